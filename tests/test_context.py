"""Whose checkpoint the running code gets, and what importing this package imports."""

from __future__ import annotations

import contextvars
import datetime
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import flytekit_ckpt
from flytekit_ckpt import (
    CheckpointUnavailableError,
    SyncCheckpoint,
    context,
    current_checkpoint,
    current_context,
)
from tests.platforms import on_flyte, retries_at_once

Attempt = Callable[..., AbstractContextManager[object]]


def printed(code: str) -> str:
    """Give what code prints in an interpreter of its own."""
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Outside any task
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [None, "flytekit", "flyte"])
def test_outside_a_task_there_is_no_checkpoint_and_programs_catch_that_as_with_flytekit(package: str | None) -> None:
    if package is not None:
        pytest.importorskip(package)
    with pytest.raises(CheckpointUnavailableError, match="SyncCheckpoint") as unavailable:
        current_checkpoint()
    assert isinstance(unavailable.value, NotImplementedError)
    with pytest.raises(NotImplementedError):
        current_context().checkpoint  # noqa: B018


def test_outside_a_task_neither_flytekit_nor_flyte_is_asked_for() -> None:
    code = """if True:
        import sys, flytekit_ckpt
        try:
            flytekit_ckpt.current_checkpoint()
        except flytekit_ckpt.CheckpointUnavailableError:
            print("flytekit" in sys.modules, "flyte" in sys.modules)
    """
    assert printed(code) == "False False"


# ---------------------------------------------------------------------------------------------------------------------
# Flyte 1
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flytekit_attempt() -> Attempt:
    """Enter an attempt with a checkpoint of flytekit's own, as flytekit's container entry point does."""
    pytest.importorskip("flytekit")
    from flytekit import ExecutionParameters
    from flytekit.core.checkpointer import SyncCheckpoint as TheirCheckpoint
    from flytekit.core.context_manager import ExecutionState, FlyteContextManager

    def entered(destination: object, source: object = None) -> AbstractContextManager[object]:
        parameters = ExecutionParameters(
            execution_date=datetime.datetime.now(datetime.timezone.utc),
            tmp_dir="unused",
            stats=None,
            execution_id=None,
            logging=None,
            raw_output_prefix="unused",
            checkpoint=TheirCheckpoint(str(destination), None if source is None else str(source)),
        )
        theirs = FlyteContextManager.current_context()
        state = theirs.new_execution_state().with_params(
            mode=ExecutionState.Mode.TASK_EXECUTION, user_space_params=parameters
        )
        return FlyteContextManager.with_context(theirs.with_execution_state(state))

    return entered


def test_under_flytekit_it_is_ours_with_the_two_places_that_flytekit_was_told(
    flytekit_attempt: Attempt, tmp_path: Path
) -> None:
    with flytekit_attempt(tmp_path / "1"):
        first = current_checkpoint()
        assert type(first) is SyncCheckpoint
        assert not first.prev_exists()
        first.write(b"5")
    with flytekit_attempt(tmp_path / "2", tmp_path / "1"):
        second = current_checkpoint()
        assert second.prev_exists()
        assert second.read() == b"5"
        second.write(b"6")
    assert (tmp_path / "1").read_bytes() == b"5"
    assert (tmp_path / "2").read_bytes() == b"6"


def test_a_flytekit_attempt_has_one_instance_and_the_next_attempt_another(
    flytekit_attempt: Attempt, tmp_path: Path
) -> None:
    with flytekit_attempt(tmp_path / "1"):
        first = current_checkpoint()
        assert current_checkpoint() is first
        assert current_context().checkpoint is first
        assert flytekit_ckpt.current_context().checkpoint is first
        # The same places, as when one process runs several tasks without a previous attempt.
        with flytekit_attempt(tmp_path / "1"):
            assert current_checkpoint() is not first
        assert current_checkpoint() is first
    with pytest.raises(CheckpointUnavailableError):
        current_checkpoint()


