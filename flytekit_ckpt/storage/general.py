"""Whatever fsspec reaches, through its general interface."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flytekit_ckpt.credentials import resolved
from flytekit_ckpt.pipeline import Chunk, Range
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, tried_again
from flytekit_ckpt.storage.objects import (
    ANYTHING,
    PART_SIZE,
    Metadata,
    Previous,
    Replaced,
    Settings,
    State,
    Stored,
    StoredObject,
    Written,
)

logger = logging.getLogger("flytekit_ckpt")


class FsspecObject(StoredObject):
    """An object behind fsspec's general interface."""

    def __init__(self, uri: str, settings: Settings | None = None) -> None:
        super().__init__(uri, settings)
        self._protocol = uri.partition("://")[0]
        self._options = resolved(self._protocol, self._settings.options)

    @property
    def _filesystem(self) -> Any:
        # Asked for at every use: fsspec hands out the same instance, but a fresh one in a forked process.
        return self._connected()

    def _connected(self, **arguments: Any) -> Any:
        return filesystem_class(self._protocol)(**self._options, use_listings_cache=False, **arguments)

    @property
    def _key(self) -> str:
        return str(self._filesystem._strip_protocol(self.uri))

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,  # noqa: ARG002 - its filesystem divides the object as it will
        previous: Previous | None,
        describe: Callable[[], Metadata],  # noqa: ARG002 - every store has its own way to keep it, if any
        replaced: Replaced,
    ) -> Written:
        written = 0
        with self._reporting("write"):
            # An instance of its own: a transaction takes every file that is opened through the instance.
            filesystem, key = self._connected(skip_instance_cache=True), self._key
            with contextlib.suppress(NotImplementedError):
                filesystem.makedirs(key.rpartition("/")[0], exist_ok=True)
            filesystem.start_transaction()
        try:
            with self._reporting("write"):
                file = filesystem.open(key, "wb")
            for chunk in self._all_bytes(chunks, previous):
                with self._reporting("write"):
                    file.write(chunk)
                written += len(chunk)
            if replaced is not ANYTHING:
                # There is no condition that every store knows.
                warn_of_no_conditions(self._protocol)
                self._compare(replaced)
            with self._reporting("write"):
                file.close()
                filesystem.end_transaction()
        except BaseException:
            with contextlib.suppress(Exception):
                filesystem.transaction.complete(commit=False)
            raise
        with self._reporting("read"):
            return Written(written, _info_version(filesystem.info(key)))

    def _compare(self, replaced: Replaced) -> None:
        """Refuse to go on if something else is there than what is to be replaced."""
        if replaced is not ANYTHING and self._current_version() != (None if replaced is None else replaced.version):
            raise ConflictError

    def _current_version(self) -> str | None:
        """What version of the object is there; `None` if there is none."""
        info = self._info()
        return None if info is None else _info_version(info)

    def exists(self) -> bool:
        return self._info() is not None

    def state(self) -> State:
        info = self._info()
        if info is not None:
            return State(Written(int(info["size"]), _info_version(info)))
        return State(None, has_files=next(self.files(), None) is not None)

    def _info(self) -> Mapping[str, Any] | None:
        with self._reporting("read"):
            try:
                info: Mapping[str, Any] = self._retrying(lambda: self._filesystem.info(self._key))
            except FileNotFoundError:
                return None
        return None if info["type"] == "directory" else info

    def _retrying(self, function: Callable[[], Any]) -> Any:
        settings = self._settings
        return tried_again(function, retries=settings.retries, uri=self.uri, cancelled=settings.cancelled)

    def copy_to(self, target: StoredObject, given_up: Callable[[], bool], mark: Metadata) -> Written | None:
        if not (isinstance(target, FsspecObject) and target._protocol == self._protocol in _ATOMIC_COPIES):
            return super().copy_to(target, given_up, mark)
        if given_up():
            raise GivenUpError
        target._compare(None)
        with target._reporting("write"), contextlib.suppress(FileNotFoundError):
            self._retrying(lambda: self._filesystem.cp_file(self._key, target._key))
            return target.state().object
        return None

    def get(self) -> Stored | None:
        info = self._info()
        if info is None:
            return None
        size = int(info["size"])
        return Stored(size, _info_version(info), self._chunks(Range(0, size)))

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        with self._reporting("read"):
            if _info_version(self._retrying(lambda: self._filesystem.info(self._key))) != written.version:
                raise ConflictError
        return self._chunks(part)

    def _chunks(self, part: Range) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                end = piece.start + piece.length
                answer = self._retrying(lambda: self._filesystem.cat_file(self._key, start=piece.start, end=end))
                return [bytes(answer)]

        return self._in_order(fetch, part, PART_SIZE)

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            prefix = self._key + "/"
            found = sorted(self._retrying(lambda: self._filesystem.find(self._key)), key=in_folders)
        for key in found:
            name = key.removeprefix(prefix)
            # Consoles make empty objects that end in "/" to show a folder.
            if key.startswith(prefix) and name and not name.endswith("/"):
                yield name, type(self)(f"{self.uri}/{name}", self._settings)

    def names(self) -> list[str]:
        with self._reporting("list"):
            try:
                found = self._retrying(lambda: self._filesystem.ls(self._key, detail=True))
            except FileNotFoundError:
                return []
        # An object is listed as lying in itself.
        files = (item["name"].rpartition("/") for item in found if item["type"] == "file")
        return [name for folder, _, name in files if folder.strip("/") == self._key.strip("/")]

    def remove(self) -> None:
        with self._reporting("remove"), contextlib.suppress(FileNotFoundError):
            self._retrying(lambda: self._filesystem.rm_file(self._key))


def in_folders(name: str) -> list[str]:
    """Sort names as a walk through folders meets them."""
    return name.split("/")


# Stores that copy an object as a whole; file systems copy files piece by piece.
_ATOMIC_COPIES = {"memory"}


@functools.cache
def warn_of_no_conditions(protocol: str) -> None:
    """Say once what a store cannot promise."""
    logger.warning(
        "%s:// knows no conditional writes: of two machines that save to one destination in the same moment, one may "
        "replace what the other has saved",
        protocol,
    )


def filesystem_class(protocol: str) -> Any:
    """Return fsspec's own filesystem for a protocol.

    Flyte 2 registers obstore's in place of some: those only work inside an event loop, and what a failed save has sent
    replaces the object.
    """
    import fsspec
    from fsspec.registry import known_implementations

    found = fsspec.get_filesystem_class(protocol)
    if found.__module__.partition(".")[0] != "obstore":
        return found
    known = known_implementations[protocol]
    module, _, name = known["class"].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(known["err"]) from error


def _info_version(info: Mapping[str, Any]) -> str:
    """Tell versions apart by what the filesystem knows of the object; when it was read is no part of that."""
    telling = "size etag md5 md5hash content_md5 checksum generation mtime modified updated created last_modified"
    return " ".join(f"{name}={info[name]}" for name in sorted(info) if name.lower() in telling.split())
