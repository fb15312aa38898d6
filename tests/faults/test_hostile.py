"""Archives as an attacker would make them: refused or made harmless, with nothing outside the target touched."""

from __future__ import annotations

import bz2
import contextlib
import gc
import gzip
import itertools
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import SyncCheckpoint, v2
from flytekit_ckpt.errors import CheckpointError, StorageError, UnsafeCheckpointError
from flytekit_ckpt.iterators import IteratorCheckpoint
from tests import limits
from tests.tars import END, file, folder, gzipped, hard_link, header, link, number, padded, pax

# Longer than anything takes, and less than a disk has.
SECONDS = 60
FILE_SIZE = 64 << 20


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    with limits.file_size(FILE_SIZE), limits.seconds(SECONDS):
        yield


# The sandbox ----------------------------------------------------------------------------------------------------------

PRIOR = {"prior", "folder", "folder/prior"}


class Sandbox:
    """A folder that may change in one place only: the target inside it.

    The system's temporary folder and the checkpoints lie in it as well.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.target = root / "target"
        self.temporary = root / "temporary"
        self.outside = root / "outside"
        for path in (self.target / "folder", self.temporary, self.outside / "inner", root / "steps"):
            path.mkdir(parents=True)
        for name in ("target/prior", "target/folder/prior", "outside/canary", "outside/inner/canary", "canary"):
            (root / name).write_bytes(name.encode())
        (root / "canary").chmod(0o640)
        (root / "link").symlink_to("outside/canary")
        for path in (root / "link", root / "canary", root / "outside" / "canary", self.outside):
            os.utime(path, (1, 1), follow_symlinks=False)

    def put(self, content: bytes) -> None:
        """Store the archive as a checkpoint, and as the step of an iterator."""
        for name in ("checkpoint", "steps/ckpt-1"):
            (self.root / name).write_bytes(content)

    def look(self) -> dict[str, tuple[object, ...]]:
        """Everything about everything."""
        seen = {}
        for path in itertools.chain([self.root], walk(self.root)):
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else path.is_symlink() and os.readlink(path)
            # Where a temporary folder came and went, the time of what it lay in is another.
            is_changed = path in (self.target, self.temporary)
            times = 0 if is_changed else status.st_mtime_ns
            seen[str(path)] = (status.st_ino, status.st_mode, status.st_uid, status.st_nlink, content, times)
        return seen

    def elsewhere(self) -> dict[str, tuple[object, ...]]:
        """Everything but the target."""
        return {name: what for name, what in self.look().items() if not f"{name}/".startswith(f"{self.target}/")}

    def names(self) -> set[str]:
        """What the target holds beside what lay there before."""
        return {str(path.relative_to(self.target)) for path in walk(self.target)} - PRIOR


def walk(folder_: Path) -> Iterator[Path]:
    """Yield everything below a folder, however deep: `rglob` recurses."""
    waiting = [folder_]
    while waiting:
        for item in os.scandir(waiting.pop()):
            yield Path(item.path)
            if item.is_dir(follow_symlinks=False):
                waiting.append(Path(item.path))


def clear(folder_: Path) -> None:
    """Remove what lies in a folder, however deep: `rmtree` recurses."""
    for path in reversed(list(walk(folder_))):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path / "sandbox")
    monkeypatch.setattr(tempfile, "tempdir", str(made.temporary))
    yield made
    clear(made.root)


class Target:
    """An iterator that a state is given to."""

    state: object = None

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state


def restore_into(sandbox: Sandbox, **options: Any) -> None:
    SyncCheckpoint("", str(sandbox.root / "checkpoint"), **options).restore(sandbox.target)


def restore(sandbox: Sandbox, **options: Any) -> None:
    """Restore into a temporary folder, and show it in the target for comparison."""
    cp = SyncCheckpoint("", str(sandbox.root / "checkpoint"), **options)
    restored = cp.restore()
    if restored is not None:
        show(restored, sandbox)


def load(sandbox: Sandbox, **options: Any) -> None:
    cp = v2.Checkpoint("", str(sandbox.root / "checkpoint"), **options)
    (cp.path / "mine").write_bytes(b"mine")
    try:
        loaded = cp.load_sync()
    except CheckpointError:
        assert [path.name for path in cp.path.iterdir()] == ["mine"]
        raise
    if loaded is not None:
        show(cp.path, sandbox)


def show(folder_: Path, sandbox: Sandbox) -> None:
    """Put what was restored into a temporary folder in the target's place, however deep: `copytree` recurses."""
    assert sandbox.temporary in folder_.parents
    clear(sandbox.target)
    for path in walk(folder_):
        place = sandbox.target / path.relative_to(folder_)
        if path.is_symlink():
            place.symlink_to(os.readlink(path))
        elif path.is_dir():
            place.mkdir()
        else:
            shutil.copy(path, place)


