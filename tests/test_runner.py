"""The local runner: tasks that fail, are killed and resume, each attempt a real process."""

from __future__ import annotations

import multiprocessing.process
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flytekit_ckpt import SyncCheckpoint, named_tasks, runner
from tests.conftest import Place, Task

COUNTER = f"{Path(__file__).parents[1] / 'examples' / 'counter.py'}:counter"

# The counter that flytekit's documentation describes: a flytekit task that imports nothing of this package.
FLYTEKIT_COUNTER = """
from flytekit import current_context, task
from flytekit.exceptions.user import FlyteRecoverableException

@task(retries=3)
def work(n_iterations: int) -> int:
    cp = current_context().checkpoint
    prev = cp.read()
    start = int(prev.decode()) if prev else 0
    for index in range(start, n_iterations):
        if index > start and index % (n_iterations // 3) == 0:
            raise FlyteRecoverableException(f"failed at iteration {index}")
        cp.write(f"{index + 1}".encode())
    return index
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, here and in the attempts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def run(target: str, *, lines: list[str] | None = None, **options: Any) -> Any:
    inputs = options.pop("inputs", {})
    return runner.run(target, inputs, report=[].append if lines is None else lines.append, **options)


def by_attempt(lines: list[str]) -> list[list[str]]:
    """Group the reported lines, without those that announce an attempt."""
    attempts: list[list[str]] = []
    for line in lines[1:]:
        if line.startswith("attempt "):
            attempts.append([])
        else:
            attempts[-1].append(line)
    return attempts


def saves(attempt: list[str]) -> int:
    return sum(line.startswith("  saved ") for line in attempt)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interruption", "preempt_after", "ending"),
    [
        ({"fail_every": "0"}, None, None),
        ({"fail_every": "6"}, None, "  raised FlyteRecoverableException: "),
        # The first attempt cannot end in time; an attempt that has to load s3fs first can still save something.
        ({"fail_every": "0", "seconds": "0.2"}, 3.0, "  killed by SIGKILL after "),
    ],
    ids=["uninterrupted", "failing", "killed"],
)
def test_the_counter_gives_the_same_result_however_it_is_interrupted_and_resumes_where_it_was(
    place: Place,
    capfd: pytest.CaptureFixture[str],
    interruption: dict[str, str],
    preempt_after: float | None,
    ending: str | None,
) -> None:
    lines: list[str] = []
    inputs = {"n_iterations": "16", "seconds": "0", **interruption}
    result = run(COUNTER, inputs=inputs, retries=20, root=place.root, preempt_after=preempt_after, lines=lines)
    assert result == 16

    attempts = by_attempt(lines)
    assert attempts[-1][-1].startswith("  succeeded after ")
    assert (len(attempts) > 1) == (ending is not None)
    assert all(attempt[-1].startswith(ending or "") for attempt in attempts[:-1])

    starts = [int(start) for start in re.findall(r"starting at iteration (\d+)", capfd.readouterr().out)]
    assert len(starts) == len(attempts)
    assert starts[0] == 0
    for (start, attempt), (following, _) in pairwise(zip(starts, attempts, strict=True)):
        saved = start + saves(attempt) if saves(attempt) else 0
        # The kill may come between a save and its report.
        assert following in (saved, saved + 1) if preempt_after else following == saved
    assert max(starts) > 0 or ending is None


@pytest.mark.parametrize("killed", [False, True], ids=["failing", "killed"])
def test_the_counter_of_flytekits_documentation_resumes_unchanged(place: Place, task: Task, killed: bool) -> None:
    pytest.importorskip("flytekit")
    source = re.sub("raise Flyte.*", "die()", FLYTEKIT_COUNTER) if killed else FLYTEKIT_COUNTER
    lines: list[str] = []
    assert run(task(source), inputs={"n_iterations": "6"}, retries=3, root=place.root, lines=lines) == 5
    assert [saves(attempt) for attempt in by_attempt(lines)] == [2, 2, 2]


def test_a_folder_saved_by_a_killed_attempt_is_restored_by_the_next(place: Place, task: Task) -> None:
    target = task("""
        def work(folder: Path):
            cp = current_checkpoint()
            state = folder / str(os.getpid())
            state.mkdir()
            if cp.restore(state) is None:
                (state / "layers").mkdir()
                (state / "layers" / "weights").write_bytes(bytes(range(256)))
                (state / "step").write_text("7")
                cp.save(state)
                # What was not saved is lost with the attempt.
                (state / "step").write_text("8")
                die()
            return {str(p.relative_to(state)): p.read_bytes() for p in state.rglob("*") if p.is_file()}
    """)
    folder = target.rpartition("/")[0]
    result = run(target, inputs={"folder": folder}, retries=1, root=place.root)
    assert result == {"layers/weights": bytes(range(256)), "step": b"7"}


def test_flytes_own_api_has_the_runners_checkpoint(place: Place, task: Task) -> None:
    target = task(
        """
        def work():
            import flyte
            checkpoint = flyte.ctx().checkpoint
            loaded = checkpoint.load_sync()
            if loaded is not None:
                return loaded.read_text(), type(checkpoint).__module__, current_checkpoint().read()
            checkpoint.save_sync(b"5")
            die()
        """
    )
    pytest.importorskip("flyte")
    assert run(target, retries=1, root=place.root) == ("5", "flytekit_ckpt.v2.checkpoint", b"5")


def test_a_task_that_imports_flytekit_late_has_the_runners_checkpoint(place: Place, task: Task) -> None:
    pytest.importorskip("flytekit")
    target = task(
        """
        def work():
            from flytekit import current_context
            checkpoint = current_context().checkpoint
            if checkpoint.read() is None:
                checkpoint.write(b"5")
                die()
            seen = []
            thread = threading.Thread(target=lambda: seen.append(current_context().checkpoint.read()))
            thread.start()
            thread.join()
            return seen
        """
    )
    assert run(target, retries=1, root=place.root) == [b"5"]


def test_an_attempt_whose_predecessor_saved_nothing_is_told_so(task: Task, tmp_path: Path) -> None:
    target = task("""
        def work():
            cp = current_checkpoint()
            if not cp.prev_exists():
                die()
            return cp.read()
    """)
    lines: list[str] = []
    assert run(target, retries=1, root=str(tmp_path / "root"), lines=lines) is None
    assert by_attempt(lines)[1][0] == "  restored nothing"


def test_a_thread_of_the_tasks_own_sees_the_tasks_checkpoint(task: Task) -> None:
    target = task("""
        def work():
            seen = []
            thread = threading.Thread(target=lambda: seen.append(current_checkpoint()))
            thread.start()
            thread.join()
            return seen == [current_checkpoint()]
    """)
    assert run(target) is True


def test_an_async_function_is_awaited(task: Task) -> None:
    target = task("""
        import asyncio

        async def work():
            await asyncio.sleep(0)
            current_checkpoint().write(b"1")
            return "awaited"
    """)
    lines: list[str] = []
    assert run(target, lines=lines) == "awaited"
    assert saves(by_attempt(lines)[0]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is retried, and what is not
# ---------------------------------------------------------------------------------------------------------------------


def test_a_non_recoverable_exception_ends_the_run_with_its_traceback(task: Task) -> None:
    target = task("""
        def work():
            raise ValueError("not worth another try")
    """)
    lines: list[str] = []
    with pytest.raises(runner.TaskFailedError) as failure:
        run(target, retries=2, lines=lines)
    message = str(failure.value)
    assert message.startswith("Traceback (most recent call last):")
    assert 'tasks.py", line' in message
    assert "ValueError: not worth another try" in message
    assert [attempt[-1][:15] for attempt in by_attempt(lines)] == ["  failed after "]


@pytest.mark.parametrize(
    ("ending", "says"),
    [("sys.exit(4)", "SystemExit: 4"), ("sys.exit()", "SystemExit"), ("os._exit(3)", "exit code 3 and no result")],
)
def test_a_task_that_exits_is_not_retried(task: Task, ending: str, says: str) -> None:
    target = task(f"""
        def work():
            {ending}
    """)
    lines: list[str] = []
    with pytest.raises(runner.TaskFailedError, match=says):
        run(target, retries=2, lines=lines)
    assert len(by_attempt(lines)) == 1


def test_a_file_that_fails_while_it_is_imported_is_not_retried(task: Task) -> None:
    lines: list[str] = []
    with pytest.raises(runner.TaskFailedError, match=r"(?s)Traceback.*ModuleNotFoundError.*nowhere"):
        run(task("import nowhere"), retries=2, lines=lines)
    assert len(by_attempt(lines)) == 1


def test_a_task_that_a_signal_kills_is_retried_and_what_it_printed_is_seen(
    task: Task, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under it a killed process loses no output anyway.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    target = task("""
        def work():
            if current_checkpoint().prev_exists():
                return "second"
            print("printed by the first")
            die()
    """)
    lines: list[str] = []
    assert run(target, retries=1, lines=lines) == "second"
    first, second = by_attempt(lines)
    assert first[-1].startswith("  killed by SIGKILL after ")
    assert second[-1].startswith("  succeeded after ")
    assert "printed by the first\n" in capfd.readouterr().out


def test_a_signal_without_a_name_is_one_too(task: Task) -> None:
    target = task("""
        def work():
            os.kill(os.getpid(), 40)
    """)
    with pytest.raises(runner.TaskFailedError, match="no attempt is left"):
        run(target)


@pytest.mark.parametrize(
    ("ending", "preempt_after"),
    [("raise FlyteRecoverableException('again')", None), ("die()", None), ("time.sleep(600)", 0.0)],
    ids=["raises", "kills itself", "is preempted"],
)
def test_a_task_that_is_interrupted_every_time_fails_when_no_attempt_is_left(
    task: Task, ending: str, preempt_after: float | None
) -> None:
    target = task(f"""
        def work():
            {ending}
    """)
    lines: list[str] = []
    with pytest.raises(runner.TaskFailedError, match=r"no attempt is left: all 3 were interrupted.*--retries"):
        run(target, retries=2, preempt_after=preempt_after, lines=lines)
    assert len(by_attempt(lines)) == 3


def test_the_time_to_preemption_starts_with_the_tasks_own_code(task: Task) -> None:
    target = task("""
        time.sleep(1.2)

        def work():
            return "in time"
    """)
    assert run(target, preempt_after=1.0) == "in time"


@pytest.mark.parametrize(
    ("ending", "preempt_after"), [("die()", None), ("time.sleep(600)", 2.0)], ids=["kills itself", "is preempted"]
)
def test_the_processes_that_a_task_started_die_with_its_killed_attempt(
    task: Task, tmp_path: Path, ending: str, preempt_after: float | None
) -> None:
    target = task(f"""
        def work(pid: Path):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            pid.write_text(str(child.pid))
            {ending}
    """)
    pid = tmp_path / "pid"
    with pytest.raises(runner.TaskFailedError, match="no attempt is left"):
        run(target, inputs={"pid": str(pid)}, preempt_after=preempt_after)
    assert ends(pid.read_text())


def test_a_killed_attempt_is_over_though_a_fork_of_it_holds_its_pipes(task: Task, tmp_path: Path) -> None:
    target = task("""
        def work(survived: Path):
            if not os.fork():
                time.sleep(5)
                survived.touch()
                os._exit(0)
            die()
    """)
    survived = tmp_path / "survived"
    with pytest.raises(runner.TaskFailedError, match="no attempt is left"):
        run(target, inputs={"survived": str(survived)})
    assert not survived.exists()


def ends(pid: str) -> bool:
    """Wait for a killed process: a signal takes a moment to arrive."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False).stdout
        # A dead one stays as a zombie where nobody inherits orphans.
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Where the checkpoints are
# ---------------------------------------------------------------------------------------------------------------------

