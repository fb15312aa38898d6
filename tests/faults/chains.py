"""Chains of attempts of which each is killed somewhere, before it has imported anything or at a random moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
import uuid
from multiprocessing.connection import Connection

from tests.conftest import Place
from tests.faults.contents import KINDS, number_of, numbered, save
from tests.faults.outcomes import Outcome, Outcomes
from tests.faults.peers import Attempt
from tests.faults.processes import started
from tests.faults.trials import Trial

POINTS = [
    "before it imports",
    "before it loads",
    "while it loads",
    "before it saves",
    "while it saves",
    "after it saved",
]


def chain(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Run chains of 2 to 6 attempts; each that lives to load has to load the newest checkpoint that was safe."""
    outcomes = Outcomes()
    chosen = random.Random(seed)
    home = place.uri()
    for number in range(rounds):
        deaths = [chosen.choice(POINTS) for _ in range(chosen.randint(1, 5))]
        outcomes[_outcome(peer, place, home, KINDS[number % 2], deaths, chosen)] += 1
    return {"": outcomes}


def _outcome(
    peer: type[Attempt], place: Place, home: str, kind: str, deaths: list[str], chosen: random.Random
) -> Outcome:
    run, root = f"r{uuid.uuid4().hex[:8]}", place.uri()
    # The numbers that may be loaded: of a save that was killed nobody knows whether it came to its end.
    accepted: set[int | None] = {None}
    for attempt, death in enumerate([*deaths, ""]):
        destination, source = f"{root}/{attempt}/checkpoint", f"{root}/{attempt - 1}/checkpoint" if attempt else ""
        told = _told(run, attempt, home)
        delay = chosen.uniform(0, 0.05)
        with started(place, _live, peer, destination, source, told, kind, attempt + 1, death, delay) as worker:
            reports: list[tuple[str, int | None]] = []
            with contextlib.suppress(EOFError):
                while True:
                    reports.append(worker.result())
        for what, number in reports:
            if what == "failed":
                return Outcome.RAISED
            if what == "loaded":
                if number not in accepted:
                    return Outcome.LOST if number is None else Outcome.WRONG
                accepted = {number}
            elif what == "saving":
                accepted.add(number)
            else:
                accepted = {number}
    return Outcome.RIGHT


def _told(run: str, attempt: int, home: str) -> dict[str, str]:
    """Give what the platform tells a container, and where its home is."""
    return {
        "FLYTE_INTERNAL_EXECUTION_PROJECT": "p",
        "FLYTE_INTERNAL_EXECUTION_DOMAIN": "d",
        "FLYTE_INTERNAL_EXECUTION_ID": run,
        "FLYTE_INTERNAL_TASK_NAME": "task",
        "FLYTE_ATTEMPT_NUMBER": str(attempt),
        "FLYTEKIT_CKPT_HOME": home,
        "OUTPUTS": f"s3://metadata/p-d-{run}/n0/data/{attempt}",
    }


def _live(
    reports: Connection,
    peer: type[Attempt],
    destination: str,
    source: str,
    told: dict[str, str],
    kind: str,
    number: int,
    death: str,
    delay: float,
) -> None:
    """Load, save a number and end, or die on the way."""
    if death == "before it imports":
        _die()
    os.environ.update(told)
    sys.argv = ["pyflyte-execute", "--checkpoint-path", destination, "--output-prefix", told["OUTPUTS"]]
    attempt = peer(destination, source)
    if death == "before it loads":
        time.sleep(delay)
        _die()
    if death == "while it loads":
        _die_in(delay)
    try:
        content = attempt.load(type(numbered(kind, 1)))
    except Exception:  # noqa: BLE001 - whatever the peers raise
        # To a task of flytekit, a source that is not there is an error too.
        reports.send(("failed", None))
        _die()
    reports.send(("loaded", number_of(content) if content else None))
    if death in ("while it loads", "before it saves"):
        _die()
    reports.send(("saving", number))
    if death == "while it saves":
        _die_in(delay)
    save(attempt, numbered(kind, number))
    reports.send(("saved", number))
    if death:
        _die()
    attempt.close()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(seconds: float) -> None:
    timer = threading.Timer(seconds, _die)
    timer.daemon = True
    timer.start()


TRIALS = [Trial("chains of 2 to 6 attempts, killed anywhere", chain)]