def read(sandbox: Sandbox, **options: Any) -> None:
    SyncCheckpoint("", str(sandbox.root / "checkpoint"), **options).read()


def restore_iterator(sandbox: Sandbox, **options: Any) -> None:
    target = Target()
    try:
        IteratorCheckpoint(str(sandbox.root / "steps"), **options).restore(target, step=1)
    except BaseException:
        assert target.state is None
        raise


Face = Callable[..., None]
FOLDER_FACES: list[Face] = [restore_into, restore, load]
FACES: list[Face] = [*FOLDER_FACES, read, restore_iterator]


def attempt(face: Face, sandbox: Sandbox, **options: Any) -> Exception | None:
    """Load; whatever comes of it, nothing outside the target has changed, and nothing at all if it failed."""
    before, elsewhere = sandbox.look(), sandbox.elsewhere()
    failure = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*leads out of the checkpoint", category=RuntimeWarning)
        try:
            face(sandbox, **options)
        except Exception as raised:  # noqa: BLE001 - judged by the caller
            failure = raised
    # A workspace lasts as long as its owner, which the frames hold.
    error: BaseException | None = failure
    while error is not None:
        error.__traceback__, error = None, error.__cause__ or error.__context__
    if any(sandbox.temporary.iterdir()):
        gc.collect()
    assert sandbox.elsewhere() == elsewhere
    if failure is not None:
        assert sandbox.look() == before
    for path in walk(sandbox.target):
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or path.is_symlink()
        assert path.is_symlink() or not status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)
        assert not path.is_symlink() or Path(os.path.realpath(path)).is_relative_to(sandbox.target)
    return failure


def is_documented(face: Face, failure: Exception | None) -> bool:
    """Whether a face documents the error; `read` has some more, for trees that are not one file."""
    if face is read and (type(failure) is IsADirectoryError or "exactly one checkpoint" in str(failure)):
        return True
    return failure is None or isinstance(failure, CheckpointError)


def made_names(names: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, id=name) for name in names]


# One archive at a time ------------------------------------------------------------------------------------------------


def unsafe(outside: str) -> dict[str, bytes]:
    """Archives that would write, read or link outside, or make a device; `outside` is the path of a folder."""
    fifo, device, disk = tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE
    escape = {"path": "../outside/evil"}
    return {
        "parent": file("../evil"),
        "parent inside": file("a/../../evil"),
        "parent after what is there": folder("a") + file("a/../evil"),
        "two dots only": folder(".."),
        "two dots at the end": file("a/.."),
        "absolute": file(f"{outside}/evil"),
        "absolute with two slashes": file(f"/{outside}/evil"),
        "absolute folder": folder(f"{outside}/evil"),
        "parent in a PAX path": pax({"path": "../outside/evil"}) + file("good"),
        "absolute in a PAX path": pax({"path": f"{outside}/evil"}) + file("good"),
        "parent in a long name": file("a/" * 60 + "../" * 61 + "outside/evil"),
        "parent in the name of a sparse file": pax({"GNU.sparse.map": "0,4", "GNU.sparse.size": "4",
                                                    "GNU.sparse.name": "../evil"}) + file("good"),
        "parent in a ustar prefix": ustar("../outside", "evil"),
        "global PAX path": pax(escape, tarfile.XGLTYPE) + file("good"),
        "global PAX hard link": pax({"linkpath": "../canary"}, tarfile.XGLTYPE) + hard_link("h", "good"),
        "file through a link out": link("l", "../outside") + file("l/evil"),
        "file through an absolute link": link("l", outside) + file("l/evil"),
        "file through a chain": link("a", "b") + link("b", "..") + file("a/evil"),
        "file through a link to .": link("a", ".") + link("a/b", "..") + file("a/b/evil"),
        "file through a link inside": folder("d") + link("l", "d") + file("l/x"),
        "folder through a link": link("l", "../outside") + folder("l/evil"),
        "folder over what a link leads to": link("l", "../outside") + folder("l/inner", 0o777),
        "link through a link": link("l", "../outside") + link("l/evil", "canary"),
        "hard link through a link": link("l", "../outside") + hard_link("l/evil", "good"),
        "hard link out": hard_link("h", "../outside/canary"),
        "hard link out, then written": hard_link("h", "../outside/canary") + file("h"),
        "absolute hard link": hard_link("h", f"{outside}/canary"),
        "absolute PAX hard link": pax({"linkpath": f"{outside}/canary"}) + hard_link("h", "good"),
        "fifo": header("f", fifo),
        "device": header("n", device, tail=bytes(64) + b"0000001\x000000003\x00"),
        "block device": header("n", disk),
        "fifo over a file": file("f") + header("f", fifo),
        "unknown type": header("s", b"s"),
        "unknown type with content": header("s", b"Z", 4) + padded(b"evil"),
        "multi-volume part": header("s", b"M", 4) + padded(b"evil"),
    }  # fmt: skip


