"""Saves and loads the same folder with flytekit, flyte and this package, side by side, on local disk.

    python benchmarks/compare.py --rounds 3

Every measurement is a process of its own; the packages take turns, so that a noisy machine is noisy for all of them.
Prints medians, as a table for the README.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

PACKAGES = ("flytekit", "flyte", "flytekit_ckpt")
EXPONENTS = bytes(0x3B + byte % 4 for byte in range(256))


def make_folder(folder: Path, megabytes: int) -> None:
    """Make what a training run saves: weights, half-zero optimizer state, a JSON log, small files."""
    source = random.Random(7)
    folder.mkdir()
    for name in ("weights", "optimizer"):
        with (folder / f"{name}.bin").open("wb") as file:
            for _ in range(megabytes):
                # As in trained weights, the exponents of floats hardly vary, and their digits do.
                floats = bytearray(source.randbytes(1 << 20))
                floats[3::4] = floats[3::4].translate(EXPONENTS)
                if name == "optimizer":
                    # Half of the values are zero, in runs of one to eight floats.
                    start = 0
                    while start < len(floats):
                        length = 4 * source.randint(1, 8)
                        floats[start : start + length] = bytes(length)
                        start += 2 * length
                file.write(floats[: 1 << 20])
    with (folder / "log.json").open("w") as log:
        for step in range(1800 * megabytes):
            json.dump({"step": step, "loss": source.random(), "learning_rate": 0.001}, log)
            log.write("\n")
    (folder / "small").mkdir()
    for number in range(500):
        (folder / "small" / f"{number}.txt").write_bytes(source.randbytes(2000))


def measure(package: str, action: str, source: str, target: str) -> None:
    """Do one thing in this process, and print seconds and peak memory above import as JSON."""
    if package == "flytekit":
        from flytekit.core.checkpointer import SyncCheckpoint as Checkpoint
        from flytekit.core.context_manager import FlyteContextManager

        FlyteContextManager.current_context()
    elif package == "flyte":
        import flyte.io  # noqa: F401 - flyte imports it when it is first needed
        from flyte import Checkpoint
    else:
        from flytekit_ckpt.v2 import Checkpoint
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if action == "save":
        checkpoint = Checkpoint(target)
        (checkpoint.save if package == "flytekit" else checkpoint.save_sync)(Path(source))
        os.sync()
    else:
        checkpoint = Checkpoint("unused", source)
        (checkpoint.restore if package == "flytekit" else checkpoint.load_sync)()
        os.sync()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "megabytes": peak / 1024}))


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--megabytes", default=128, show_default=True, help="Size of the weights, and of the optimizer state.")
@click.option("--measure", "one", nargs=4, hidden=True)
def main(rounds: int, megabytes: int, one: tuple[str, str, str, str] | None) -> None:
    if one:
        measure(*one)
        return
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="flytekit_ckpt-benchmark-") as name:
        folder = Path(name)
        make_folder(folder / "source", megabytes)
        for number in range(rounds):
            for package in PACKAGES:
                stored = folder / f"{package}-{number}" / "checkpoint"
                for action, arguments in (("save", (folder / "source", stored)), ("load", (stored, "-"))):
                    command = [sys.executable, __file__, "--measure", package, action, *map(str, arguments)]
                    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    results.setdefault((action, package), []).append(json.loads(answer.splitlines()[-1]))
                shutil.rmtree(stored.parent)
        size = sum(path.stat().st_size for path in (folder / "source").rglob("*"))
    print(f"{size / 1e6:.0f} MB, local disk, medians of {rounds} rounds, {os.cpu_count()} cores, ", end="")
    print(f"Python {platform.python_version()}\n")
    print("| | " + " | ".join(PACKAGES) + " |")
    print("|---" * (len(PACKAGES) + 1) + "|")
    for action in ("save", "load"):
        for unit, form in (("seconds", "{:.2f} s"), ("megabytes", "{:.0f} MB")):
            row = [form.format(statistics.median(r[unit] for r in results[action, package])) for package in PACKAGES]
            label = f"{action} the folder" if unit == "seconds" else f"{action}: peak memory above import"
            print(f"| {label} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
