"""Storage that refuses, is full or changes meanwhile raises; attempts that die early lose nothing."""

from __future__ import annotations

import pytest

from tests.conftest import Place
from tests.faults import losses
from tests.faults.outcomes import Outcome, Outcomes
from tests.faults.peers import OURS
from tests.faults.trials import Run, UnsuitedError

# Trials: minutes of them.
pytestmark = pytest.mark.long

our_faces = pytest.mark.parametrize("peer", OURS.values(), ids=OURS)


def counted(run: Run, peer: type, place: Place, rounds: int) -> Outcomes:
    try:
        return sum(run(peer, place, rounds, 1).values(), Outcomes())
    except UnsuitedError as reason:
        pytest.skip(str(reason))


@our_faces
@pytest.mark.parametrize(
    "run",
    [losses.no_permission, losses.wrong_credentials, losses.full_disk, losses.full_store],
    ids=lambda run: run.__name__,
)
def test_what_is_refused_raises(run: Run, peer: type, place: Place) -> None:
    assert set(counted(run, peer, place, 1)) == {Outcome.RAISED}


@our_faces
def test_what_vanishes_is_loaded_whole_or_raises(peer: type, s3: Place) -> None:
    assert set(counted(losses.vanishing, peer, s3, 1)) <= {Outcome.RIGHT, Outcome.RAISED}


@our_faces
def test_the_last_of_two_writers_wins(peer: type, place: Place) -> None:
    outcomes = counted(losses.two_writers, peer, place, 16)
    assert set(outcomes) <= {Outcome.RIGHT, Outcome.RAISED}
    assert outcomes[Outcome.RIGHT] > outcomes[Outcome.RAISED]


@our_faces
def test_attempts_that_die_before_they_save_lose_nothing(peer: type, place: Place) -> None:
    assert set(counted(losses.dying_attempts, peer, place, 1)) == {Outcome.RIGHT}
