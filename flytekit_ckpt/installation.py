"""`install`, after which programs that import flytekit or flyte use this package's checkpoints, unchanged."""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flytekit_ckpt import endings, termination, v2
from flytekit_ckpt.attempts import (
    attempt_of_context,
    begin,
    flyte_attempt,
    lock,
    of_flyte,
    of_runner,
    taken_over,
    unavailable,
)
from flytekit_ckpt.checkpointer import Checkpoint, SyncCheckpoint
from flytekit_ckpt.options import GRACE, InstallOptions, check_names, is_asynchronous, of_attempts
from flytekit_ckpt.replacement import change, changes, put_back, take_over

if TYPE_CHECKING:
    from typing_extensions import Unpack


def install(**options: Unpack[InstallOptions]) -> None:
    """Have programs that import flytekit or flyte use this package's checkpoints, unchanged.

    Takes the place of flytekit's `Checkpoint` and `SyncCheckpoint` wherever they were imported to, and of
    `flyte.Checkpoint`, `flyte.BaseCheckpoint` and `flyte.latest_checkpoint`; `flytekit.current_context().checkpoint`
    gives `SyncCheckpoint`, also on Flyte 2 under flyte-migrate, and `flyte.ctx().checkpoint` gives `v2.Checkpoint`.

    It may be called more than once, from any thread, before or after flytekit, flyte, flyte-migrate or the tasks were
    imported, and with any of them missing; it imports none of them.

    Parameters
    ----------
    **options
        Those of `flytekit_ckpt.options.InstallOptions`, such as `retries=20` or `asynchronous=True`, for the
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

    check_names(options, InstallOptions, "install")
    of_attempts.update(options)
    for name in _PATCHES:
        if sys.modules.get(name) is not None:
            # Waits for a thread that is in the midst of importing it.
            importlib.import_module(name)
    with lock:
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
    if is_asynchronous():
        # Before the task begins, in the main thread.
        termination.finish_within(of_attempts.get("grace", GRACE))
    begin()


def uninstall() -> None:
    """Undo `install`.

    Names that modules outside flytekit and flyte imported from there meanwhile stay what they are.
    """
    with lock:
        _installed.clear()
        for name in list(of_attempts):
            of_attempts.pop(name)  # type: ignore[misc]
        put_back()


_installed: list[bool] = []

# Modules whose import hook is registered.
_awaited: set[str] = set()


def _patch(name: str, module: object) -> None:
    with lock:
        # Tests put all kinds of things in the place of modules.
        if _installed and isinstance(module, types.ModuleType):
            _PATCHES[name](module)


def _patch_flytekit_names(checkpointer: types.ModuleType) -> None:
    # Whoever imports them later gets ours from here, flytekit's container entry point for one.
    take_over({checkpointer.Checkpoint: Checkpoint, checkpointer.SyncCheckpoint: SyncCheckpoint})


def _patch_flytekit_context(context_manager: types.ModuleType) -> None:
    change(context_manager.ExecutionParameters, "checkpoint", property(_flytekit_checkpoint))


def _patch_flyte_names(flyte: types.ModuleType) -> None:
    names = ("BaseCheckpoint", "Checkpoint", "latest_checkpoint")
    # Flyte's own module keeps its names: flyte.models makes its checkpoints with them, and so tells attempts apart.
    take_over({getattr(flyte, name): getattr(v2, name) for name in names if hasattr(flyte, name)}, "flyte._checkpoint")


def _patch_flyte_context(models: types.ModuleType) -> None:
    change(models.TaskContext, "checkpoint", property(_flyte_checkpoint))
    change(models.TaskContext, "__init__", _beginning(models.TaskContext.__init__))


def _patch_flytekit_tasks(tasks: types.ModuleType) -> None:
    for name in ("PythonFunctionTask", "AsyncPythonFunctionTask"):
        kind = getattr(tasks, name, None)
        if kind is not None and "execute" in vars(kind):
            change(kind, "execute", endings.finishing(kind.execute))


def _patch_flyte_runtime(runner: types.ModuleType) -> None:
    change(runner, "run_task", endings.finishing_of_flyte(runner.run_task))


def _patch_flytekit_elastic(task: types.ModuleType) -> None:
    change(task, "spawn_helper", _with_options(_flytekit_worker))


def _patch_flyte_elastic(task: types.ModuleType) -> None:
    change(task, "launcher_entrypoint", _with_options(_flyte_worker))


_PATCHES: dict[str, Callable[[types.ModuleType], None]] = {
    "flytekit.core.checkpointer": _patch_flytekit_names,
    "flytekit.core.context_manager": _patch_flytekit_context,
    "flytekit.core.python_function_task": _patch_flytekit_tasks,
    "flytekitplugins.kfpytorch.task": _patch_flytekit_elastic,
    "flyte": _patch_flyte_names,
    "flyte.models": _patch_flyte_context,
    "flyte._internal.runtime.taskrunner": _patch_flyte_runtime,
    "flyteplugins.pytorch.task": _patch_flyte_elastic,
}


def _flytekit_checkpoint(parameters: Any) -> Checkpoint:
    """The attempt's checkpoint, in place of `flytekit.ExecutionParameters.checkpoint`."""
    own = parameters._checkpoint
    found = taken_over(own) if own is not None else of_flyte() or of_runner()
    if found is None:
        raise unavailable()
    return found


def _beginning(initialize: Callable[..., None]) -> Callable[..., None]:
    """Have a `flyte.models.TaskContext` in a container begin with its checkpoint, which the task may never ask for.

    The command line of a container that is reused does not name the attempts that it runs.
    """

    # flyte shows a context by the signature of this.
    @functools.wraps(initialize)
    def initialized(task: Any, *arguments: Any, **named: Any) -> None:
        initialize(task, *arguments, **named)
        if getattr(task, "checkpoint_paths", None) is not None and task.mode == "remote":
            with lock:
                flyte_attempt(task)

    return initialized


def _flyte_checkpoint(task: Any) -> v2.Checkpoint | None:
    """The attempt's checkpoint or `None` outside a task, in place of `flyte.models.TaskContext.checkpoint`."""
    attempt = attempt_of_context(task)
    with lock:
        return attempt.new if attempt is not None else None


# Both Flytes' Elastic tasks spawn workers that get the task's function pickled by its value, so that they do not import
# the module that calls `install`.


def _with_options(worker: Callable[..., Any]) -> Callable[..., Any]:
    """Give a worker the options of `install`, as they are when it is sent to the process that runs it."""
    # torch elastic asks for its name.
    return functools.update_wrapper(functools.partial(worker, of_attempts), worker)


def _flytekit_worker(options: InstallOptions, function: bytes, *arguments: Any) -> Any:
    """Run as a worker of `flytekitplugins.kfpytorch.Elastic`."""
    install(**options)
    from flytekitplugins.kfpytorch import task

    return changes[task, "spawn_helper"].theirs(_finishing(function), *arguments)


def _flyte_worker(options: InstallOptions, context: Any, function: bytes, *arguments: Any) -> Any:
    """Run as a worker of `flyteplugins.pytorch.Elastic`."""
    install(**options)
    from flyteplugins.pytorch import task

    return changes[task, "launcher_entrypoint"].theirs(context, _finishing(function), *arguments)


def _finishing(function: bytes) -> bytes:
    return pickle.dumps(functools.partial(endings.finished_from, function))
