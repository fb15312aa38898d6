"""Chains of attempts through the platforms' own entry points: whatever dies, none starts from zero."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.conftest import Place
from tests.platforms import Attempt, Flyte1, Flyte1Map, Flyte2, Platform, needs
from tests.test_resumption import place

__all__ = ["place"]

# Each names a moment of an attempt's life, in its order; "while" is a moment from `DELAY` seconds on.
DEATHS = [
    "before it imports",
    "while it carries",
    "before it loads",
    "while it loads",
    "before it saves",
    "while it saves",
    "after it saved",
]

BEGINNING = """
import os, signal, threading, time

def die(point):
    if os.environ.get("DIE") == point:
        os.kill(os.getpid(), signal.SIGKILL)

def die_during(point):
    def wait():
        time.sleep(float(os.environ["DELAY"]))
        die(point)

    if os.environ.get("DIE") == point:
        threading.Thread(target=wait, daemon=True).start()

die("before it imports")
import flytekit_ckpt.auto
if os.environ.get("DIE") == "while it carries":
    time.sleep(float(os.environ["DELAY"]))
    die("while it carries")
if os.environ.get("DIE") == "before it loads":
    # What is carried forward in the background has its time.
    for attempt in flytekit_ckpt.attempts.named.values():
        attempt.carry_forward.close()
    die("before it loads")
"""

FLYTE_1 = """
from flytekit import current_context, task

@task(retries=9)
def work(n: int) -> int:
    checkpoint = current_context().checkpoint
    die_during("while it loads")
    start = int(checkpoint.read() or 0)
    print(f"starting at {start}")
    die("while it loads")
    die("before it saves")
    die_during("while it saves")
    checkpoint.write(b"%d" % (start + n))
    print(f"saved {start + n}")
    die("while it saves")
    die("after it saved")
    return start + n
"""

FLYTE_2 = """
import flyte

env = flyte.TaskEnvironment(name="chain")

@env.task(retries=9)
def work(n: int) -> int:
    checkpoint = flyte.ctx().checkpoint
    die_during("while it loads")
    found = checkpoint.load_sync()
    start = int(found.read_bytes()) if found else 0
    print(f"starting at {start}")
    die("while it loads")
    die("before it saves")
    die_during("while it saves")
    checkpoint.save_sync(b"%d" % (start + n))
    print(f"saved {start + n}")
    die("while it saves")
    die("after it saved")
    return start + n
