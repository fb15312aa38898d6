"""install() and uninstall(): what they take over, whatever is imported when, and whatever is missing."""

from __future__ import annotations

import asyncio
import importlib.util
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

import flytekit_ckpt
from flytekit_ckpt import SyncCheckpoint, UnsafeCheckpointError, attempts, installation, options, v2
from flytekit_ckpt.running import Running
from tests.platforms import Flyte1, Flyte2, Platform, on_flyte, on_flytekit, retries_at_once

# A user's module: its names come from every place that has them.
USER = """
import sys
if "flytekit" in sys.argv:
    from flytekit import Checkpoint
    from flytekit.core.checkpointer import SyncCheckpoint as Renamed
if "flyte" in sys.argv:
    import flyte
    from flyte import BaseCheckpoint, Checkpoint as New, latest_checkpoint
"""

# Names what is not ours, by where it was found.
CHECK = """
def strangers():
    import flytekit_ckpt
    from flytekit_ckpt import v2
    ours = {
        "Checkpoint": flytekit_ckpt.Checkpoint, "SyncCheckpoint": flytekit_ckpt.SyncCheckpoint,
        "Renamed": flytekit_ckpt.SyncCheckpoint, "New": v2.Checkpoint, "BaseCheckpoint": v2.BaseCheckpoint,
        "latest_checkpoint": v2.latest_checkpoint,
    }
    expected = {"user": ours}
    if "flytekit" in sys.argv:
        import flytekit.bin.entrypoint
        legacy = {name: ours[name] for name in ("Checkpoint", "SyncCheckpoint")}
        expected |= {
            "flytekit": legacy, "flytekit.bin.entrypoint": legacy,
            "flytekit.core.checkpointer": legacy, "flytekit.core.context_manager": legacy,
        }
    if "flyte" in sys.argv:
        expected["flyte"] = {
            "Checkpoint": v2.Checkpoint, "BaseCheckpoint": v2.BaseCheckpoint,
            "latest_checkpoint": v2.latest_checkpoint,
        }
    return [
        f"{module}.{name}"
        for module, names in expected.items()
        for name, value in names.items()
        if vars(sys.modules[module]).get(name, value) is not value
    ]

def unavailable():
    if "flytekit" not in sys.argv:
        return True
    import flytekit
    try:
        flytekit.current_context().checkpoint
    except flytekit_ckpt.CheckpointUnavailableError:
        return True
"""

INSTALL = "import flytekit_ckpt; flytekit_ckpt.install(); flytekit_ckpt.install()"
AUTO = "import flytekit_ckpt.auto"

# Those that this environment has.
PACKAGES = [name for name in ("flytekit", "flyte") if importlib.util.find_spec(name) is not None]
on_either = pytest.mark.skipif(not PACKAGES, reason="without flytekit and flyte")


def printed(tmp_path: Path, code: str, *packages: str) -> str:
    """Give what code prints in an interpreter where `user` can be imported."""
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-c", "import sys\n" + textwrap.dedent(code), *packages]
    return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True).stdout.strip()


ALL = ["import flytekit", "import flyte", "import flyte_migrate", "import user"]


def possible(order: list[str]) -> list[str]:
    """Leave out the imports of what this environment does not have."""
    return [line for line in order if line not in ALL or importlib.util.find_spec(line.split()[1]) or "user" in line]


@on_either
@pytest.mark.parametrize(
    "order",
    [
        [INSTALL, *ALL],
        ["import flytekit", INSTALL, "import flyte", "import flyte_migrate", "import user"],
        ["import flyte", AUTO, "import user", "import flyte_migrate"],
        ["import flyte_migrate", INSTALL, "import user"],
        ["import user", AUTO, "import flyte_migrate"],
        [*ALL, INSTALL],
    ],
    ids=lambda order: " ".join(line.split(";")[0].split()[-1] for line in order),
)
def test_in_any_order_every_name_is_ours(tmp_path: Path, order: list[str]) -> None:
    code = "\n".join([*possible(order), CHECK, "print(strangers(), unavailable())"])
    assert printed(tmp_path, code, *PACKAGES) == "[] True"


