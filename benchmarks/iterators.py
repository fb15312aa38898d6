"""Compares iterator checkpoints with datarax's, which keep their states with Orbax, on the local disk.

    python benchmarks/iterators.py --datarax .venv-datarax/bin/python

Needs the extra `test`, and a Python that has datarax 0.1.4, which does not install beside flyte. Each round is a
process of each; in a round, a small dict is saved and restored so many times, keeping three steps. What this package
saves is flushed to the disk inside the time. Also lists steps on the S3 server of the tests, and counts the requests.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

HERE = Path(__file__).parent
OURS, DATARAX = "flytekit_ckpt", "datarax"
# Of a save in the background, the time that it holds the caller.
ACTIONS = ("save", "restore", "save in the background")


@click.command(help=__doc__)
@click.option("--datarax", required=True, help="The Python that has datarax.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--count", default=50, show_default=True, help="Saves and restores in a round.")
@click.option("--steps", default=10_000, show_default=True, help="Steps to list on S3.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", help="Folder for the results.")
def main(datarax: str, rounds: int, count: int, steps: int, output: Path) -> None:
    pythons = {OURS: (sys.executable, "flytekit_ckpt.iterators"), DATARAX: (datarax, "datarax.checkpoint.iterators")}
    seconds: dict[str, dict[str, list[float]]] = {peer: {action: [] for action in ACTIONS} for peer in pythons}
    for _ in range(rounds):
        for peer, (python, module) in pythons.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [python, str(HERE / "iterator_worker.py"), module, folder, str(count)]
                found = json.loads(
                    subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).splitlines()[-1]
                )
            for action, each in found.items():
                seconds[peer][action].append(statistics.median(each))
    print("| Medians | flytekit_ckpt | datarax | |\n|---|---|---|---|")
    for action in ACTIONS:
        ours, theirs = (statistics.median(seconds[peer][action]) for peer in pythons)
        print(f"| {action} | {ours * 1000:.2f} ms | {theirs * 1000:.1f} ms | {theirs / ours:.1f}x as fast |")
    listed, requests = listing(steps)
    print(f"\n{steps:,} steps on S3: listed in {listed:.2f} s with {requests} requests")
    record = {"seconds": seconds, "listing": {"steps": steps, "seconds": listed, "requests": requests}}
    (output / "iterators.json").write_text(json.dumps(record, indent=1) + "\n")


def listing(steps: int) -> tuple[float, int]:
    """List so many steps on S3; gives the seconds and the number of requests."""
    sys.path.insert(0, str(HERE.parent))
    import s3fs

    from flytekit_ckpt import storage
    from flytekit_ckpt.iterators import IteratorCheckpoint
    from tests.s3_server import serve

    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
        filesystem = s3fs.S3FileSystem(**options, use_listings_cache=False)
        filesystem.call_s3("create_bucket", Bucket="steps")
        filesystem.pipe({f"s3://steps/ckpt-{step}": b"" for step in range(steps)}, batch_size=64)
        requests: list[str] = []
        # The same filesystem: fsspec keeps one for equal options.
        own = storage.at("s3://steps", storage.Settings(options))._filesystem  # type: ignore[attr-defined]
        own.s3.meta.events.register("before-call.s3", lambda model, **_: requests.append(model.name))
        checkpoint = IteratorCheckpoint("s3://steps", storage_options=options)
        started = time.perf_counter()
        found = checkpoint.list_checkpoints()
        seconds = time.perf_counter() - started
    if len(found) != steps or set(requests) != {"ListObjectsV2"}:
        raise AssertionError((len(found), requests))
    return seconds, len(requests)


if __name__ == "__main__":
    main()
