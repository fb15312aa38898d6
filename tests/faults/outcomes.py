"""What a trial can end with, and how often it did."""

from __future__ import annotations

import contextlib
import enum
from collections import Counter
from collections.abc import Callable, Iterable

from tests.faults.peers import Attempt, Content


class Outcome(enum.Enum):
    """What became of a checkpoint, from the best to the worst."""

    RIGHT = "right"
    RAISED = "raised"
    LOST = "silently lost"
    WRONG = "silently wrong"


Outcomes = Counter[Outcome]


def judged(attempt: Attempt, kind: type, accepted: Callable[[Content | None], Outcome]) -> Outcome:
    """Load, and judge what came of it; what fails without a trace is not wrong.

    Parameters
    ----------
    attempt : Attempt
        One that has loaded nothing yet; it is closed.
    kind : type
        Whether bytes or a folder were saved.
    accepted : callable
        Judges what was loaded.
    """
    with contextlib.closing(attempt):
        try:
            content = attempt.load(kind)
        except attempt.errors:
            return Outcome.RAISED if attempt.is_untouched() else Outcome.WRONG
        if content is None and not attempt.is_untouched():
            return Outcome.WRONG
        return accepted(content)


def one_of(expected: Iterable[Content | None]) -> Callable[[Content | None], Outcome]:
    """Accept some contents; anything else is wrong, and nothing at all lost."""
    contents = list(expected)

    def accepted(content: Content | None) -> Outcome:
        if content in contents:
            return Outcome.RIGHT
        return Outcome.WRONG if content else Outcome.LOST

    return accepted