def ustar(prefix: str, name: str) -> bytes:
    """Divide a name as POSIX does."""
    block = bytearray(file(name))
    block[257:265] = b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix.encode()
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def sparse(map_: bytes, size: int | str, content: bytes = b"evil") -> bytes:
    """Make a sparse file of GNU tar's version 1.0, whose map is the beginning of its content."""
    keys = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    return pax(keys) + file("sparse", padded(map_) + content)


NEGATIVE = -1 << 40
EXTENSIONS = {"PAX": tarfile.XHDTYPE, "global PAX": tarfile.XGLTYPE, "long name": b"L", "long link": b"K"}

DAMAGED: dict[str, bytes] = {
    # Behind hard links.
    "hard link through a link, to outside": link("l", "../outside") + hard_link("h", "l/canary"),
    "hard link to nothing": hard_link("h", "nothing"),
    "hard link to a later file": hard_link("h", "later") + file("later"),
    "hard link to itself": hard_link("h", "h"),
    "hard link to itself, a file": file("h") + hard_link("h", "h"),
    "hard link to a link": link("l", "../outside/canary") + hard_link("h", "l"),
    "hard link to a folder": folder("d") + hard_link("h", "d"),
    "hard link to the target": hard_link("h", "."),
    # Contradictions.
    "file over a folder": folder("a") + file("a"),
    "link over a folder": folder("a") + link("a", ".."),
    "hard link over a folder": file("b") + folder("a") + hard_link("a", "b"),
    "folder over a file": file("a") + folder("a"),
    "file below a file": file("a") + file("a/b"),
    "file below a hard link": file("a") + hard_link("h", "a") + file("h/b"),
    # Numbers.
    "size beyond the end": header("a", size=1 << 40) + padded(b"evil"),
    "largest size": header("a", size=b"\x80" + b"\xff" * 11),
    "negative size": file("a") + header("b", size=-1) + file("c"),
    "negative size of some blocks": file("a") + header("b", size=-1024) + file("c"),
    "most negative size": header("b", size=b"\xff" + bytes(11)) + file("c"),
    "size that is not a number": header("a", size=b"evil" * 3),
    "negative PAX size": pax({"size": "-5"}) + file("a"),
    "huge PAX size": pax({"size": str(1 << 80)}) + file("a"),
    "PAX size of very many digits": pax({"size": "9" * 5000}) + header("a", size=512) + b"x" * 512,
    "PAX size that is too much": pax({"size": "50000"}) + file("a") + file("b"),
    "negative global PAX size": pax({"size": "-5"}, tarfile.XGLTYPE) + file("a"),
    "sparse map with a negative start": sparse(b"1\n-5\n4\n", 10),
    "sparse map with a negative length": sparse(b"1\n0\n-5\n", 10),
    "sparse map that overlaps": sparse(b"2\n0\n4\n2\n4\n", 10, b"evil" * 2),
    "sparse map of other than numbers": sparse(b"1\nx\ny\n", 10),
    "sparse map beyond the size": sparse(b"1\n100\n4\n", 10),
    "sparse map that does not end": sparse(b"99999\n" + b"0\n" * 100, 10),
    "negative sparse size": sparse(b"1\n0\n4\n", -1),
    "sparse size that is not a number": sparse(b"1\n0\n4\n", "x"),
    "negative lengths in a PAX sparse map": pax({"GNU.sparse.map": "0,-4,4,4", "GNU.sparse.size": "8"}) + file("a"),
    **{f"huge {name}": header("a", kind, 1 << 50) for name, kind in EXTENSIONS.items()},
    **{f"negative {name}": header("a", kind, -512) + file("b") for name, kind in EXTENSIONS.items()},
    **{
        f"{name} headers one after another": (header("a", kind, 12) + padded(b"12 path=abc\n")) * 3000 + file("b")
        for name, kind in EXTENSIONS.items()
    },
    "PAX record of a wrong length": header("p", b"x", 12) + padded(b"99 path=abc\n") + file("a"),
    "PAX record of a huge length": header("p", b"x", 28) + padded(b"9999999999999999999 path=abc") + file("a"),
    # Names that no disk can hold.
    "NUL in a name": pax({"path": "a\0b"}) + file("x"),
    "NUL in a link": pax({"linkpath": "a\0b"}) + link("x", "y"),
    "NUL in a hard link": file("y") + pax({"linkpath": "y\0b"}) + hard_link("x", "y"),
    "NUL in a folder": pax({"path": "a\0b"}) + folder("x"),
    "long name": file("n" * 300),
    "long path": file("/".join(["n" * 200] * 30)),
    "long link": link("l", "n/" * 5000),
    "10,000 folders deep": file("d/" * 10_000 + "x"),
    "10,000 folders deep in a PAX path": pax({"path": "d/" * 10_000 + "x"}) + file("x"),
    "bad checksum": file("a") + bytes(header("b")[:148]) + b"0000000\0" + header("b")[156:],
}


