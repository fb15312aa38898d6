"""Which checkpoint belongs to the running code, and `install`, after which unchanged programs use this package."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from flytekit_ckpt import errors, v2
from flytekit_ckpt.checkpointer import Checkpoint, SyncCheckpoint


@dataclass(frozen=True)
class Context:
    """What the running task attempt has (flytekit: `flytekit.current_context()`)."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The attempt's legacy checkpoint, the same instance at every use.

        Raises
        ------
        CheckpointUnavailableError
            Outside a task; programs written for flytekit catch it as `NotImplementedError`.
        """
        # The innermost: the local runner's task may run tasks of its own.
        found = _of_flyte() or _of_flytekit() or _of_runner()
        if found is None:
            raise _unavailable()
        return found


def current_context() -> Context:
    """Return the context of the running task attempt (flytekit: `flytekit.current_context`)."""
    return Context()


def current_checkpoint() -> Checkpoint:
    """Return the running task attempt's legacy checkpoint; short for `current_context().checkpoint`."""
    return current_context().checkpoint


def _unavailable() -> errors.CheckpointUnavailableError:
    flyte = sys.modules.get("flyte")
    if isinstance(flyte, types.ModuleType) and hasattr(flyte, "TaskEnvironment") and not hasattr(flyte, "Checkpoint"):
        message = (
            f"flyte {getattr(flyte, '__version__', '')} gives its tasks no checkpoints. "
            "Update it to 2.1.3 or later, or make a flytekit_ckpt.SyncCheckpoint(destination, source) of your own"
        )
        return errors.CheckpointUnavailableError(message)
    message = (
        "no checkpoint belongs to this code: it runs neither as a Flyte task nor under `flytekit-ckpt run`. "
        "Outside of both, make a flytekit_ckpt.SyncCheckpoint(destination, source) of your own"
    )
    return errors.CheckpointUnavailableError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Attempts
# ---------------------------------------------------------------------------------------------------------------------


# Keyword arguments of either face, as `install` was given them.
_options: dict[str, Any] = {}


class _Attempt:
    """One attempt's checkpoint: both faces of it, each made when it is first asked for."""

    def __init__(self, destination: str, source: str | None) -> None:
        self._places = destination, source

    @functools.cached_property
    def legacy(self) -> SyncCheckpoint:
        return SyncCheckpoint(*self._places, **_options)

    @functools.cached_property
    def new(self) -> v2.Checkpoint:
        return v2.Checkpoint(*self._places, **_options)


# For whoever asks first, and for taking names over: every thread must see the same.
_lock = threading.RLock()

# A fork must not come with the lock of a thread that it does not have.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

# Both Flytes make one checkpoint of their own for every attempt, which tells the attempts of a process apart.
_attempts: weakref.WeakKeyDictionary[Any, _Attempt] = weakref.WeakKeyDictionary()

# The local runner gives a whole process to an attempt, and the attempt may start threads of its own, which would not
# see a context variable.
_runners: list[_Attempt] = []


def set_runner_checkpoint(destination: str, source: str | None) -> None:
    """Make a checkpoint the current one for the rest of this process; called by the local runner."""
    _runners.append(_Attempt(destination, source))


def _attempt(theirs: Any, destination: str, source: str | None) -> _Attempt:
    if theirs not in _attempts:
        _attempts[theirs] = _Attempt(destination, source)
    return _attempts[theirs]


def _of_runner() -> SyncCheckpoint | None:
    with _lock:
        return _runners[-1].legacy if _runners else None


def _of_flyte() -> SyncCheckpoint | None:
    # Not by an import statement: that waits for threads that are importing the package, and `_patch` has those wait for
    # this lock.
    flyte: Any = sys.modules.get("flyte")
    with _lock:
        attempt = _flyte_attempt(flyte.ctx()) if isinstance(flyte, types.ModuleType) and hasattr(flyte, "ctx") else None
        return attempt.legacy if attempt is not None else None


def _flyte_attempt(task: Any) -> _Attempt | None:
    """What belongs to a `flyte.models.TaskContext`."""
    checkpoint = _original(type(task), "checkpoint")
    # Releases before 2.1.3 have none.
    theirs = checkpoint.fget(task) if checkpoint is not None else None
    return _attempt(theirs, theirs.remote_destination, theirs.remote_source) if theirs is not None else None


