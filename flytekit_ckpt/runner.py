"""Runs a task on this machine the way the platform does: attempt after attempt, some of them killed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import typing
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flytekit_ckpt import attempts, context, endings, errors, layout, scratch, storage
from flytekit_ckpt.named_tasks import TaskFailedError, arguments_of, loaded
from flytekit_ckpt.options import InstallOptions
from flytekit_ckpt.running import Running

__all__ = ["TaskFailedError", "run"]


def run(
    target: str,
    inputs: Mapping[str, str],
    *,
    retries: int = 0,
    root: str | None = None,
    preempt_after: float | None = None,
    options: InstallOptions | None = None,
    report: Callable[[str], None],
) -> Any:
    """Run a function or a flytekit task through attempts, each a process and a destination of its own.

    The previous attempt's destination is the next one's source. An attempt that raises `FlyteRecoverableException`, or
    is killed, is followed by another one; any other exception ends the run.

    Parameters
    ----------
    target : str
        `FILE:FUNCTION`.
    inputs : mapping of str to str
        Arguments as text; each is read as its parameter's annotation says, as JSON or else as text if it says nothing.
    retries : int, default 0
        Attempts after the first.
    root : str, optional
        Folder or URI that the run's checkpoints are kept below, in a folder of the run's own; a temporary one, removed
        at the end, if not given.
    preempt_after : float, optional
        Seconds after which every attempt is killed with SIGKILL, counted from the start of the task's own code.
    options : InstallOptions, optional
        Options of the task's checkpoint, such as `home` and `resume_from`.
    report : callable
        Takes each line that says what happens.

    Returns
    -------
    object
        What the task returned; its `repr` if it cannot be passed between processes.

    Raises
    ------
    TaskFailedError
        If the task failed, or no attempt is left.
    """
    function = target.rpartition(":")[2]
    with contextlib.ExitStack() as stack:
        if root is None:
            root = _temporary(stack, "flytekit_ckpt-run-")
        elif (path := storage.local_path(root)) is not None:
            # The task may change its working directory.
            root = str(path.absolute())
        name = f"{function}-{uuid.uuid4().hex[:8]}"
        prefix = f"{root.rstrip('/')}/{name}"
        report(f"checkpoints: {storage.public(prefix)}")
        source = None
        for number in range(1, retries + 2):
            destination = f"{prefix}/attempt-{number}/{layout.OBJECT_NAME}"
            report(f"attempt {number} of {retries + 1}")
            with contextlib.ExitStack() as disk:
                # What an attempt leaves on its machine goes with it.
                scratch = _temporary(disk, "flytekit_ckpt-attempt-")
                known = Running(destination, source, "local", "local", name, Path(target).name, function, number - 1)
                attempt = _Attempt(target, inputs, known, options or {}, scratch, report)
                how = attempt.follow(preempt_after)
            report(f"  {how} after {attempt.seconds:.2f} s")
            if attempt.succeeded:
                return attempt.result
            if attempt.failure is not None:
                raise TaskFailedError(attempt.failure)
            source = destination
    message = f"no attempt is left: all {retries + 1} were interrupted; give more with --retries"
    raise TaskFailedError(message)


def _temporary(stack: contextlib.ExitStack, prefix: str) -> str:
    folder = tempfile.mkdtemp(prefix=prefix)
    stack.callback(scratch.remove_tree, Path(folder))
    return folder


class _Attempt:
    """One attempt, seen from the process that watches it."""

    def __init__(
        self,
        target: str,
        inputs: Mapping[str, str],
        known: Running,
        options: InstallOptions,
        scratch: str,
        report: Callable[[str], None],
    ) -> None:
        self.succeeded = False
        self.result: Any = None
        self.failure: str | None = None
        self._raised = ""
        self._report = report
        # A process that shares nothing with this one, as on the platform.
        spawn = multiprocessing.get_context("spawn")
        self._events, theirs = spawn.Pipe(duplex=False)
        arguments = (theirs, target, dict(inputs), known, options, scratch)
        self._process = spawn.Process(target=_attempt, args=arguments)
        self._started = time.monotonic()
        self._process.start()
        theirs.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def follow(self, preempt_after: float | None) -> str:
        """Wait for the attempt's end, or kill it; returns how it ended."""
        deadline: float | None = None
        kind = ""
        try:
            while kind != "closed":
                if deadline is not None and time.monotonic() >= deadline:
                    self._kill()
                    deadline = None
                # The pipe alone does not tell of the attempt's death: processes that it forked keep it open.
                if self._events.poll(0.05):
                    kind = self._take()
                    if kind == "started" and preempt_after is not None:
                        deadline = time.monotonic() + preempt_after
                elif not self._process.is_alive():
                    while self._events.poll() and self._take() != "closed":
                        # What it sent between the two questions.
                        pass
                    break
        finally:
            self._kill()
        self._process.join()
        return self._end()

    def _kill(self) -> None:
        # The attempt leads a group of its own: the processes that it started die with it, as a container's do.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(typing.cast("int", self._process.pid), signal.SIGKILL)
        self._process.kill()

    def _take(self) -> str:
        try:
            kind, content = self._events.recv()
        except EOFError:
            return "closed"
        if kind == "event":
            self._report(f"  {_described(content)}")
        elif kind == "returned":
            self.succeeded = True
            self.result = _unpickled(*content)
        elif kind == "recoverable":
            self._raised = content
        elif kind == "failed":
            self.failure = content
        return str(kind)

    def _end(self) -> str:
        code = self._process.exitcode or 0
        if self.succeeded:
            return "succeeded"
        if self.failure is not None:
            return "failed"
        if self._raised:
            return f"raised {self._raised}"
        if code < 0:
            return f"killed by {_signal_name(-code)}"
        self.failure = f"the attempt's process ended with exit code {code} and no result"
        return "failed"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # A real-time signal.
        return f"signal {number}"


