"""What never starting from zero costs on S3: saves with a home, and attempts that have no checkpoint.

    python benchmarks/attempts.py

Needs the extra `test`. Saves of 100 bytes with a home and without take turns; so do processes that begin as an attempt
of Flyte's whose predecessor has saved nothing, with the import line and without.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

HERE = Path(__file__).parent

# As Flyte's entry point would, before it imports the task's module, which imports what tasks import.
START = """
import sys
sys.argv = ["pyflyte-execute", "--checkpoint-path", "s3://bucket/a/2", "--prev-checkpoint", "s3://bucket/a/1"]
import time
started = time.perf_counter()
{line}
import asyncio, http.client, json, logging, tarfile, unittest, xml.dom.minidom
print(time.perf_counter() - started)
"""
LINES = {"without": "", "with the import line": "import flytekit_ckpt.auto", "and s3fs": "import s3fs"}


@click.command(help=__doc__)
@click.option("--rounds", default=15, show_default=True, help="Processes of each kind.")
@click.option("--count", default=200, show_default=True, help="Saves of each kind.")
def main(rounds: int, count: int) -> None:
    sys.path.insert(0, str(HERE.parent))
    import s3fs

    from tests import s3_server

    with tempfile.TemporaryDirectory() as folder, s3_server.serve(Path(folder) / "server") as server:
        options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
        s3fs.S3FileSystem(**options).call_s3("create_bucket", Bucket="bucket")
        saves = saving(options, count)
        variables = dict(zip(("ENDPOINT", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), options.values(), strict=True))
        environment = {**os.environ, **{f"FLYTE_AWS_{name}": value for name, value in variables.items()}}
        starts: dict[str, list[float]] = {name: [] for name in LINES}
        for _ in range(rounds):
            for name, line in LINES.items():
                command = [sys.executable, "-c", START.format(line=line)]
                starts[name].append(float(subprocess.check_output(command, text=True, env=environment)))
    print("| Medians | ms |\n|---|---|")
    for title, times in [*saves.items(), *((f"start of an attempt, {name}", found) for name, found in starts.items())]:
        print(f"| {title} | {statistics.median(times) * 1000:.1f} |")


def saving(options: dict[str, str], count: int) -> dict[str, list[float]]:
    """Give the seconds of each save."""
    from flytekit_ckpt import running
    from flytekit_ckpt.running import Running
    from flytekit_ckpt.v2 import Checkpoint

    seconds = {}
    made = {}
    for title, home in (("save of 100 bytes", None), ("the same with a home", "s3://bucket/home")):
        with running.as_running(Running(None, None, "p", "d", "r", "t", "n", 0)):
            made[title] = Checkpoint(f"s3://bucket/{len(made)}", storage_options=options, home=home)
        made[title].save_sync(bytes(100))
        seconds[title] = [0.0] * count
    for number in range(count):
        for title, checkpoint in made.items():
            started = time.perf_counter()
            checkpoint.save_sync(bytes(100))
            seconds[title][number] = time.perf_counter() - started
    return seconds


if __name__ == "__main__":
    main()
