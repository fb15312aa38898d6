"""A process that saves and copies for this one, whose interpreter goes on meanwhile."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from flytekit_ckpt import storage
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.storage import Surroundings

logger = logging.getLogger("flytekit_ckpt")

_INTERVAL = 0.02
"""Seconds between two questions whether a call is given up."""

_STOP = b""
"""Sent in the place of a request while one is worked on: it is given up."""

NICENESS = 10
"""How far behind the caller's own threads it stands where there are not cores enough: it gets a tenth of one."""

_Answer = TypeVar("_Answer")


class ProcessUnavailableError(Exception):
    """There can be no other process, or what it needs cannot be sent there; nothing has been done."""


class SavingProcess:
    """Calls functions in another process, one at a time; it is begun once, and anew if it was killed.

    Nothing of the program that runs here is imported there.

    Parameters
    ----------
    uri : str
        Where it will save to, for which it makes itself ready.
    niceness : int, default NICENESS
        How far behind the caller's own threads it stands.
    """

    def __init__(self, uri: str, niceness: int = NICENESS) -> None:
        self._uri = uri
        self._niceness = niceness
        self._forget()
        _all.add(self)

    def _forget(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._is_ready = False

    def _leave(self) -> None:
        """Have a forked process not keep its parent's connection open."""
        if self._connection is not None:
            self._connection.close()
        self._forget()

    def begin(self) -> None:
        """Begin the process, unless it runs.

        Raises
        ------
        ProcessUnavailableError
            If the system allows no other process.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        try:
            self._begin()
        except OSError as error:
            self.close()
            raise ProcessUnavailableError(str(error)) from error

    def _begin(self) -> None:
        from multiprocessing.connection import Pipe

        self._connection, theirs = Pipe()
        with theirs:
            number = theirs.fileno()
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from flytekit_ckpt import processes; "
                f"processes.serve({number}, {os.getpid()}, {self._uri!r}, {self._niceness})"
            )
            self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[number], stdin=subprocess.DEVNULL)
        weakref.finalize(self, _end, self._process, os.getpid())

    def await_ready(self, given_up: Callable[[], bool]) -> bool:
        """Begin the process and wait until it takes calls, which takes it about a second, unless that is given up.

        Parameters
        ----------
        given_up : callable
            Called repeatedly; tells whether to wait no longer. The process has done nothing then, and may be closed.

        Returns
        -------
        bool
            Whether it takes calls.

        Raises
        ------
        ProcessUnavailableError
            If the system allows no other process, or it ends before that.
        """
        self.begin()
        while not self._is_ready:
            if self._connection.poll(_INTERVAL):
                try:
                    self._connection.recv()
                except (EOFError, ConnectionError) as error:
                    message = f"it ended at once (exit code {self.close()})"
                    raise ProcessUnavailableError(message) from error
                self._is_ready = True
            elif given_up():
                return False
        return True

    def call(
        self,
        function: Callable[..., _Answer],
        *arguments: object,
        callback: Callback | None = None,
        given_up: Callable[[], bool] | None = None,
    ) -> _Answer:
        """Call a function there, and wait for its answer.

        Parameters
        ----------
        function : callable
            One of this package.
        *arguments : object
            They are sent there, and the answer back.
        callback : fsspec callback, optional
            Progress callback, which the function gets as `callback`.
        given_up : callable, optional
            Called repeatedly here; tells whether the function is to leave it, which it may ask by its own `given_up`.

        Raises
        ------
        Exception
            What the function raises.
        ProcessUnavailableError
            If there can be no other process, or the arguments cannot be sent.
        CheckpointError
            If the process is killed, and once more when it is tried again.
        """
        surroundings = Surroundings()
        try:
            level = logger.getEffectiveLevel()
            named = callback is not None, given_up is not None
            request = pickle.dumps((function, arguments, named, level, surroundings))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ProcessUnavailableError(str(error)) from error
        for is_last in (False, True):
            try:
                self.begin()
                self._connection.send_bytes(request)
                kind, answer = self._answer(callback, given_up)
                break
            except (EOFError, ConnectionError) as error:
                code = self.close()
                message = f"the process that saves in the background was killed (exit code {code})"
                if is_last:
                    message = f"{message} twice: give it more memory, or save less at a time"
                    raise CheckpointError(message) from error
                logger.warning("%s: another one does its work", message)
            except BaseException:
                # What it was to answer would come in the place of the next answer.
                self.close()
                raise
        if kind == "failed":
            raise answer
        return cast("_Answer", answer)

    def _answer(self, callback: Callback | None, given_up: Callable[[], bool] | None) -> tuple[str, Any]:
        while True:
            while given_up is not None and not self._connection.poll(_INTERVAL):
                if given_up():
                    self._connection.send_bytes(_STOP)
                    given_up = None
            kind, content = self._connection.recv()
            if kind == "ready":
                self._is_ready = True
            elif kind == "log":
                logger.handle(logging.makeLogRecord(content))
            elif kind == "size" and callback is not None:
                callback.set_size(content)
            elif kind == "progress" and callback is not None:
                callback.relative_update(content)
            elif kind in ("done", "failed"):
                return kind, content

    def close(self) -> int | None:
        """End the process, at once; returns its exit code."""
        process, connection = self._process, self._connection
        self._forget()
        if connection is not None:
            connection.close()
        return None if process is None else _end(process, os.getpid())


def _end(process: subprocess.Popen[bytes], parent: int) -> int | None:
    if os.getpid() != parent:
        return None
    process.kill()
    return process.wait()


_all: weakref.WeakSet[SavingProcess] = weakref.WeakSet()


def _leave_all() -> None:
    for process in list(_all):
        process._leave()


os.register_at_fork(after_in_child=_leave_all)


# In the other process -------------------------------------------------------------------------------------------------


def serve(number: int, parent: int, uri: str, niceness: int) -> None:
    """Answer the calls that come by an open connection, until the parent ends."""
    # What the terminal or the platform tells a whole group is for the parent to decide.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(niceness)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from multiprocessing.connection import Connection

    storage.import_client(uri)
    connection = _Sender(Connection(number))
    connection.send("ready", None)
    handler = _LogSender(connection)
    logger.addHandler(handler)
    logger.propagate = False
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = connection.take()
            try:
                function, arguments, (has_callback, may_be_given_up), level, surroundings = pickle.loads(request)
            except Exception as error:  # noqa: BLE001 - other people's classes raise what they like here
                # Of the program's own module, for example, which is not imported here.
                connection.send("failed", ProcessUnavailableError(f"{type(error).__name__}: {error}"))
                continue
            logger.setLevel(level)
            named: dict[str, Any] = {"callback": _CallbackSender(connection)} if has_callback else {}
            if may_be_given_up:
                named["given_up"] = connection.is_stopped
            try:
                surroundings.enter()
                answer = "done", function(*arguments, **named)
            except BaseException as error:
                # Where it was raised does not come across.
                logger.debug("in the process that saves in the background", exc_info=True)
                answer = "failed", _sendable(error)
            connection.send(*answer)
    # Threads that wait for a server, for example, are of no use to anybody any more.
    os._exit(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - other people's exceptions raise what they like here
        return CheckpointError(f"{type(error).__name__}: {error}")
    return error


class _Sender:
    """The connection to the parent, of which several threads make use."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def take(self) -> bytes:
        received = _STOP
        while received == _STOP:
            # What was to be stopped had come to its end.
            received = self._connection.recv_bytes()
        return received

    def is_stopped(self) -> bool:
        # It stays there until the next request is taken.
        stopped: bool = self._connection.poll(0)
        return stopped

    def send(self, kind: str, content: Any) -> None:
        with self._lock:
            self._connection.send((kind, content))


class _LogSender(logging.Handler):
    """Has the parent log what is logged here."""

    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        told = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
        if record.exc_info:
            told["exc_text"] = logging.Formatter().formatException(record.exc_info)
        self._sender.send("log", told)


class _CallbackSender:
    """Has the parent call a progress callback."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender

    def set_size(self, size: int) -> None:
        self._sender.send("size", size)

    def relative_update(self, inc: int = 1) -> None:
        self._sender.send("progress", inc)
