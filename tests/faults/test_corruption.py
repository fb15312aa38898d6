"""Damage to a stored checkpoint raises, or changes nothing that is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Place
from tests.faults.corruption import CONTENTS, Victim, damaged, flips
from tests.faults.outcomes import Outcome, Outcomes
from tests.faults.peers import OURS, Flyte

# Trials: minutes of them.
pytestmark = pytest.mark.long

FOLDERS = [name for name, content in CONTENTS.items() if isinstance(content, dict)]


def assert_nothing_is_silent(outcomes: dict[str, Outcomes]) -> None:
    for what, counts in outcomes.items():
        assert set(counts) <= {Outcome.RIGHT, Outcome.RAISED}, (what, counts)
        assert counts[Outcome.RAISED], "nothing was damaged"


@pytest.mark.parametrize("peer", OURS.values(), ids=OURS)
@pytest.mark.parametrize("name", CONTENTS)
def test_damage_to_a_checkpoint_is_noticed(peer: type, name: str, place: Place) -> None:
    rounds, edge = (60, 20) if place.is_local else (5, 3)
    assert_nothing_is_silent(damaged(name, False, peer, place, rounds, 1, edge=edge))


@pytest.mark.parametrize("peer", OURS.values(), ids=OURS)
@pytest.mark.parametrize("name", FOLDERS)
def test_damage_to_an_archive_of_flyte_is_noticed(peer: type, name: str, tmp_path: Path) -> None:
    assert_nothing_is_silent(damaged(name, True, peer, Place(str(tmp_path)), 60, 1, edge=20))


def test_flyte_does_not_notice(tmp_path: Path) -> None:
    """Or else the trials would measure nothing."""
    victim = Victim(Place(str(tmp_path)), Flyte, CONTENTS["folder"])
    outcomes = Outcomes(outcome for _, outcome in victim.outcomes(Flyte, flips(victim.size, 40, 1, edge=0)))
    assert outcomes[Outcome.WRONG] > 20