def test_threads_that_ask_at_once_get_the_same_instance(
    flytekit_attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(8, timeout=30)
    seen = []

    def ask() -> None:
        together.wait()
        seen.append(current_checkpoint())

    # As often as a thread may be interrupted, so that one is interrupted between looking and making.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(20):
            with flytekit_attempt(tmp_path / str(number)):
                seen.clear()
                threads = [threading.Thread(target=contextvars.copy_context().run, args=(ask,)) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert [each is seen[0] for each in seen] == [True] * 8
    finally:
        sys.setswitchinterval(interval)


def test_an_instance_of_ours_that_flytekit_was_given_is_taken_as_it_is(
    flytekit_attempt: Attempt, tmp_path: Path
) -> None:
    import flytekit

    ours = SyncCheckpoint(str(tmp_path / "1"))
    with flytekit_attempt("unused"):
        flytekit.current_context()._checkpoint = ours
        assert current_checkpoint() is ours


@pytest.mark.parametrize("installed", [False, True])
def test_a_checkpoint_of_the_users_own_making_is_taken_as_it_is(
    flytekit_attempt: Attempt, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flytekit
    from flytekit.core.checkpointer import SyncCheckpoint as TheirCheckpoint

    class Own(TheirCheckpoint):
        pass

    own = Own("unused")
    if installed:
        flytekit_ckpt.install()
    try:
        with flytekit_attempt("unused"):
            monkeypatch.setattr(flytekit.current_context(), "_checkpoint", own)
            assert current_checkpoint() is own
            assert flytekit.current_context().checkpoint is own
    finally:
        flytekit_ckpt.uninstall()


@pytest.mark.parametrize("installing", [True, False])
def test_the_instance_is_the_same_for_flytekits_own_context(
    flytekit_attempt: Attempt, tmp_path: Path, installing: bool
) -> None:
    import flytekit

    with flytekit_attempt(tmp_path / "1"):
        first = current_checkpoint()
        if installing:
            flytekit_ckpt.install()
        try:
            assert (flytekit.current_context().checkpoint is first) == installing
            assert current_checkpoint() is first
        finally:
            flytekit_ckpt.uninstall()


# ---------------------------------------------------------------------------------------------------------------------
# Flyte 2
# ---------------------------------------------------------------------------------------------------------------------


@on_flyte
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_under_flyte_a_retry_reads_what_the_failed_attempt_wrote_and_so_does_flytes_own_checkpoint(
    tmp_path: Path, asynchronous: bool
) -> None:
    import flyte

    environment = flyte.TaskEnvironment(name="tests")
    seen: list[object] = []

    def attempt() -> str:
        checkpoint = current_checkpoint()
        assert type(checkpoint) is SyncCheckpoint
        assert current_context().checkpoint is checkpoint
        seen.append((checkpoint.read(), checkpoint))
        if checkpoint.read() is None:
            checkpoint.write(b"5")
            msg = "the first attempt"
            raise RuntimeError(msg)
        loaded = flyte.ctx().checkpoint.load_sync()
        return loaded.read_text()

    async def attempt_async() -> str:
        return attempt()

    task = environment.task(retries=retries_at_once(1))(attempt_async if asynchronous else attempt)
    run = flyte.with_runcontext(mode="local", raw_data_path=str(tmp_path)).run(task)

    assert run.outputs()[0] == "5"
    (first_read, first), (second_read, second) = seen
    assert (first_read, second_read) == (None, b"5")
    assert first is not second


@on_flyte
def test_under_flyte_what_flytes_own_checkpoint_saved_is_read(tmp_path: Path) -> None:
    import flyte

    environment = flyte.TaskEnvironment(name="tests")

    @environment.task(retries=retries_at_once(1))
    def attempt() -> bytes:
        previous = current_checkpoint().read()
        if previous is None:
            flyte.ctx().checkpoint.save_sync(b"5")
            msg = "the first attempt"
            raise RuntimeError(msg)
        return previous

    run = flyte.with_runcontext(mode="local", raw_data_path=str(tmp_path)).run(attempt)
    assert run.outputs()[0] == b"5"


# ---------------------------------------------------------------------------------------------------------------------
# What is imported
# ---------------------------------------------------------------------------------------------------------------------


def test_no_module_of_the_package_imports_flytekit_or_flyte() -> None:
    code = """if True:
        import importlib, pkgutil, sys, flytekit_ckpt
        names = [module.name for module in pkgutil.iter_modules(flytekit_ckpt.__path__)]
        for name in names:
            importlib.import_module(f"flytekit_ckpt.{name}")
        print("context" in names and "runner" in names, "flytekit" in sys.modules, "flyte" in sys.modules)
    """
    assert printed(code) == "True False False"


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = """if True:
        import sys
        before = set(sys.modules)
        import flytekit_ckpt
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"fsspec", "s3fs", "click", "asyncio", "tarfile", "multiprocessing", "flytekit", "flyte"}))
    """
    assert printed(code) == "[]"


def test_the_recoverable_exception_is_flytekits_where_flytekit_is_installed() -> None:
    pytest.importorskip("flytekit")
    from flytekit.exceptions.user import FlyteRecoverableException

    assert flytekit_ckpt.FlyteRecoverableException is FlyteRecoverableException
    assert context.FlyteRecoverableException is FlyteRecoverableException


def test_the_recoverable_exception_is_ours_where_flytekit_is_not_installed() -> None:
    code = """if True:
        import sys

        class WithoutFlytekit:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] == "flytekit" else self.finder.find_spec(name, path, target)

        sys.meta_path[:] = map(WithoutFlytekit, sys.meta_path)
        from flytekit_ckpt import FlyteRecoverableException, errors
        print(FlyteRecoverableException is errors.FlyteRecoverableException)
    """
    assert printed(code) == "True"


def test_every_public_name_resolves_and_is_listed() -> None:
    assert flytekit_ckpt.__all__
    assert set(flytekit_ckpt.__all__) <= set(dir(flytekit_ckpt))
    for name in flytekit_ckpt.__all__:
        assert getattr(flytekit_ckpt, name).__name__ == name


@pytest.mark.parametrize("module", [flytekit_ckpt, context])
def test_a_name_that_is_not_there_is_an_attribute_error(module: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # type: ignore[attr-defined]  # noqa: B018
