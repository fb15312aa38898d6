"""Temporary files: those of living writers are left alone, those of killed ones are not."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flytekit_ckpt import SyncCheckpoint, storage
from flytekit_ckpt.storage import slots

KILLED = """
import os, signal, sys
from flytekit_ckpt import storage
def chunks():
    yield b"x" * 100_000
    os.kill(os.getpid(), signal.SIGKILL)
storage.at(sys.argv[1]).put(chunks())
"""


def left(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".tmp"))


def test_the_next_save_removes_what_killed_ones_left(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "object")]) for _ in range(3)]
    for writer in writers:
        writer.wait()
    assert left(tmp_path)
    SyncCheckpoint(str(tmp_path / "object")).write(b"5")
    assert os.listdir(tmp_path) == ["object"]


def test_all_that_several_killed_at_once_left_is_removed(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f".object.{number}.tmp").write_bytes(b"left")
    SyncCheckpoint(str(tmp_path / "object")).write(b"5")
    assert os.listdir(tmp_path) == ["object"]


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "object"
    with slots.temporary(path) as (first, first_name), slots.temporary(path) as (second, second_name):
        assert first_name != second_name
        SyncCheckpoint(str(path)).write(b"5")
        os.write(first, b"1")
        os.write(second, b"2")
        assert (first_name.read_bytes(), second_name.read_bytes()) == (b"1", b"2")
        os.replace(second_name, path)
    assert os.listdir(tmp_path) == ["object"]
    assert path.read_bytes() == b"2"


def test_other_objects_files_are_left_alone(tmp_path: Path) -> None:
    for name in (".other.0.tmp", ".object.tmp", "object.0.tmp", ".object.0.tmp.bak"):
        (tmp_path / name).touch()
    SyncCheckpoint(str(tmp_path / "object")).write(b"5")
    assert len(os.listdir(tmp_path)) == 5


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / ".object.0.tmp").symlink_to("mine")
    SyncCheckpoint(str(tmp_path / "object")).write(b"5")
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_writers_at_once_neither_meet_nor_leave_anything(tmp_path: Path) -> None:
    path = tmp_path / "object"

    def write(number: int) -> None:
        storage.at(str(path)).put([b"%d" % number * 10_000])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100, 400)))
    content = path.read_bytes()
    assert content == content[:3] * 10_000
    assert os.listdir(tmp_path) == ["object"]


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".object.0.tmp").write_bytes(b"someone is writing this")
    SyncCheckpoint(str(tmp_path / "object")).write(b"5")
    assert sorted(os.listdir(tmp_path)) == [".object.0.tmp", "object"]
