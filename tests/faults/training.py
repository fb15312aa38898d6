"""Trainings that save in the background and are killed at random moments.

    python -m tests.faults.training --kills 200

Needs PyTorch. Each training is tried again until it comes to its end, and must end with the weights of an uninterrupted
one. One keeps its state as bytes, the other in a folder, whose files it writes anew while their last save goes on.
"""

from __future__ import annotations

import functools
import io
import random
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import click
import torch

from flytekit_ckpt import attempts, current_checkpoint, install
from flytekit_ckpt.running import Running
from tests.conftest import Place
from tests.faults.processes import started

EPOCHS = 400

# The first optimizer of a process imports a great part of PyTorch, which is not to be what is killed.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1).zero_grad()


def train_bytes(epochs: int) -> list[float]:
    """Train, and keep the state as bytes."""
    training = _Training()
    cp = current_checkpoint()
    if (saved := cp.read()) is not None:
        training.load(torch.load(io.BytesIO(saved)))
    while training.epoch < epochs:
        training.step()
        buffer = io.BytesIO()
        torch.save(training.state(), buffer)
        cp.write(buffer.getvalue())
    return training.weights()


def train_folder(epochs: int) -> list[float]:
    """Train, and keep each thing in a file of its own."""
    training = _Training()
    folder = Path(tempfile.mkdtemp())
    cp = current_checkpoint()
    if cp.restore(folder) is not None:
        training.load({path.name: torch.load(path) for path in folder.iterdir()})
    while training.epoch < epochs:
        training.step()
        for name, value in training.state().items():
            torch.save(value, folder / name)
        cp.save(folder)
    return training.weights()


class _Training:
    def __init__(self) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self._inputs = torch.randn(256, 8)
        self._model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9)
        self.epoch = 0

    def step(self) -> None:
        self._optimizer.zero_grad()
        targets = self._inputs.sum(dim=1, keepdim=True)
        torch.nn.functional.mse_loss(self._model(self._inputs), targets).backward()
        self._optimizer.step()
        self.epoch += 1

    def state(self) -> dict[str, object]:
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "epoch": self.epoch,
        }

    def load(self, state: dict[str, object]) -> None:
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        self.epoch = state["epoch"]

    def weights(self) -> list[float]:
        return [value for parameter in self._model.parameters() for value in parameter.flatten().tolist()]


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
            with started(place, _live, train, f"{root}/{attempt}", source) as worker:
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


def _live(reports: Connection, train: Callable[[int], list[float]], destination: str, source: str | None) -> None:
    """Train as an attempt of a task that knows nothing of this."""
    install(asynchronous=True)
    attempts.set_runner_checkpoint(Running(destination, source))
    reports.send("begun")
    weights = train(EPOCHS)
    for attempt in attempts.running_attempts():
        assert not list(attempt.finish())
    reports.send(weights)


@functools.cache
def _uninterrupted(train: Callable[[int], list[float]]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, started(Place(folder), _live, train, f"{folder}/0", None) as worker:
        assert worker.result() == "begun"
        weights: list[float] = worker.result()
        return weights


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True, help="Kills on each storage.")
def main(kills: int) -> None:
    from tests.faults.__main__ import places

    click.echo("| Storage | Kills | Trainings | With the weights of an uninterrupted one |\n|---|---|---|---|")
    with places() as everywhere:
        for name, place in everywhere.items():
            killed, trained, right = interrupted(place, kills, 1)
            click.echo(f"| {name} | {killed} | {trained} | {right} of {trained} |")


if __name__ == "__main__":
    main()