HARMLESS: dict[str, tuple[bytes, set[str]]] = {
    "link out": (file("a") + link("l", "../outside"), {"a"}),
    "link to what lies beside": (link("l", "../target2"), set()),
    "absolute link": (file("a") + link("l", "/etc/passwd"), {"a"}),
    "link out in a PAX path": (file("a") + pax({"linkpath": "../canary"}) + link("l", "a"), {"a"}),
    "global PAX link": (file("a") + pax({"linkpath": "../canary"}, tarfile.XGLTYPE) + link("l", "a"), {"a"}),
    "chain that leaves": (link("a", "b") + link("b", "c") + link("c", ".."), set()),
    "chain that leaves through .": (link("h", ".") + folder("d") + link("d/g", "../h/.."), {"h", "d"}),
    "link to itself": (link("l", "l"), {"l"}),
    "links in a circle": (link("a", "b") + link("b", "a"), {"a", "b"}),
    "link to .": (link("l", "."), {"l"}),
    "link to nothing, inside": (link("l", "nothing/x"), {"l"}),
    "link, then a file": (link("a", "../outside/canary") + file("a"), {"a"}),
    "link, then a folder": (link("a", "../outside") + folder("a") + file("a/x"), {"a", "a/x"}),
    "file, then a link out": (file("a") + link("a", "../outside/canary"), set()),
    "hard link inside": (file("a") + hard_link("h", "a"), {"a", "h"}),
    "hard link, then written": (file("f") + hard_link("h", "f") + file("h", b"second"), {"f", "h"}),
    "hard link with a size": (file("a") + header("h", tarfile.LNKTYPE, 5, "a") + file("b"), {"a", "h", "b"}),
    "setuid, setgid, sticky": (header("d", b"5", mode=0o7777) + file("d/x", mode=0o7777), {"d", "d/x"}),
    "mode that is no mode": (file("a", mode=0o1777777), {"a"}),
    "folder without any right": (folder("d", 0) + file("d/x"), {"d", "d/x"}),
    "folder without any right, last": (file("d/e/x") + folder("d/e", 0) + folder("d", 0), {"d", "d/e", "d/e/x"}),
    "same file again": (file("a", b"first") + file("a", b"last"), {"a"}),
    "same folder again": (folder("a") + folder("a", 0o700) + folder("./a/"), {"a"}),
    "names of dots": (file("./a") + folder("./") + file("b/./c") + folder("."), {"a", "b", "b/c"}),
    "three dots": (file(".../x"), {"...", ".../x"}),
    "backslashes": (file("..\\..\\evil") + file("C:\\evil"), {"..\\..\\evil", "C:\\evil"}),
    "empty name": (file(b"") + file("a"), {"a"}),
    "slashes only is the root": (file("a") + folder("./."), {"a"}),
    "not UTF-8": (pax({"path": b"\xff\xfe"}) + file("x") + file(b"\xe4"), {"\udcff\udcfe", "\udce4"}),
    "half a surrogate": (pax({"path": b"\xed\xa0\x80"}) + file("x"), {"\udced\udca0\udc80"}),
    "newlines and escapes": (file("a\nb\x1b[31m") + link("l\n", "a\n"), {"a\nb\x1b[31m", "l\n"}),
    "contiguous file": (header("a", tarfile.CONTTYPE, 4) + padded(b"evil"), {"a"}),
    "sparse file": (sparse(b"1\n6\n4\n", 10), {"sparse"}),
    "sparse folder": (pax({"GNU.sparse.map": "0,4", "GNU.sparse.size": "4"}) + folder("d"), {"d"}),
    "PAX numbers that are none": (pax({"mtime": "x", "uid": "x", "gid": "-1", "size": "x"}) + file("a", b""), {"a"}),
    "infinite time": (pax({"mtime": "inf"}) + file("a") + pax({"mtime": "nan"}) + folder("d"), {"a", "d"}),
    "time of a million digits": (pax({"mtime": "1e999000"}) + file("a"), {"a"}),
    "time just before zero": (pax({"mtime": "-1e-999000"}) + file("a"), {"a"}),
    "time beyond every clock": (file("a", mtime=1 << 80) + file("b", mtime=-1 << 80), {"a", "b"}),
    "owner of this system": (pax({"uid": "0", "uname": "root", "gid": "12"}) + file("a"), {"a"}),
    "part that is no number": (pax({"flytekit_ckpt.part": "x"}) + file("a"), {"a"}),
    "global PAX size": (pax({"size": "2"}, tarfile.XGLTYPE) + file("a") + file("b"), {"a", "b"}),
    "what follows the end": (file("a") + END + file("../evil") + END, {"a"}),
    "garbage after the end": (file("a") + END + b"evil" * 100, {"a"}),
    "nothing": (END, set()),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", made_names(unsafe("")))
def test_what_would_leave_the_target_is_refused(name: str, face: Face, sandbox: Sandbox) -> None:
    sandbox.put(gzipped(file("good"), unsafe(str(sandbox.outside))[name], END))
    failure = attempt(face, sandbox)
    if face in FOLDER_FACES:
        assert isinstance(failure, UnsafeCheckpointError)
        assert "checkpoint" in str(failure)
    else:
        # Neither makes files: whether a link would be written through is not their concern.
        assert failure is not None
        assert is_documented(face, failure)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", made_names(DAMAGED))
def test_what_no_program_would_write_is_refused(name: str, face: Face, sandbox: Sandbox) -> None:
    sandbox.put(gzipped(file("good"), DAMAGED[name], END))
    failure = attempt(face, sandbox)
    assert failure is not None
    assert is_documented(face, failure), repr(failure)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", made_names(HARMLESS))
def test_what_is_strange_is_made_harmless(name: str, face: Face, sandbox: Sandbox) -> None:
    content, names = HARMLESS[name]
    sandbox.put(gzipped(content, END))
    failure = attempt(face, sandbox)
    if face in FOLDER_FACES:
        assert failure is None, repr(failure)
        assert sandbox.names() == names
    assert is_documented(face, failure), repr(failure)


@pytest.mark.parametrize("face", FACES)
def test_a_record_of_negative_length_is_passed_over_or_refused(face: Face, sandbox: Sandbox) -> None:
    """Releases of tarfile differ."""
    sandbox.put(gzipped(header("p", b"x", 12) + padded(b"-9 path=abc\n") + file("a"), END))
    failure = attempt(face, sandbox)
    assert is_documented(face, failure), repr(failure)
    if face in FOLDER_FACES:
        assert sandbox.names() == ({"a"} if failure is None else set())


PAYLOAD = {"flytekit_ckpt.payload": "1"}


@pytest.mark.parametrize("face", FACES)
def test_a_wrapped_payload_is_one_file(face: Face, sandbox: Sandbox) -> None:
    for marked in (file("../evil"), link("l", "../outside/canary"), folder("d"), file("payload") + file("b")):
        sandbox.put(gzipped(pax(PAYLOAD), marked, END))
        failure = attempt(face, sandbox)
        assert is_documented(face, failure), repr(failure)
        # What is not refused is nothing but empty bytes.
        assert failure is not None or all(
            path.read_bytes() == b"" for path in walk(sandbox.target) if path.name in ("payload", "_dst_cp")
        )


@pytest.mark.parametrize("depth", [100, 1100])
@pytest.mark.parametrize("face", FOLDER_FACES)
def test_deep_folders_are_restored_to_the_last_or_not_at_all(depth: int, face: Face, sandbox: Sandbox) -> None:
    sandbox.put(gzipped(file("d/" * depth + "x"), END))
    failure = attempt(face, sandbox)
    if failure is None:
        assert len(sandbox.names()) == depth + 1
    else:
        assert isinstance(failure, CheckpointError)


@pytest.mark.parametrize("count", [20, 60, 1200])
def test_links_after_links_do_not_lead_out(count: int, sandbox: Sandbox) -> None:
    """Linux follows 40, and Python before 3.13 some hundreds."""
    links = [link(f"l{number_}", f"l{number_ + 1}") for number_ in range(count)]
    sandbox.put(gzipped(*links, link(f"l{count}", "../outside"), END))
    elsewhere = sandbox.elsewhere()
    with pytest.warns(RuntimeWarning, match="leads out of the checkpoint"):
        restore_into(sandbox)
    assert sandbox.elsewhere() == elsewhere
    assert not any(map(os.path.exists, (sandbox.target / name for name in sandbox.names())))


def test_what_a_link_was_restored_to_may_not_be_changed_by_what_is_restored_next(sandbox: Sandbox) -> None:
    """Three checkpoints, restored into the same folder one after another, must not write where one cannot."""
    for content in (link("l", "sub/.."), link("sub", "."), file("l/evil")):
        sandbox.put(gzipped(content, END))
        elsewhere = sandbox.elsewhere()
        with contextlib.suppress(CheckpointError):
            restore_into(sandbox)
        assert sandbox.elsewhere() == elsewhere


def test_the_last_entry_of_a_name_counts(sandbox: Sandbox) -> None:
    sandbox.put(gzipped(file("a", b"first"), hard_link("h", "a"), file("a", b"last"), END))
    assert attempt(restore_into, sandbox) is None
    assert (sandbox.target / "a").read_bytes() == b"last"
    assert (sandbox.target / "h").read_bytes() == b"first"


def test_the_last_mode_of_a_folder_counts(sandbox: Sandbox) -> None:
    sandbox.put(gzipped(folder("a", 0o755), folder("a", 0o700), END))
    assert attempt(restore_into, sandbox) is None
    assert stat.S_IMODE((sandbox.target / "a").stat().st_mode) == 0o700


UNPRIVILEGED = """
import os, sys
from flytekit_ckpt import SyncCheckpoint, v2
from flytekit_ckpt.errors import CheckpointError
source, target = sys.argv[1:]
# What is imported where it is used may lie where the user cannot read.
SyncCheckpoint("", "/nonexistent").restore()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    SyncCheckpoint("", source).restore(target)
except CheckpointError:
    assert os.listdir(target) == [], os.listdir(target)
else:
    assert os.stat(target + "/d").st_mode & 0o777 == 0
    os.chmod(target + "/d", 0o700)
    assert os.stat(target + "/d/e").st_mode & 0o777 == 0
cp = v2.Checkpoint("", source)
try:
    cp.load_sync()
except CheckpointError:
    pass
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become someone else")
@pytest.mark.parametrize("order", ["folders first", "folders last"])
def test_folders_without_any_right_are_restored_by_a_user_like_any_other(order: str) -> None:
    """Root may do everything, so the rights must be taken from it to see what happens to others."""
    folders = folder("d", 0) + folder("d/e", 0)
    parts = (folders, file("d/e/x")) if order == "folders first" else (file("d/e/x"), folder("d/e", 0), folder("d", 0))
    backwards = (file("d/e/x"), folder("d", 0), folder("d/e", 0))
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        for number_, archive in enumerate((parts, backwards)):
            source, target, temporary = (Path(name) / f"{part}{number_}" for part in ("source", "target", "temporary"))
            source.write_bytes(gzipped(*archive, END))
            for path in (target, temporary):
                path.mkdir()
                path.chmod(0o777)
            environment = {**os.environ, "TMPDIR": str(temporary), "HOME": str(temporary)}
            arguments = [sys.executable, "-c", UNPRIVILEGED, str(source), str(target)]
            done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert list(temporary.iterdir()) == []


# Compression ----------------------------------------------------------------------------------------------------------

LITTLE = file("a", b"content") + END


def gzip_header(flags: int, extra: bytes) -> bytes:
    return b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + extra + gzip.compress(LITTLE)[10:]


ODD_COMPRESSION: dict[str, bytes] = {
    "gzip with a large extra field": gzip_header(4, b"\xff\xff" + bytes(65535)),
    "gzip with an extra field that looks like ours": gzip_header(4, b"\x08\x00FC\x04\x00\xff\xff\xff\xff"),
    "gzip with an extra field that says nothing": gzip_header(4, b"\x08\x00FC\x04\x00\x00\x00\x00\x00"),
    "gzip with a long name": gzip_header(8, b"n" * 3_000_000 + b"\0"),
    "gzip with a long comment": gzip_header(16, b"n" * 3_000_000 + b"\0"),
    "gzip with a name that does not end": b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 10_000_000,
    "gzip with reserved flags": gzip_header(0xE0, b""),
    "gzip with a checksum of the header": gzip_header(2, b"\0\0"),
    "tiny members": b"".join(gzip.compress(LITTLE[at : at + 512]) for at in range(0, len(LITTLE), 512)),
    "empty members after": gzip.compress(LITTLE) + gzip.compress(b"") * 20_000,
    "garbage after": gzip.compress(LITTLE) + b"evil",
    "zeros after": gzip.compress(LITTLE) + bytes(100_000),
    "gzip in gzip": gzip.compress(gzip.compress(LITTLE)),
    "xz of a large dictionary": lzma.compress(LITTLE, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 64 << 20}]),
    "lzma that claims a dictionary of 4 GB": b"\x5d\0\0\0\xff" + lzma.compress(LITTLE, lzma.FORMAT_ALONE)[5:],
    "xz, then xz": lzma.compress(LITTLE[:512]) + lzma.compress(LITTLE[512:]),
    "bz2, then gzip": bz2.compress(LITTLE) + gzip.compress(LITTLE),
    "two archives": gzip.compress(LITTLE) * 2,
    "two plain archives": LITTLE * 2,
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", made_names(ODD_COMPRESSION))
def test_odd_compression_gives_what_was_packed_or_an_error(name: str, face: Face, sandbox: Sandbox) -> None:
    sandbox.put(ODD_COMPRESSION[name])
    failure = attempt(face, sandbox)
    assert is_documented(face, failure), repr(failure)
    if failure is None and face in FOLDER_FACES:
        (found,) = sandbox.names()
        # What does not look like an archive is a payload, and comes back as it is.
        wanted = b"content" if found == "a" else ODD_COMPRESSION[name]
        assert (sandbox.target / found).read_bytes() == wanted


# Memory and disk ------------------------------------------------------------------------------------------------------

MEASURED = """
import resource, sys, warnings
from flytekit_ckpt import SyncCheckpoint, v2
from flytekit_ckpt.errors import CheckpointError

# Not to take the machine along.
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
warnings.simplefilter("ignore")

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) >> 10

