"""Starts a measured process, watches its temporary disk from outside, and checks what it loaded."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import s3_filesystem

WORKER = Path(__file__).with_name("worker.py")
INTERVAL = 0.1


class Place(ABC):
    """Where checkpoints are kept: how to name one, how much it takes, and how to remove everything."""

    name: str
    environment: dict[str, str]

    @abstractmethod
    def uri(self, name: str) -> str: ...

    @abstractmethod
    def size(self, uri: str) -> int: ...

    @abstractmethod
    def clear(self) -> None: ...


class Local(Place):
    """A folder on the local disk."""

    name = "local"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {}

    def uri(self, name: str) -> str:
        return str(self.folder / name / "checkpoint")

    def size(self, uri: str) -> int:
        return sum(file.stat().st_size for file in (Path(uri), *Path(uri).rglob("*")) if file.is_file())

    def clear(self) -> None:
        discard(self.folder)
        self.folder.mkdir()


class S3(Place):
    """A bucket on a server that runs for the benchmark."""

    name = "S3"

    def __init__(self, endpoint: str, key: str, secret: str) -> None:
        self.environment = {
            "FLYTE_AWS_ENDPOINT": endpoint,
            "FLYTE_AWS_ACCESS_KEY_ID": key,
            "FLYTE_AWS_SECRET_ACCESS_KEY": secret,
        }
        self._filesystem = s3_filesystem(self.environment)
        self._filesystem.call_s3("create_bucket", Bucket="benchmark")

    def uri(self, name: str) -> str:
        return f"s3://benchmark/{name}/checkpoint"

    def size(self, uri: str) -> int:
        return sum(found["size"] for found in self._filesystem.find(uri, detail=True).values())

    def clear(self) -> None:
        keys = self._filesystem.find("benchmark")
        if keys:
            self._filesystem.rm(keys)
            # The server collects what was deleted a second later: that is not to slow the next one.
            time.sleep(2)


def discard(folder: Path) -> None:
    """Free the room that a folder takes, and put it out of the way.

    Small files stay until the benchmark ends: ext4 makes new ones slowly while many were deleted a minute ago.
    """
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_size > 1 << 20:
            file.unlink()
    folder.rename(folder.with_name(f"discarded-{uuid.uuid4().hex}"))


def run(
    place: Place, folder: Path, peer: str, action: str, uri: str, source: Path, expected: Path | None
) -> dict[str, Any]:
    """Measure one action in a process of its own, with a `TMPDIR` of its own.

    Parameters
    ----------
    place
        Where the checkpoint is kept.
    folder
        Where to make `TMPDIR`.
    peer, action, uri, source
        For the worker.
    expected
        What a loaded folder must equal.

    Returns
    -------
    dict
        What the worker tells; and `disk`, the peak of bytes on the disk, below what stays there.
    """
    temporary = tempfile.mkdtemp(prefix="tmp-", dir=folder)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, WORKER, peer, action, uri, source],
            env={**os.environ, **place.environment, "TMPDIR": temporary},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        watched = [Path(temporary), *([place.folder] if isinstance(place, Local) else [])]
        with process:
            with contextlib.suppress(BrokenPipeError):
                process.stdout.readline()
                with _watching(process.pid, watched) as peak:
                    process.stdin.write("\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
            if not line:
                process.wait()
                errors.seek(0)
                message = f"{peer} failed to {action} {uri}:\n{errors.read()[-3000:]}"
                raise RuntimeError(message)
            answer: dict[str, Any] = json.loads(line)
            if action != "few bytes":
                answer["disk"] = max(peak["disk"] - _usage(process.pid, watched), 0)
                before = answer.pop("memory_before")
                if peer == "tar":
                    # Which is a process of its own; it takes next to nothing.
                    answer["memory"] = None
                elif answer["memory"] is None:
                    answer["memory"] = max(peak["memory"] - before, 0)
                loaded = answer.pop("loaded")
                if loaded is not None and expected is not None:
                    _check_equal(expected, Path(loaded))
    discard(Path(temporary))
    return answer


def import_seconds(statement: str) -> float:
    """Time a Python that does nothing else."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


@contextlib.contextmanager
def _watching(pid: int, folders: list[Path]) -> Iterator[dict[str, int]]:
    """Keep the peaks of disk and memory use, from another process than the measured one so as not to slow it."""
    peak = {"disk": 0, "memory": 0}
    done = threading.Event()

    def watch() -> None:
        pause = INTERVAL
        while not done.wait(pause):
            started = time.perf_counter()
            peak["disk"] = max(peak["disk"], _usage(pid, folders))
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                peak["memory"] = max(peak["memory"], pages * os.sysconf("SC_PAGE_SIZE"))
            # Ten thousand files take long to look at: that must take little of a core from the measured process.
            pause = max(INTERVAL, 49 * (time.perf_counter() - started))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _usage(pid: int, folders: list[Path]) -> int:
    """Bytes of disk that files below folders take, and those that a process keeps open without a name."""
    # By inode: a file that is moved meanwhile may be met twice.
    found = {status.st_ino: status.st_blocks * 512 for folder in folders for status in _files(folder)}
    device = os.stat(folders[0]).st_dev
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{name}")
                if stat.S_ISREG(status.st_mode) and not status.st_nlink and status.st_dev == device:
                    found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def _files(folder: Path | str) -> Iterator[os.stat_result]:
    # Whatever vanishes while it is looked at is passed over.
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(OSError):
                if item.is_dir(follow_symlinks=False):
                    yield from _files(item.path)
                elif item.is_file(follow_symlinks=False):
                    yield item.stat(follow_symlinks=False)


def _check_equal(expected: Path, loaded: Path) -> None:
    """Refuse the time of a load that did not bring everything."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} for root in (expected, loaded)]
    if names[0] != names[1] or any(not filecmp.cmp(expected / name, loaded / name, shallow=False) for name in names[0]):
        message = f"{loaded} is not what was saved"
        raise RuntimeError(message)
