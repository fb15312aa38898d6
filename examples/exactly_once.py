"""Model and data resume together: however often it is killed, the task learns from every sample once an epoch.

flytekit-ckpt run examples/exactly_once.py:train --retries 20 --preempt-after 1
"""

import json
import random
import tempfile
import time
from pathlib import Path

from flytekit_ckpt import current_context
from flytekit_ckpt.iterators import IteratorCheckpoint


class Samples:
    """Numbers, in an order of its own for every epoch."""

    def __init__(self, count: int, epochs: int) -> None:
        self.random = random.Random(0)
        self.remaining_epochs = epochs
        self.numbers = list(range(count))
        self.remaining: list[int] = []
        self.seen = 0

    def __iter__(self) -> "Samples":
        return self

    def __next__(self) -> int:
        if not self.remaining:
            if not self.remaining_epochs:
                raise StopIteration
            self.remaining_epochs -= 1
            self.remaining = self.random.sample(self.numbers, len(self.numbers))
        self.seen += 1
        return self.remaining.pop()

    def get_state(self) -> dict[str, object]:
        state = {"epochs": self.remaining_epochs, "remaining": self.remaining, "seen": self.seen}
        return {**state, "random": self.random.getstate()}

    def set_state(self, state: dict[str, object]) -> None:
        self.remaining_epochs, self.remaining, self.seen = state["epochs"], state["remaining"], state["seen"]
        self.random.setstate(state["random"])


def train(count: int = 40, epochs: int = 2, seconds: float = 0.03) -> dict[str, int]:
    cp = current_context().checkpoint
    samples = Samples(count, epochs)
    # What the model has learned: how often it has seen each sample.
    model = [0] * count

    folder = Path(tempfile.mkdtemp())
    data = IteratorCheckpoint(folder / "data")
    if cp.restore(folder) is not None:
        model = json.loads((folder / "model.json").read_text())
        data.restore_latest(samples)
    print(f"    starting after {samples.seen} samples")

    for sample in samples:
        time.sleep(seconds)
        model[sample] += 1
        if samples.seen % 4 == 0:
            (folder / "model.json").write_text(json.dumps(model))
            data.save_to_directory(samples, step=samples.seen)
            # Both of them in one object: the next attempt finds both or, of an earlier save, both.
            cp.save(folder)
    return {"least often": min(model), "most often": max(model)}
