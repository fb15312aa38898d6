"""Storage that refuses, is full or changes meanwhile, and attempts that die before they save."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests import s3_server
from tests.conftest import Place
from tests.faults.confined import give_up_capabilities, mount_small_disk
from tests.faults.contents import KINDS, LARGE_BYTES, large, number_of, numbered, save
from tests.faults.objects import connected
from tests.faults.outcomes import Outcome, Outcomes, judged, one_of
from tests.faults.peers import Attempt, Content
from tests.faults.processes import Worker, started
from tests.faults.trials import Trial, UnsuitedError
from tests.faults.wire import Wire

MEBIBYTE = 1 << 20
_MOMENT = 1.0


def saved(peer: type[Attempt], place: Place, content: Content) -> str:
    uri = f"{place.uri()}/checkpoint"
    with contextlib.closing(peer(uri)) as attempt:
        save(attempt, content)
    return uri


def load(reports: Connection, peer: type[Attempt], uri: str, expected: Content) -> None:
    """Load in a process of its own, and report the outcome."""
    reports.send(judged(peer("", uri), type(expected), one_of([expected])))


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------


def no_permission(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Load a local checkpoint that may not be read."""
    if not place.is_local:
        message = "only files have permissions"
        raise UnsuitedError(message)
    outcomes = Outcomes()
    for number in range(rounds):
        content = numbered(KINDS[number % 2], number)
        uri = saved(peer, place, content)
        for path in (Path(uri), *Path(uri).rglob("*")):
            if path.is_file():
                path.chmod(0)
        with started(place, _load_as_anyone, peer, uri, content) as worker:
            outcomes[worker.result()] += 1
    return {"": outcomes}


def _load_as_anyone(reports: Connection, peer: type[Attempt], uri: str, expected: Content) -> None:
    give_up_capabilities()
    load(reports, peer, uri, expected)


