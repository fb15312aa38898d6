"""Archives of every make that the engine has: real flyte, tarfile and tar load what was saved."""

from __future__ import annotations

import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flytekit_ckpt import SyncCheckpoint, v2
from flytekit_ckpt.archive.packing import LARGE_ENTRY
from flytekit_ckpt.members import MEMBER_SIZE
from tests.conftest import Place
from tests.trees import Tree, look, make

flyte = pytest.importorskip("flyte")

NOISE = random.Random(9).randbytes(3 * MEMBER_SIZE)
TEXT = b"".join(b"step %d loss %d\n" % (step, step * 7919 % 1000) for step in range(200_000))
HALF_ZERO = bytes(byte * (index // 4 % 2) for index, byte in enumerate(NOISE[:MEMBER_SIZE]))

FOLDERS: dict[str, Tree] = {
    "empty": {},
    "empty folders": {"a": None, "a/b": None},
    "empty file": {"a": b""},
    "stored": {"weights": NOISE},
    "compressed": {"log": TEXT, "state": HALF_ZERO},
    "zeros": {"zeros": bytes(3 * MEMBER_SIZE)},
    "mixed": {"a": b"1", "b": NOISE, "c": b"2", "d": None, "d/e": TEXT, "d/f": b"3", "link": "a"},
    "at the borders": {
        f"{size}": NOISE[:size]
        for border in (512, LARGE_ENTRY, MEMBER_SIZE - 512, MEMBER_SIZE)
        for size in (border - 1, border, border + 1)
    },
    "many": {f"{number:04}": NOISE[number : number + number % 700] for number in range(3000)},
    "names": {"ü": b"1", "n" * 200: b"2", "d" * 90: None, f"{'d' * 90}/{'e' * 90}": b"3", "new\nline": b"4", " ": b"5"},
}


def save_with_new_face(folder: Path, uri: str) -> None:
    v2.Checkpoint(uri).save_sync(folder)


def save_with_legacy_face(folder: Path, uri: str) -> None:
    SyncCheckpoint(uri).save(folder)


def save_part_by_part(folder: Path, uri: str) -> None:
    """Save twice as many parts as there are, so that most is carried over."""
    cp = SyncCheckpoint(uri)
    parts = folder.with_name("parts")
    for _ in range(2):
        for child in sorted(folder.iterdir()):
            part = parts / child.name
            part.mkdir(parents=True, exist_ok=True)
            if not (part / child.name).exists():
                subprocess.run(["cp", "-a", child, part], check=True)
            cp.save(part)


SAVERS = [save_with_new_face, save_with_legacy_face, save_part_by_part]


def savers_and_folders() -> Iterator[object]:
    for saver in SAVERS:
        for name in FOLDERS:
            # Part by part takes a request or more each; a link is not saved apart from what it points to.
            if saver is not save_part_by_part or name not in ("empty", "many", "mixed"):
                yield pytest.param(saver, name, id=f"{saver.__name__}-{name}")


@pytest.mark.parametrize(("saver", "name"), list(savers_and_folders()))
def test_flyte_loads_every_archive(saver: Callable[[Path, str], None], name: str, place: Place, tmp_path: Path) -> None:
    source = make(tmp_path / "source", FOLDERS[name])
    uri = place.uri()
    saver(source, uri)
    theirs, ours = flyte.Checkpoint("unused", uri), v2.Checkpoint("", uri)
    loaded = theirs.load_sync()
    if not FOLDERS[name]:
        # Flyte 2 hands back the folder that it has, or nothing, for a tree without entries.
        assert loaded is None or not any(loaded.iterdir())
        return
    assert loaded is not None
    assert look(loaded) == look(source)
    assert ours.load_sync() == ours.path
    assert look(ours.path) == look(source)
    if place.is_local:
        for program in ("tar", "tarfile"):
            target = tmp_path / program
            target.mkdir()
            if program == "tar":
                subprocess.run(["tar", "xzf", uri, "-C", target], check=True)
            else:
                with tarfile.open(uri) as tar:
                    tar.extractall(target, filter="fully_trusted")
            assert look(target) == look(source)
