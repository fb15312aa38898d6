"""A training loop that saves, in a process of its own: prints as JSON what the saves cost it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

REST = 1.0
"""Seconds of the loop that are measured before each save."""

Content = Path | bytes
"""What is saved: a folder, or bytes."""

Begin = Callable[[], "Future[Any] | None"]
"""Begins a save; gives its future, `None` if it has ended."""


# The loops: each gives a function that does one step ------------------------------------------------------------------


def python_step() -> Callable[[], None]:
    def step() -> None:
        total = 0
        for number in range(20_000):
            total += number * number

    return step


def torch_step() -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batch = torch.randn(64, 256)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return step


def waiting_step() -> Callable[[], None]:
    """Leave the cores to others, as a loop does whose work is done by a GPU."""
    return lambda: time.sleep(0.002)


STEPS = {"Python": python_step, "PyTorch": torch_step, "waiting": waiting_step}


# Who saves ------------------------------------------------------------------------------------------------------------


class Saver:
    """Someone who saves the same again and again."""

    def __init__(self, uri: str, content: Content) -> None:
        self.uri = uri
        self.content = content

    def prepare(self) -> None:
        """Do what is to be done before each save, and is not measured."""

    def begin(self) -> Future[Any] | None:
        """Begin a save."""
        raise NotImplementedError

    def memory(self) -> int:
        """Peak of the memory of this process and of those that save for it, in kB."""
        return peak("self")


def peak(process: str | int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


class Ours(Saver):
    """AsyncCheckpoint: bytes are kept, a folder is copied."""

    def __init__(self, uri: str, content: Content) -> None:
        super().__init__(uri, content)
        from flytekit_ckpt import AsyncCheckpoint

        self.checkpoint = AsyncCheckpoint(uri)

    def begin(self) -> Future[Any] | None:
        if isinstance(self.content, bytes):
            return self.checkpoint.write_async(self.content)
        return self.checkpoint.save_async(self.content)

    def memory(self) -> int:
        process = self.checkpoint._saves._process
        return super().memory() + (peak(process._process.pid) if process is not None else 0)


class OursMoved(Ours):
    """AsyncCheckpoint, which is given the folder."""

    def prepare(self) -> None:
        assert isinstance(self.content, Path)
        self.given = Path(shutil.copytree(self.content, Path(os.environ["TMPDIR"], "given")))

    def begin(self) -> Future[Any] | None:
        return self.checkpoint.save_async(self.given, move=True)


class OursInThread(Ours):
    """AsyncCheckpoint without a process of its own."""

    def __init__(self, uri: str, content: Content) -> None:
        from flytekit_ckpt import storage

        storage.is_shared = lambda _: False
        super().__init__(uri, content)


class Synchronous(Saver):
    """SyncCheckpoint, which has the API of flytekit's."""

    package = "flytekit_ckpt"

    def __init__(self, uri: str, content: Content) -> None:
        super().__init__(uri, content)
        import importlib

        self.checkpoint = importlib.import_module(self.package).SyncCheckpoint(uri)

    def begin(self) -> None:
        if isinstance(self.content, bytes):
            self.checkpoint.write(self.content)
        else:
            self.checkpoint.save(self.content)


class Flytekit(Synchronous):
    """flytekit's SyncCheckpoint."""

    package = "flytekit.core.checkpointer"


class Flyte(Saver):
    """flyte's Checkpoint."""

    def __init__(self, uri: str, content: Content) -> None:
        super().__init__(uri, content)
        from flyte import Checkpoint

        self.checkpoint = Checkpoint(uri)

    def begin(self) -> None:
        self.checkpoint.save_sync(self.content)


class PyTorch(Saver):
    """PyTorch's distributed checkpoint, of tensors of as many bytes: it snapshots them in memory."""

    def __init__(self, uri: str, content: Content) -> None:
        super().__init__(uri, content)
        import torch
        import torch.distributed.checkpoint as dcp

        if isinstance(content, bytes):
            self.state = {"weight": torch.randn(len(content) // 4)}
        else:
            total = sum(file.stat().st_size for file in content.rglob("*") if file.is_file())
            self.state = {f"weight{number}": torch.randn(total // 32) for number in range(8)}
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        torch.distributed.init_process_group("gloo", f"file://{uri}.store", rank=0, world_size=1)
        self._save = dcp.async_save
        self._number = 0

    def begin(self) -> Future[Any] | None:
        self._number += 1
        begun: Future[Any] = self._save(self.state, checkpoint_id=f"{self.uri}-{self._number}")
        return begun


class Copy(Saver):
    """`cp -r`, for scale: what a snapshot would take that way."""

    def prepare(self) -> None:
        shutil.rmtree(Path(os.environ["TMPDIR"], "copied"), ignore_errors=True)

    def begin(self) -> None:
        subprocess.run(["cp", "-r", str(self.content), f"{os.environ['TMPDIR']}/copied"], check=True)


SAVERS: dict[str, type[Saver]] = {
    "AsyncCheckpoint": Ours,
    "AsyncCheckpoint, move=True": OursMoved,
    "AsyncCheckpoint, in a thread": OursInThread,
    "SyncCheckpoint": Synchronous,
    "flytekit": Flytekit,
    "flyte": Flyte,
    "PyTorch async_save": PyTorch,
    "cp -r": Copy,
}


def measured(step: Callable[[], None], saver: Saver, rounds: int) -> dict[str, list[float]]:
    """Run the loop; give of each save the seconds that it held the loop, those until it was safe, and the slow-down."""
    found: dict[str, list[float]] = {"held": [], "safe": [], "slower": []}
    for number in range(rounds + 1):
        if isinstance(saver.content, Path):
            # What has not changed since the last save would not be saved again.
            for path in saver.content.rglob("*"):
                path.touch()
        saver.prepare()
        end = time.perf_counter() + REST
        before = rate(step, lambda end=end: time.perf_counter() < end)
        started = time.perf_counter()
        future = saver.begin()
        held = safe = time.perf_counter() - started
        during = before
        if future is not None:
            ended = threading.Event()
            moments: list[float] = []
            future.add_done_callback(lambda _, moments=moments: moments.append(time.perf_counter()))
            future.add_done_callback(lambda _, ended=ended: ended.set())
            during = rate(step, lambda ended=ended: not ended.is_set())
            future.result()
            safe = moments[0] - started
        if number:  # the first one warms up
            for name, value in (("held", held), ("safe", safe), ("slower", 1 - during / before)):
                found[name].append(value)
    return found


def rate(step: Callable[[], None], goes_on: Callable[[], bool]) -> float:
    """Do steps, at least one; give how many are done in a second."""
    started = time.perf_counter()
    count = 0
    while not count or goes_on():
        step()
        count += 1
    return count / (time.perf_counter() - started)


def main(loop: str, name: str, uri: str, content: str, rounds: str) -> None:
    # Bytes are told by their number.
    given: Content = os.urandom(int(content)) if content.isdigit() else Path(content)
    step = STEPS[loop]()
    saver = SAVERS[name](uri, given)
    medians = {name: statistics.median(values) for name, values in measured(step, saver, int(rounds)).items()}
    print(json.dumps({**medians, "memory": saver.memory()}))
    # What a saver leaves running is not waited for.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
