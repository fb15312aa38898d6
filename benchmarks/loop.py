"""Measures what saves cost a training loop: how long each holds it, and how much slower it goes on meanwhile.

    python benchmarks/loop.py

Needs the extras `test` and `benchmark`, and PyTorch. They save in turn, each in a process of its own that runs a
loop: of pure Python, of PyTorch on one thread, or one that waits, as for a GPU. `safe` is the time until the save is
stored. The S3 server runs on the same cores. With `--one-core`, everything but the server runs on one.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import data
import measure
from compare import serve

HERE = Path(__file__).parent
MB = 10**6

FOLDER, BYTES = "folder of 281 MB", "bytes of 1 MB"
EVERYONE = [
    "AsyncCheckpoint",
    "AsyncCheckpoint, move=True",
    "AsyncCheckpoint, in a thread",
    "SyncCheckpoint",
    "flytekit",
    "flyte",
    "PyTorch async_save",
    "cp -r",
]
# PyTorch's and cp's go to the local disk only, and bytes are neither moved nor copied.
LOCAL_ONLY = {"PyTorch async_save", "cp -r"}
FOLDER_ONLY = {"AsyncCheckpoint, move=True", "cp -r"}


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True, help="Processes of each.")
@click.option("--saves", default=3, show_default=True, help="Saves in each process.")
@click.option("--loops", default="Python,PyTorch,waiting", show_default=True)
@click.option("--only", default=",".join(["local", "S3"]), show_default=True, help="Where to.")
@click.option("--savers", default=";".join(EVERYONE), show_default=False, help="Who, separated by semicolons.")
@click.option("--scale", default=1.0, show_default=True, help="Fraction of the data, to try things out.")
@click.option("--one-core", is_flag=True, help="Have loop and saver share one core.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", help="Folder for the results.")
def main(
    rounds: int, saves: int, loops: str, only: str, savers: str, scale: float, *, one_core: bool, output: Path
) -> None:
    found: dict[tuple[str, str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="flytekit_ckpt-loop-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        data.make_default(folder / "source", scale)
        (folder / "local").mkdir()
        places: list[measure.Place] = [measure.Local(folder / "local")]
        if "S3" in only:
            places.append(stack.enter_context(serve(folder / "server"))[0])
        contents = {FOLDER: str(folder / "source"), BYTES: str(round(MB * scale))}
        for number in range(rounds):
            for place in places:
                if place.name not in only.split(","):
                    continue
                for loop in loops.split(","):
                    for what, content in contents.items():
                        for saver in savers.split(";"):
                            is_left_out = saver in LOCAL_ONLY and place.name != "local"
                            if is_left_out or (saver in FOLDER_ONLY and what == BYTES):
                                continue
                            uri = place.uri(f"{number}-{loop}-{EVERYONE.index(saver)}-{what[:5]}")
                            answer = run(place, folder, loop, saver, uri, content, saves, one_core=one_core)
                            found.setdefault((place.name, loop, what, saver), []).append(answer)
                            print(place.name, loop, what, saver, answer, file=sys.stderr)
                        place.clear()
    rows = [
        {"place": place, "loop": loop, "what": what, "saver": saver, "rounds": answers, **medians(answers)}
        for (place, loop, what, saver), answers in found.items()
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"loop{'-one-core' if one_core else ''}.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("| Storage | Loop | What | Who | loop held, ms | safe after, s | loop slower | memory, MB | scratch, MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['place']} | {row['loop']} | {row['what']} | {row['saver']} | {row['held'] * 1000:.1f} "
            f"| {row['safe']:.3f} | {row['slower']:.0%} | {row['memory'] / 1000:.0f} | {row['scratch'] / MB:.0f} |"
        )


def medians(answers: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(answer[name] for answer in answers) for name in answers[0]}


def run(
    place: measure.Place, folder: Path, loop: str, saver: str, uri: str, content: str, saves: int, *, one_core: bool
) -> dict[str, float]:
    """Run one process; adds the peak of what lay in its `TMPDIR`, in bytes."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "loop_worker.py"), loop, saver, uri, content, str(saves)]
    if one_core:
        command = ["taskset", "-c", "0", *command]
    environment = {**os.environ, **place.environment, "TMPDIR": str(scratch)}
    with watched(scratch) as seen:
        printed = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    measure.discard(scratch)
    if printed.returncode:
        raise SystemExit(printed.stderr)
    answer: dict[str, float] = json.loads(printed.stdout.splitlines()[-1])
    return {**answer, "scratch": max(seen, default=0)}


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Look again and again how many bytes a folder takes."""
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(measure.INTERVAL):
            # A folder may be removed while it is looked at.
            with contextlib.suppress(FileNotFoundError):
                seen.append(sum(size_of(path) for path in folder.rglob("*")))

    def size_of(path: Path) -> Any:
        try:
            return path.lstat().st_size if path.is_file() else 0
        except OSError:
            # Removed meanwhile.
            return 0

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
