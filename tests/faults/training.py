"""Trainings that save in the background, as attempts of a task that knows nothing of this. Needs PyTorch."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flytekit_ckpt import attempts, current_checkpoint, install
from flytekit_ckpt.running import Running

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


def live(reports: Connection, train: Callable[[int], list[float]], destination: str, source: str | None) -> None:
    """Train as an attempt of a task that knows nothing of this."""
    install(asynchronous=True)
    attempts.set_runner_checkpoint(Running(destination, source))
    reports.send("begun")
    weights = train(EPOCHS)
    for attempt in attempts.running_attempts():
        assert not list(attempt.finish())
    reports.send(weights)
