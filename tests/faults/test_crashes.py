"""Whenever a process is killed that saves, the next one finds the checkpoint before or the new one."""

from __future__ import annotations

import pytest

from tests.conftest import Place
from tests.faults.contents import KINDS
from tests.faults.crashes import NEXT_LOAD, NEXT_SAVE, crash
from tests.faults.outcomes import Outcome
from tests.faults.peers import OURS

# Trials: minutes of them.
pytestmark = pytest.mark.long


@pytest.mark.parametrize("peer", OURS.values(), ids=OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_save_leaves_a_whole_checkpoint(peer: type, kind: str, place: Place) -> None:
    rounds = 2 if kind == KINDS[-1] else 8 if place.is_local else 4
    outcomes = crash(kind, peer, place, rounds, 1)
    assert set(outcomes[NEXT_LOAD]) == {Outcome.RIGHT}
    assert set(outcomes[NEXT_SAVE]) == {Outcome.RIGHT}, "what the killed process left was not removed"
