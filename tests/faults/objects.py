"""What a checkpoint consists of where it is stored: read, and damaged behind everyone's back."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from tests.conftest import Place


class Part(ABC):
    """A file or an object."""

    @abstractmethod
    def read(self) -> bytes: ...

    @abstractmethod
    def overwrite(self, content: bytes) -> None:
        """Change the bytes and nothing else: what is known of them stays as it was."""


class File(Part):
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> bytes:
        return self._path.read_bytes()

    def overwrite(self, content: bytes) -> None:
        # In place, as a disk that rots: extended attributes stay.
        status = self._path.stat()
        with self._path.open("r+b") as file:
            file.write(content)
            file.truncate()
        os.utime(self._path, ns=(status.st_atime_ns, status.st_mtime_ns))


class S3Key(Part):
    def __init__(self, filesystem: Any, path: str) -> None:
        self._call = filesystem.call_s3
        bucket, _, key = path.partition("/")
        self._where = {"Bucket": bucket, "Key": key}
        head = self._call("head_object", **self._where)
        self._headers = {name: head[name] for name in ("Metadata", "ContentType", "ContentEncoding") if name in head}
        self._filesystem, self._path = filesystem, path

    def read(self) -> bytes:
        content: bytes = self._filesystem.cat_file(self._path)
        return content

    def overwrite(self, content: bytes) -> None:
        self._call("put_object", Body=content, **self._where, **self._headers)


def parts(place: Place, uri: str) -> list[Part]:
    """Give what is stored at a URI and below it."""
    if place.is_local:
        path = Path(uri)
        found = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
        return [File(item) for item in found]
    filesystem = connected(place)
    return [S3Key(filesystem, path) for path in sorted(filesystem.find(uri))]


def connected(place: Place) -> Any:
    from s3fs import S3FileSystem

    return S3FileSystem(**place.options, use_listings_cache=False)


def names_beside(place: Place, uri: str) -> list[str]:
    """List what else lies in the folder of a local object, or at a key that begins like that of one on S3."""
    folder, _, own = uri.rpartition("/")
    if place.is_local:
        return [name for name in os.listdir(folder) if name != own]
    found = connected(place).find(folder)
    return [key for key in found if not f"s3://{key}/".startswith(f"{uri}/")]