@pytest.mark.parametrize("install_first", [True, False])
@pytest.mark.parametrize("package", ["flytekit", "flyte"])
def test_either_package_may_be_missing(tmp_path: Path, package: str, install_first: bool) -> None:
    pytest.importorskip(package)
    missing = {"flytekit": "flyte", "flyte": "flytekit"}[package]
    without = f"sys.modules[{missing!r}] = None"
    order = [INSTALL, "import user"] if install_first else ["import user", INSTALL]
    ask = """
try:
    flytekit_ckpt.current_checkpoint()
except flytekit_ckpt.CheckpointUnavailableError:
    print(strangers())
"""
    code = "\n".join([without, *order, CHECK, ask])
    assert printed(tmp_path, code, package) == "[]"


def test_neither_package_is_imported(tmp_path: Path) -> None:
    code = """
    import flytekit_ckpt.auto
    flytekit_ckpt.uninstall()
    print("flytekit" in sys.modules, "flyte" in sys.modules)
    """
    assert printed(tmp_path, code) == "False False"


@on_either
@pytest.mark.parametrize(
    "before",
    [[], [INSTALL, "flytekit_ckpt.uninstall()"], ["import flytekit", "import flyte"], ALL],
    ids=["none", "installed and uninstalled", "packages", "all"],
)
def test_uninstall_gives_everything_back_and_it_may_be_installed_again(tmp_path: Path, before: list[str]) -> None:
    code = """
    import importlib
    holders = {
        "flytekit": ["flytekit"] + ["flytekit." + name for name in
                                    ("bin.entrypoint", "core.checkpointer", "core.context_manager")],
        "flyte": ["flyte"],
    }
    modules = [importlib.import_module(name) for package in sys.argv[1:] for name in holders[package]]
    def owner(package):
        return package.ExecutionParameters if package.__name__ == "flytekit" else package.models.TaskContext
    def originals():
        values = [getattr(module, name, None) for module in modules
                  for name in ("Checkpoint", "SyncCheckpoint", "BaseCheckpoint", "latest_checkpoint")]
        values += [owner(sys.modules[package]).checkpoint.fget for package in sys.argv[1:]]
        return {value.__module__.partition(".")[0] for value in values if value is not None}
    for _ in range(3):
        flytekit_ckpt.uninstall(); flytekit_ckpt.uninstall()
        print(originals() == set(sys.argv[1:]))
        if "user" in sys.modules:
            print(strangers())
        flytekit_ckpt.install()
        print(originals() == {"flytekit_ckpt"})
        import user
        print(strangers())
    """
    code = "\n".join([*possible(before), INSTALL, CHECK, textwrap.dedent(code)])
    lines = printed(tmp_path, code, *PACKAGES).splitlines()
    if before == ALL and "flytekit" in PACKAGES:
        # The user's module took its names before anything was installed, so it gets them back too.
        assert len([line for line in lines if "user.Renamed" in line]) == 3
    kept = [line for line in lines if not any(f"{name}.Checkpoint" in line for name in PACKAGES)]
    assert set(kept) == {"True", "[]"}, lines


@on_flyte
def test_a_flyte_without_checkpoints_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flyte

    for name in ("BaseCheckpoint", "Checkpoint", "latest_checkpoint"):
        monkeypatch.delattr(flyte, name, raising=False)
    monkeypatch.delattr(flyte.models.TaskContext, "checkpoint", raising=False)
    flytekit_ckpt.install()
    try:

        def work() -> str:
            with pytest.raises(flytekit_ckpt.CheckpointUnavailableError) as unavailable:
                flytekit_ckpt.current_checkpoint()
            return str(unavailable.value)

        assert f"flyte {flyte.__version__} gives its tasks no checkpoints" in str(run_locally(work, tmp_path))
    finally:
        flytekit_ckpt.uninstall()


@on_flyte
def test_uninstall_leaves_what_someone_else_has_put_there_since() -> None:
    import flyte

    own = flyte.Checkpoint
    flytekit_ckpt.install()
    try:
        flyte.Checkpoint = "someone else's"
        flytekit_ckpt.uninstall()
        assert flyte.Checkpoint == "someone else's"
    finally:
        flyte.Checkpoint = own