SAVES_ITS_NUMBER = """
def work():
    cp = current_checkpoint()
    number = int(cp.read() or b"0") + 1
    cp.write(b"%d" % number)
    if number < 2:
        raise FlyteRecoverableException("again")
    return number
"""


def test_each_attempt_of_each_run_has_a_destination_of_its_own_below_the_root(place: Place, task: Task) -> None:
    target = task(SAVES_ITS_NUMBER)
    prefixes = []
    for _ in range(2):
        lines: list[str] = []
        assert run(target, retries=1, root=place.root, lines=lines) == 2
        prefixes.append(lines[0].removeprefix("checkpoints: "))
    assert prefixes[0] != prefixes[1]
    for prefix in prefixes:
        assert prefix.startswith(f"{place.root}/work-")
        saved = [SyncCheckpoint("", f"{prefix}/attempt-{n}/_flytecheckpoints").read() for n in (1, 2)]
        assert saved == [b"1", b"2"]


@pytest.mark.parametrize(
    ("source", "fails"),
    [(SAVES_ITS_NUMBER, False), ("def work():\n    current_checkpoint().write(b'1')\n    raise ValueError", True)],
    ids=["succeeds", "fails"],
)
def test_a_temporary_root_is_used_where_none_is_given_and_removed_at_the_end(
    task: Task, temporary: Path, source: str, fails: bool
) -> None:
    while_it_ran: list[bool] = []

    def report(line: str) -> None:
        if line.startswith("  saved "):
            while_it_ran.append(any(temporary.rglob("_flytecheckpoints")))

    if fails:
        with pytest.raises(runner.TaskFailedError, match="ValueError"):
            runner.run(task(source), {}, report=report)
    else:
        runner.run(task(source), {}, retries=1, report=report)
    assert while_it_ran
    assert all(while_it_ran)
    assert list(temporary.iterdir()) == []


