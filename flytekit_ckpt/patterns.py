"""Patterns that choose some of a checkpoint's entries by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence


class Patterns:
    """Names that match one of some patterns, as those of `pathlib.Path.glob`, or lie in a folder that does.

    Parameters
    ----------
    patterns : str or sequence of str
        Relative, with `/` between components: `*`, `?` and `[...]` stand for characters of one component, `**` for any
        number of components.

    Raises
    ------
    ValueError
        If one is blank, absolute, or has `..` in it: no entry has such a name.
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        self._patterns = [_components(pattern) for pattern in given]

    @classmethod
    def of(cls, patterns: str | Sequence[str] | None) -> Patterns | None:
        """Take what a user gave, which may be nothing."""
        return None if patterns is None else cls(patterns)

    def match(self, name: str) -> bool:
        """Tell whether an entry is chosen."""
        components = name.split("/")
        return any(_match(pattern, components) for pattern in self._patterns)


def _components(pattern: str) -> list[str]:
    components = [component for component in pattern.split("/") if component not in ("", ".")]
    if pattern.startswith("/") or ".." in components or not components:
        message = f"only={pattern!r} can match no entry: give a relative pattern without '..', such as 'model/*'"
        raise ValueError(message)
    return components


def _match(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        # What is left of the name lies in a folder that matches.
        return True
    if pattern[0] == "**":
        return any(_match(pattern[1:], name[start:]) for start in range(len(name)))
    return bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and _match(pattern[1:], name[1:])


EVERYTHING = Patterns("**")
"""Chooses every entry."""