@on_either
def test_from_many_threads_while_others_import(tmp_path: Path) -> None:
    names = [line.split()[1] for line in possible(ALL)]
    code = f"""
    import importlib, threading, flytekit_ckpt
    sys.setswitchinterval(1e-5)
    names = {names}
    threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
    threads += [threading.Thread(target=flytekit_ckpt.install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    """
    code = textwrap.dedent(code) + CHECK + "\nprint(strangers(), unavailable())"
    for _ in range(3):
        assert printed(tmp_path, code, *PACKAGES) == "[] True"


def test_a_module_that_is_importing_meanwhile_gets_ours(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    code = """
    import types
    late = sys.modules["late"] = types.ModuleType("late")
    import flyte, flytekit_ckpt
    from flytekit_ckpt import replacement, v2
    held = replacement._held
    def seen(module, replacements):
        found = held(module, replacements)
        if module is late:
            # What `from flyte import Checkpoint` finds just after it has been looked at.
            late.Checkpoint = flyte.Checkpoint
        return found
    replacement._held = seen
    flytekit_ckpt.install()
    print(late.Checkpoint is v2.Checkpoint)
    """
    assert printed(tmp_path, code) == "True"


def test_modules_that_load_when_they_are_used_are_not_loaded(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    (tmp_path / "broken.py").write_text("import not_there_at_all")
    code = """
    import importlib.util
    spec = importlib.util.find_spec("broken")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules["broken"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["broken"])
    import flytekit_ckpt.auto, flyte
    from flytekit_ckpt import v2
    print(flyte.Checkpoint is v2.Checkpoint)
    flytekit_ckpt.uninstall()
    flytekit_ckpt.install()
    print(flyte.Checkpoint is v2.Checkpoint)
    """
    assert printed(tmp_path, code) == "True\nTrue"


@pytest.mark.parametrize("package", ["flytekit", "flyte"])
def test_what_stands_in_for_a_module_is_left_alone(tmp_path: Path, package: str) -> None:
    pytest.importorskip("flyte")
    code = f"""
    from unittest.mock import MagicMock
    sys.modules["{package}"] = sys.modules["{package}.core.checkpointer"] = MagicMock()
    import types
    nameless = sys.modules["nameless"] = types.ModuleType("nameless")
    del nameless.__name__
    class Pretending:
        __slots__ = ()
        __class__ = property(lambda self: types.ModuleType)
    sys.modules["pretending"] = Pretending()
    import flytekit_ckpt
    flytekit_ckpt.install()
    flytekit_ckpt.uninstall()
    print("done")
    """
    assert printed(tmp_path, code) == "done"


def test_a_module_that_cannot_be_changed_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    code = """
    import types, flyte
    class ReadOnly(types.ModuleType):
        def __setattr__(self, name, value):
            raise AttributeError("read-only")
    module = sys.modules["read_only"] = ReadOnly("read_only")
    theirs = [flyte.Checkpoint]
    module.__dict__["Checkpoint"] = flyte.Checkpoint
    import flytekit_ckpt.auto
    from flytekit_ckpt import v2
    print(flyte.Checkpoint is v2.Checkpoint, module.Checkpoint is theirs[0])
    flytekit_ckpt.uninstall()
    print(flyte.Checkpoint is theirs[0], module.Checkpoint is theirs[0])
    """
    assert printed(tmp_path, code) == "True True\nTrue True"


def test_a_users_class_that_extends_theirs_goes_on_working(tmp_path: Path) -> None:
    pytest.importorskip("flytekit")
    (tmp_path / "extending.py").write_text(
        "from flytekit.core.checkpointer import SyncCheckpoint\n"
        "class Mine(SyncCheckpoint):\n"
        "    def __init__(self, destination, source=None):\n"
        "        SyncCheckpoint.__init__(self, destination, source)\n"
    )
    code = """
    import extending
    import flytekit_ckpt.auto
    extending.Mine("one").write(b"5")
    mine = extending.Mine("two", "one")
    print(mine.read(), isinstance(mine, extending.SyncCheckpoint))
    """
    assert printed(tmp_path, code) == "b'5' True"


def test_installing_again_takes_over_what_was_imported_anew(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    code = """
    import flytekit_ckpt.auto, flyte
    from flytekit_ckpt import v2
    for name in [name for name in sys.modules if name.partition(".")[0] == "flyte"]:
        del sys.modules[name]
    import flyte
    print(flyte.Checkpoint is v2.Checkpoint)
    flytekit_ckpt.install()
    print(flyte.Checkpoint is v2.Checkpoint)
    """
    assert printed(tmp_path, code) == "False\nTrue"


# ---------------------------------------------------------------------------------------------------------------------
# The attempts of one process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[None]:
    flytekit_ckpt.install()
    yield
    flytekit_ckpt.uninstall()


@on_flyte
@pytest.mark.usefixtures("installed")
def test_outside_a_task_flyte_has_none() -> None:
    import flyte

    # Releases differ in whether there is a context.
    assert getattr(flyte.ctx(), "checkpoint", None) is None


@on_flytekit
@pytest.mark.usefixtures("installed")
def test_outside_a_task_flytekit_says_so() -> None:
    import flytekit

    with pytest.raises(flytekit_ckpt.CheckpointUnavailableError):
        flytekit.current_context().checkpoint  # noqa: B018
    with pytest.raises(NotImplementedError):
        flytekit.current_context().checkpoint  # noqa: B018


@on_flytekit
@pytest.mark.usefixtures("installed")
def test_a_flytekit_task_that_is_run_locally_has_the_checkpoint_of_its_sandbox() -> None:
    import flytekit

    seen = []

    @flytekit.task
    def work() -> bool:
        checkpoint = flytekit.current_context().checkpoint
        seen.append(checkpoint)
        checkpoint.write(b"5")
        return checkpoint.read() is None

    assert work() is True
    assert type(seen[0]) is SyncCheckpoint
    assert SyncCheckpoint("", seen[0]._checkpoint_dest).read() == b"5"


def run_locally(function: object, tmp_path: Path, *, retries: int = 0) -> object:
    import flyte

    task = flyte.TaskEnvironment(name="tests").task(retries=retries_at_once(retries))(function)
    return flyte.with_runcontext(mode="local", raw_data_path=str(tmp_path)).run(task).outputs()[0]


@on_flyte
def test_an_attempt_keeps_its_instances_when_it_installs_and_uninstalls(tmp_path: Path) -> None:
    import flyte

    def work() -> bool:
        theirs = flyte.ctx().checkpoint
        legacy = flytekit_ckpt.current_checkpoint()
        assert type(theirs) is not v2.Checkpoint
        flytekit_ckpt.install()
        try:
            ours = flyte.ctx().checkpoint
            assert type(ours) is v2.Checkpoint
            assert isinstance(ours, flyte.Checkpoint)
            assert flyte.ctx().checkpoint is ours
            assert flytekit_ckpt.current_checkpoint() is legacy
        finally:
            flytekit_ckpt.uninstall()
        assert flyte.ctx().checkpoint is theirs
        assert flytekit_ckpt.current_checkpoint() is legacy
        return (ours.remote_destination, ours.remote_source) == (theirs.remote_destination, theirs.remote_source)

    assert run_locally(work, tmp_path) is True


@on_flyte
@pytest.mark.usefixtures("installed")
def test_threads_of_an_attempt_share_its_instances(tmp_path: Path) -> None:
    import flyte

    def work() -> int:
        import contextvars

        seen = set()
        together = threading.Barrier(8, timeout=30)

        def ask() -> None:
            together.wait()
            seen.add(flyte.ctx().checkpoint)
            seen.add(flytekit_ckpt.current_checkpoint())

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(ask,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(seen)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert run_locally(work, tmp_path) == 2
    finally:
        sys.setswitchinterval(interval)


async def run_in_a_reused_process(
    task: Any, number: int, folder: Path, destination: str, source: str | None = None
) -> None:
    """Run an attempt of a task, as the worker of a reused container does."""
    from flyte._internal.runtime.convert import convert_from_native_to_inputs
    from flyte._internal.runtime.rusty import run_task

    class Controller:
        """What releases before 2.3 cannot do without."""

        async def finalize_parent_action(self, action: object) -> None: ...

    folder.mkdir()
    inputs = await convert_from_native_to_inputs(task.native_interface, number=number)
    (folder / "inputs.pb").write_bytes(inputs.proto_inputs.SerializeToString())
    await run_task(
        task=task,
        controller=Controller(),
        org="o",
        project="p",
        domain="d",
        run_name="r",
        name=f"a{number}",
        raw_data_path=str(folder / "raw"),
        output_path=str(folder),
        run_base_dir=str(folder),
        version="v",
        checkpoint_path=destination,
        prev_checkpoint=source,
        input_path=str(folder / "inputs.pb"),
    )
    assert not (folder / "error.pb").exists()


@on_flyte
@pytest.mark.usefixtures("installed")
def test_an_attempt_of_a_reused_process_carries_forward_though_it_never_asks(tmp_path: Path) -> None:
    import flyte

    async def work(number: int) -> None:
        assert str(number) in repr(flyte.ctx())

    before, after = tmp_path / "0", tmp_path / "1"
    before.write_bytes(b"5")
    task = flyte.TaskEnvironment(name="tests").task(work)
    asyncio.run(run_in_a_reused_process(task, 7, tmp_path / "io", str(after), str(before)))
    assert after.read_bytes() == b"5"


@on_flyte
@pytest.mark.usefixtures("installed")
def test_tasks_of_a_reused_process_do_not_see_each_others_checkpoints(tmp_path: Path) -> None:
    import flyte

    instances: list[object] = []

    async def work(number: int) -> int:
        new, legacy = flyte.ctx().checkpoint, flytekit_ckpt.current_checkpoint()
        instances.extend([new, legacy])
        previous = await new.load()
        await asyncio.sleep(0.01)
        start = int(previous.read_text()) if previous is not None else number * 100
        for index in range(start, start + 3):
            assert flyte.ctx().checkpoint is new
            assert flytekit_ckpt.current_checkpoint() is legacy
            await new.save(str(index + 1).encode())
            await asyncio.sleep(0)
        assert legacy.read() == (None if previous is None else str(start).encode())
        return start

    async def attempts(attempt: int) -> None:
        """Run ten tasks at once, as the worker of a reused container does."""
        task = flyte.TaskEnvironment(name="tests").task(work)

        async def run(number: int) -> None:
            await run_in_a_reused_process(
                task,
                number,
                tmp_path / f"{number}-{attempt}",
                str(tmp_path / f"checkpoint-{number}-{attempt}"),
                str(tmp_path / f"checkpoint-{number}-{attempt - 1}") if attempt else None,
            )

        await asyncio.gather(*(run(number) for number in range(10)))

    for attempt in range(3):
        asyncio.run(attempts(attempt))
        for number in range(10):
            saved = (tmp_path / f"checkpoint-{number}-{attempt}").read_text()
            assert saved == str(number * 100 + 3 * (attempt + 1))
    assert len(set(instances)) == 10 * 3 * 2


@on_flyte
@pytest.mark.usefixtures("installed")
def test_a_fork_asks_for_the_checkpoint_while_threads_do(tmp_path: Path) -> None:
    import contextvars

    import flyte

    def work() -> int:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                flyte.ctx().checkpoint  # noqa: B018

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(ask,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        hung = 0
        try:
            for _ in range(5):
                child = os.fork()
                if not child:
                    os._exit(0 if flyte.ctx().checkpoint is not None else 1)
                deadline = time.monotonic() + 20
                while os.waitpid(child, os.WNOHANG) == (0, 0):
                    if time.monotonic() > deadline:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                        hung += 1
                        break
                    time.sleep(0.01)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        return hung

    assert run_locally(work, tmp_path) == 0


@on_flyte
@pytest.mark.usefixtures("installed")
def test_the_innermost_task_is_the_one_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flyte

    outer = str(tmp_path / "outer")
    monkeypatch.setattr(attempts, "runners", [attempts.Attempt(Running(outer))])

    def work() -> bool:
        return flytekit_ckpt.current_checkpoint()._checkpoint_dest == flyte.ctx().checkpoint.remote_destination  # type: ignore[attr-defined]

    assert run_locally(work, tmp_path) is True
    assert flytekit_ckpt.current_checkpoint()._checkpoint_dest == outer  # type: ignore[attr-defined]
    flytekit = pytest.importorskip("flytekit")

    @flytekit.task
    def nested() -> str:
        assert flytekit.current_context().checkpoint is flytekit_ckpt.current_checkpoint()
        return flytekit_ckpt.current_checkpoint()._checkpoint_dest  # type: ignore[attr-defined]

    assert nested() != outer


@on_flyte
def test_an_attempt_that_is_over_leaves_nothing_behind(tmp_path: Path) -> None:
    import gc

    before = len(attempts.attempts)
    flytekit_ckpt.install()
    try:

        def work() -> bool:
            import flyte

            flytekit_ckpt.current_checkpoint()
            return flyte.ctx().checkpoint.prev_exists()

        run_locally(work, tmp_path)
    finally:
        flytekit_ckpt.uninstall()
    # The threads that ran it may still be at their ends.
    deadline = time.monotonic() + 30
    while len(attempts.attempts) > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert len(attempts.attempts) <= before


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def test_options_hold_for_every_attempt_until_they_are_given_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SyncCheckpoint(str(tmp_path / "before")).write(b"0123456789")
    monkeypatch.setattr(attempts, "runners", [])

    def read() -> bytes | None:
        attempts.set_runner_checkpoint(Running("", str(tmp_path / "before")))
        return flytekit_ckpt.current_checkpoint().read()

    try:
        flytekit_ckpt.install(restore_limit=9)
        with pytest.raises(UnsafeCheckpointError, match="restore_limit"):
            read()
        # As a worker does that inherits an installation, or a second module.
        flytekit_ckpt.install()
        with pytest.raises(UnsafeCheckpointError, match="restore_limit"):
            read()
        flytekit_ckpt.install(restore_limit=10)
        assert read() == b"0123456789"
        flytekit_ckpt.install(restore_limit=9)
    finally:
        flytekit_ckpt.uninstall()
    assert read() == b"0123456789"


def test_an_unknown_option_is_an_error_and_installs_nothing() -> None:
    with pytest.raises(TypeError, match="retires"):
        flytekit_ckpt.install(retires=3)
    assert not installation._installed
    assert not options.of_attempts


# ---------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------

ELASTIC = {
    "flytekit": """
        import os
        import flytekit_ckpt.auto
        from flytekit import current_context, task
        from flytekit.exceptions.user import FlyteRecoverableException
        from flytekitplugins.kfpytorch import Elastic

        @task(task_config=Elastic(nnodes=1, nproc_per_node=2), retries=1)
        def work() -> int:
            checkpoint = current_context().checkpoint
            saved = checkpoint.read()
            if os.environ["RANK"] == "0":
                print("starting at", 0 if saved is None else int(saved))
            if saved is None:
                if os.environ["RANK"] == "0":
                    checkpoint.write(b"5")
                raise FlyteRecoverableException("simulated")
            return int(saved)
    """,
    "flyte": """
        import os
        import flyte
        import flytekit_ckpt.auto
        from flyteplugins.pytorch import Elastic

        elastic = Elastic(nnodes=1, nproc_per_node=2, max_restarts=0)
        environment = flyte.TaskEnvironment(name="tests", plugin_config=elastic)

        @environment.task(retries=1)
        def work() -> int:
            checkpoint = flyte.ctx().checkpoint
            loaded = checkpoint.load_sync()
            assert type(checkpoint).__module__.startswith("flytekit_ckpt.v2.")
            start = 0 if loaded is None else int(loaded.read_text())
            if os.environ["RANK"] == "0":
                print("starting at", start)
            if not start:
                if os.environ["RANK"] == "0":
                    checkpoint.save_sync(b"5")
                raise RuntimeError("simulated")
            return start
    """,
}


@pytest.mark.heavy
@pytest.mark.parametrize("asynchronous", ["0", "1"])
@pytest.mark.parametrize(("package", "platform"), [("flytekit", Flyte1), ("flyte", Flyte2)])
def test_the_workers_of_an_elastic_task_are_installed_in_too(
    package: str, platform: type[Platform], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    pytest.importorskip(package)
    monkeypatch.setenv("FLYTEKIT_CKPT_ASYNCHRONOUS", asynchronous)
    file = tmp_path / "elastic_task.py"
    file.write_text(textwrap.dedent(ELASTIC[package]))
    run = platform(file, "work", {}, str(tmp_path / "checkpoints"), tmp_path)
    assert run.run(retries=1) == 5
    # With torch's own beginning of a worker's lines.
    starts = [line for attempt in run.attempts for line in attempt.lines if "starting at" in line]
    assert [line.split()[-1] for line in starts] == ["0", "5"]
    assert Path(run.destination(1)).read_bytes() == b"5"
