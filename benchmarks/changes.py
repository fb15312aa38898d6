"""Measures what a save costs after a part of a folder has changed, and a load of which a part is needed.

    python benchmarks/changes.py --rounds 3

Needs the extras `test` and `benchmark`, and 20 GB of disk below TMPDIR: of a file system that shares blocks (XFS,
Btrfs), or of one that does not. Everything happens in one process, in turn, so that the ratios are those of one machine
in one state. The same bytes copied by the server alone, and two plain requests, are what a save and a load cannot be
faster than. Prints medians as Markdown tables.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import data
import numpy as np

from flytekit_ckpt.entries import SETTLED_NS
from flytekit_ckpt.v2 import Checkpoint

HERE = Path(__file__).parent
LARGE = 4 << 30

Measured = dict[str, list[tuple[float, float]]]
"""Seconds, and CPU seconds of this process, by what was done."""


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--scale", default=1.0, show_default=True, help="Fraction of the data, to try things out.")
@click.option("--disk-only", is_flag=True, help="Leave out S3.")
def main(rounds: int, scale: float, *, disk_only: bool) -> None:
    sys.path.append(str(HERE.parent / "tests"))
    import s3_server
    from peers import s3_filesystem

    with tempfile.TemporaryDirectory(prefix="flytekit_ckpt-benchmark-") as temporary:
        folder = Path(temporary)
        tempfile.tempdir = temporary
        one_place("local disk", folder, str(folder / "checkpoints"), rounds, scale)
        if disk_only:
            return
        with s3_server.serve(folder / "server", capacity="16G") as server:
            names = {"ENDPOINT": server.endpoint, "ACCESS_KEY_ID": server.key, "SECRET_ACCESS_KEY": server.secret}
            os.environ.update({f"FLYTE_AWS_{name}": value for name, value in names.items()})
            store = s3_filesystem(os.environ)
            store.call_s3("create_bucket", Bucket="benchmark")
            root = "s3://benchmark"
            alone = {"the server copies the object": lambda number: copied(store, root, number)}
            one_place("S3", folder, root, rounds, scale, alone)
            measured: Measured = defaultdict(list)
            one_file(measured, folder / "large", store, rounds, scale)
            show("S3, one small file of a large object", measured, "two plain requests")


def one_place(
    place: str,
    folder: Path,
    root: str,
    rounds: int,
    scale: float,
    others: Mapping[str, Callable[[int], object]] = MappingProxyType({}),
) -> None:
    """Measure saves to one place, and in each round what others do with the number of the round."""
    measured: Measured = defaultdict(list)
    # Packages import late, and connect at the first request.
    Checkpoint(f"{root}/warm").save_sync(HERE)
    for number in range(rounds):
        one_round(measured, folder / "source", f"{root}/{number}", scale, in_other_order=number % 2 == 1)
        for what, other in others.items():
            measure(measured, what, functools.partial(other, number))
    show(place, measured, "first save")


def one_round(measured: Measured, source: Path, root: str, scale: float, *, in_other_order: bool) -> None:
    """Save a folder, the same with 2 % changed in two ways, the next attempt's, and one that grows."""
    state = source / "state"
    data.make_default(state, scale)
    part = round(281_000_000 * data.CHANGED * scale)
    (state / "adapter.bin").write_bytes(os.urandom(part))
    checkpoint = Checkpoint(f"{root}/first")
    save = checkpoint.save_sync
    measure(measured, "first save", lambda: save(state))
    measure(measured, "again, nothing changed", lambda: save(state))
    (state / "adapter.bin").write_bytes(os.urandom(part))
    measure(measured, "again, a file of 2 % changed", lambda: save(state))
    data.change(state)
    measure(measured, "again, 2 % in the middle of the largest file changed", lambda: save(state))
    with Checkpoint(f"{root}/next", f"{root}/first", carry_forward=False) as attempt:
        loaded = attempt.load_sync()
        assert loaded is not None
        (loaded / "adapter.bin").write_bytes(os.urandom(part))
        measure(measured, "first save of the next attempt, a file of 2 % changed", lambda: attempt.save_sync(loaded))
    grown = source / "grown"
    trainer = Checkpoint(f"{root}/trainer")
    for number in range(4):
        shutil.copytree(state, grown / f"checkpoint-{number}")
        # Training goes on, and the files become old enough for their times to be trusted.
        time.sleep(SETTLED_NS / 1e9)
        trainer.save_sync(grown)
    shutil.copytree(state, grown / "checkpoint-4")
    alone = Checkpoint(f"{root}/alone")
    last: list[tuple[str, Callable[[], object]]] = [
        ("one new checkpoint beside four that were saved", lambda: trainer.save_sync(grown)),
        ("the new one alone", lambda: alone.save_sync(grown / "checkpoint-4")),
    ]
    # The first one takes memory that a virtual machine may have to get from its host.
    for what, work in reversed(last) if in_other_order else last:
        measure(measured, what, work)
    shutil.rmtree(source)


def copied(store: Any, root: str, number: int) -> None:
    key = f"{root.removeprefix('s3://')}/{number}"
    size = store.info(f"{key}/first")["size"]
    bucket, _, name = key.partition("/")
    upload = {"Bucket": bucket, "Key": f"{name}/copy"}
    upload["UploadId"] = store.call_s3("create_multipart_upload", **upload)["UploadId"]
    source = {"CopySource": f"{key}/first", "CopySourceRange": f"bytes=0-{size - 1}"}
    answer = store.call_s3("upload_part_copy", PartNumber=1, **source, **upload)
    parts = [{"PartNumber": 1, "ETag": answer["CopyPartResult"]["ETag"]}]
    store.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)


def one_file(measured: Measured, source: Path, store: Any, rounds: int, scale: float) -> None:
    """Restore 300 bytes of a checkpoint of 4 GiB."""
    source.mkdir()
    block = np.random.default_rng(3).bytes(8 << 20)
    with (source / "weights.bin").open("wb") as file:
        for _ in range(round(LARGE * scale / len(block)) or 1):
            file.write(block)
    (source / "trainer_state.json").write_bytes(b"{}".ljust(300))
    uri = "s3://benchmark/large"
    Checkpoint(uri).save_sync(source)
    size = store.info(uri)["size"]

    def plain() -> None:
        store.cat_file(uri, start=size - (128 << 10), end=size)
        store.cat_file(uri, start=0, end=1000)

    def restored() -> None:
        with Checkpoint("", uri) as checkpoint:
            loaded = checkpoint.load_sync(only="trainer_state.json")
            assert loaded is not None
            assert (loaded / "trainer_state.json").stat().st_size == 300

    def listed() -> None:
        with Checkpoint("", uri) as checkpoint:
            entries = checkpoint.entries()
            assert entries is not None
            assert len(entries) == 2

    for _ in range(10 * rounds):
        measure(measured, "two plain requests", plain)
        measure(measured, "restore 300 bytes", restored)
        measure(measured, "list the entries", listed)


def measure(measured: Measured, what: str, work: Callable[[], object]) -> None:
    # Nobody waits for what others have written.
    os.sync()
    usage, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    measured[what].append((seconds, cpu))


def show(place: str, measured: Measured, base: str) -> None:
    click.echo(f"\n| {place} | Seconds | CPU seconds | x {base} |\n|---|---|---|---|")
    medians = {
        what: [statistics.median(values) for values in zip(*times, strict=True)] for what, times in measured.items()
    }
    for what, (seconds, cpu) in medians.items():
        click.echo(f"| {what} | {seconds:.3f} | {cpu:.3f} | {seconds / medians[base][0]:.2f} |")


if __name__ == "__main__":
    main()
