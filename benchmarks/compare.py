"""Compares this package with flytekit, flyte, tar and s3fs, on the local disk and on S3.

    python benchmarks/compare.py --rounds 3

Needs the extras `test` and `benchmark`, and for the case `large` 15 GB of disk below TMPDIR and 12 GB of memory.

Every measurement is a process of its own, and in each round everyone has a turn, so that a noisy machine is noisy for
all. Imports and the connection to S3 are made before the clock starts, and the source is in the page cache. What is
written to the local disk is flushed before the clock stops, alike for everyone. Loaded folders are compared with the
saved ones, byte for byte. Prints medians, and writes them, every single measurement and a chart to --output.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import measure
from cases import CASES, IMPORTS, LOCAL, Case
from chart import draw
from peers import OURS, PEERS
from report import IMPORT, LOAD_THEIRS, Results, machine, tables, target_table, targets

HERE = Path(__file__).parent
IMPORT_REPETITIONS = 15


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--cases", default=",".join([*CASES, IMPORT]), show_default=True, help="Names, separated by commas.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Who takes part.")
@click.option("--scale", default=1.0, show_default=True, help="Fraction of the data, to try things out.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", help="Folder for the results.")
def main(rounds: int, cases: str, peers: str, scale: float, output: Path) -> None:
    names = cases.split(",")
    unknown = set(names) - {*CASES, IMPORT}
    if unknown:
        message = f"there are no cases {', '.join(sorted(unknown))}"
        raise click.UsageError(message)
    results = Results()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flytekit_ckpt-benchmark-") as temporary:
        folder = Path(temporary)
        (folder / LOCAL).mkdir()
        with contextlib.ExitStack() as stack:
            places: list[measure.Place] = [measure.Local(folder / LOCAL)]
            server = "none"
            if set(names) != {IMPORT}:
                s3, server = stack.enter_context(serve(folder / "server"))
                places.append(s3)
            for name in names:
                if name == IMPORT:
                    compare_imports(results)
                else:
                    compare(results, name, CASES[name], places, rounds, scale, folder, peers.split(","))
        about = {**machine(folder, server), "rounds": rounds, "scale": scale, "minutes": minutes(started)}
    found = targets(results)
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": about,
        "targets": [vars(target) for target in found],
        "medians": results.medians(),
        "measurements": results.records,
    }
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    if "default" in names:
        draw(results, output / "chart.svg")
    print(f"Medians of {rounds} rounds at scale {scale:g}. {about['cpu']}, {about['cores']} cores, ", end="")
    print(f"Python {about['python']}, {about['s3_server']}, {about['date']}, {about['minutes']} minutes.")
    print(tables(results), target_table(found), sep="\n\n")


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[measure.Place, str]]:
    """Start the S3 server that the tests run against."""
    sys.path.append(str(HERE.parent / "tests"))
    import s3_server

    with s3_server.serve(folder, capacity="12G") as server:
        yield measure.S3(server.endpoint, server.key, server.secret), server.kind


def compare(
    results: Results,
    name: str,
    case: Case,
    places: list[measure.Place],
    rounds: int,
    scale: float,
    folder: Path,
    wanted: list[str],
) -> None:
    """Run all rounds of a case."""
    source = folder / "source"
    if case.make is not None:
        case.make(source, scale)
    for number in range(min(rounds, case.most_rounds)):
        for place in places:
            peers = [peer for peer in case.peers.get(place.name, ()) if peer in wanted]
            # Who comes first differs from round to round.
            for turn in range(len(peers)):
                peer = peers[(turn + number) % len(peers)]
                for action, at, answer in take_turn(case, place, peer, folder, source):
                    results.add((name, place.name, action), at, number, **answer)
                    show(name, place.name, action, at, answer["seconds"])
                place.clear()
    if source.exists():
        measure.discard(source)


def take_turn(
    case: Case, place: measure.Place, peer: str, folder: Path, source: Path
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Let a peer do a case's actions; give each action, who did it, and what it took."""
    for action in case.actions:
        # A load takes what was saved; everything else starts from nothing.
        uri = place.uri(peer if action in ("save", "load") else f"{peer}-{action.replace(' ', '-')}")
        answer = measure.run(place, folder, peer, action, uri, source, source)
        if action == "few bytes":
            for single, seconds in answer.items():
                yield single, peer, {"seconds": seconds}
            continue
        yield action, peer, answer if action == "load" else {**answer, "size": place.size(uri)}
        if action == "load" and peer == "flyte":
            yield LOAD_THEIRS, OURS, measure.run(place, folder, OURS, "load", uri, source, source)


def compare_imports(results: Results) -> None:
    """Time imports, in turn, each against a Python that imports nothing right before."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for statement in IMPORTS.values():
        measure.import_seconds(statement)
    for _ in range(IMPORT_REPETITIONS):
        for name, statement in IMPORTS.items():
            nothing = measure.import_seconds("pass")
            seconds[name].append(measure.import_seconds(statement) - nothing)
    for name, values in seconds.items():
        for number, value in enumerate(values):
            results.add((IMPORT, "", IMPORT), name, number, seconds=value)
        show(IMPORT, "", IMPORT, name, statistics.median(values))


def show(case: str, place: str, action: str, peer: str, seconds: float) -> None:
    click.echo(f"{case:8} {place:6} {action:20} {peer:14} {seconds:9.4f} s", err=True)


def minutes(started: float) -> float:
    return round((time.monotonic() - started) / 60, 1)


if __name__ == "__main__":
    main()
