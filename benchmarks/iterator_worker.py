"""Saves and restores an iterator with the checkpoints of the module that is named; prints seconds of each, as JSON.

python benchmarks/iterator_worker.py MODULE FOLDER COUNT
"""

import importlib
import json
import sys
import time


class Data:
    """A small state, as loaders have."""

    def __init__(self, position: int = 0) -> None:
        self.state = {
            "position": position,
            "epoch": 2,
            "seed": 7,
            "rate": 0.5,
            "name": "train",
            "done": list(range(10)),
        }

    def get_state(self) -> dict[str, object]:
        return self.state

    def set_state(self, state: dict[str, object]) -> None:
        self.state = state


def main(module: str, folder: str, count: str) -> None:
    kind = importlib.import_module(module).IteratorCheckpoint
    checkpoint, background = kind(f"{folder}/waiting"), kind(f"{folder}/background", async_checkpointing=True)
    saves, restores, held = [], [], []
    # The first ones import what they need.
    for step in range(-3, int(count)):
        started = time.perf_counter()
        checkpoint.save_to_directory(Data(step), step=step + 3, keep=3)
        saved = time.perf_counter()
        data = checkpoint.restore_latest(Data())
        restored = time.perf_counter()
        if data.state["position"] != step:
            raise AssertionError(data.state)
        begun = time.perf_counter()
        background.save_to_directory(Data(step), step=step + 3, keep=3)
        returned = time.perf_counter()
        background.handler.wait_until_finished()
        if step >= 0:
            held.append(returned - begun)
            saves.append(saved - started)
            restores.append(restored - saved)
    print(json.dumps({"save": saves, "restore": restores, "save in the background": held}))


if __name__ == "__main__":
    main(*sys.argv[1:])
