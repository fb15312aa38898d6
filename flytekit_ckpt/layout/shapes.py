"""The shapes that a checkpoint has, what they are called, and what is logged and said of them."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flytekit_ckpt import storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.entries import Entry
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.pipeline import Callback, Chunk

logger = logging.getLogger("flytekit_ckpt")

PAYLOAD_NAME = "payload"
"""File that a payload loads to in Flyte 2's API, and the member that holds a wrapped one."""

LEGACY_PAYLOAD_NAME = "_dst_cp"
"""File that flytekit keeps written bytes in."""

OBJECT_NAME = "_flytecheckpoints"
"""Name of the object inside a local destination that is a folder."""

# What is kept as an object's metadata, where the storage keeps any: the shape, and the CRC-32 of a payload's bytes.
SHAPE = "shape"
CRC32 = "crc32"
# That an object was only carried forward: whoever saves replaces it.
CARRIED = "carried"
# The checkpoint that the attempt which saved it had resumed from, where no source led there.
RESUMED = "resumed"


@dataclass(frozen=True)
class Payload:
    """Bytes that were saved as they are: their number, and themselves."""

    size: int
    chunks: Iterator[Chunk]
    version: str | None
    metadata: storage.Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class Tree:
    """A saved set of files, folders and links; each can be read before the next is asked for.

    Attributes
    ----------
    entries : iterator of Entry
        What it holds; where only some of it was asked for, that.
    version : str or None
        That of the object.
    metadata : mapping
        What was described when it was written.
    units : list of Unit or None
        What its index says it holds, where that was asked for and it has one.
    """

    entries: Iterator[Entry]
    version: str | None
    metadata: storage.Metadata = field(default_factory=dict)
    units: list[Unit] | None = None


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint was found.

    Attributes
    ----------
    place : str
        `"source"`, `"own destination"`, `"home"` or `"other run"`; blank where only one place was asked for.
    passed_over : tuple of str
        The places that were looked at before, and why each was passed over.
    """

    place: str
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        passed = f"passed over: {'; '.join(self.passed_over)}" if self.passed_over else ""
        told = "; ".join(part for part in (self.place, passed) if part)
        return f" ({told})" if told else ""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found: its URI, what it holds, and which place that is."""

    uri: str
    content: Payload | Tree
    origin: Origin


_in_background: contextvars.ContextVar[bool] = contextvars.ContextVar("flytekit_ckpt.in_background", default=False)


@dataclass(frozen=True)
class Event:
    """What the log record of a save or a restore carries as its `checkpoint` attribute.

    Attributes
    ----------
    operation : str
        `"saved"` or `"restored"`.
    shape : str
        `"payload"` or `"tree"`, `"nothing"` if there was no checkpoint.
    size : int
        Bytes of the object as stored (restored: of the payload, or of the tree's files).
    seconds : float
    uri : str
        The object, without credentials; blank if there was no checkpoint.
    origin : Origin
        Of a restore: which of the places that were looked at it was found in.
    in_background : bool
        Of a save: whether the caller did not wait for it.
    """

    operation: str
    shape: str
    size: int
    seconds: float
    uri: str
    origin: Origin = field(default_factory=lambda: Origin("", ()))
    in_background: bool = field(default_factory=_in_background.get)

    def log(self) -> None:
        told = f", {self.size} bytes in {self.seconds:.3f} s: {self.uri}" if self.uri else ""
        how = " in the background" if self.in_background else ""
        logger.info("%s %s%s%s%s", self.operation, self.shape, how, told, self.origin, extra={"checkpoint": self})


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """Have the events of saves say that the caller does not wait for them."""
    token = _in_background.set(True)
    try:
        yield
    finally:
        _in_background.reset(token)


def as_bytes(content: object) -> bytes:
    """Return what is bytes-like as bytes; anything else is a `TypeError`."""
    if isinstance(content, bytes):
        return content
    try:
        return memoryview(content).tobytes()  # type: ignore[arg-type]
    except TypeError as error:
        message = f"a checkpoint is bytes or a path, not {type(content).__name__}"
        raise TypeError(message) from error


def not_savable(path: Path) -> Exception:
    """Make the error for a path that is neither a file nor a folder."""
    if os.path.lexists(path):
        return ValueError(f"cannot save {path} as a checkpoint: it is neither a file nor a folder")
    return FileNotFoundError(errno.ENOENT, "there is nothing to save as a checkpoint", str(path))


def reporting(chunks: Iterable[Chunk], callback: Callback) -> Iterator[Chunk]:
    """Pass chunks on, and report their bytes to a progress callback."""
    for chunk in chunks:
        yield chunk
        callback.relative_update(len(chunk))


@contextlib.contextmanager
def naming(uri: str) -> Iterator[None]:
    """Put the URI, and what to do, into the error of a room that knows no URI."""
    try:
        yield
    except CorruptCheckpointError as error:
        message = str(error)
        if message.startswith(f"the checkpoint at {storage.public(uri)} "):
            raise
        message = (
            f"the checkpoint at {storage.public(uri)} cannot be used: {message}. "
            "Nothing was written; remove it to start afresh, or resume from an earlier one"
        )
        raise type(error)(message) from error


def log_nothing(origin: Origin) -> None:
    """Log that a restore found no checkpoint."""
    Event("restored", "nothing", 0, 0.0, "", origin).log()
