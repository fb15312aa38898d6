"""SIGTERM: a save in progress is finished, a callback runs once, and the process ends as it would have."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flytekit_ckpt import SyncCheckpoint, on_termination
from flytekit_ckpt.iterators import IteratorCheckpoint

# `kill` sends the signal, and returns at once: its handler has been called or waits for the main thread.
PROGRAM = """
import io, os, signal, sys, threading, time
from flytekit_ckpt import SyncCheckpoint, on_termination
from flytekit_ckpt.v2 import Checkpoint

root = sys.argv[1]

def say(text):
    os.write(1, f"{text}\\n".encode())

def kill():
    os.kill(os.getpid(), signal.SIGTERM)

class Slow(io.RawIOBase):
    '''Sends the signal in the middle of being saved.'''
    def __init__(self, times=1):
        self.left, self.times = 3, times
    def readable(self):
        return True
    def read(self, size=-1):
        self.left -= 1
        if self.left == 1:
            for _ in range(self.times):
                kill()
            time.sleep(0.2)
        return b"x" * 1000 if self.left >= 0 else b""
"""


def run(tmp_path: Path, body: str) -> tuple[int, list[str]]:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM + body, str(tmp_path)], check=False, stdout=subprocess.PIPE, timeout=60
    )
    return process.returncode, process.stdout.decode().splitlines()


def saved(tmp_path: Path, name: str) -> bytes | None:
    return SyncCheckpoint("", str(tmp_path / name)).read()


def test_a_save_of_the_main_thread_is_finished_first(tmp_path: Path) -> None:
    body = """
cp = SyncCheckpoint(root + "/first")
on_termination(lambda: (say("callback"), SyncCheckpoint(root + "/last").write(b"last words")))
cp.save(Slow(times=3))
say("never")
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, ["callback"])
    assert saved(tmp_path, "first") == b"x" * 3000
    assert saved(tmp_path, "last") == b"last words"


def test_the_signal_in_the_midst_of_the_callback_does_not_call_it_again(tmp_path: Path) -> None:
    body = """
on_termination(lambda: (say("callback"), kill(), say("callback ends")))
kill()
say("never")
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, ["callback", "callback ends"])


def test_saves_of_other_threads_are_finished_first(tmp_path: Path) -> None:
    body = """
on_termination(lambda: say("callback"))
barrier = threading.Barrier(2)
class Together(Slow):
    def read(self, size=-1):
        if self.left == 3:
            barrier.wait()
        return super().read(size)
def work(name, times):
    SyncCheckpoint(f"{root}/{name}").save(Together(times))
threads = [threading.Thread(target=work, args=(name, times)) for name, times in (("first", 1), ("second", 0))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
time.sleep(10)
say("never")
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, ["callback"])
    assert saved(tmp_path, "first") == saved(tmp_path, "second") == b"x" * 3000


def test_the_callback_may_save_with_the_same_checkpoint_in_the_middle_of_a_save(tmp_path: Path) -> None:
    body = """
cp = SyncCheckpoint(root + "/first")
on_termination(lambda: cp.write(b"last words"))
cp.save(Slow())
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, [])
    assert saved(tmp_path, "first") == b"last words"


def test_the_callback_may_save_in_the_middle_of_a_restore(tmp_path: Path) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    body = """
from flytekit_ckpt import layout
cp = SyncCheckpoint(root + "/second", root + "/first")
on_termination(lambda: cp.write(b"last words"))
real = layout.get
layout.get = lambda *arguments: (kill(), real(*arguments))[1]
cp.read()
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, [])
    assert saved(tmp_path, "second") == b"last words"


@pytest.mark.parametrize(
    ("before", "code", "lines"),
    [
        ("", -signal.SIGTERM, ["callback"]),
        ("signal.signal(signal.SIGTERM, lambda *_: (say('handler'), sys.exit(7)))", 7, ["callback", "handler"]),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", 0, ["callback", "survived"]),
    ],
)
def test_afterwards_the_signal_does_what_it_did(tmp_path: Path, before: str, code: int, lines: list[str]) -> None:
    body = f"""
{before}
on_termination(lambda: say("never"))
on_termination(lambda: say("callback"))
kill()
time.sleep(0.2)
kill()
time.sleep(0.2)
say("survived")
"""
    assert run(tmp_path, body) == (code, lines)


def test_a_save_that_fails_and_a_callback_that_fails_change_nothing(tmp_path: Path) -> None:
    body = """
on_termination(lambda: (say("callback"), 1 / 0))
class Broken(Slow):
    def read(self, size=-1):
        if self.left == 1:
            raise OSError("broken")
        return super().read(size)
SyncCheckpoint(root + "/first").save(Broken())
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, ["callback"])
    assert not (tmp_path / "first").exists()


def test_without_a_callback_only_the_save_is_finished(tmp_path: Path) -> None:
    body = (
        "on_termination()\nCheckpoint(root + '/first').save_sync(b'5')\nSyncCheckpoint(root + '/second').save(Slow())"
    )
    assert run(tmp_path, body) == (-signal.SIGTERM, [])
    assert saved(tmp_path, "second") == b"x" * 3000


def test_without_it_a_save_is_cut_short(tmp_path: Path) -> None:
    """So that the tests above are known to test something."""
    assert run(tmp_path, "SyncCheckpoint(root + '/first').save(Slow())") == (-signal.SIGTERM, [])
    assert not (tmp_path / "first").exists()


def test_async_saves_are_finished_while_the_event_loop_waits(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"5" * 50_000_000)
    body = """
import asyncio
on_termination(lambda: say("callback"))
async def work():
    saving = asyncio.create_task(Checkpoint(root + "/first").save(root + "/data"))
    await asyncio.sleep(0.01)
    kill()
    await saving
    await asyncio.sleep(10)
asyncio.run(work())
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, ["callback"])
    assert saved(tmp_path, "first") == b"5" * 50_000_000


def test_iterator_states_that_wait_to_be_saved_are_saved(tmp_path: Path) -> None:
    body = """
from flytekit_ckpt.iterators import IteratorCheckpoint
class Counter:
    def get_state(self): return {"at": 5}
    def set_state(self, state): pass
on_termination(lambda: say("callback"))
checkpoint = IteratorCheckpoint(root + "/steps", async_checkpointing=True)
for step in (1, 2):
    checkpoint.save_to_directory(Counter(), step=step, keep=None)
kill()
time.sleep(10)
"""
    assert run(tmp_path, body) == (-signal.SIGTERM, ["callback"])
    assert list(IteratorCheckpoint(tmp_path / "steps").list_checkpoints()) == [1, 2]


def test_a_forked_process_waits_for_its_own_saves_only(tmp_path: Path) -> None:
    body = """
on_termination(lambda: say("callback"))
class Held(Slow):
    def read(self, size=-1):
        time.sleep(3600)
threading.Thread(target=SyncCheckpoint(root + "/first").save, args=(Held(),), daemon=True).start()
time.sleep(0.2)
child = os.fork()
if not child:
    kill()
    time.sleep(10)
    os._exit(0)
say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""
    assert run(tmp_path, body) == (0, ["callback", f"-{signal.SIGTERM.value}"])


def test_only_the_main_thread_may_ask_for_it() -> None:
    errors = []
    # A test before this one may have asked for it.
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        try:
            on_termination()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
    assert signal.getsignal(signal.SIGTERM) is before