def test_a_relative_root_stays_where_it_is_when_the_task_changes_its_folder(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = task("""
        def work(elsewhere: str):
            cp = current_checkpoint()
            previous = cp.read()
            os.chdir(elsewhere)
            cp.write(b"1")
            if not cp.prev_exists():
                die()
            return previous
    """)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(target, inputs={"elsewhere": str(elsewhere)}, retries=1, root="relative") == b"1"
    assert list(elsewhere.iterdir()) == []


def test_nothing_that_a_killed_attempt_restored_stays_behind(task: Task, temporary: Path) -> None:
    target = task("""
        def work():
            cp = current_checkpoint()
            folder = cp.restore()
            step = int((folder / "_dst_cp").read_bytes()) if folder else 0
            cp.write(b"%d" % (step + 1))
            if step < 2:
                die()
    """)
    run(target, retries=2)
    assert list(temporary.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, results and targets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "-3", -3),
        ("float", "0.5", 0.5),
        ("float", "1e-3", 0.001),
        ("float", "2", 2.0),
        ("bool", "true", True),
        ("bool", "false", False),
        ("str", "5", "5"),
        ("str", "a=b", "a=b"),
        ("str", "", ""),
        ("Path", "5", Path("5")),
        ("Path", "/some/where", Path("/some/where")),
        ("list", "[1, 2]", [1, 2]),
        ("list[str]", '["a"]', ["a"]),
        ("dict", '{"a": [1]}', {"a": [1]}),
        ("dict[str, int]", '{"a": 1}', {"a": 1}),
        ("int | None", "5", 5),
        ("int | None", "null", None),
        ("str | None", "5", "5"),
        ("str | None", "null", None),
        (None, "5", 5),
        (None, '{"a": null}', {"a": None}),
        (None, "plain text", "plain text"),
    ],
)
def test_an_input_is_converted_as_its_annotation_says(annotation: str | None, text: str, value: object) -> None:
    # Without a process, which would cost more than all the rest; the next test has one.
    names: dict[str, Any] = {"Path": Path}
    exec(f"def work(x{f': {annotation}' if annotation else ''}): ...", names)
    assert repr(named_tasks.arguments_of(names["work"], {"x": text})["x"]) == repr(value)


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"], ids=["evaluated", "as text"])
def test_a_task_is_called_with_its_converted_inputs_and_its_defaults(tmp_path: Path, future: str) -> None:
    file = tmp_path / "typed.py"
    file.write_text(
        f"{future}from pathlib import Path\n"
        "def work(i: int, f: float, b: bool, s: str, p: Path, l: list, d: dict, free, left: int = 9, *, only: int):\n"
        "    return i, f, b, s, p, l, d, free, left, only\n"
    )
    inputs = {"i": "1", "f": "0.5", "b": "true", "s": "1", "p": "1", "l": "[1]", "d": "{}", "free": "1", "only": "2"}
    assert run(f"{file}:work", inputs=inputs) == (1, 0.5, True, "1", Path("1"), [1], {}, 1, 9, 2)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"count": "three"}, "count=three is not int"),
        ({"count": "1.5"}, "count=1.5 is not int"),
        ({"count": "true"}, "count=true is not int"),
        ({"count": "1", "rate": "fast"}, "rate=fast is not float"),
        ({"count": "1", "flag": "1"}, "flag=1 is not bool"),
        ({"count": "1", "rate": "true"}, "rate=true is not float"),
        ({"count": "1", "items": "a,b"}, "items=a,b is not list"),
        ({"count": "1", "names": "[]"}, r"names=\[\] is not dict"),
        ({"count": "1", "limit": "many"}, "limit=many is not int"),
        ({"count": "1", "unknown": "1"}, "the inputs do not fit work.*unexpected keyword argument 'unknown'"),
        ({}, "the inputs do not fit work.*missing a required argument: 'count'"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) or "nothing" if isinstance(value, dict) else "",
)
def test_inputs_that_do_not_fit_are_named_before_the_task_runs(
    task: Task, capfd: pytest.CaptureFixture[str], inputs: dict[str, str], says: str
) -> None:
    target = task("""
        from typing import Optional

        def work(
            count: int,
            rate: float = 1.0,
            flag: bool = False,
            items: list = [],
            names: dict = {},
            limit: Optional[int] = None,
        ):
            print("ran")
    """)
    lines: list[str] = []
    with pytest.raises(runner.TaskFailedError, match=says) as failure:
        run(target, inputs=inputs, retries=2, lines=lines)
    assert "Traceback" not in str(failure.value)
    assert len(by_attempt(lines)) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("missing.py:work", "there is no file '.*missing.py': name the task as FILE:FUNCTION"),
        ("tasks.py", "name the task as FILE:FUNCTION"),
        ("tasks.py:missing", "tasks.py has no function or task 'missing'"),
        ("tasks.py:IMPORTED_AT", "tasks.py has no function or task 'IMPORTED_AT'"),
        ("tasks.txt:work", "tasks.txt is not a Python file"),
    ],
)
def test_a_target_that_is_not_there_is_named(task: Task, tmp_path: Path, target: str, says: str) -> None:
    task("IMPORTED_AT = time.time()")
    (tmp_path / "tasks.txt").write_text("")
    lines: list[str] = []
    with pytest.raises(runner.TaskFailedError, match=says) as failure:
        run(f"{tmp_path}/{target}", retries=2, lines=lines)
    assert "Traceback" not in str(failure.value)
    assert len(by_attempt(lines)) == 1


