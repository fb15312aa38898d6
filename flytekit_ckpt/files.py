"""Local files: read as chunks by several threads, written and sent on to the disk, copied by the file system."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.pipeline import CHUNK_SIZE, Chunk, Range

FLUSH_SIZE = 8 << 20
"""Bytes after which a file that is being written is sent on to the disk."""

COPY_SIZE = 64 << 20
"""Bytes that the file system is asked to copy at a time."""


BLOCK_SIZE = 4 << 10
"""Bytes of a file system's block, of most of them."""


class OpenFile:
    """A regular file that several threads read at once, closed when the last of them lets go of it.

    A file that is replaced while it is being saved is saved as it was, and not a mixture.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            message = f"{path} was removed while it was being saved: save again"
            raise CheckpointError(message) from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file's `offset` on; a file that has fewer bytes by now is a `CheckpointError`."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                raise self._shrank(offset)
            buffer = buffer[count:]
            offset += count

    def read(self, size: int, offset: int) -> bytes:
        """Read at least one byte and at most `size` of them from the file's `offset` on, as `read_into` does."""
        content = os.pread(self._descriptor, size, offset)
        if not content:
            raise self._shrank(offset)
        return content

    def _shrank(self, size: int) -> CheckpointError:
        return CheckpointError(f"{self._path} shrank to {size} bytes while it was being saved: save again")


def file_content(path: str | Path, size: int) -> bytes:
    """Read exactly `size` bytes of a small file; a file that has fewer by now is a `CheckpointError`."""
    if not size:
        return b""
    file = OpenFile(path)
    content = file.read(size, 0)
    while len(content) < size:
        content += file.read(size - len(content), len(content))
    return content


def file_chunks(path: str | Path, size: int) -> Iterator[bytes]:
    """Read exactly `size` bytes of a file; a file that has fewer by now is a `CheckpointError`."""
    file = OpenFile(path)
    done = 0
    while done < size:
        chunk = file.read(min(CHUNK_SIZE, size - done), done)
        done += len(chunk)
        yield chunk


class FileWriter:
    """Writes chunks to a new file, one after the other, and has the system send them on to the disk.

    So they neither pile up in memory, which a container may have little of, nor are all waited for at the end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._written = 0
        self._flushed = 0

    def __call__(self, chunk: Chunk) -> int:
        """Write a whole chunk; returns its size in bytes."""
        done = os.write(self._descriptor, chunk)
        while done < len(chunk):
            done += os.write(self._descriptor, memoryview(chunk)[done:])
        return self.written(done)

    def written(self, size: int) -> int:
        """Take note of bytes that have been appended to the file; returns their number."""
        self._written += size
        length = self._written - self._flushed
        if length >= FLUSH_SIZE and hasattr(os, "posix_fadvise"):
            # Linux begins to write what is not on the disk yet, and drops from its cache only what is.
            os.posix_fadvise(self._descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written
        return size


def cloned(source: int, target: int) -> bool:
    """Have the file system make an open file the same as another one without copying it, where it can."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


# From Linux's headers; Python has no name for it.
_FICLONE = 0x40049409


def copy_part(source: int, target: int, part: Range) -> int:
    """Copy bytes from one open file to the end of another, by the file system where it can; returns their number."""
    done = 0
    while done < part.length:
        offset = part.start + done
        # Blocks that are whole are not copied where a file system can share them.
        size = min(-offset % BLOCK_SIZE or COPY_SIZE, part.length - done)
        try:
            count = os.copy_file_range(source, target, size, offset)
        except (AttributeError, OSError):
            # Not on this system, or not between these two files; a disk that fails will fail here too.
            count = os.write(target, os.pread(source, min(CHUNK_SIZE, size), offset))
        if not count:
            message = f"the file ends at {offset}"
            raise EOFError(message)
        done += count
    return done


def mapped_files() -> frozenset[tuple[int, int]] | None:
    """Give the device and inode of each file that this process may change through its memory.

    Such a change shows in the file's times only now and then. `None` where the system does not tell.
    """
    try:
        maps = Path("/proc/self/maps").read_text("utf-8", "surrogateescape")
    except OSError:
        return None
    fields = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = {field[5] for field in fields if len(field) == 6 and "w" in field[1] and field[1].endswith("s")}
    found = set()
    for path in paths:
        # What has been removed meanwhile is not going to be saved.
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
    return frozenset(found)
