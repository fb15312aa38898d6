"""A checkpoint is carried forward by another process where this one has not imported the storage's client."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flytekit_ckpt import SyncCheckpoint, layout
from flytekit_ckpt.processes import SavingProcess
from flytekit_ckpt.storage import Settings
from tests.conftest import Place, filesystem

PROGRAM = """
import atexit, logging, os, signal, sys
from multiprocessing.connection import Connection
from flytekit_ckpt import SyncCheckpoint, processes
from flytekit_ckpt.carry_forward import CarryForward
from flytekit_ckpt.storage import Settings

def tell(*words):
    # At once: a thread logs meanwhile.
    os.write(1, " ".join(map(str, words)).encode() + b"\\n")

# The client that this program has imported by its end, after everything that it waits for.
atexit.register(lambda: tell("imported" if "s3fs" in sys.modules else "not imported"))
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
IS_HELD = False
begin, send = processes.SavingProcess._begin, Connection.send_bytes

def begun(process):
    begin(process)
    if IS_HELD:
        os.kill(process._process.pid, signal.SIGSTOP)
    tell("process", process._process.pid)

def sent(connection, content, *arguments):
    send(connection, content, *arguments)
    if not content:
        tell("told to stop")

processes.SavingProcess._begin, Connection.send_bytes = begun, sent
source, destination = sys.argv[1:]

def carry(**options):
    carrying = CarryForward(source, destination, Settings(options), is_wanted=True)
    carrying.begin()
    return carrying
"""


class Program:
    """A program that runs, and what it has told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def wait_for(self, beginning: str) -> str:
        """Read up to a line, and give what follows its beginning."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(beginning):
                return line.removeprefix(beginning).strip()
        raise AssertionError(self.lines)

    def go_on(self) -> None:
        """Let it go on where it waits for a line."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def end(self) -> list[str]:
        """Wait for its end; give all that it has told."""
        rest, _ = self.process.communicate(timeout=120)
        self.lines.extend(rest.splitlines())
        assert self.process.returncode == 0, self.lines
        return self.lines


@contextlib.contextmanager
def running(source: str, destination: str, body: str) -> Iterator[Program]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(body), source, destination],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Then who reads from it reads on, and fails.
    watch = threading.Timer(120, process.kill)
    watch.start()
    with process:
        try:
            yield Program(process)
        finally:
            watch.cancel()
            process.kill()


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    return not Path(f"/proc/{process}").exists()


def uploads(place: Place, uri: str) -> list[Any]:
    """List the uploads to an object that have not been completed."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    answer = filesystem(place).call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    found: list[Any] = answer.get("Uploads") or []
    return found


def await_upload(place: Place, uri: str) -> None:
    deadline = time.monotonic() + 60
    while not uploads(place, uri):
        assert time.monotonic() < deadline


@pytest.fixture
def source(s3: Place) -> str:
    uri = s3.uri()
    SyncCheckpoint(uri, storage_options=s3.options).write(b"5")
    return uri


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A checkpoint that takes long to be sent."""
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 512 << 20)
    return str(path)


def test_an_attempt_begins_without_the_client_and_its_checkpoint_is_carried(s3: Place, source: str) -> None:
    destination = s3.uri()
    body = """
    sys.argv[:] = ["pyflyte-execute", "--checkpoint-path", destination, "--prev-checkpoint", source]
    import flytekit_ckpt.auto
    tell("s3fs" in sys.modules)
    """
    with running(source, destination, body) as program:
        lines = program.end()
    assert "False" in lines
    assert lines[-1] == "not imported"
    assert any(line.startswith(f"carried {source} forward to {destination}") for line in lines)
    found = layout.get(destination, s3.settings)
    assert found is not None
    assert found.metadata["carried"] == "yes"
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"5"
    assert is_gone(int(next(line for line in lines if line.startswith("process ")).split()[1]))


@pytest.mark.parametrize("imports", ["", "import s3fs"], ids=["local", "imported"])
def test_there_is_no_other_process_where_nothing_must_be_imported(
    s3: Place, source: str, tmp_path: Path, imports: str
) -> None:
    destination = s3.uri() if imports else str(tmp_path / "second")
    if not imports:
        source = str(tmp_path / "first")
        SyncCheckpoint(source).write(b"5")
    with running(source, destination, f"{imports}\ncarry()") as program:
        lines = program.end()
    assert not any(line.startswith("process ") for line in lines)
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"5"


def test_a_save_stops_the_other_process_and_no_upload_is_left(s3: Place, large: str) -> None:
    destination = s3.uri()
    body = """
    carry()
    input()
    SyncCheckpoint(destination).write(b"6")
    tell("saved")
    """
    with running(large, destination, body) as program:
        other = int(program.wait_for("process "))
        await_upload(s3, destination)
        os.kill(other, signal.SIGSTOP)
        assert uploads(s3, destination)
        program.go_on()
        program.wait_for("told to stop")
        os.kill(other, signal.SIGCONT)
        program.wait_for("saved")
        assert not uploads(s3, destination)
        assert is_gone(other)
        lines = program.end()
    assert f"{large} is not carried forward to {destination}: something else is saved there" in lines
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"6"


