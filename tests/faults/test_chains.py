"""With a home, no chain of attempts starts from zero."""

from __future__ import annotations

import pytest

from tests.conftest import Place
from tests.faults import chains
from tests.faults.outcomes import Outcome
from tests.faults.peers import OURS

# Trials: minutes of them.
pytestmark = pytest.mark.long


@pytest.mark.parametrize("peer", OURS.values(), ids=OURS)
def test_no_chain_of_attempts_starts_from_zero(peer: type, place: Place) -> None:
    assert set(chains.chain(peer, place, 12, 1)[""]) == {Outcome.RIGHT}
