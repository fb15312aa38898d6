"""The command that is installed, from outside."""

from __future__ import annotations

import os
import pty
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import flytekit_ckpt
from flytekit_ckpt import SyncCheckpoint
from flytekit_ckpt.archive import pack
from flytekit_ckpt.cli import main
from tests.conftest import Place, Task
from tests.trees import look, make

COMMAND = Path(sys.executable).with_name("flytekit-ckpt")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


INTERRUPTED_TWICE = """
def work(size: int):
    cp = current_checkpoint()
    steps = len(cp.read() or b"") // size
    cp.write(b"1" * size * (steps + 1))
    if steps == 0:
        raise FlyteRecoverableException("once")
    if steps == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"steps": steps}
"""


def test_the_output_says_of_every_attempt_what_was_restored_and_saved_and_how_it_ended(task: Task) -> None:
    ran = command("run", task(INTERRUPTED_TWICE), "size=505", "--retries", "4")
    patterns = [
        r"checkpoints: /.*/work-\w+",
        r"attempt 1 of 5",
        r"  restored nothing",
        r"  saved payload, 505 B in \d+\.\d+ s",
        r"  raised FlyteRecoverableException: once after \d+\.\d+ s",
        r"attempt 2 of 5",
        r"  restored payload, 505 B in \d+\.\d+ s",
        r"  saved payload, 1\.01 kB in \d+\.\d+ s",
        r"  killed by SIGKILL after \d+\.\d+ s",
        r"attempt 3 of 5",
        r"  restored payload, 1\.01 kB in \d+\.\d+ s",
        r"  saved payload, 1\.5\d kB in \d+\.\d+ s",
        r"  succeeded after \d+\.\d+ s",
        r"result: \{'steps': 2\}",
    ]
    lines = ran.stdout.splitlines()
    assert [pattern for pattern, line in zip(patterns, lines, strict=True) if not re.fullmatch(pattern, line)] == []
    assert ran.stderr == ""
    assert ran.returncode == 0


def test_a_saved_folder_is_called_a_tree(task: Task, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(2_500_000))
    target = task("""
        def work(folder: str):
            cp = current_checkpoint()
            if cp.restore() is None:
                cp.save(folder)
                raise FlyteRecoverableException("once")
    """)
    ran = command("run", target, f"folder={tmp_path / 'model'}", "--retries=1")
    assert re.search(r"^  saved tree, [\d.]+ kB in \d", ran.stdout, re.MULTILINE)
    assert re.search(r"^  restored tree, 2\.5 MB in \d", ran.stdout, re.MULTILINE)
    assert ran.stdout.endswith("\nresult: None\n")


def test_the_traceback_of_a_failing_task_is_printed_and_the_exit_code_says_so(task: Task) -> None:
    target = task("""
        def work():
            raise ValueError("broken for good")
    """)
    ran = command("run", target, "--retries", "3")
    assert ran.returncode == 1
    assert re.search(r"^  failed after \d", ran.stdout, re.MULTILINE)
    assert "attempt 2" not in ran.stdout
    assert "result:" not in ran.stdout
    # The task's traceback, and none of the command's own.
    assert ran.stderr.startswith("Error: Traceback (most recent call last):\n")
    assert 'tasks.py", line' in ran.stderr
    assert ran.stderr.count("Traceback") == 1
    assert ran.stderr.rstrip().endswith("ValueError: broken for good")


def test_preempt_after_kills_every_attempt(task: Task) -> None:
    target = task("""
        def work():
            time.sleep(600)
    """)
    ran = command("run", target, "--preempt-after", "0.1", "--retries", "1")
    assert len(re.findall(r"^  killed by SIGKILL after", ran.stdout, re.MULTILINE)) == 2
    assert ran.stderr == "Error: no attempt is left: all 2 were interrupted; give more with --retries\n"
    assert ran.returncode == 1


def test_nothing_is_retried_unless_it_is_asked_for(task: Task) -> None:
    ran = command("run", task(INTERRUPTED_TWICE), "size=1")
    assert "attempt 1 of 1\n" in ran.stdout
    assert "no attempt is left: all 1 " in ran.stderr
    assert ran.returncode == 1


def test_a_named_root_keeps_every_attempts_checkpoint(task: Task, tmp_path: Path) -> None:
    root = tmp_path / "kept"
    ran = command("run", task(INTERRUPTED_TWICE), "size=1", "--retries=2", "--root", root)
    prefix = ran.stdout.splitlines()[0].removeprefix("checkpoints: ")
    assert Path(prefix).parent == root
    assert [path.name for path in sorted(Path(prefix).iterdir())] == ["attempt-1", "attempt-2", "attempt-3"]
    assert SyncCheckpoint("", f"{prefix}/attempt-3/_flytecheckpoints").read() == b"111"


