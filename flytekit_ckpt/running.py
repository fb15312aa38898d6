"""Which attempt of which task runs here: what the platforms tell their containers."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True)
class Running:
    """An attempt, as far as the platform tells.

    Attributes
    ----------
    destination, source : str or None
        Where its checkpoint is saved to, and where the previous attempt's is.
    project, domain, run : str
        The run that it belongs to (flytekit: the execution); blank if unknown.
    task : str
        The task's name, the same in every run; blank if unknown.
    node : str
        Which of the run's tasks it is, with the index of a map task (Flyte 2: the action); blank if unknown.
    number : int or None
        Counted from 0 within the run.
    """

    destination: str | None = None
    source: str | None = None
    project: str = ""
    domain: str = ""
    run: str = ""
    task: str = ""
    node: str = ""
    number: int | None = None


def running() -> Running:
    """Tell which attempt runs here, in this order: as `as_running` says, as flyte says, as the command line says."""
    said = _said.get()
    if said is not None:
        return said
    # Not by an import statement: a thread may be in the midst of importing it.
    flyte: Any = sys.modules.get("flyte")
    context = flyte.ctx() if isinstance(flyte, types.ModuleType) and hasattr(flyte, "ctx") else None
    return of_flyte(context) if context else _of_command_line(sys.argv)


@contextlib.contextmanager
def as_running(attempt: Running) -> Iterator[None]:
    """Have `running` answer with an attempt."""
    token = _said.set(attempt)
    try:
        yield
    finally:
        _said.reset(token)


_said: contextvars.ContextVar[Running | None] = contextvars.ContextVar("flytekit_ckpt.running", default=None)


def of_flyte(task: Any) -> Running:
    """Give the attempt of a `flyte.models.TaskContext`."""
    paths = getattr(task, "checkpoint_paths", None)
    action = getattr(task, "task_action", None) or task.action
    told = _of_command_line(sys.argv)
    # A container that is reused runs other actions than its command line names.
    is_told = (told.run, told.node) == (action.run_name, action.name)
    return Running(
        destination=named_uri(getattr(paths, "checkpoint_path", None)),
        source=named_uri(getattr(paths, "prev_checkpoint_path", None)),
        project=action.project or "",
        domain=action.domain or "",
        run=action.run_name or "",
        task=told.task if is_told else "",
        node=action.name,
        number=_attempt_number(),
    )


def named_uri(uri: str | None) -> str | None:
    """Return the URI that a platform names, `None` for the ways in which it says that there is none."""
    uri = os.fspath(uri or "").strip().strip('"').strip()
    # A template that the platform has not filled in is none either.
    return None if not uri or uri.startswith("{{") else uri


def is_restarted() -> bool:
    """Tell whether the platform has restarted this attempt: torch elastic its workers, a JobSet its pods."""
    return any(_number(name) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT"))


def has_other_ranks() -> bool:
    """Tell whether this process is one of several ranks, which do not all start in the same moment."""
    return _number("WORLD_SIZE") > 1


# The entry points of both platforms' containers. A user's program may have options of the same names.
_FLYTE_1 = ("pyflyte-execute", "pyflyte-map-execute")
_FLYTE_2 = ("a0",)


def _of_command_line(arguments: Sequence[str]) -> Running:
    # Where it was started as a module, its name is the second.
    names = [PurePath(argument).name for argument in arguments[:2]]
    if any(name in _FLYTE_1 for name in names):
        return _of_flyte_1(_options(arguments)[0])
    if any(name in _FLYTE_2 for name in names):
        return _of_flyte_2(*_options(arguments))
    return Running()


def _options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read `--name value` and `--name=value`; what belongs to no option comes second."""
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(arguments[1:])
    while waiting:
        name, separator, value = waiting.pop(0).partition("=")
        if not name.startswith("--"):
            rest.append(name + separator + value)
        elif separator:
            options[name] = value
        elif waiting and not waiting[0].startswith("--"):
            options[name] = waiting.pop(0)
    return options, rest


def _of_flyte_1(options: dict[str, str]) -> Running:
    run = _variable("EXECUTION_ID", "NM")
    number = _attempt_number()
    return Running(
        destination=named_uri(options.get("--checkpoint-path")),
        source=named_uri(options.get("--prev-checkpoint")),
        project=_variable("EXECUTION_PROJECT", "PRJ"),
        domain=_variable("EXECUTION_DOMAIN", "DM"),
        run=run,
        task=_variable("TASK_NAME", "TK_NM"),
        node=_node(options.get("--output-prefix", ""), run, number),
        number=number,
    )


def _node(output_prefix: str, run: str, number: int | None) -> str:
    """Tell the node from where its outputs go: `.../<project>-<domain>-<run>/<node>/data/<attempt>`."""
    parts = output_prefix.rstrip("/").split("/")
    # What does not end so is not known here, and may be another task's too.
    if not run or number is None or parts.pop() != str(number):
        return ""
    ends = [place for place, part in enumerate(parts, 1) if part == run or part.endswith(f"-{run}")]
    # Without the run's name in it, it is at least this task's alone.
    node = "/".join(parts[ends[-1] :] if ends else parts)
    index = os.environ.get(os.environ.get("BATCH_JOB_ARRAY_INDEX_VAR_NAME", ""), "")
    offset = os.environ.get("BATCH_JOB_ARRAY_INDEX_OFFSET", "")
    return "/".join(part for part in (node, offset, index) if part)


def _of_flyte_2(options: dict[str, str], rest: list[str]) -> Running:
    return Running(
        destination=named_uri(options.get("--checkpoint-path")),
        source=named_uri(options.get("--prev-checkpoint")),
        project=options.get("--project", ""),
        domain=options.get("--domain", ""),
        # Templates that the platform has not filled in.
        run=_filled(options.get("--run-name", ""), "RUN_NAME"),
        # How the task is found: `mod MODULE instance NAME`.
        task=".".join(rest[1::2]),
        node=_filled(options.get("--name", ""), "ACTION_NAME"),
        number=_attempt_number(),
    )


def _filled(value: str, variable: str) -> str:
    return os.environ.get(variable, "") if value.startswith("{{") or not value else value


def _variable(name: str, short: str) -> str:
    return os.environ.get(f"FLYTE_INTERNAL_{name}") or os.environ.get(f"_F_{short}") or ""


def _attempt_number() -> int | None:
    text = os.environ.get("FLYTE_ATTEMPT_NUMBER", "")
    return int(text) if text.isdecimal() else None


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
