"""What every trial is: something that goes wrong, done to a checkpointer at a place, as often as asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.conftest import Place
from tests.faults.outcomes import Outcomes
from tests.faults.peers import Attempt


class UnsuitedError(Exception):
    """The trial means nothing for this checkpointer or place, or this machine does not allow it."""


Run = Callable[[type[Attempt], Place, int, int], dict[str, Outcomes]]
"""Takes a checkpointer, a place, how many rounds and a seed; gives outcomes by what was looked at."""


@dataclass(frozen=True)
class Trial:
    """A trial by its name, and how it is run."""

    name: str
    run: Run