def test_a_task_may_import_the_modules_beside_its_file(task: Task, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 5")
    target = task("""
        from beside import VALUE

        def work():
            return VALUE
    """)
    assert run(target) == 5


@pytest.mark.parametrize(
    ("value", "seen"),
    [("lambda: 1", "<function work.<locals>.<lambda> at "), ("Model()", "<tasks.Model object at ")],
    ids=["not picklable", "of a class that only the task has"],
)
def test_a_result_that_cannot_be_passed_on_comes_back_as_its_repr(task: Task, value: str, seen: str) -> None:
    target = task(f"""
        class Model:
            pass

        def work():
            return {value}
    """)
    result = run(target)
    assert isinstance(result, str)
    assert result.startswith(seen)


def test_a_result_larger_than_a_pipe_holds_comes_back_whole(task: Task) -> None:
    target = task("""
        def work():
            return bytes(5_000_000)
    """)
    assert run(target) == bytes(5_000_000)


def test_a_result_sent_while_the_process_is_asked_whether_it_lives_is_not_lost(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = multiprocessing.process.BaseProcess.is_alive

    def slowly(process: multiprocessing.process.BaseProcess) -> bool:
        time.sleep(1)
        return alive(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "is_alive", slowly)
    assert run(task("def work():\n    time.sleep(0.15)\n    return 5")) == 5


def test_an_annotation_that_only_type_checkers_see_does_not_stop_a_task(task: Task) -> None:
    assert run(task("def work(n, d: 'Unknown' = None):\n    return n"), inputs={"n": "1"}) == 1


def test_a_task_starts_processes_in_pythons_default_way(task: Task) -> None:
    target = task("""
        import multiprocessing

        def work():
            return multiprocessing.get_start_method()
    """)
    command = [sys.executable, "-c", "import multiprocessing; print(multiprocessing.get_start_method())"]
    assert run(target) == subprocess.check_output(command, text=True).strip()


def test_a_task_leaves_the_runners_own_process_group_alone(task: Task) -> None:
    target = task("""
        def work():
            return os.getpgid(0)
    """)
    assert run(target) != os.getpgid(0)
