"""How each package saves and loads; whatever a package imports, it imports when its peer is made or warmed up."""

from __future__ import annotations

import os
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = "flytekit_ckpt"


class Peer(ABC):
    """One of those that are compared."""

    @abstractmethod
    def save(self, uri: str, folder: Path) -> None:
        """Save a folder."""

    @abstractmethod
    def load(self, uri: str) -> Path:
        """Load what `save` stored, into a folder below `TMPDIR`."""

    def saver(self, uri: str) -> Callable[[Path], None]:
        """Give a function that saves one thing after the other to the same checkpoint."""
        raise NotImplementedError

    def writer(self, uri: str) -> Callable[[bytes], None]:
        """Give a function that stores a few bytes, again and again."""
        raise NotImplementedError

    def read(self, uri: str) -> bytes:
        """Read what `writer` stored, as an attempt that has just started does."""
        raise NotImplementedError


class FlytekitCkpt(Peer):
    """Our package: folders with Flyte 2's API; parts and bytes with flytekit's."""

    def __init__(self) -> None:
        from flytekit_ckpt import SyncCheckpoint, v2

        self._legacy = SyncCheckpoint
        self._new = v2.Checkpoint

    def save(self, uri: str, folder: Path) -> None:
        self._new(uri).save_sync(folder)

    def load(self, uri: str) -> Path:
        # What was loaded lasts as long as the checkpoint, here as with the others. Without a destination nothing is
        # carried forward to it behind the measurement.
        self._loaded = self._new("", uri)
        return Path(self._loaded.load_sync() or "nothing")

    def saver(self, uri: str) -> Callable[[Path], None]:
        return self._legacy(uri).save

    def writer(self, uri: str) -> Callable[[bytes], None]:
        return self._legacy(uri).write

    def read(self, uri: str) -> bytes:
        return self._legacy("", uri).read() or b""


class Flytekit(Peer):
    """flytekit 1, which stores files one by one."""

    def __init__(self) -> None:
        from flytekit.core.checkpointer import SyncCheckpoint

        self._type = SyncCheckpoint

    def save(self, uri: str, folder: Path) -> None:
        self._type(uri).save(folder)

    def load(self, uri: str) -> Path:
        self._loaded = self._type("unused", uri)
        return Path(self._loaded.restore() or "nothing")

    def saver(self, uri: str) -> Callable[[Path], None]:
        return self._type(uri).save

    def writer(self, uri: str) -> Callable[[bytes], None]:
        return self._type(uri).write

    def read(self, uri: str) -> bytes:
        return self._type("unused", uri).read() or b""


class Flyte(Peer):
    """Flyte 2, which stores a gzip-compressed tar."""

    def __init__(self) -> None:
        from flyte import Checkpoint

        self._type = Checkpoint

    def save(self, uri: str, folder: Path) -> None:
        self._type(uri).save_sync(folder)

    def load(self, uri: str) -> Path:
        self._loaded = self._type("unused", uri)
        return Path(self._loaded.load_sync() or "nothing")

    def writer(self, uri: str) -> Callable[[bytes], None]:
        return self._type(uri).save_sync

    def read(self, uri: str) -> bytes:
        return self.load(uri).read_bytes()


class Tar(Peer):
    """The program, without compression, on local files."""

    def save(self, uri: str, folder: Path) -> None:
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "cf", uri, "-C", folder, "."], check=True)

    def load(self, uri: str) -> Path:
        folder = tempfile.mkdtemp()
        subprocess.run(["tar", "xf", uri, "-C", folder], check=True)
        return Path(folder)


class S3fs(Peer):
    """s3fs alone, which stores files one by one."""

    def __init__(self) -> None:
        self._filesystem = s3_filesystem(os.environ)

    def save(self, uri: str, folder: Path) -> None:
        self._filesystem.put(f"{folder}/", f"{uri}/", recursive=True)

    def load(self, uri: str) -> Path:
        folder = tempfile.mkdtemp()
        self._filesystem.get(f"{uri}/", f"{folder}/", recursive=True)
        return Path(folder)

    def writer(self, uri: str) -> Callable[[bytes], None]:
        return lambda content: self._filesystem.pipe_file(uri, content)

    def read(self, uri: str) -> bytes:
        return self._filesystem.cat_file(uri)


PEERS: dict[str, type[Peer]] = {OURS: FlytekitCkpt, "flytekit": Flytekit, "flyte": Flyte, "tar": Tar, "s3fs": S3fs}


def s3_filesystem(environment: Any) -> Any:
    """Connect to the server that the environment names to Flyte's packages."""
    from s3fs import S3FileSystem

    return S3FileSystem(
        endpoint_url=environment["FLYTE_AWS_ENDPOINT"],
        key=environment["FLYTE_AWS_ACCESS_KEY_ID"],
        secret=environment["FLYTE_AWS_SECRET_ACCESS_KEY"],
        use_listings_cache=False,
    )