def test_a_save_does_not_wait_until_the_other_process_is_ready(s3: Place, source: str) -> None:
    body = """
    IS_HELD = True
    carrying = carry()
    input()
    # Its own client is not imported before that has stopped.
    with carrying.paused():
        tell("imported" if "s3fs" in sys.modules else "not yet")
        SyncCheckpoint(destination).write(b"6")
    """
    destination = s3.uri()
    with running(source, destination, body) as program:
        other = int(program.wait_for("process "))
        program.go_on()
        program.wait_for("not yet")
        assert is_gone(other)
        lines = program.end()
    assert "told to stop" not in lines
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"6"


def test_who_has_imported_the_client_meanwhile_does_not_wait_for_the_other_process(s3: Place, source: str) -> None:
    destination = s3.uri()
    body = """
    IS_HELD = True
    carrying = carry()
    input()
    import s3fs
    carrying.close()
    tell("closed")
    input()
    """
    with running(source, destination, body) as program:
        other = int(program.wait_for("process "))
        program.go_on()
        program.wait_for("closed")
        assert is_gone(other)
        assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"5"
        program.go_on()
        program.end()


def test_if_the_other_process_is_killed_one_more_copies(s3: Place, large: str) -> None:
    destination = s3.uri()
    with running(large, destination, "carry()") as program:
        other = int(program.wait_for("process "))
        await_upload(s3, destination)
        os.kill(other, signal.SIGKILL)
        lines = program.end()
    assert "the process that saves in the background was killed (exit code -9): another one does its work" in lines
    assert lines[-1] == "not imported"
    found = layout.get(destination, s3.settings)
    assert isinstance(found, layout.Payload)
    assert found.size == 512 << 20


def test_if_the_program_is_killed_no_half_of_a_checkpoint_is_there(s3: Place, large: str) -> None:
    destination = s3.uri()
    with running(large, destination, "carry()") as program:
        other = int(program.wait_for("process "))
        await_upload(s3, destination)
        program.process.kill()
        assert is_gone(other)
    found = layout.get(destination, s3.settings)
    assert found is None or found.size == 512 << 20
    assert os.path.getsize(large) == 512 << 20
    # And the next attempt carries on.
    SyncCheckpoint(f"{destination}-3", large, storage_options=s3.options).close()
    assert layout.get(f"{destination}-3", s3.settings) is not None


def test_a_fork_has_no_part_in_it(s3: Place, source: str) -> None:
    destination = s3.uri()
    body = """
    IS_HELD = True
    carrying = carry()
    input()
    if not os.fork():
        carrying.close()
        # Not by `os._exit`: nothing that is registered for the end may end it.
        sys.exit()
    assert os.wait()[1] == 0
    tell("forked")
    """
    with running(source, destination, body) as program:
        other = int(program.wait_for("process "))
        program.go_on()
        program.wait_for("forked")
        os.kill(other, signal.SIGCONT)
        lines = program.end()
    assert not any(line.startswith("process ") for line in lines[lines.index("forked") :])
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"5"


@pytest.mark.parametrize("executable", ["/nothing/python", "/bin/false"])
def test_where_no_other_process_can_be_begun_a_thread_carries(s3: Place, source: str, executable: str) -> None:
    destination = s3.uri()
    with running(source, destination, f"sys.executable = {executable!r}\ncarry()") as program:
        lines = program.end()
    assert any(line.startswith("carrying forward in a thread, as no other process can") for line in lines)
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"5"


def test_options_that_mean_nothing_to_another_process_are_used_by_a_thread(s3: Place, source: str) -> None:
    destination = s3.uri()
    body = f"""
    class Secret(str):
        pass

    carry(**{{**{s3.options!r}, "secret": Secret({s3.options["secret"]!r})}})
    tell("s3fs" in sys.modules)
    """
    with running(source, destination, body) as program:
        lines = program.end()
    assert "True" in lines
    assert not any(line.startswith("process ") for line in lines)
    assert SyncCheckpoint("", destination, storage_options=s3.options).read() == b"5"


def test_a_call_that_is_given_up_too_late_disturbs_no_other(tmp_path: Path) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    process = SavingProcess(str(tmp_path))
    process.begin()
    assert process._process is not None
    begun = process._process.pid
    nothing, first, second = (str(tmp_path / name) for name in ("nothing", "first", "second"))
    # It never asks: there is nothing to copy.
    assert process.call(layout.copy, nothing, second, Settings(), given_up=lambda: True) is None
    assert process.call(layout.copy, first, second, Settings(), given_up=lambda: False) is not None
    assert process._process.pid == begun
    process.close()
    assert SyncCheckpoint("", second).read() == b"5"