def _of_flytekit() -> Checkpoint | None:
    """The checkpoint that flytekit was given, in its container or its local sandbox."""
    if sys.modules.get("flytekit") is None:
        return None
    import flytekit

    try:
        return _taken_over(flytekit.current_context().checkpoint)
    except NotImplementedError:
        return None


def _taken_over(theirs: Any) -> Checkpoint:
    """The legacy face in place of flytekit's own checkpoint; any other, a subclass too, is the user's."""
    kind = type(theirs)
    if (kind.__module__, kind.__qualname__) != ("flytekit.core.checkpointer", "SyncCheckpoint"):
        return cast("Checkpoint", theirs)
    with _lock:
        # flytekit has no public name for the two prefixes.
        return _attempt(theirs, theirs._checkpoint_dest, theirs._checkpoint_src).legacy


# ---------------------------------------------------------------------------------------------------------------------
# install() and uninstall()
# ---------------------------------------------------------------------------------------------------------------------


def install(**options: Any) -> None:
    """Have programs that import flytekit or flyte use this package's checkpoints, unchanged.

    Takes the place of flytekit's `Checkpoint` and `SyncCheckpoint` wherever they were imported to, and of
    `flyte.Checkpoint`, `flyte.BaseCheckpoint` and `flyte.latest_checkpoint`; `flytekit.current_context().checkpoint`
    gives `SyncCheckpoint`, also on Flyte 2 under flyte-migrate, and `flyte.ctx().checkpoint` gives `v2.Checkpoint`.

    It may be called more than once, from any thread, before or after flytekit, flyte, flyte-migrate or the tasks were
    imported, and with any of them missing; it imports none of them.

    Parameters
    ----------
    **options
        Keyword arguments of `SyncCheckpoint` and `v2.Checkpoint`, which are the same, such as `retries=20`, for the
        checkpoints of task attempts. They stay until they are given anew.

    Raises
    ------
    TypeError
        If there is no such option.

    See Also
    --------
    flytekit_ckpt.auto : does this when it is imported.
    """
    import wrapt

    SyncCheckpoint("", **options)
    _options.update(options)
    for name in _PATCHES:
        if sys.modules.get(name) is not None:
            # Waits for a thread that is in the midst of importing it.
            importlib.import_module(name)
    with _lock:
        _installed[:] = [True]
        try:
            for name in _PATCHES:
                if sys.modules.get(name) is not None:
                    _patch(name, sys.modules[name])
                elif name not in _awaited:
                    _awaited.add(name)
                    wrapt.register_post_import_hook(functools.partial(_patch, name), name)
        except BaseException:
            # Not half of it.
            uninstall()
            raise


def uninstall() -> None:
    """Undo `install`.

    Names that modules outside flytekit and flyte imported from there meanwhile stay what they are.
    """
    with _lock:
        _installed.clear()
        _options.clear()
        theirs = {id(change.ours): change.theirs for change in _changes.values()}
        for (owner, name), change in _changes.items():
            # What has been replaced once more is someone else's.
            if vars(owner).get(name) is change.ours:
                setattr(owner, name, change.theirs)
        _changes.clear()
        for module_name, module in _modules():
            if _is_theirs(module_name):
                for name, original in _held(module, theirs):
                    setattr(module, name, original)


class _Change(NamedTuple):
    theirs: Any
    ours: Any


_installed: list[bool] = []

# Modules whose import hook is registered.
_awaited: set[str] = set()

# By the owner, a module or a class, and the name.
_changes: dict[tuple[Any, str], _Change] = {}


def _change(owner: Any, name: str, ours: Any) -> None:
    # Releases differ in what they have.
    theirs = vars(owner).get(name, ours)
    if theirs is not ours and (owner, name) not in _changes:
        # Some modules do not let themselves be changed.
        with contextlib.suppress(AttributeError, TypeError):
            setattr(owner, name, ours)
            _changes[owner, name] = _Change(theirs, ours)


def _original(kind: type, name: str) -> Any:
    """What a class's attribute was before it was changed."""
    for owner in kind.__mro__:
        if (owner, name) in _changes:
            return _changes[owner, name].theirs
    return getattr(kind, name, None)