def test_what_follows_the_first_equals_sign_is_the_value(task: Task) -> None:
    target = task("""
        def work(query):
            return query
    """)
    assert command("run", target, "query=a=b=c").stdout.endswith("\nresult: 'a=b=c'\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["n"], "an input is given as NAME=VALUE, not 'n'"),
        (["=3"], "an input is given as NAME=VALUE, not '=3'"),
        (["--retries", "-1"], "--retries"),
        (["--retries", "some"], "--retries"),
        (["--preempt-after", "-1"], "--preempt-after"),
    ],
    ids=["no equals sign", "no name", "negative retries", "retries that are no number", "negative time"],
)
def test_a_misused_command_is_explained_and_runs_nothing(task: Task, arguments: list[str], says: str) -> None:
    ran = command("run", task("def work(n: int = 0): print('ran')"), *arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Usage: flytekit-ckpt run" in ran.stderr
    assert ran.stdout == ""


def test_a_task_that_is_not_there_is_an_error_without_traceback(tmp_path: Path) -> None:
    ran = command("run", f"{tmp_path}/missing.py:work")
    assert ran.returncode == 1
    assert re.fullmatch(r"Error: there is no file '.*/missing\.py': .*\n", ran.stderr)


def test_the_version_is_the_packages() -> None:
    ran = command("--version")
    assert ran.stdout.split()[-1] == flytekit_ckpt.__version__
    assert ran.returncode == 0


def test_an_attempt_ends_with_a_runner_that_is_told_to_stop(task: Task, tmp_path: Path) -> None:
    target = task("""
        def work(pid: str):
            with open(pid, "w") as file:
                file.write(str(os.getpid()))
            print("started", flush=True)
            time.sleep(600)
    """)
    arguments = [COMMAND, "run", target, f"pid={tmp_path / 'pid'}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        while "started" not in runner.stdout.readline():
            assert runner.poll() is None
        runner.terminate()
        assert runner.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# Saving and restoring by hand -----------------------------------------------------------------------------------------


def test_what_is_saved_is_restored(place: Place, tmp_path: Path) -> None:
    source, uri = make(tmp_path / "source", {"a": b"1", "b": None, "b/c": b"2"}), place.uri()
    saved = command("save", source, uri)
    assert (saved.returncode, saved.stdout, saved.stderr) == (0, f"saved {source} to {uri}\n", "")
    target = tmp_path / "new" / "target"
    restored = command("restore", uri, target)
    assert (restored.returncode, restored.stdout, restored.stderr) == (0, f"restored {uri} into {target}\n", "")
    assert look(target) == look(source)
    assert SyncCheckpoint("", uri).restore() is not None


def test_what_is_saved_is_listed_and_restored_in_part(place: Place, tmp_path: Path) -> None:
    source, uri = make(tmp_path / "source", {"a": b"1" * 2000, "b": None, "b/c": b"2"}), place.uri()
    for path in (source / "a", source / "b" / "c", source / "b"):
        os.utime(path, (86399, 86399))
    command("save", source, uri)
    listed = command("list", uri)
    lines = [
        "          2,000  1970-01-01 23:59:59  a",
        "              0  1970-01-01 23:59:59  b/",
        "              1  1970-01-01 23:59:59  b/c",
    ]
    assert (listed.returncode, listed.stdout.splitlines(), listed.stderr) == (0, lines, "")
    target = tmp_path / "target"
    assert command("restore", uri, target, "--only", "b/*", "--only", "x").returncode == 0
    assert [path.relative_to(target).as_posix() for path in sorted(target.rglob("*"))] == ["b", "b/c"]
    payload = place.uri()
    SyncCheckpoint(payload).write(b"12")
    assert command("list", payload).stdout == f"{2:15}  {'':19}  _dst_cp\n"
    missing = command("list", place.uri())
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: there is no checkpoint at ")


def test_what_cannot_be_saved_or_restored_is_said(tmp_path: Path) -> None:
    missing = command("restore", tmp_path / "nothing", tmp_path / "target")
    assert (missing.returncode, missing.stderr) == (1, f"Error: there is no checkpoint at {tmp_path}/nothing\n")
    content = b"".join(chunk for chunk in pack([]) if isinstance(chunk, bytes))
    (tmp_path / "damaged").write_bytes(content[:-1])
    damaged = command("restore", tmp_path / "damaged", tmp_path / "target")
    assert damaged.returncode == 1
    assert "truncated" in damaged.stderr
    assert "Traceback" not in damaged.stderr
    assert command("save", tmp_path / "nothing", tmp_path / "x").returncode == 2


def test_a_terminal_shows_a_progress_bar(tmp_path: Path) -> None:
    make(tmp_path / "source", {"a": random.Random(1).randbytes(5_000_000)})
    for arguments in (("save", "source", "object"), ("restore", "object", "target")):
        ours, theirs = pty.openpty()
        ran = subprocess.run([COMMAND, *arguments], stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, check=True)
        os.close(theirs)
        shown = os.read(ours, 100_000).decode()
        os.close(ours)
        assert "100%" in shown
        assert ran.stdout.decode().startswith(arguments[0])


def test_save_takes_the_place_of_what_is_there_and_restore_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = tmp_path / "checkpoint"
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        assert CliRunner().invoke(main, ["save", str(tmp_path / name), str(uri)]).exit_code == 0
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    assert CliRunner().invoke(main, ["restore", str(uri), "target"]).exit_code == 0
    assert [path.name for path in here.rglob("*")] == ["target", "b"]
