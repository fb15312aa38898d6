"""Data to save: the same at every run, whatever its scale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MB = 10**6
CHANGED = 0.02


def make_default(folder: Path, scale: float) -> None:
    """Make what a training run saves, 281 MB: weights, half-zero optimizer state, a log, 500 small files."""
    source = np.random.default_rng(7)
    (folder / "small").mkdir(parents=True)
    with (folder / "weights.bin").open("wb") as weights, (folder / "optimizer.bin").open("wb") as optimizer:
        for count in _blocks(128 * MB * scale / 4):
            weights.write(_normals(source, count) * np.float32(0.02))
            optimizer.write(_normals(source, count) * (source.random(count, np.float32) < 0.5))
    with (folder / "log.jsonl").open("wb") as log:
        step = 0
        while log.tell() < 23 * MB * scale:
            log.write(_log_lines(source, step, 1000))
            step += 1000
    _make_small(source, folder / "small", round(500 * scale))


def make_small(folder: Path, scale: float) -> None:
    """Make 10,000 small files in 20 folders."""
    source = np.random.default_rng(11)
    for number in range(20):
        _make_small(source, folder / f"{number:02}", round(500 * scale))


def make_large(folder: Path, scale: float) -> None:
    """Make one file of 4 GiB of weights."""
    source = np.random.default_rng(13)
    folder.mkdir(parents=True)
    with (folder / "weights.bin").open("wb") as file:
        for count in _blocks(4 * 2**30 * scale / 4):
            file.write(_normals(source, count) * np.float32(0.02))


def make_random(folder: Path, scale: float) -> None:
    """Make 281 MB that no compressor makes smaller."""
    source = np.random.default_rng(17)
    folder.mkdir(parents=True)
    with (folder / "random.bin").open("wb") as file:
        for count in _blocks(281 * MB * scale):
            file.write(source.bytes(count))


def make_zeros(folder: Path, scale: float) -> None:
    """Make 281 MB of zeros, written out: a file with holes would be read faster."""
    folder.mkdir(parents=True)
    with (folder / "zeros.bin").open("wb") as file:
        for count in _blocks(281 * MB * scale):
            file.write(bytes(count))


def make_change(folder: Path, scale: float) -> None:
    """Make the default folder, `state`, and beside it `part` with 2 % of its size."""
    make_default(folder / "state", scale)
    (folder / "part").mkdir()
    count = round(281 * MB * CHANGED * scale / 4)
    (folder / "part" / "adapter.bin").write_bytes(_normals(np.random.default_rng(19), count))


def change(state: Path) -> None:
    """Change 2 % of what `make_default` made, keeping the size and how well it compresses."""
    weights = np.memmap(state / "weights.bin", np.float32, "r+")
    count = round(sum(path.stat().st_size for path in state.rglob("*") if path.is_file()) * CHANGED / 4)
    start = (len(weights) - count) // 2
    weights[start : start + count] *= -1
    weights.flush()


def _blocks(total: float) -> Iterator[int]:
    """Cut into blocks that are cheap to hold in memory."""
    left = round(total)
    while left > 0:
        yield min(left, 4 << 20)
        left -= 4 << 20


def _normals(source: np.random.Generator, count: int) -> np.ndarray:
    return source.standard_normal(count, np.float32)


def _log_lines(source: np.random.Generator, first: int, count: int) -> bytes:
    noise = source.normal(1, 0.05, (count, 2))
    lines = []
    for step, (loss, norm) in enumerate(noise, first):
        rate = 3e-4 * max(0.1, 1 - step / 1e6)
        line = {
            "step": step,
            "loss": loss * 8 / (1 + step) ** 0.1,
            "lr": rate,
            "grad_norm": norm,
            "epoch": step // 5000,
        }
        lines.append(json.dumps(line) + "\n")
    return "".join(lines).encode()


def _make_small(source: np.random.Generator, folder: Path, count: int) -> None:
    """Make files of 1 to 7 KB, of text and of random bytes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(source.integers(1000, 7000, count)):
        if number % 2:
            (folder / f"{number}.bin").write_bytes(source.bytes(size))
        else:
            (folder / f"{number}.json").write_bytes(_log_lines(source, number, 1 + size // 110))
