"""Runs every trial against every checkpointer, and prints what came of them as a Markdown table."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import click

from tests import s3_server
from tests.conftest import Place, empty
from tests.faults import chains, corruption, crashes, losses
from tests.faults.objects import connected
from tests.faults.outcomes import Outcome, Outcomes
from tests.faults.peers import PEERS
from tests.faults.processes import variables
from tests.faults.trials import Trial, UnsuitedError

SEED = 1

# Damaging a checkpoint takes no process of its own; a loss may take seconds.
SHARES = [
    (crashes.TRIALS, 1.0),
    (corruption.TRIALS, 20.0),
    (losses.TRIALS, 0.1),
    (losses.CONTESTS, 1.0),
    (chains.TRIALS, 6.25),
]


@click.command()
@click.option("--rounds", default=50, show_default=True, help="Kills of each kind; other trials are in proportion.")
@click.option("--only", default="", help="Run the trials whose names contain this.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the table to this file as well.")
def main(rounds: int, only: str, output: Path | None) -> None:
    """Try to lose checkpoints: this package's, flytekit's and flyte's."""
    logging.disable()
    warnings.simplefilter("ignore")
    columns = ["Trial", "Place", "Times", *PEERS]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    click.echo("\n".join(lines))
    with places() as everywhere:
        for trials, share in SHARES:
            for trial in trials:
                for name, place in everywhere.items():
                    if only in trial.name:
                        for row in rows(trial, name, place, max(1, round(rounds * share))):
                            click.echo(row)
                            lines.append(row)
                        if not place.is_local:
                            empty(place)
    if output is not None:
        output.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def places() -> Iterator[dict[str, Place]]:
    """Give a folder on the local disk and a bucket on the S3 server, which this process reaches by its environment."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        s3_server.serve(Path(folder, "s3")) as server,
    ):
        options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
        s3 = Place("s3://checkpoints", options, server)
        connected(s3).call_s3("create_bucket", Bucket="checkpoints")
        os.environ.update(variables(options))
        yield {"local disk": Place(str(Path(folder, "checkpoints"))), "S3": s3}


def rows(trial: Trial, place_name: str, place: Place, rounds: int) -> Iterator[str]:
    """Run a trial against everyone; yields a line of the table for each thing that it looks at."""
    results: dict[str, dict[str, Outcomes]] = {}
    for name, peer in PEERS.items():
        with contextlib.suppress(UnsuitedError):
            for part, outcomes in trial.run(peer, place, rounds, SEED).items():
                results.setdefault(part, {})[name] = outcomes
    for part, by_peer in results.items():
        counts = {sum(outcomes.values()) for outcomes in by_peer.values()}
        times = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        cells = [_cell(by_peer.get(name)) for name in PEERS]
        yield f"| {trial.name}{part} | {place_name} | {times} | {' | '.join(cells)} |"


def _cell(outcomes: Outcomes | None) -> str:
    if outcomes is None:
        return "-"
    return ", ".join(f"{outcomes[outcome]} {outcome.value}" for outcome in Outcome if outcomes[outcome])


if __name__ == "__main__":
    main()
