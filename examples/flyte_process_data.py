"""The first program of Flyte 2's checkpointing tutorial, which restarts from zero at every retry on flyte alone.

python examples/flyte_process_data.py
"""

import pathlib

import flyte

import flytekit_ckpt.auto

env = flyte.TaskEnvironment(name="process-data")


def work(index: int) -> None:
    print(f"processing {index}")


@env.task(retries=3)
def process_data() -> int:
    checkpoint = flyte.ctx().checkpoint

    # load_sync() returns a Path to the restored state or None
    prev_path: pathlib.Path | None = checkpoint.load_sync()

    start_index = 0
    if prev_path:
        # If we saved bytes or a single file, it appears at prev_path / "payload"
        state_file = prev_path / "payload"
        if state_file.exists():
            start_index = int(state_file.read_text())
            print(f"resuming from index {start_index}")

    for i in range(start_index, 100):
        work(i)
        checkpoint.save_sync(str(i + 1).encode())
    return 100


if __name__ == "__main__":
    flyte.with_runcontext(mode="local").run(process_data)
