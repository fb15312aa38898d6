"""The counter of Flyte's documentation: a task that checkpoints every iteration, fails now and then, and resumes.

flytekit-ckpt run examples/counter.py:counter n_iterations=10 --retries 10 --preempt-after 1
"""

import time

from flytekit_ckpt import FlyteRecoverableException, current_context


def counter(n_iterations: int, fail_every: int = 4, seconds: float = 0.3) -> int:
    cp = current_context().checkpoint
    prev = cp.read()
    start = int(prev.decode()) if prev else 0
    print(f"    starting at iteration {start}")

    for index in range(start, n_iterations):
        if fail_every and index > start and index % fail_every == 0:
            raise FlyteRecoverableException(f"simulated failure at iteration {index}")
        time.sleep(seconds)
        cp.write(str(index + 1).encode())
    return n_iterations
