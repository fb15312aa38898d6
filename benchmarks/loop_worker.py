"""A training loop that saves, in a process of its own: prints as JSON what the saves cost it."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

REST = 1.0
"""Seconds of the loop that are measured before each save."""


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


STEPS = {"Python": python_step, "PyTorch": torch_step}


# Who saves: each gives a function that begins a save, and its future; `None` where it has ended when that returns.
Begin = Callable[[], "Future[Any] | None"]


def ours(uri: str, folder: Path, content: bytes | None, *, thread: bool = False, move: bool = False) -> Begin:
    from flytekit_ckpt import AsyncCheckpoint, storage

    if thread:
        storage.is_shared = lambda _: False
    checkpoint = AsyncCheckpoint(uri)
    if content is not None:
        return lambda: checkpoint.write_async(content)
    if not move:
        return lambda: checkpoint.save_async(folder)

    def give_away() -> Future[None]:
        return checkpoint.save_async(given.pop(), move=True)

    given: list[Path] = []
    give_away.prepare = lambda: given.append(Path(shutil.copytree(folder, folder.with_name("given"))))  # type: ignore[attr-defined]
    return give_away


def sync(uri: str, folder: Path, content: bytes | None) -> Begin:
    from flytekit_ckpt import SyncCheckpoint

    checkpoint = SyncCheckpoint(uri)
    return lambda: checkpoint.save(folder) if content is None else checkpoint.write(content)


def flytekit(uri: str, folder: Path, content: bytes | None) -> Begin:
    from flytekit.core.checkpointer import SyncCheckpoint

    checkpoint = SyncCheckpoint(uri)
    return lambda: checkpoint.save(folder) if content is None else checkpoint.write(content)


def flyte(uri: str, folder: Path, content: bytes | None) -> Begin:
    sys.path.insert(0, str(Path(__file__).parent))
    import peers

    peer = peers.Flyte()
    write = peer.writer(uri)
    return lambda: peer.save(uri, folder) if content is None else write(content)


def torch_dcp(uri: str, folder: Path, content: bytes | None) -> Begin:
    """Save the same number of bytes as tensors, with PyTorch's distributed checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    total = (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if content is None else len(content)
    )
    rows = max(total // (4 * 1024 * 8), 1)
    state = {f"weight{number}": torch.randn(rows, 1024) for number in range(8)} if content is None else {}
    state = state or {"weight": torch.zeros(total // 4)}
    numbers = iter(range(10**6))
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{uri.removeprefix('file://')}.store")
    return lambda: dcp.async_save(state, checkpoint_id=f"{uri}-{next(numbers)}")  # type: ignore[return-value]


def cp(uri: str, folder: Path, content: bytes | None) -> Begin:
    """Copy the folder, as `cp -r` does."""
    import os
    import subprocess

    numbers = iter(range(10**6))

    def copy() -> None:
        target = f"{os.environ['TMPDIR']}/copied-{next(numbers)}"
        subprocess.run(["cp", "-r", str(folder), target], check=True)
        shutil.rmtree(target)

    return copy


SAVERS: dict[str, Callable[..., Begin]] = {
    "ours": ours,
    "ours, move=True": lambda *given: ours(*given, move=True),
    "ours, in a thread": lambda *given: ours(*given, thread=True),
    "ours, synchronous": sync,
    "flytekit": flytekit,
    "flyte": flyte,
    "PyTorch async_save": torch_dcp,
    "cp -r": cp,
}


def measured(step: Callable[[], None], begin: Begin, rounds: int) -> dict[str, float]:
    """Run the loop; give medians of seconds."""
    rates_before, rates_during, held, safe = [], [], [], []
    prepare = getattr(begin, "prepare", lambda: None)
    for number in range(rounds + 1):
        prepare()
        before = rate(step, lambda end=time.perf_counter() + REST: time.perf_counter() < end)
        started = time.perf_counter()
        future = begin()
        returned = time.perf_counter()
        during = 0.0
        ended = threading.Event()
        moments: list[float] = []
        if future is not None:
            future.add_done_callback(
                lambda _, moments=moments, ended=ended: (moments.append(time.perf_counter()), ended.set())
            )
            during = rate(step, lambda ended=ended: not ended.is_set())
            future.result()
        if number:  # the first one warms up
            rates_before.append(before)
            rates_during.append(during)
            held.append(returned - started)
            safe.append((moments[0] if moments else returned) - started)
    median = statistics.median
    slower = [1 - during / before for before, during in zip(rates_before, rates_during, strict=True) if during]
    return {
        "held": median(held),
        "safe": median(safe),
        "slower": median(slower) if slower else 0.0,
    }


def rate(step: Callable[[], None], goes_on: Callable[[], bool]) -> float:
    """Do steps; give how many are done in a second."""
    started = time.perf_counter()
    count = 0
    while goes_on():
        step()
        count += 1
    return count / (time.perf_counter() - started)


def main(loop: str, saver: str, uri: str, folder: str, size: str, rounds: str) -> None:
    content = bytes(range(256)) * (int(size) // 256) if int(size) else None
    step = STEPS[loop]()
    begin = SAVERS[saver](uri, Path(folder), content)
    print(json.dumps(measured(step, begin, int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
