"""Entries taken from the disk and written to it, by honest folders and hostile archives."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import archive
from flytekit_ckpt.entries import Entry, header, safe_name, stream_entry
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from flytekit_ckpt.files import FileWriter
from flytekit_ckpt.folders import scan_folder
from flytekit_ckpt.unpacking import unpack
from tests.trees import Tree, look, make, trees

modestly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def round_trip(source: Path, target: Path) -> Path:
    target.mkdir()
    unpack(archive.read(archive.pack(scan_folder(source))), target).set_folder_attributes(target)
    return target


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


# From the disk --------------------------------------------------------------------------------------------------------


@modestly
@given(trees())
def test_a_folder_comes_back_with_links_and_times_to_the_nanosecond(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as name:
        source = make(Path(name) / "source", tree)
        for number, path in enumerate(sorted(source.rglob("*"), reverse=True)):
            os.utime(path, ns=(0, 1_700_000_000_123_456_789 + number), follow_symlinks=False)
        target = round_trip(source, Path(name) / "target")
        assert look(target) == look(source)
        assert times(target) == times(source)


@modestly
@given(st.integers(-(1 << 62), 1 << 62) | st.integers(-20, 20).map(lambda number: number * 10**8 + 1))
def test_a_time_is_kept_as_decimal_seconds(nanoseconds: int) -> None:
    status = SimpleNamespace(st_mode=0o644, st_mtime_ns=nanoseconds)
    info = header("a", cast("os.stat_result", status), FILE)
    assert Decimal(info.pax_headers.get("mtime", info.mtime)) * 10**9 == nanoseconds
    assert nanoseconds % 10**9 == 0 or info.pax_headers["mtime"] == str(Decimal(nanoseconds) / 10**9)


@modestly
@given(st.from_regex(r"[0-9]{1,11}(\.[0-9]{0,12})?", fullmatch=True))
def test_a_time_of_any_form_comes_back(text: str) -> None:
    info = tarfile.TarInfo("a")
    info.pax_headers = {"mtime": text}
    seconds = Decimal(text)
    with tempfile.TemporaryDirectory() as name:
        unpack([Entry(info)], Path(name))
        assert (Path(name) / "a").stat().st_mtime_ns == (int(seconds * 10**9) if seconds < 1 << 32 else 0)


@modestly
@given(st.lists(st.sampled_from(["a", ".", "..", "", ".b", "c."]), min_size=1).map("/".join))
def test_a_name_is_cleaned_or_refused(name: str) -> None:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        with pytest.raises(UnsafeCheckpointError):
            safe_name(name)
    else:
        assert safe_name(name) == "/".join(parts)


def test_modes_come_back_without_the_dangerous_bits(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"d": None, "d/read only": b"x", "run": b"x", "setuid": b"x", "secret": b""})
    for name, mode in {"d/read only": 0o444, "run": 0o755, "setuid": 0o6755, "secret": 0o600, "d": 0o555}.items():
        (source / name).chmod(mode)
    target = round_trip(source, tmp_path / "target")
    modes = {name: stat.S_IMODE((target / name).stat().st_mode) for name in ("d", "d/read only", "run", "setuid")}
    assert modes == {"d": 0o555, "d/read only": 0o444, "run": 0o755, "setuid": 0o755}
    for folder in (source, target):
        (folder / "d").chmod(0o755)


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    os.makedirs(os.fsencode(source) + b"/\xff\xfe")
    with open(os.fsencode(source) + b"/\xff\xfe/\xe4 and " + "ü".encode(), "wb") as file:
        file.write(b"x")
    assert look(round_trip(source, tmp_path / "target")) == look(source)


def test_links_that_lead_out_are_saved_as_what_they_point_to(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", {"file": b"1", "inner": "file", "folder": None, "folder/x": b"2"})
    source = make(
        tmp_path / "source",
        {
            "out": "../outside",
            "absolute": str(outside / "file"),
            "absolute inside": str(tmp_path / "source" / "kept"),
            "kept": b"3",
            "link": "kept",
            "through": "out/file",
        },
    )
    target = round_trip(source, tmp_path / "target")
    found = look(target, modes=False)
    assert found == {
        "out": ("folder", 0),
        "out/file": ("file", b"1", 0),
        "out/inner": ("link", "file"),
        "out/folder": ("folder", 0),
        "out/folder/x": ("file", b"2", 0),
        "absolute": ("file", b"1", 0),
        "absolute inside": ("file", b"3", 0),
        "kept": ("file", b"3", 0),
        "link": ("link", "kept"),
        "through": ("file", b"1", 0),
    }


def test_hard_links_are_files(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"a": b"x"})
    os.link(source / "a", source / "b")
    assert all(entry.info.isreg() for entry in scan_folder(source))
    target = round_trip(source, tmp_path / "target")
    assert [(path.name, path.stat().st_nlink) for path in sorted(target.iterdir())] == [("a", 1), ("b", 1)]


def test_what_cannot_be_kept_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source", {"kept": b"x", "dangling": "nowhere", "loop": "loop", "up": ".."})
    os.mkfifo(source / "fifo")
    (source / "to fifo").symlink_to("fifo")
    monkeypatch.chdir(source)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.warns(RuntimeWarning, match="left out of the checkpoint") as caught:
            target = round_trip(source, tmp_path / "target")
    warned = " ".join(str(warning.message) for warning in caught)
    assert all(f"{source}/{name} " in warned for name in ("dangling", "loop", "fifo", "socket", "to fifo"))
    found = look(target, modes=False)
    assert {name for name in found if "/" not in name} == {"kept", "up"}
    # The folder is not saved inside itself for ever.
    assert "up/source/up" not in found


def test_a_file_that_changes_its_size_is_saved_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"log": b"12345"})
    entries = list(scan_folder(source))
    (source / "log").write_bytes(b"1234567")
    target = tmp_path / "grown"
    target.mkdir()
    unpack(archive.read(archive.pack(entries)), target)
    assert (target / "log").read_bytes() == b"12345"
    (source / "log").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="shrank to 1 bytes"):
        list(archive.pack(entries))
    (source / "log").unlink()
    with pytest.raises(CheckpointError, match="was removed while"):
        list(archive.pack(entries))


def test_a_slow_disk_holds_up_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = FileWriter.__call__
    taken = 0

    def slow(self: FileWriter, chunk: bytes) -> int:
        gate.wait(20)
        return write(self, chunk)

    def chunks() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield b"1" * 1000

    monkeypatch.setattr(FileWriter, "__call__", slow)
    thread = threading.Thread(
        target=lambda: unpack([stream_entry("a", chunks(), 20_000)], tmp_path, memory=3000), daemon=True
    )
    thread.start()
    time.sleep(0.5)
    # What waits to be written, and the one that would be too much.
    assert 0 < taken <= 4
    gate.set()
    thread.join()
    assert (tmp_path / "a").read_bytes() == b"1" * 20_000


# Hostile archives -----------------------------------------------------------------------------------------------------

Member = tuple[str, bytes, str]


def hostile(*members: Member) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o7777
            content = b"evil" if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


FILE, LINK, HARD, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE

REFUSED: dict[str, list[Member]] = {
    "dots": [("../evil", FILE, "")],
    "dots inside": [("a/../../evil", FILE, "")],
    "only dots": [("..", FOLDER, "")],
    "absolute": [("/tmp/evil", FILE, "")],
    "through a link out": [("l", LINK, ".."), ("l/evil", FILE, "")],
    "through an absolute link": [("l", LINK, "/tmp"), ("l/evil", FILE, "")],
    "through a link inside": [("d", FOLDER, ""), ("l", LINK, "d"), ("l/x", FILE, "")],
    "through a chain": [("a", LINK, "b"), ("b", LINK, ".."), ("a/evil", FILE, "")],
    "folder through a link": [("l", LINK, ".."), ("l/evil", FOLDER, "")],
    "hard link out": [("h", HARD, "../canary")],
    "absolute hard link": [("h", HARD, "/etc/passwd")],
    "hard link through a link": [("l", LINK, ".."), ("h", HARD, "l/canary")],
    "hard link to nothing": [("h", HARD, "nothing")],
    "fifo": [("f", tarfile.FIFOTYPE, "")],
    "device": [("n", tarfile.CHRTYPE, "")],
    "block device": [("n", tarfile.BLKTYPE, "")],
    "file over a folder": [("a", FOLDER, ""), ("a", FILE, "")],
    "file below a file": [("a", FILE, ""), ("a/b", FILE, "")],
}

HARMLESS: dict[str, tuple[list[Member], set[str]]] = {
    "link out": ([("a", FILE, ""), ("l", LINK, "../canary")], {"a"}),
    "absolute link": ([("a", FILE, ""), ("l", LINK, "/etc/passwd")], {"a"}),
    "chain that leaves": (
        [("h", LINK, "."), ("d", FOLDER, ""), ("d/g", LINK, "../h/.."), ("a", FILE, "")],
        {"h", "d", "a"},
    ),
    "duplicates": ([("a", FILE, ""), ("a", FILE, "")], {"a"}),
    "link, then file": ([("a", LINK, "../canary"), ("a", FILE, "")], {"a"}),
    "file, then link out": ([("a", FILE, ""), ("a", LINK, "../canary")], set()),
    "dots that stay": ([("./a", FILE, ""), ("./", FOLDER, ""), ("b/./c", FILE, "")], {"a", "b", "b/c"}),
    "hard link inside": ([("a", FILE, ""), ("h", HARD, "a")], {"a", "h"}),
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    make(tmp_path / "around", {"canary": b"safe", "target": None})
    return tmp_path / "around" / "target"


def surroundings(target: Path) -> object:
    return {name: what for name, what in look(target.parent).items() if not name.startswith("target")}


@pytest.mark.parametrize("members", REFUSED.values(), ids=REFUSED)
def test_a_hostile_archive_is_refused(members: list[Member], target: Path) -> None:
    before = surroundings(target)
    with pytest.raises((UnsafeCheckpointError, CorruptCheckpointError)):
        unpack(archive.read([hostile(("good", FILE, ""), *members)]), target)
    assert surroundings(target) == before
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(("members", "kept"), HARMLESS.values(), ids=HARMLESS)
def test_a_strange_archive_is_made_harmless(members: list[Member], kept: set[str], target: Path) -> None:
    before = surroundings(target)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*leads out of the checkpoint", category=RuntimeWarning)
        unpack(archive.read([hostile(*members)]), target).set_folder_attributes(target)
    assert surroundings(target) == before
    found = look(target)
    assert found.keys() == kept
    assert all(what[-1] == 0o777 for what in found.values() if what[0] == "file")


def test_a_link_that_is_left_out_is_warned_of(target: Path) -> None:
    with pytest.warns(RuntimeWarning, match="'l' is not restored: it leads out"):
        unpack(archive.read([hostile(("l", LINK, "../canary"))]), target)


@pytest.mark.parametrize("mtime", ["nan", "inf", "-1e400", "99999999999999999999", "x"])
def test_an_absurd_time_does_not_stop_a_restore(mtime: str, target: Path) -> None:
    info = tarfile.TarInfo("a")
    info.pax_headers = {"mtime": mtime}
    unpack([Entry(info)], target)
    assert (target / "a").stat().st_mtime_ns == 0


def test_content_of_another_length_than_announced_is_an_error(target: Path) -> None:
    info = tarfile.TarInfo("a")
    info.size = 5
    chunks: Callable[[], object] = lambda: iter([b"123"])  # noqa: E731
    with pytest.raises(CorruptCheckpointError, match="3 bytes instead of the 5"):
        unpack([Entry(info, chunks)], target)  # type: ignore[arg-type]
