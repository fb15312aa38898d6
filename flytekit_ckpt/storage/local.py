"""A local file as an object: written beside its place, flushed to the disk and renamed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.files import COPY_SIZE, FileWriter, cloned, copy_part
from flytekit_ckpt.pipeline import Chunk, Range, in_order
from flytekit_ckpt.storage import slots
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError
from flytekit_ckpt.storage.objects import (
    Anything,
    Metadata,
    Previous,
    Replaced,
    Settings,
    State,
    Stored,
    StoredObject,
    Written,
)

LOCAL_SIZE = 256 << 10
"""Bytes read from a local file at a time: few, so that the same memory is used again and again."""

ATTRIBUTE = "user.flytekit_ckpt"
"""Extended attribute that keeps an object's metadata."""


class LocalObject(StoredObject):
    """A file."""

    def __init__(self, path: Path, settings: Settings | None = None) -> None:
        super().__init__(str(path), settings)
        self._name = path
        # A link at the destination is the user's way to put the file elsewhere.
        self._path = Path(os.path.realpath(path))

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,  # noqa: ARG002 - a file grows as it will
        previous: Previous | None,
        describe: Callable[[], Metadata],
        replaced: Replaced,
    ) -> Written:
        if previous is not None and not isinstance(previous.object, LocalObject):
            chunks = self._all_bytes(chunks, previous)
        old: list[io.FileIO] = []
        with contextlib.ExitStack() as files:
            file, finish = files.enter_context(self._replacing())
            writer = FileWriter(file)

            def write(chunk: Chunk | Range) -> int:
                with self._reporting("write"):
                    if isinstance(chunk, Range):
                        return writer.written(copy_part(old[0].fileno(), file, chunk))
                    return writer(chunk)

            def sized() -> Iterator[tuple[int, Chunk | Range]]:
                for chunk in chunks:
                    if isinstance(chunk, Range) and not old:
                        assert isinstance(previous, Previous)
                        assert isinstance(previous.object, LocalObject)
                        old.append(files.enter_context(previous.object._opened(previous.written)))
                    yield 0 if isinstance(chunk, Range) else len(chunk), chunk

            # In a thread, so that what follows is packed meanwhile.
            written = sum(in_order(write, sized(), threads=1, memory=self._settings.share))
            return Written(written, finish(describe(), replaced))

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[tuple[int, _Finish]]:
        """Give a new file, and what puts it, described, in the place of what is there."""
        with contextlib.ExitStack() as files:
            with self._reporting("write"):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file, temporary = files.enter_context(slots.temporary(self._path))

            def finish(metadata: Metadata, replaced: Replaced) -> str:
                with self._reporting("write"):
                    _describe(file, metadata)
                    os.fsync(file)
                    if replaced is None:
                        _take_name(temporary, self._path)
                    else:
                        with self._compared(replaced):
                            os.replace(temporary, self._path)
                    self._flush_name()
                    return _file_version(os.stat(self._path))

            yield file, finish

    @contextlib.contextmanager
    def _compared(self, replaced: Written | Anything) -> Iterator[None]:
        """Hold the file that is there against all who mean to replace it too; refuse if it is another one."""
        with contextlib.ExitStack() as files:
            while True:
                try:
                    file = files.enter_context(self._path.open("rb", buffering=0))
                except FileNotFoundError:
                    if isinstance(replaced, Written):
                        raise ConflictError from None
                    break
                # Some file systems have no locks: what is left there is the look.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                    # A process that is forked meanwhile has the lock too, and is not to keep it.
                    files.callback(fcntl.flock, file, fcntl.LOCK_UN)
                if slots.is_at(file.fileno(), self._path):
                    if isinstance(replaced, Written) and _file_version(os.fstat(file.fileno())) != replaced.version:
                        raise ConflictError
                    break
                # Somebody has replaced it while this one was waiting.
                if isinstance(replaced, Written):
                    raise ConflictError
            yield

    def _flush_name(self) -> None:
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _opened(self, written: Written) -> io.FileIO:
        """Open the file, if it is still the one that was written."""
        with self._reporting("read"):
            try:
                file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                raise ConflictError from None
            if _file_version(os.fstat(file.fileno())) != written.version:
                file.close()
                raise ConflictError
            return file

    def link_to(self, target: StoredObject, mark: Metadata) -> bool:
        if not isinstance(target, LocalObject):
            return False
        with contextlib.ExitStack() as files:
            try:
                source = files.enter_context(self._path.open("rb", buffering=0))
                file, finish = files.enter_context(target._replacing())
            except (OSError, StorageError):
                # `copy_to` says why.
                return False
            if cloned(source.fileno(), file):
                finish({**_description(source.fileno()), **mark}, None)
                return True
        try:
            os.link(self._path, target._path)
        except FileExistsError:
            raise ConflictError from None
        except OSError:
            # Not on every file system, nor from one to another.
            return False
        with target._reporting("write"):
            target._flush_name()
        return True

    def copy_to(self, target: StoredObject, given_up: Callable[[], bool], mark: Metadata) -> Written | None:
        if not isinstance(target, LocalObject):
            return super().copy_to(target, given_up, mark)
        with contextlib.ExitStack() as files:
            with self._reporting("read"):
                try:
                    source = files.enter_context(self._path.open("rb", buffering=0))
                except FileNotFoundError:
                    return None
                size = os.fstat(source.fileno()).st_size
            file, finish = files.enter_context(target._replacing())
            for start in range(0, size, COPY_SIZE):
                if given_up():
                    raise GivenUpError
                with target._reporting("write"):
                    copy_part(source.fileno(), file, Range(start, min(COPY_SIZE, size - start)))
            return Written(size, finish({**_description(source.fileno()), **mark}, None))

    def state(self) -> State:
        with self._reporting("read"):
            try:
                file = self._path.open("rb", buffering=0)
            except (FileNotFoundError, NotADirectoryError):
                return State(None)
            except IsADirectoryError:
                return State(None, has_files=any(self._path.iterdir()))
            with file:
                status = os.fstat(file.fileno())
                return State(Written(status.st_size, _file_version(status)), _description(file.fileno()))

    def exists(self) -> bool:
        with self._reporting("read"):
            return self._path.is_file()

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                return None
            status = os.fstat(file.fileno())
            metadata = _description(file.fileno())
        return Stored(status.st_size, _file_version(status), self._chunks(file, Range(0, status.st_size)), metadata)

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        return self._chunks(self._opened(written), part)

    def _chunks(self, file: io.FileIO, part: Range) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                return [os.pread(file.fileno(), piece.length, piece.start)]

        with file:
            yield from self._in_order(fetch, part, LOCAL_SIZE, threads=1)

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            paths = sorted(path for path in self._path.rglob("*") if path.is_file())
        for path in paths:
            yield path.relative_to(self._path).as_posix(), LocalObject(path, self._settings)

    def names(self) -> list[str]:
        with self._reporting("list"):
            try:
                return [item.name for item in os.scandir(self._path) if item.is_file()]
            except FileNotFoundError:
                return []

    def remove(self) -> None:
        with self._reporting("remove"):
            # Not what a link leads to.
            self._name.unlink(missing_ok=True)


class _Finish(Protocol):
    def __call__(self, metadata: Metadata, replaced: Replaced) -> str: ...


def _take_name(temporary: Path, name: Path) -> None:
    """Give a file a name that nobody else has."""
    try:
        os.link(temporary, name)
    except FileExistsError:
        raise ConflictError from None
    except OSError:
        # Not every file system has hard links.
        if name.exists():
            raise ConflictError from None
        os.replace(temporary, name)


def _describe(file: int, metadata: Metadata) -> None:
    # Not every file system has attributes, nor every system a call for them, and neither is worth a failed save.
    with contextlib.suppress(OSError, AttributeError):
        os.setxattr(file, ATTRIBUTE, json.dumps(dict(metadata)).encode())


def _description(file: int) -> Metadata:
    try:
        found = json.loads(os.getxattr(file, ATTRIBUTE))
    except (OSError, AttributeError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _file_version(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
