"""An attempt whose saves go on in the background ends when they are safe, or fails so that it is tried again."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from flytekit_ckpt import SyncCheckpoint, runner
from flytekit_ckpt.errors import FlyteRecoverableException
from tests.conftest import Place, Task
from tests.platforms import Flyte1, Flyte2, Platform, needs

# Saves take some time; those of bytes that begin with an x fail. Nothing else makes them known to the task.
BEGINNING = """
import os, time
import flytekit_ckpt.auto
from flytekit_ckpt import asynchronous, parts
from flytekit_ckpt.errors import StorageError

called = asynchronous.AsynchronousSaves._called

def slowly(saves, contents, callback):
    time.sleep(0.2)
    if any((content.content if isinstance(content, parts.Bytes) else content)[:1] == b"x" for content in contents):
        raise StorageError("the disk is broken")
    return called(saves, contents, callback)

asynchronous.AsynchronousSaves._called = slowly
"""

FLYTE_1 = """
from flytekit import current_context, task
from flytekit.exceptions.user import FlyteRecoverableException

@task(retries=9)
def work(n: int) -> int:
    checkpoint = current_context().checkpoint
    print(f"kind {type(checkpoint).__name__}")
    start = int(checkpoint.read() or 0)
    print(f"starting at {start}")
    save = checkpoint.write
"""

FLYTE_2 = """
import flyte

env = flyte.TaskEnvironment(name="ends")

class FlyteRecoverableException(Exception):
    pass

@env.task(retries=9)
def work(n: int) -> int:
    checkpoint = flyte.ctx().checkpoint
    print(f"kind {type(checkpoint).__name__}")
    found = checkpoint.load_sync()
    start = int(found.read_bytes()) if found else 0
    print(f"starting at {start}")
    save = checkpoint.save_sync
"""

# What the task does then, how its attempt ends, and what the next one starts at.
BODIES = {
    "ends at once": ("save(b'5')", "succeeded", 5),
    "raises": ("save(b'5'); raise ValueError('its own')", "failed", 5),
    "raises for another attempt": ("save(b'5'); raise FlyteRecoverableException('its own')", "recoverable", 5),
    "its last save fails": ("save(b'5'); time.sleep(1); save(b'x')", "recoverable", 5),
    "a later save heals": ("save(b'x'); save(b'5')", "succeeded", 5),
    "the next save says so": ("save(b'x'); time.sleep(1); save(b'5')", "recoverable", 0),
}


@needs("flytekit", "flyte")
@pytest.mark.parametrize("platform", [Flyte1, Flyte2])
@pytest.mark.parametrize("body", BODIES)
def test_an_attempt_ends_when_its_saves_are_safe(tmp_path: Path, platform: type[Platform], body: str) -> None:
    code, outcome, saved = BODIES[body]
    beginning = FLYTE_1 if platform is Flyte1 else FLYTE_2
    file = tmp_path / f"ends_{uuid.uuid4().hex}.py"
    file.write_text(f"{BEGINNING}{beginning}    {code}\n    return start\n")
    environment = {"FLYTEKIT_CKPT_ASYNCHRONOUS": "1"}
    run = platform(file, "work", {"n": 1}, str(tmp_path / "checkpoints"), tmp_path / "io", environment=environment)
    attempt = run.attempt()
    # On Flyte 2 every error is answered with another attempt.
    expected = "recoverable" if platform is Flyte2 and outcome == "failed" else outcome
    assert attempt.outcome == expected, attempt.lines
    assert "kind AsyncCheckpoint" in attempt.lines
    if outcome == "recoverable" and "its own" not in code:
        assert any("the disk is broken" in line for line in attempt.lines)
    assert int(SyncCheckpoint("", run.destination(1)).read() or 0) == saved


@needs("flytekit")
def test_an_asynchronous_task_of_flytekits_is_finished_too(tmp_path: Path) -> None:
    file = tmp_path / f"ends_{uuid.uuid4().hex}.py"
    task = FLYTE_1.replace("def work", "async def work")
    file.write_text(f"{BEGINNING}{task}    save(b'5'); time.sleep(1); save(b'x')\n    return start\n")
    environment = {"FLYTEKIT_CKPT_ASYNCHRONOUS": "1"}
    run = Flyte1(file, "work", {"n": 1}, str(tmp_path / "checkpoints"), tmp_path / "io", environment=environment)
    attempt = run.attempt()
    assert attempt.outcome == "recoverable", attempt.lines
    assert SyncCheckpoint("", run.destination(1)).read() == b"5"


TASK = """
    import time
    from flytekit_ckpt import asynchronous

    called = asynchronous.AsynchronousSaves._called

    def slowly(*arguments):
        time.sleep(0.3)
        return called(*arguments)

    asynchronous.AsynchronousSaves._called = slowly

    def work(n: int) -> str:
        cp = current_checkpoint()
        start = int(cp.read() or 0)
        for value in range(start + 1, n + 1):
            cp.write(b"%d" % value)
            time.sleep({pause})
        return type(cp).__name__
"""


def test_the_local_runner_shows_background_saves(place: Place, task: Task) -> None:
    lines: list[str] = []
    options: Any = {"asynchronous": True}
    result = runner.run(task(TASK.format(pause=0)), {"n": "3"}, root=place.root, options=options, report=lines.append)
    assert result == "AsyncCheckpoint"
    assert any("saved payload in the background, 1 B in " in line for line in lines), lines


def test_the_local_runner_kills_attempts_in_the_middle_of_them(tmp_path: Path, task: Task) -> None:
    lines: list[str] = []
    options: Any = {"asynchronous": True}
    target = task(TASK.format(pause=0.2))
    root = str(tmp_path / "root")
    result = runner.run(
        target, {"n": "12"}, root=root, retries=30, preempt_after=1.6, options=options, report=lines.append
    )
    assert result == "AsyncCheckpoint"
    assert sum("killed by SIGKILL" in line for line in lines) >= 1, lines


def test_the_local_runner_tries_again_after_a_save_that_failed(tmp_path: Path, task: Task) -> None:
    target = task(
        """
        from flytekit_ckpt import asynchronous
        from flytekit_ckpt.errors import StorageError

        def work() -> int:
            cp = current_checkpoint()
            start = int(cp.read() or 0)
            if not start:
                cp.write_async(b"1").result()
                def fail(*_):
                    raise StorageError("the disk is broken")
                asynchronous.AsynchronousSaves._called = fail
            cp.write(b"2")
            return start
        """
    )
    lines: list[str] = []
    options: Any = {"asynchronous": True}
    assert runner.run(target, {}, root=str(tmp_path), retries=1, options=options, report=lines.append) == 1
    assert any(FlyteRecoverableException.__name__ in line and "the disk is broken" in line for line in lines), lines