"""


@dataclass
class Chain:
    """The attempts of one task, and what the next of them may start with.

    Attributes
    ----------
    run : Platform
        Calls the attempts.
    has_home : bool
        Whether they have a home.
    is_local : bool
        Whether their checkpoints are on the local disk, where carrying forward takes no time.
    newest : set of int
        The newest checkpoint that is safe; of a save that was killed nobody knows whether it came to its end.
    reached : set of int
        What the next attempt's source may lead to.
    """

    run: Platform
    has_home: bool
    is_local: bool
    newest: set[int] = field(default_factory=lambda: {0})
    reached: set[int] = field(default_factory=lambda: {0})

    def attempt(self, death: str = "", delay: float = 0.0) -> None:
        """Run an attempt that dies so, or one that lives; it has to start where it can at best."""
        self.run.environment = {**self.run.environment, "DIE": death, "DELAY": str(delay)}
        attempt = self.run.attempt()
        assert attempt.outcome == ("failed" if death else "succeeded"), attempt.lines
        started, saved = _number(attempt, "starting at "), _number(attempt, "saved ")
        assert (started is None) or death not in ("before it imports", "while it carries", "before it loads")
        if started is not None:
            assert started in (self.newest if self.has_home else self.reached), (death, attempt.lines)
            self.newest = {started}
        if saved is not None:
            assert started is not None
            self.newest = self.reached = {saved}
        elif death == "before it imports":
            self.reached = {0}
        elif death != "before it loads":
            known = self.reached if started is None else {started}
            # It may have been killed before what it loaded had arrived, unless that takes no time.
            self.reached = known if self.is_local else known | {0}
            if death == "while it saves" and started is not None:
                maybe = started + self.run.inputs["n"]
                self.newest, self.reached = self.newest | {maybe}, self.reached | {maybe}


def _number(attempt: Attempt, beginning: str) -> int | None:
    found = [line.removeprefix(beginning) for line in attempt.lines if line.startswith(beginning)]
    return int(found[0]) if found else None


def chain(
    platform: type[Platform], place: Place, folder: Path, *, has_home: bool, root: str = "", n: int = 1, **more: Any
) -> Chain:
    """Begin a chain of attempts, each of which counts by `n`."""
    file = folder / f"chain_{platform.__name__.lower()}.py"
    file.write_text(BEGINNING + (FLYTE_2 if platform is Flyte2 else FLYTE_1))
    root = root or place.uri()
    environment = {"FLYTEKIT_CKPT_HOME": f"{root}/home"} if has_home else {}
    name = uuid.uuid4().hex
    run = platform(file, "work", {"n": n}, f"{root}/{name}", folder / name, environment=environment, **more)
    return Chain(run, has_home, place.is_local)


@needs("flytekit")
def test_an_attempt_that_dies_before_it_loads_costs_nothing_on_flyte_1(place: Place, tmp_path: Path) -> None:
    attempts = chain(Flyte1, place, tmp_path, has_home=False)
    for death in ("after it saved", "before it loads", ""):
        attempts.attempt(death)


@needs("flyte")
def test_an_attempt_that_dies_before_it_loads_costs_nothing_on_flyte_2(place: Place, tmp_path: Path) -> None:
    attempts = chain(Flyte2, place, tmp_path, has_home=False)
    for death in ("after it saved", "before it loads", ""):
        attempts.attempt(death)


@needs("flytekit")
def test_with_a_home_an_attempt_that_dies_before_it_imports_costs_nothing_in_a_map(
    place: Place, tmp_path: Path
) -> None:
    root = place.uri()
    mapped = [chain(Flyte1Map, place, tmp_path, has_home=True, root=root, n=n, index=n) for n in (1, 2)]
    for death in ("after it saved", "before it imports", ""):
        for attempts in mapped:
            attempts.attempt(death)


class Runs(RuleBasedStateMachine):
    """Several tasks of several runs, all with one home or with none, whose attempts die anywhere."""

    place: Place
    folder: Path
    platform: type[Platform]

    @initialize(has_home=st.booleans())
    def begin(self, has_home: bool) -> None:
        root = self.place.uri()

        def begun(n: int, run: str, node: str, kind: type[Platform] = self.platform, **more: Any) -> Chain:
            names = {"run_name": run, "node": node}
            return chain(kind, self.place, self.folder, has_home=has_home, root=root, n=n, **names, **more)

        # Each counts by a number of its own.
        self.chains = [begun(1, "monday", "n0"), begun(1000, "tuesday", "n0")]
        if self.platform is Flyte1:
            self.chains += [begun(10**6 * n, "monday", "n1", Flyte1Map, index=n) for n in (1, 2)]
        else:
            # What `flyte.map` calls are actions of the same run.
            self.chains += [begun(10**6, "monday", "n1")]
        self.used: set[int] = set()

    @rule(
        number=st.integers(0, 3),
        death=st.sampled_from([*DEATHS, "after it saved", ""]),
        delay=st.floats(0, 0.1),
    )
    def attempt(self, number: int, death: str, delay: float) -> None:
        number %= len(self.chains)
        self.used.add(number)
        self.chains[number].attempt(death, delay)

    def teardown(self) -> None:
        for number in getattr(self, "used", ()):
            self.chains[number].attempt()


@needs("flytekit", "flyte")
@pytest.mark.long
@pytest.mark.parametrize("platform", [Flyte1, Flyte2])
def test_no_chain_of_attempts_starts_from_zero(place: Place, tmp_path: Path, platform: type[Platform]) -> None:
    members = {"place": place, "folder": tmp_path, "platform": platform}
    machine = type("Runs", (Runs,), members)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8, stateful_step_count=7, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
