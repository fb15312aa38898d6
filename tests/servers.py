"""Runs a server that the tests need, for no longer than the tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_START_SECONDS = 60.0
_STOP_SECONDS = 5.0


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a program that listens on a port of 127.0.0.1, from when it does until it is stopped.

    Parameters
    ----------
    command
        The program and its arguments.
    port
        Where it will listen.
    log
        File for what it prints.
    environment
        All of its variables; this process's own by default.

    Raises
    ------
    RuntimeError
        If it does not start. The message ends with its log.
    """
    with log.open("wb") as file:
        # setpriv becomes the program, so the process stays ours to end, and the kernel kills it if we are killed first.
        process = subprocess.Popen(
            ("setpriv", "--pdeathsig=KILL", *command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                ending = log.read_text(errors="replace")[-2000:]
                message = f"{command[0]} did not start. Its log ends with:\n{ending}"
                raise RuntimeError(message)
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Keep a port from everyone who asks for any free one; whoever names it may listen there."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]