def wrong_credentials(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Load from S3 with a wrong secret key."""
    if place.is_local or not s3_server.checks_credentials():
        message = "nobody asks for credentials"
        raise UnsuitedError(message)
    outcomes = Outcomes()
    stranger = Place(place.root, {**place.options, "secret": "wrong" * 8})
    for number in range(rounds):
        content = numbered(KINDS[number % 2], number)
        with started(stranger, load, peer, saved(peer, place, content), content) as worker:
            outcomes[worker.result()] += 1
    return {"": outcomes}


# ---------------------------------------------------------------------------------------------------------------------
# Full
# ---------------------------------------------------------------------------------------------------------------------


def full_disk(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Restore to a disk that is too small; save to one that holds the previous checkpoint and no more."""
    chosen = random.Random(seed)
    outcomes = {", restoring": Outcomes()}
    if place.is_local:
        outcomes[", saving"] = Outcomes()
    uri = saved(peer, place, large(8 * MEBIBYTE))
    for _ in range(rounds):
        room = chosen.randrange(MEBIBYTE, 7 * MEBIBYTE)
        with started(place, _load_to_small_disk, peer, uri, large(8 * MEBIBYTE), room) as worker:
            outcomes[", restoring"][_unless_refused(worker)] += 1
        if place.is_local:
            with started(place, _save_to_small_disk, peer, room) as worker:
                outcomes[", saving"][_unless_refused(worker)] += 1
    return outcomes


def _unless_refused(worker: Worker) -> Outcome:
    result = worker.result()
    if isinstance(result, OSError):
        message = f"no disk may be mounted here: {result}"
        raise UnsuitedError(message)
    assert isinstance(result, Outcome)
    return result


def _load_to_small_disk(reports: Connection, peer: type[Attempt], uri: str, expected: Content, room: int) -> None:
    try:
        disk = _small_disk(room)
    except OSError as error:
        reports.send(error)
        return
    os.environ["TMPDIR"] = tempfile.tempdir = str(disk)
    load(reports, peer, uri, expected)


def _save_to_small_disk(reports: Connection, peer: type[Attempt], room: int) -> None:
    try:
        disk = _small_disk(room)
    except OSError as error:
        reports.send(error)
        return
    reports.send(refused_save(peer, Place(str(disk)), large(MEBIBYTE // 2), large(8 * MEBIBYTE)))


def _small_disk(room: int) -> Path:
    disk = Path(tempfile.mkdtemp())
    mount_small_disk(disk, room)
    return disk


def refused_save(peer: type[Attempt], place: Place, previous: Content, refused: Content) -> Outcome:
    """Save what has no room; that has to raise, and the previous checkpoint to be there as before."""
    uri = saved(peer, place, previous)
    with contextlib.closing(peer(uri)) as attempt:
        try:
            save(attempt, refused)
        except attempt.errors:
            outcome = judged(peer("", uri), type(previous), one_of([previous]))
            # A failure that says nothing about what it has destroyed is no clear one.
            return Outcome.RAISED if outcome is Outcome.RIGHT else Outcome.WRONG
    return judged(peer("", uri), type(refused), one_of([refused]))


def full_store(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Save to a store of which the user may have no more."""
    if not isinstance(place.server, s3_server.S3Server) or not place.server.has_quotas:
        message = "users have no quota here"
        raise UnsuitedError(message)
    outcomes = Outcomes()
    for _ in range(rounds):
        limited = _place_of_limited_user(place.server)
        with started(limited, _save_to_full_store, peer, limited) as worker:
            outcomes[worker.result()] += 1
    return {"": outcomes}


def _place_of_limited_user(server: s3_server.S3Server) -> Place:
    key, secret = server.limited_user(3 * MEBIBYTE)
    place = Place(f"s3://limited-{key}", {"endpoint_url": server.endpoint, "key": key, "secret": secret})
    connected(place).call_s3("create_bucket", Bucket=f"limited-{key}")
    return place


def _save_to_full_store(reports: Connection, peer: type[Attempt], place: Place) -> None:
    reports.send(refused_save(peer, place, large(MEBIBYTE // 2), large(8 * MEBIBYTE)))


# ---------------------------------------------------------------------------------------------------------------------
# Changed meanwhile
# ---------------------------------------------------------------------------------------------------------------------


def vanishing(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Remove what is being loaded once some of it has arrived."""
    if place.is_local:
        message = "an open file stays"
        raise UnsuitedError(message)
    chosen = random.Random(seed)
    outcomes = Outcomes()
    content = large(40 * MEBIBYTE)
    for _ in range(rounds):
        uri = saved(peer, place, content)

        def remove(uri: str = uri) -> None:
            connected(place).rm(uri, recursive=True)

        with Wire(place.options["endpoint_url"], chosen.randrange(MEBIBYTE, 30 * MEBIBYTE), remove) as wire:
            through = Place(place.root, {**place.options, "endpoint_url": wire.endpoint})
            with started(through, load, peer, uri, content) as worker:
                outcomes[worker.result()] += 1
            assert wire.happened
    return {"": outcomes}


def two_writers(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Load while two processes save to the same destination, and once they are done."""
    outcomes = {}
    for kind in (*KINDS[1:], LARGE_BYTES):
        # Flyte 2 takes a second to compress the larger one.
        count = rounds if kind == "small folder" else max(2, rounds // 4)
        outcomes[f", {kind}"] = _loads_beside_two_writers(peer, place, kind, count)
    return outcomes


def _loads_beside_two_writers(peer: type[Attempt], place: Place, kind: str, count: int) -> Outcomes:
    uri = f"{place.uri()}/checkpoint"
    outcomes = Outcomes()
    content_kind = type(numbered(kind, 1))

    def whole(content: Content | None) -> Outcome:
        if not content:
            return Outcome.LOST
        number = number_of(content)
        return Outcome.RIGHT if number is not None and content == numbered(kind, number) else Outcome.WRONG

    with (
        started(place, _save_some, peer, uri, kind, range(1, 2 * count, 2)) as first,
        started(place, _save_some, peer, uri, kind, range(2, 2 * count + 1, 2)) as second,
    ):
        first.result()
        while any(worker.is_alive() for worker in (first, second)):
            outcomes[judged(peer("", uri), content_kind, whole)] += 1
        for worker in (first, second):
            worker.last(0)
    # Whoever saved last saved the last of its own.
    last = [numbered(kind, 2 * count - 1), numbered(kind, 2 * count)]
    outcomes[judged(peer("", uri), content_kind, one_of(last))] += 1
    return outcomes


def _save_some(reports: Connection, peer: type[Attempt], uri: str, kind: str, numbers: range) -> None:
    attempt = peer(uri)
    for number in numbers:
        save(attempt, numbered(kind, number))
        reports.send(number)


# ---------------------------------------------------------------------------------------------------------------------
# Attempts that die before they save
# ---------------------------------------------------------------------------------------------------------------------


def dying_attempts(peer: type[Attempt], place: Place, rounds: int, seed: int) -> dict[str, Outcomes]:
    """Save in attempt 1, die in attempts 2 and 3 a moment after loading, load in attempt 4."""
    outcomes = Outcomes()
    for number in range(rounds):
        root = place.uri()
        destinations = [f"{root}/{attempt}/checkpoint" for attempt in range(1, 5)]
        content = numbered(KINDS[number % 2], number)
        with contextlib.closing(peer(destinations[0])) as attempt:
            save(attempt, content)
        for source, destination in itertools.pairwise(destinations[:3]):
            with started(place, _load_and_die, peer, destination, source, type(content)) as worker:
                worker.join()
        outcomes[judged(peer(destinations[3], destinations[2]), type(content), one_of([content]))] += 1
    return {"": outcomes}


def _load_and_die(_: Connection, peer: type[Attempt], destination: str, source: str, kind: type) -> None:
    attempt = peer(destination, source)
    with contextlib.suppress(Exception):
        attempt.load(kind)
    time.sleep(_MOMENT)
    os.kill(os.getpid(), signal.SIGKILL)


TRIALS = [
    Trial("no permission to read", no_permission),
    Trial("wrong credentials", wrong_credentials),
    Trial("full disk", full_disk),
    Trial("full store, saving", full_store),
    Trial("removed while it is loaded", vanishing),
    Trial("attempts 2 and 3 die before they save", dying_attempts),
]
CONTESTS = [Trial("two writers at once", two_writers)]