before = peak()
try:
    v2.Checkpoint("", sys.argv[1], memory_budget=32 << 20).load_sync()
except CheckpointError as error:
    print(type(error).__name__, end=" ")
else:
    print("loaded", end=" ")
print(peak() - before)
"""


def measured(content: bytes, tmp_path: Path) -> tuple[str, int]:
    """Load in a process of its own; returns what came of it, and by how many megabytes its memory grew at most."""
    (tmp_path / "checkpoint").write_bytes(content)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = [sys.executable, "-c", MEASURED, str(tmp_path / "checkpoint")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(temporary.iterdir()) == []
    outcome, megabytes = done.stdout.split()
    return outcome, int(megabytes)


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")

MEGABYTE = b"x" * (1 << 20)


def hungry() -> dict[str, Callable[[], bytes]]:
    """Archives of little size that ask for much memory."""
    size = number(256 << 20)
    filler = [MEGABYTE] * 256
    numbers = [b"0\n" * (1 << 19)] * 16
    return {
        "PAX record": lambda: gzipped(header("p", b"x", size), b"268435456 path=", *filler, file("a"), END),
        "PAX path": lambda: gzipped(pax({"path": "x" * (64 << 20)}), file("a"), END),
        "PAX path of folders": lambda: gzipped(pax({"path": "d/" * 500_000}), file("a"), END),
        "long name": lambda: gzipped(header("p", b"L", size), *filler, file("a"), END),
        "sparse map": lambda: gzipped(
            pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "0"}),
            header("s", size=16 << 20), b"99999999\n", *numbers, END,
        ),
        "long links": lambda: gzipped(
            *(pax({"linkpath": "x" * (1 << 20)}) + link(f"{at}", "x") for at in range(300)), END
        ),
        "PAX records of links": lambda: gzipped(
            *(pax({"comment": "x" * (1 << 20)}) + link(f"{at}", "x") for at in range(300)), END
        ),
        "global PAX headers": lambda: gzipped(
            *(pax({f"key{at}": "x" * (1 << 20)}, tarfile.XGLTYPE) + file(f"{at}") for at in range(300)), END
        ),
        "gzip name": lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (60 << 20),
        "zeros after the end": lambda: gzipped(file("a"), END, *([bytes(1 << 20)] * 512)),
        "bz2": lambda: bz2.compress(file("a") + END + bytes(64 << 20)),
        "lzma dictionary": lambda: b"\x5d\0\0\0\x60" + lzma.compress(LITTLE, lzma.FORMAT_ALONE)[5:],
        "content": lambda: gzipped(header("a", size=256 << 20), *filler, END),
    }  # fmt: skip


@on_linux
@pytest.mark.parametrize("name", made_names(hungry()))
def test_a_small_archive_does_not_take_much_memory(name: str, tmp_path: Path) -> None:
    content = hungry()[name]()
    assert measured(content, tmp_path)[1] < 150


@pytest.mark.long
@on_linux
def test_very_many_empty_files_take_little_memory(tmp_path: Path) -> None:
    outcome, megabytes = measured(gzipped(*(file(f"{number_:x}", b"") for number_ in range(30_000)), END), tmp_path)
    assert outcome == "loaded"
    # As many names are kept.
    assert megabytes < 50


@pytest.mark.long
@on_linux
def test_a_million_members_take_little_memory(tmp_path: Path) -> None:
    with limits.seconds(600):
        outcome, megabytes = measured(gzipped(*[folder("d") * 1000] * 1000, END), tmp_path)
    assert outcome == "loaded"
    assert megabytes < 30


BOMBS: dict[str, Callable[[], bytes]] = {
    "1000:1": lambda: gzipped(header("a", size=32 << 20), bytes(32 << 20), END),
    "1000:1, in bz2": lambda: bz2.compress(header("a", size=32 << 20) + bytes(32 << 20) + END),
    "hole of an exabyte": lambda: gzipped(sparse(b"1\n%d\n4\n" % (1 << 60), (1 << 60) + 4), END),
    "many files": lambda: gzipped(*[file("a", bytes(100_000)) + file("b", bytes(100_000))] * 40, END),
    "payload": lambda: b"plain bytes " * 200_000,
    "wrapped payload": lambda: gzipped(pax(PAYLOAD), header("payload", size=32 << 20), bytes(32 << 20), END),
}


@pytest.mark.parametrize("face", [*FOLDER_FACES, read])
@pytest.mark.parametrize("name", made_names(BOMBS))
def test_more_than_the_limit_is_refused(name: str, face: Face, sandbox: Sandbox) -> None:
    sandbox.put(BOMBS[name]())
    failure = attempt(face, sandbox, restore_limit=1 << 20)
    if not (face is read and "exactly one checkpoint" in str(failure)):
        assert isinstance(failure, UnsafeCheckpointError), repr(failure)


@pytest.mark.parametrize("face", [*FOLDER_FACES, read])
def test_as_much_as_the_limit_is_restored(face: Face, sandbox: Sandbox) -> None:
    for content in (gzipped(file("a", bytes(1000)), END), bytes(1000)):
        sandbox.put(content)
        assert attempt(face, sandbox, restore_limit=1000) is None
        assert isinstance(attempt(face, sandbox, restore_limit=999), UnsafeCheckpointError)


@pytest.mark.parametrize("face", FOLDER_FACES)
def test_without_a_limit_the_disk_is_one(face: Face, sandbox: Sandbox) -> None:
    sandbox.put(BOMBS["hole of an exabyte"]())
    assert isinstance(attempt(face, sandbox), StorageError)


# Any sequence of entries ----------------------------------------------------------------------------------------------

NOWHERE = f"{tempfile.gettempdir()}/flytekit_ckpt-tests-nowhere"
WORDS = ["a", "b", "a/b", "b/a", "a/b/c", "../x", "../outside/canary", "..", ".", "", "./a", "a/..", "a/../../canary",
         NOWHERE, f"{NOWHERE}/x", "/", "a\\..\\b", "\udcff", "n" * 120, "prior", "folder", "folder/prior",
         "../target", "a//b", "a/.", "folder/../../outside"]  # fmt: skip
KINDS = [bytes([code]) for code in b"0\x001234567SLKxgXDMVZ"]
SIZES = [0, 1, 4, 511, 512, 513, 1024, 10_240, -1, -512, 1 << 33, NEGATIVE]

names = st.sampled_from(WORDS) | st.lists(st.sampled_from(["a", "b", "..", ".", ""]), max_size=4).map("/".join)
records = st.dictionaries(
    st.sampled_from(
        ["path", "linkpath", "size", "mtime", "uid", "hdrcharset", "flytekit_ckpt.payload", "flytekit_ckpt.part",
         "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.name", "GNU.sparse.major", "GNU.sparse.minor",
         "GNU.sparse.realsize", "GNU.sparse.offset", "GNU.sparse.numbytes"]
    ),
    names | st.sampled_from(["0", "1", "-1", "4", "512", "0,4", "4,4,0,4", "x", "1e400", "nan", "BINARY", "a\0b"]),
    max_size=3,
)  # fmt: skip
contents = st.sampled_from([b"", b"evil", b"1\n0\n4\n", b"x" * 512, b"12 path=../x"]) | st.binary(max_size=20)


@st.composite
def members(draw: st.DrawFn) -> bytes:
    """A member that is mostly whole: what is damaged everywhere is refused at once."""
    kind = draw(st.sampled_from([b"0", b"0", b"5", b"2", b"2", b"1", b"1", *KINDS]))
    content = draw(contents) if kind not in (b"5", b"2", b"1") else b""
    size = draw(st.just(len(content)) | st.sampled_from(SIZES)) if draw(st.integers(0, 5)) == 0 else len(content)
    block = header(draw(names), kind, size, draw(names), mode=draw(st.sampled_from([0, 0o644, 0o755, 0o7777])))
    return block + padded(content)


archives = st.lists(
    members()
    | st.builds(pax, records, st.sampled_from([b"x", b"x", b"g"]))
    | st.builds(link, names, names)
    | st.builds(file, names),
    max_size=8,
)
packers: list[Callable[[bytes], bytes]] = [gzipped, gzipped, bytes, bz2.compress]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(archives, st.booleans(), st.sampled_from(packers))
def test_no_sequence_of_entries_gets_out(parts: list[bytes], ends: bool, pack: Callable[[bytes], bytes]) -> None:
    content = pack(b"".join(parts) + END * ends)
    # No bytes at all are no checkpoint.
    assume(content)
    for face in FACES:
        with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
            sandbox = Sandbox(Path(name) / "sandbox")
            patch.setattr(tempfile, "tempdir", str(sandbox.temporary))
            sandbox.put(content)
            failure = attempt(face, sandbox)
            assert is_documented(face, failure), repr(failure)
            assert not os.path.lexists(NOWHERE)
            clear(sandbox.root)
