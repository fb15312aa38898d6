"""Tasks with checkpoints of every kind, one attempt after the other, over a network that fails: does anything pile up?

python -m tests.faults.soak --minutes 5
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import gc
import os
import random
import tempfile
import threading
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import click
import s3fs

from flytekit_ckpt import SyncCheckpoint, storage
from flytekit_ckpt.iterators import IteratorCheckpoint
from flytekit_ckpt.v2 import Checkpoint
from tests import s3_server
from tests.conftest import Place
from tests.faults import proxy
from tests.trees import look, make

TASKS = 4
WARM_UP = 6
"""Rounds after which a process has what it keeps."""


@dataclass(frozen=True)
class Sample:
    """What the process holds between two rounds: bytes of memory, open descriptors, threads."""

    memory: int
    descriptors: int
    threads: int


def sample() -> Sample:
    gc.collect()
    # What is free already: how much of it glibc holds back differs by a hundred megabytes from one moment to the next.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count())


class Task:
    """A task, each of whose attempts resumes from the one before."""

    def __init__(self, place: Place, folder: Path, seed: int) -> None:
        self.place, self.folder = place, folder
        self.random = random.Random(seed)
        # Every attempt saves where the last but one did.
        self.uris = [place.uri() for _ in range(2)]
        self.steps = IteratorCheckpoint(place.uri(), storage_options=place.options)
        self.number = 0
        self.saved: object = None

    def attempt(self) -> None:
        """Load what the last one saved; then save, or die before that, or fork first."""
        destination, source = self.uris[self.number % 2], self.uris[(self.number + 1) % 2]
        storage.at(destination, self.place.settings).remove()
        kind = self.random.choice([SyncCheckpoint, Checkpoint])
        checkpoint = kind(destination, source, storage_options=self.place.options)
        found = checkpoint.restore() if isinstance(checkpoint, SyncCheckpoint) else checkpoint.load_sync()
        assert (None if found is None else look(found)) == self.saved
        self.iterate()
        self.number += 1
        what = self.random.choice(["save", "save", "die", "fork"])
        if what == "die" and found is not None:
            assert checkpoint._resumption.carry_forward._copying is not None
            checkpoint._resumption.carry_forward._copying.result()
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            tree = make(Path(folder), {"step": b"%d" % self.number, "weights": self.random.randbytes(10 << 20)})
            if what == "fork":
                self.in_a_fork(checkpoint, tree)
            elif isinstance(checkpoint, SyncCheckpoint):
                checkpoint.save(tree)
            else:
                checkpoint.save_sync(tree)
            self.saved = look(tree)

    def iterate(self) -> None:
        self.steps.save_to_directory(State(self.number), step=self.number, keep=2)
        assert self.steps.restore_latest(State()).at == self.number

    def in_a_fork(self, checkpoint: SyncCheckpoint | Checkpoint, tree: Path) -> None:
        child = os.fork()
        if not child:
            try:
                checkpoint.save(tree) if isinstance(checkpoint, SyncCheckpoint) else checkpoint.save_sync(tree)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0) == (child, 0)


class State:
    """An iterator."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def get_state(self) -> dict[str, object]:
        return {"at": self.at, "buffer": bytes(100_000)}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def soak(place: Place, folder: Path, *, seconds: float, seed: int = 0) -> Generator[Sample]:
    """Run tasks side by side in this process, and give a sample after every attempt of all of them."""
    tasks = [Task(place, folder, seed + number) for number in range(TASKS)]
    end = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(TASKS) as pool:
        while time.monotonic() < end:
            for done in [pool.submit(task.attempt) for task in tasks]:
                done.result()
            yield sample()


def growth(samples: list[Sample]) -> Sample:
    """Tell by how much the second half of the samples is above the first, each by its median, after the warm-up."""
    steady = samples[WARM_UP:]
    halves = steady[: len(steady) // 2], steady[len(steady) // 2 :]
    names = ("memory", "descriptors", "threads")
    first, second = ([sorted(getattr(s, name) for s in half)[len(half) // 2] for name in names] for half in halves)
    return Sample(*(after - before for before, after in zip(first, second, strict=True)))


@click.command()
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--rate", default=0.05, show_default=True, help="Share of the requests that get a fault.")
def main(minutes: float, rate: float) -> None:
    with tempfile.TemporaryDirectory() as folder, s3_server.serve(Path(folder) / "s3") as server:
        with proxy.serve(server.endpoint, rate=rate, kinds=proxy.QUICK) as faulty:
            options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
            bucket = f"soak-{uuid.uuid4().hex[:8]}"
            s3fs.S3FileSystem(**options).call_s3("create_bucket", Bucket=bucket)
            place = Place(f"s3://{bucket}", {**options, "endpoint_url": faulty.endpoint})
            samples = list(soak(place, Path(folder), seconds=minutes * 60))
        click.echo(f"{len(samples) * TASKS} attempts, {faulty.requests} requests, {len(faulty.history)} of them failed")
        for name, one in (("after the warm-up", samples[WARM_UP]), ("at the end", samples[-1])):
            click.echo(f"{name}: {one.memory >> 20} MiB, {one.descriptors} descriptors, {one.threads} threads")
        grown = growth(samples)
        click.echo(f"growth: {grown.memory / 2**20:.1f} MiB, {grown.descriptors} descriptors, {grown.threads} threads")


if __name__ == "__main__":
    main()
