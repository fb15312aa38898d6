"""What the fuzzer tries on an input, and what it calls a finding: also without the fuzzer.

An input's first byte says what the rest is (`Shape`). A finding is an exception.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import os
import stat
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from flytekit_ckpt import archive, layout, members, restoration, state
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.folders import scan_folder
from flytekit_ckpt.storage import Settings
from tests import tars
from tests.trees import Tree as Description
from tests.trees import make

Tree = dict[str, tuple[int, int, object]]
"""Names, and what is there: its type, its mode, and its content or what it links to."""

SETTINGS = Settings(memory=16 << 20)
LONGEST_STATE = 1 << 16
LARGEST_FILE = 16 << 20
"""Bytes: an archive may say that a file is larger than any disk."""


class Shape(enum.IntEnum):
    """What the bytes of an input stand for."""

    OBJECT = 0
    """The checkpoint, as it is."""
    OUR_TAR = 1
    """A tar, to be stored in this package's members, whose checksums are right then."""
    PLAIN_TAR = 2
    """A tar, to be compressed as other programs do."""
    DAMAGE = 3
    """Changes to a good checkpoint: which one, and for each change where, and what."""
    STATE = 4
    """The files of an iterator's state: how long the JSON is, the JSON, an array."""


def check(data: bytes) -> None:
    """Try one input."""
    if not data:
        return
    shape, content = Shape(data[0] % len(Shape)), data[1:]
    if shape is Shape.STATE:
        check_state(content)
    elif shape is Shape.DAMAGE:
        check_damage(content)
    else:
        load(as_object(shape, content))


def as_object(shape: Shape, content: bytes) -> bytes:
    """Make the checkpoint that an input of one of the first three shapes stands for."""
    if shape is Shape.OBJECT:
        return content
    tar = with_checksums(content)
    return ours(tar) if shape is Shape.OUR_TAR else tars.gzipped(tar)


def with_checksums(tar: bytes) -> bytes:
    """Put the right checksum into each header: of those that a fuzzer changes, none would be read otherwise."""
    made = bytearray(tar)
    for start in range(0, len(tar) - tars.BLOCK + 1, tars.BLOCK):
        if tar[start + 257 : start + 262] == b"ustar":
            block = tar[start : start + 148] + b" " * 8 + tar[start + 156 : start + tars.BLOCK]
            made[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(made)


def ours(tar: bytes) -> bytes:
    """Store a tar in members as this package does, a few blocks in each."""
    size = 8 * tars.BLOCK
    pieces = [tar[start : start + size] for start in range(0, len(tar), size)]
    return b"".join(members.member(memoryview(piece)) for piece in pieces)


# Archives -------------------------------------------------------------------------------------------------------------


def load(content: bytes) -> Tree | None:
    """Restore a checkpoint into a folder; returns what it is then, `None` if it was refused.

    Whatever happens, nothing beside the folder changes, and if it is refused, nothing in it.
    """
    with _room() as room:
        source, target = room / "source", room / "target"
        source.write_bytes(content)
        before = _elsewhere(room)
        found = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opened = layout.get(str(source), SETTINGS)
                if opened is not None:
                    whole = layout.Found(str(source), opened, layout.Origin("", ()))
                    restoration.restore(whole, layout.PAYLOAD_NAME, target, SETTINGS)
        except CheckpointError:
            assert os.listdir(target) == ["prior"]
            assert (target / "prior").read_bytes() == b"prior"
        else:
            found = _made(target)
            # An archive may have an entry of the same name.
            if found.get("prior", (0, 0, None))[2] == b"prior":
                del found["prior"]
        assert _elsewhere(room) == before, "something outside the folder has changed"
        return found


@contextlib.contextmanager
def _room() -> Iterator[Path]:
    """Make a folder with the one that is restored into, and others that must not change."""
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as name:
        room = Path(name)
        for folder in ("target", "outside"):
            (room / folder).mkdir()
        for file in ("canary", "outside/canary"):
            (room / file).write_bytes(b"canary")
        (room / "target/prior").write_bytes(b"prior")
        yield room


def _elsewhere(room: Path) -> list[tuple[object, ...]]:
    seen: list[tuple[object, ...]] = []
    for path in itertools.chain([room], room.iterdir(), (room / "outside").iterdir()):
        if path.name != "target":
            status = path.lstat()
            seen.append((path, status.st_ino, status.st_mode, status.st_nlink, status.st_size, status.st_mtime_ns))
    return seen


def _made(target: Path) -> Tree:
    """Describe what was restored, which is plain files, folders, and links that end inside."""
    found: Tree = {}
    # What no right is left to cannot be looked at, and not be removed.
    for root, folders, files in os.walk(target):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            if path.is_symlink():
                assert Path(os.path.realpath(path)).is_relative_to(target), "a link leads out"
                content: object = os.readlink(path)
            else:
                assert not mode & ~0o777, "a dangerous bit is set"
                assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
                path.chmod(0o700)
                content = path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(target))] = (stat.S_IFMT(status.st_mode), mode, content)
    return found


