"""The counter of Flyte 1's documentation; its one new line is the import of `flytekit_ckpt.auto`.

pyflyte-migrate run examples/flytekit_counter.py counter --n_iterations 10
"""

from flytekit import current_context, task
from flytekit.exceptions.user import FlyteRecoverableException

import flytekit_ckpt.auto


@task(retries=3)
def counter(n_iterations: int) -> int:
    cp = current_context().checkpoint
    prev = cp.read()
    start = int(prev.decode()) if prev else 0
    print(f"starting at iteration {start}")

    for index in range(start, n_iterations):
        if index > start and index % 4 == 0:
            raise FlyteRecoverableException(f"simulated failure at iteration {index}")
        cp.write(str(index + 1).encode())
    return n_iterations
