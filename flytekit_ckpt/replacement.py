"""Names in other people's modules and classes, replaced and put back."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any, NamedTuple


class Change(NamedTuple):
    """What a name stood for, and what it stands for now."""

    theirs: Any
    ours: Any


# By the owner, a module or a class, and the name.
changes: dict[tuple[Any, str], Change] = {}


def change(owner: Any, name: str, ours: Any) -> None:
    """Replace what a module or class has under a name, if it has that."""
    # Releases differ in what they have.
    theirs = vars(owner).get(name, ours)
    if theirs is not ours and (owner, name) not in changes:
        # Some modules do not let themselves be changed.
        with contextlib.suppress(AttributeError, TypeError):
            setattr(owner, name, ours)
            changes[owner, name] = Change(theirs, ours)


def original(kind: type, name: str) -> Any:
    """What a class's attribute was before it was changed."""
    for owner in kind.__mro__:
        if (owner, name) in changes:
            return changes[owner, name].theirs
    return getattr(kind, name, None)


def take_over(ours: dict[Any, Any], but: str = "") -> None:
    """Replace objects in every module that holds them, by whatever name."""
    replacements = {id(theirs): replacement for theirs, replacement in ours.items()}
    # Theirs first: a module that another thread imports meanwhile takes its names from there.
    for module_name, module in sorted(_modules(), key=lambda named: not _is_theirs(named[0])):
        if module_name == but:
            continue
        held = _held(module, replacements)
        # A user's classes that extend theirs go on calling their base by its name.
        if held and (_is_theirs(module_name) or not _extends(module, set(ours))):
            for name, replacement in held:
                change(module, name, replacement)


def put_back() -> None:
    """Undo all changes; names that others imported from flytekit or flyte meanwhile stay what they are."""
    theirs = {id(made.ours): made.theirs for made in changes.values()}
    for (owner, name), made in changes.items():
        # What has been replaced once more is someone else's.
        if vars(owner).get(name) is made.ours:
            setattr(owner, name, made.theirs)
    changes.clear()
    for module_name, module in _modules():
        if _is_theirs(module_name):
            for name, replaced in _held(module, theirs):
                setattr(module, name, replaced)


def _is_theirs(module_name: str) -> bool:
    return module_name.partition(".")[0] in {"flytekit", "flyte"}


def _extends(module: types.ModuleType, originals: set[Any]) -> bool:
    classes = [value for value in _names(module).values() if isinstance(value, type)]
    return any(originals.intersection(kind.__mro__[1:]) for kind in classes if kind not in originals)


def _modules() -> list[tuple[str, types.ModuleType]]:
    return [(name, module) for name, module in list(sys.modules.items()) if isinstance(module, types.ModuleType)]


def _names(module: types.ModuleType) -> dict[str, Any]:
    try:
        # Asking the module itself would load it, if it is one that loads when it is used.
        return dict(object.__getattribute__(module, "__dict__"))
    except AttributeError:
        # Some only say that they are modules.
        return {}


def _held(module: types.ModuleType, replacements: dict[int, Any]) -> list[tuple[str, Any]]:
    """Give the names that stand for objects with these identities, and what replaces them."""
    return [(name, replacements[id(value)]) for name, value in _names(module).items() if id(value) in replacements]
