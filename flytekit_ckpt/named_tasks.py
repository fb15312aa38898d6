"""A task that is named on the command line, and its arguments, given as text."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class TaskFailedError(Exception):
    """The task failed for good; the message holds its traceback or says what killed it."""


def loaded(target: str) -> Callable[..., Any]:
    """Import the file; of a flytekit task, take the function."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        message = f"there is no file {file!r}: name the task as FILE:FUNCTION, for example counter.py:counter"
        raise TaskFailedError(message)
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        message = f"{file} is not a Python file"
        raise TaskFailedError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    task = getattr(module, name, None)
    function = getattr(task, "task_function", task)
    if not callable(function):
        message = f"{file} has no function or task {name!r}"
        raise TaskFailedError(message)
    return typing.cast("Callable[..., Any]", function)


def arguments_of(function: Callable[..., Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Read each input as its parameter's annotation says, as JSON or else as text if it says nothing."""
    try:
        kinds = typing.get_type_hints(function)
    except NameError:
        # An annotation that only type checkers can evaluate.
        kinds = {}
    arguments = {name: _argument(name, text, kinds.get(name)) for name, text in inputs.items()}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        message = f"the inputs do not fit {function.__name__}{inspect.signature(function)}: {error}"
        raise TaskFailedError(message) from error
    return arguments


def _argument(name: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text == "null" and types.NoneType in typing.get_args(kind):
            return None
        choices = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
        kind = choices[0] if len(choices) == 1 else None
    if kind in (str, Path):
        return kind(text)
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    wanted = typing.get_origin(kind) or kind
    if wanted is float and type(value) is int:
        return float(value)
    if wanted in (int, float, bool, list, dict) and type(value) is not wanted:
        message = f"{name}={text} is not {wanted.__name__}"
        raise TaskFailedError(message)
    return value
