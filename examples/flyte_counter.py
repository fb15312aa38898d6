"""The resilient counter of Flyte 2's checkpointing tutorial, which restarts from zero at every retry on flyte alone.

The tutorial tells the first attempt by `flyte.ctx().attempt_number()`. In flyte 2.12 that is no method, and stays 0 in
local runs: here the first attempt is the one that has nothing to restore.

python examples/flyte_counter.py
"""

import flyte

import flytekit_ckpt

flytekit_ckpt.install()

env = flyte.TaskEnvironment(name="checkpoint-tutorial")


@env.task(retries=3)
def resilient_counter(n_iterations: int) -> int:
    checkpoint = flyte.ctx().checkpoint

    # 1. Restore state
    restored_path = checkpoint.load_sync()
    start = 0
    if restored_path:
        # Single-file/bytes checkpoints are restored to a file named 'payload'
        payload = restored_path / "payload"
        if payload.exists():
            start = int(payload.read_bytes().decode())
            print(f"Restoring from iteration {start}")

    # 2. Process and save
    for index in range(start, n_iterations):
        # Simulate a failure halfway through
        if index == n_iterations // 2 and not restored_path:
            raise RuntimeError("Simulated failure on first attempt!")

        print(f"Processing iteration {index}")

        # Save the next starting point
        checkpoint.save_sync(str(index + 1).encode())

    return n_iterations


if __name__ == "__main__":
    run = flyte.with_runcontext(mode="local").run(resilient_counter, n_iterations=10)
    print(f"Final result: {run.outputs()[0]}")
