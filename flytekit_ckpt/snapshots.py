"""Files as they are now, kept on their own disk until they have been saved."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from flytekit_ckpt.errors import CheckpointError, StorageError
from flytekit_ckpt.files import cloned, copy_part
from flytekit_ckpt.folders import Exclude, folder_size, scan_folder
from flytekit_ckpt.pipeline import CHUNK_SIZE, Chunk, Range, in_order, processors
from flytekit_ckpt.scratch import Held, remove_tree

logger = logging.getLogger("flytekit_ckpt")

SPARE = 64 << 20
"""Bytes of the disk that a snapshot leaves to others."""


class NoRoomError(Exception):
    """The disk has no room for a snapshot."""


class Snapshot:
    """What a file, a folder or a reader held when this was made.

    Attributes
    ----------
    path : pathlib.Path
        The file or folder that holds it now; nobody else changes it.
    size : int
        Bytes of its files.
    """

    def __init__(self, path: Path, size: int, held: Held) -> None:
        self.path = path
        self.size = size
        self._held = held

    @property
    def folder(self) -> Path:
        """All that is there because of it."""
        return self._held.path

    def discard(self) -> None:
        """Remove it."""
        self._held.remove()

    @classmethod
    def of_folder(cls, folder: Path, exclude: Exclude) -> Snapshot:
        """Copy what `scan_folder` gives of a folder, by the file system where it can."""
        with _made(folder, folder_size(folder, exclude)) as (held, path):
            path.mkdir()
            return cls(path, _copy_folder(folder, exclude, path), held)

    @classmethod
    def of_file(cls, file: Path) -> Snapshot:
        """Copy a file; the copy has its name."""
        with _made(file, file.stat().st_size) as (held, path):
            return cls(path, _copy_file(file, path), held)

    @classmethod
    def of_chunks(cls, chunks: Iterable[Chunk], size: int | None) -> Snapshot:
        """Write bytes to a file."""
        with (
            _made(Path(tempfile.gettempdir(), "content"), size or 0) as (held, path),
            path.open("wb", buffering=0) as file,
        ):
            for chunk in chunks:
                file.write(chunk)
            return cls(path, file.tell(), held)

    @classmethod
    def of_moved(cls, path: Path, exclude: Exclude = lambda _: None) -> Snapshot:
        """Take a file or folder away from where it is; it stays in the folder that it lies in, by another name."""
        if not path.is_dir():
            held = Held.made_inside(path.parent)
            target = held.path / path.name
            try:
                path.rename(target)
                return cls(target, target.stat().st_size, held)
            except BaseException:
                held.remove()
                raise
        if not path.is_symlink():
            size = folder_size(path, exclude)
            # It cannot be renamed if another disk is mounted there, for example.
            with contextlib.suppress(OSError):
                held = Held(path)
                try:
                    held.rename()
                except BaseException:
                    held.release()
                    raise
                return cls(held.path, size, held)
        snapshot = cls.of_folder(path, exclude)
        if path.is_symlink():
            path.unlink()
        else:
            remove_tree(path)
        return snapshot


@contextlib.contextmanager
def _made(original: Path, size: int) -> Iterator[tuple[Held, Path]]:
    """Make room for a copy of a file or folder, and give the copy's path; nothing stays if that fails."""
    base = _base(original)
    try:
        if shutil.disk_usage(base).free < size + SPARE:
            raise NoRoomError
        held = Held.made_inside(base)
    except OSError as error:
        raise _failed(original, error) from error
    try:
        yield held, held.path / (original.resolve().name or "folder")
    except OSError as error:
        held.remove()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError from error
        raise _failed(original, error) from error
    except BaseException:
        held.remove()
        raise


def _base(original: Path) -> Path:
    """Give a folder on the same disk: that of temporary files, or the one that the original lies in."""
    temporary, beside = Path(tempfile.gettempdir()), original.resolve().parent
    if os.stat(temporary).st_dev == os.stat(original.parent).st_dev or not os.access(beside, os.W_OK | os.X_OK):
        return temporary
    return beside


def _failed(original: Path, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{error.filename or original} was removed while it was being saved: save again")
    message = f"cannot make a snapshot of {original}: {error}. Check the permissions of the folder that it lies in"
    return StorageError(error.errno, message)


def _copy_folder(folder: Path, exclude: Exclude, target: Path) -> int:
    """Copy a folder's contents into another one, several files at a time; returns the bytes of the files."""
    folders: list[tuple[str, os.stat_result]] = []

    def files() -> Iterator[tuple[int, tuple[Path, Path]]]:
        for entry in scan_folder(folder, exclude):
            path = target / entry.name
            if entry.info.isdir():
                path.mkdir()
                folders.append((str(path), os.stat(folder / entry.name)))
            elif entry.info.issym():
                path.symlink_to(entry.info.linkname)
                status = os.lstat(folder / entry.name)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
            elif entry.path is not None:
                yield CHUNK_SIZE, (Path(entry.path), path)

    def copied(pair: tuple[Path, Path]) -> int:
        return _copy_file(*pair)

    threads = processors()
    size = sum(in_order(copied, files(), threads=threads, memory=4 * threads * CHUNK_SIZE))
    # What lies in a folder comes first: nothing may be left to do in one that has lost its rights.
    for path, status in reversed(folders):
        os.chmod(path, stat.S_IMODE(status.st_mode))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return size


def _copy_file(original: Path, path: Path) -> int:
    """Copy a file with its mode and its time; returns its bytes."""
    with original.open("rb", buffering=0) as source, path.open("xb", buffering=0) as target:
        status = os.fstat(source.fileno())
        if not cloned(source.fileno(), target.fileno()):
            try:
                copy_part(source.fileno(), target.fileno(), Range(0, status.st_size))
            except EOFError as error:
                message = f"{original} shrank while it was being saved: save again"
                raise CheckpointError(message) from error
        os.fchmod(target.fileno(), stat.S_IMODE(status.st_mode))
        os.utime(target.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
        return status.st_size