def _described(event: layout.Event) -> str:
    if event.shape == "nothing":
        return "restored nothing"
    how = " in the background" if event.in_background else ""
    return f"{event.operation} {event.shape}{how}, {_readable(event.size)} in {event.seconds:.3f} s"


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _unpickled(pickled: bytes | None, text: str) -> Any:
    try:
        return pickle.loads(pickled) if pickled is not None else text
    except Exception:  # noqa: BLE001 - a class of the task's own module, which this process has not imported
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Inside the attempt's process
# ---------------------------------------------------------------------------------------------------------------------


class _EventSender(logging.Handler):
    """Passes on what this package logs of saves and restores."""

    def __init__(self, events: multiprocessing.connection.Connection[Any, Any]) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "checkpoint", None)
        if event is not None:
            self._events.send(("event", event))


def _attempt(
    events: multiprocessing.connection.Connection[Any, Any],
    target: str,
    inputs: dict[str, str],
    known: Running,
    options: InstallOptions,
    scratch: str,
) -> None:
    os.setsid()
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    # Processes that the task starts are started as they would be anywhere else.
    multiprocessing.set_start_method(None, force=True)
    # What a killed attempt printed should have been seen.
    typing.cast("Any", sys.stdout).reconfigure(line_buffering=True)
    logger = logging.getLogger("flytekit_ckpt")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_EventSender(events))
    try:
        function = loaded(target)
        arguments = arguments_of(function, inputs)
        context.install(**options)
        attempts.set_runner_checkpoint(known)
        events.send(("started", None))
        value = endings.finishing(_awaited)(function, arguments)
        events.send(("returned", _pickled(value)))
    except TaskFailedError as error:
        events.send(("failed", str(error)))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it goes to the process that watches
        if isinstance(error, _recoverable()):
            events.send(("recoverable", f"{type(error).__name__}: {error}"))
        else:
            events.send(("failed", traceback.format_exc()))


def _awaited(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    value = function(**arguments)
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _pickled(value: object) -> tuple[bytes | None, str]:
    try:
        return pickle.dumps(value), repr(value)
    except Exception:  # noqa: BLE001 - objects raise what they like here
        return None, repr(value)


def _recoverable() -> tuple[type[BaseException], ...]:
    types: list[type[BaseException]] = [errors.FlyteRecoverableException]
    # An exception of flytekit's can only have been raised if flytekit was imported.
    if sys.modules.get("flytekit") is not None:
        from flytekit.exceptions.user import FlyteRecoverableException

        types.append(FlyteRecoverableException)
    return tuple(types)
