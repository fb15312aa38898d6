"""Trainings that save in the background and are killed at random moments.

    python -m tests.faults.interrupted --kills 200

Needs PyTorch. Each training is tried again until it comes to its end, and must end with the weights of an uninterrupted
one. One keeps its state as bytes, the other in a folder, whose files it writes anew while their last save goes on.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable

import click

from tests.conftest import Place
from tests.faults.__main__ import places
from tests.faults.processes import preload, started
from tests.faults.training import live, train_bytes, train_folder


def interrupted(place: Place, kills: int, seed: int) -> tuple[int, int, int]:
    """Train until it has been killed so often; give the kills, the trainings, and those with the right weights."""
    chosen = random.Random(seed)
    # An attempt that is never given the time to save once comes to no end.
    least = 0.3 if place.is_local else 1.2
    killed, trained, right = 0, 0, 0
    while killed < kills:
        train = (train_bytes, train_folder)[trained % 2]
        root, attempt, weights = place.uri(), 0, None
        while weights is None:
            source = f"{root}/{attempt - 1}" if attempt else None
            with started(place, live, train, f"{root}/{attempt}", source) as worker:
                assert worker.result() == "begun"
                if worker.reports.poll(chosen.uniform(least, least + 1.0)):
                    weights = worker.result()
                else:
                    worker.kill()
                    killed += 1
            attempt += 1
        trained += 1
        right += weights == _uninterrupted(train)
    return killed, trained, right


@functools.cache
def _uninterrupted(train: Callable[[int], list[float]]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, started(Place(folder), live, train, f"{folder}/0", None) as worker:
        assert worker.result() == "begun"
        weights: list[float] = worker.result()
        return weights


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True, help="Kills on each storage.")
def main(kills: int) -> None:
    preload("tests.faults.training")
    click.echo("| Storage | Kills | Trainings | With the weights of an uninterrupted one |\n|---|---|---|---|")
    with places() as everywhere:
        for name, place in everywhere.items():
            killed, trained, right = interrupted(place, kills, 1)
            click.echo(f"| {name} | {killed} | {trained} | {right} of {trained} |")


if __name__ == "__main__":
    main()
