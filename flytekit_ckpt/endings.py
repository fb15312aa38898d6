"""The end of an attempt: what it saves in the background is safe then, or the attempt has failed."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
import pickle
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

from flytekit_ckpt import attempts, background_saves, errors

logger = logging.getLogger("flytekit_ckpt")


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a task's function end when its last save is safe.

    If a save has failed, and no later one of the same has succeeded, it raises `FlyteRecoverableException`: the next
    attempt goes on from the save before.
    """

    @functools.wraps(function)
    def finished(*arguments: Any, **named: Any) -> Any:
        try:
            value = function(*arguments, **named)
        except BaseException as error:
            failure = finish(attempts.running_attempts())
            if isinstance(error, Exception) and (own := _of_background(error)) is not None:
                raise recoverable(own) from error
            if failure is not None:
                logger.warning("the task has failed, and a save of it too: %s", failure)
            raise
        failure = finish(attempts.running_attempts())
        if failure is not None:
            raise recoverable(failure) from failure
        return value

    return finished


def finished_from(function: bytes, **named: Any) -> Any:
    """Call a pickled function as `finishing` has it; this is what a worker of an Elastic task is given."""
    return finishing(pickle.loads(function))(**named)


def finishing_of_flyte(run_task: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Have `run_task` of flyte, which gives a task's outputs and its error, end when the task's last save is safe."""

    @functools.wraps(run_task)
    async def finished(*arguments: Any, **named: Any) -> Any:
        outputs, error = await run_task(*arguments, **named)
        context = named.get("tctx", arguments[0] if arguments else None)
        attempt = attempts.attempt_of_context(context)
        failure = await asyncio.to_thread(finish, [] if attempt is None else [attempt])
        if failure is None or error is not None:
            return outputs, error
        from flyte.errors import CustomError

        return {}, CustomError.from_exception(failure)

    return finished


def finish(known: list[attempts.Attempt]) -> Exception | None:
    """Wait until everything is saved that attempts have given to be saved; returns what failed."""
    failures = [failure for attempt in known for failure in attempt.finish()]
    return failures[0] if failures else None


def recoverable(error: BaseException) -> Exception:
    """Make the error that a platform answers with another attempt."""
    message = f"a checkpoint was not saved in the background: {error}"
    return recoverable_type()(message)


def recoverable_type() -> type[Exception]:
    """Give `FlyteRecoverableException`: where flytekit is installed, its own is the one that its platform retries."""
    if importlib.util.find_spec("flytekit") is None:
        return errors.FlyteRecoverableException
    from flytekit.exceptions.user import FlyteRecoverableException

    return cast("type[Exception]", FlyteRecoverableException)


def _of_background(error: BaseException) -> BaseException | None:
    """Find among an error and its causes one that a save in the background has raised."""
    return next((cause for cause in _causes(error) if background_saves.has_raised(cause)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