# Damage ---------------------------------------------------------------------------------------------------------------

GOOD: list[Description] = [
    {"a": b"1", "b": bytes(range(256)) * 3, "c": None, "c/d": b"", "c/link": "d"},
    {"n" * 120: b"long", "d" * 90: None, f"{'d' * 90}/{'e' * 90}": b"longer", "ü": b"2"},
    {"text": b"step 1, loss 0.5\n" * 50, "zeros": bytes(3000)},
]


@functools.cache
def good() -> list[tuple[bytes, Tree]]:
    """Make good checkpoints, and what they restore to, of this package's making and of others'."""
    made = []
    for tree in GOOD:
        with tempfile.TemporaryDirectory() as name:
            source = make(Path(name) / "source", tree)
            for path in source.rglob("*"):
                os.utime(path, (1e9, 1e9), follow_symlinks=False)
                if not path.is_symlink():
                    path.chmod(0o755)
            packed = b"".join(chunk for chunk in archive.pack(scan_folder(source)) if isinstance(chunk, bytes))
        tar = zlib.decompressobj(31)
        plain = b""
        rest = packed
        while rest:
            plain += tar.decompress(rest)
            rest, tar = tar.unused_data, zlib.decompressobj(31)
        for content in (packed, tars.gzipped(plain, level=9)):
            found = load(content)
            assert found is not None
            made.append((content, found))
    return made


_CHANGE = struct.Struct("<HBB")


def damaged(data: bytes) -> tuple[bytes, Tree]:
    """Change a good checkpoint as an input says; returns it with what it was good for."""
    content, wanted = good()[data[0] % len(good())]
    changed = bytearray(content)
    changes = data[1:]
    for start in range(0, len(changes) - _CHANGE.size + 1, _CHANGE.size):
        place, what, value = _CHANGE.unpack_from(changes, start)
        at = place % (len(changed) + 1)
        if what % 4 == 0:
            del changed[at:]
        elif what % 4 == 1:
            changed[at:at] = bytes([value])
        elif what % 4 == 2:
            del changed[at : at + value]
        elif at < len(changed):
            changed[at] ^= value
    return bytes(changed), wanted


def check_damage(data: bytes) -> None:
    """A damaged checkpoint is refused, or restores exactly what was saved.

    What no longer looks like an archive at its beginning is a payload, and comes back as it is.
    """
    if not data:
        return
    content, wanted = damaged(data)
    found = load(content)
    if found is not None and content and found.get(layout.PAYLOAD_NAME, (0, 0, None))[2] != content:
        assert found == wanted, "a damaged checkpoint restored something else"


# States ---------------------------------------------------------------------------------------------------------------


def check_state(data: bytes) -> None:
    """Files that are not a state are a `ValueError`, larger arrays than any machine has a `MemoryError`.

    Keys of JAX need JAX.
    """
    if len(data) < 2 or len(data) > LONGEST_STATE:
        return
    length = int.from_bytes(data[:2], "little")
    text, array = data[2 : 2 + length], data[2 + length :]
    refusals = (ValueError, CheckpointError, ImportError, MemoryError)
    with contextlib.suppress(*refusals), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = {"state.json": text, "state/0.npy": state.read_file("state/0.npy", iter([array]))}
        state.decode("state", files)
    with contextlib.suppress(*refusals), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state.decode("state", {"state.json": text})
