"""A process that saves one checkpoint after the other is killed at a random moment."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import statistics
import time
from multiprocessing.connection import Connection

from tests.conftest import Place
from tests.faults.contents import KINDS, numbered, save
from tests.faults.objects import names_beside
from tests.faults.outcomes import Outcome, Outcomes, judged, one_of
from tests.faults.peers import Attempt
from tests.faults.processes import Worker, started
from tests.faults.trials import Trial

NEXT_LOAD, NEXT_SAVE = ", the next load", ", the next save"


def keep_saving(reports: Connection, peer: type[Attempt], uri: str, kind: str) -> None:
    """Save the numbers from 1 on, reporting each that is done."""
    attempt = peer(uri)
    reports.send(0)
    for number in itertools.count(1):
        save(attempt, numbered(kind, number))
        reports.send(number)


def crash(kind: str, peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Kill a process that saves, again and again.

    The next attempt has to load the last checkpoint that was reported, or the one after it. What it saves then has to
    arrive, and to leave nothing beside the object.
    """
    outcomes = {NEXT_LOAD: Outcomes(), NEXT_SAVE: Outcomes()}
    chosen = random.Random(seed)
    duration = _duration(peer, place, kind)
    for _ in range(rounds):
        uri = f"{place.uri()}/checkpoint"
        with started(place, keep_saving, peer, uri, kind) as worker:
            # At times in the first save, which has no checkpoint before it.
            for _ in range(chosen.choice([1, 2, 2, 3])):
                reported = worker.result()
            time.sleep(chosen.uniform(0, 2 * duration))
            worker.kill()
            reported = worker.last(reported)
        expected = [numbered(kind, reported) if reported else None, numbered(kind, reported + 1)]
        outcomes[NEXT_LOAD][judged(peer("", uri), type(expected[1]), one_of(expected))] += 1
        outcomes[NEXT_SAVE][_next_save(peer, place, uri, kind, reported + 2)] += 1
    return outcomes


def _next_save(peer: type[Attempt], place: Place, uri: str, kind: str, number: int) -> Outcome:
    content = numbered(kind, number)
    with contextlib.closing(peer(uri)) as attempt:
        save(attempt, content)
    if names_beside(place, uri):
        return Outcome.WRONG
    return judged(peer("", uri), type(content), one_of([content]))


def _duration(peer: type[Attempt], place: Place, kind: str) -> float:
    """Give the seconds that a save takes, so that one is killed in all of its stages."""
    with started(place, keep_saving, peer, f"{place.uri()}/checkpoint", kind) as worker:
        times = [_reported_at(worker) for _ in range(6)]
    # Without the first, which connects.
    return statistics.median(end - start for start, end in itertools.pairwise(times[1:]))


def _reported_at(worker: Worker) -> float:
    worker.result()
    return time.perf_counter()


TRIALS = [Trial(f"killed while saving, {kind}", functools.partial(crash, kind)) for kind in KINDS]