def _patch(name: str, module: object) -> None:
    with _lock:
        # Tests put all kinds of things in the place of modules.
        if _installed and isinstance(module, types.ModuleType):
            _PATCHES[name](module)


def _patch_flytekit_names(checkpointer: types.ModuleType) -> None:
    # Whoever imports them later gets ours from here, flytekit's container entry point for one.
    _take_over({checkpointer.Checkpoint: Checkpoint, checkpointer.SyncCheckpoint: SyncCheckpoint})


def _patch_flytekit_context(context_manager: types.ModuleType) -> None:
    _change(context_manager.ExecutionParameters, "checkpoint", property(_flytekit_checkpoint))


def _patch_flyte_names(flyte: types.ModuleType) -> None:
    names = ("BaseCheckpoint", "Checkpoint", "latest_checkpoint")
    # Flyte's own module keeps its names: flyte.models makes its checkpoints with them, and so tells attempts apart.
    _take_over({getattr(flyte, name): getattr(v2, name) for name in names if hasattr(flyte, name)}, "flyte._checkpoint")


def _patch_flyte_context(models: types.ModuleType) -> None:
    _change(models.TaskContext, "checkpoint", property(_flyte_checkpoint))


def _patch_flytekit_elastic(task: types.ModuleType) -> None:
    _change(task, "spawn_helper", _flytekit_worker)


def _patch_flyte_elastic(task: types.ModuleType) -> None:
    _change(task, "launcher_entrypoint", _flyte_worker)


_PATCHES: dict[str, Callable[[types.ModuleType], None]] = {
    "flytekit.core.checkpointer": _patch_flytekit_names,
    "flytekit.core.context_manager": _patch_flytekit_context,
    "flytekitplugins.kfpytorch.task": _patch_flytekit_elastic,
    "flyte": _patch_flyte_names,
    "flyte.models": _patch_flyte_context,
    "flyteplugins.pytorch.task": _patch_flyte_elastic,
}


def _flytekit_checkpoint(parameters: Any) -> Checkpoint:
    """The attempt's checkpoint, in place of `flytekit.ExecutionParameters.checkpoint`."""
    own = parameters._checkpoint
    found = _taken_over(own) if own is not None else _of_flyte() or _of_runner()
    if found is None:
        raise _unavailable()
    return found


def _flyte_checkpoint(task: Any) -> v2.Checkpoint | None:
    """The attempt's checkpoint or `None` outside a task, in place of `flyte.models.TaskContext.checkpoint`."""
    with _lock:
        attempt = _flyte_attempt(task) or (_runners[-1] if _runners else None)
        return attempt.new if attempt is not None else None


# Both Flytes' Elastic tasks spawn workers that get the task's function pickled by its value, so that they do not import
# the module that calls `install`.


def _flytekit_worker(*arguments: Any) -> Any:
    """Run as a worker of `flytekitplugins.kfpytorch.Elastic`."""
    install()
    from flytekitplugins.kfpytorch import task

    return _changes[task, "spawn_helper"].theirs(*arguments)


def _flyte_worker(*arguments: Any) -> Any:
    """Run as a worker of `flyteplugins.pytorch.Elastic`."""
    install()
    from flyteplugins.pytorch import task

    return _changes[task, "launcher_entrypoint"].theirs(*arguments)


def _take_over(ours: dict[Any, Any], but: str = "") -> None:
    """Replace objects in every module that holds them, by whatever name."""
    replacements = {id(theirs): replacement for theirs, replacement in ours.items()}
    for module_name, module in _modules():
        if module_name == but:
            continue
        held = _held(module, replacements)
        # A user's classes that extend theirs go on calling their base by its name.
        if held and (_is_theirs(module_name) or not _extends(module, set(ours))):
            for name, replacement in held:
                _change(module, name, replacement)


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


def __getattr__(name: str) -> object:
    # Where flytekit is installed its own exception is the one that its platform retries.
    if name != "FlyteRecoverableException":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    if importlib.util.find_spec("flytekit") is None:
        return errors.FlyteRecoverableException
    from flytekit.exceptions.user import FlyteRecoverableException

    return FlyteRecoverableException
