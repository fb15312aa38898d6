"""The programs in examples/, through the real entry points: each attempt starts where an earlier one saved."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import flytekit_ckpt
from flytekit_ckpt import runner
from tests.conftest import Place
from tests.platforms import (
    EXAMPLES,
    Flyte1,
    Flyte2,
    Migrated,
    Platform,
    on_flyte,
    on_flytekit,
    on_migrate,
    printed,
    script,
)

# A flytekit task on either platform.
BOTH = [pytest.param(Flyte1, marks=on_flytekit), pytest.param(Migrated, id="Flyte2", marks=on_migrate)]


def starts(platform: Platform) -> list[str]:
    """Give where the attempts started."""
    return [line.split()[-1] for attempt in platform.attempts for line in attempt.starting()]


# ---------------------------------------------------------------------------------------------------------------------
# flytekit's counter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", BOTH)
def test_flytekits_counter_resumes_attempt_after_attempt(
    platform: type[Platform], place: Place, tmp_path: Path
) -> None:
    run = platform(EXAMPLES / "flytekit_counter.py", "counter", {"n_iterations": 10}, place.uri(), tmp_path)
    assert run.run(retries=3) == 10
    assert starts(run) == ["0", "4", "8"]
    # Written through this package: flytekit makes a folder here, and Flyte 2 cannot be asked at all.
    assert flytekit_ckpt.SyncCheckpoint("", run.destination(3)).read() == b"10"


@on_migrate
def test_flytekits_counter_resumes_under_pyflyte_migrate(tmp_path: Path) -> None:
    command = [script("pyflyte-migrate"), "run", "--raw-data-path", str(tmp_path)]
    command += ["flytekit_counter.py", "counter", "--n_iterations", "10"]
    lines, _ = printed(command, EXAMPLES)
    assert [line.split()[-1] for line in lines if line.startswith("starting at")] == ["0", "4", "8"], lines
    assert "o0=10" in "".join(lines)


@on_migrate
def test_a_task_that_began_on_plain_flytekit_resumes_on_flyte_2(place: Place, tmp_path: Path) -> None:
    installing = (EXAMPLES / "flytekit_counter.py").read_text()
    plain = installing.replace("import flytekit_ckpt.auto\n", "")
    assert plain != installing
    file = tmp_path / "plain_counter.py"
    file.write_text(plain)
    before = Flyte1(file, "counter", {"n_iterations": 10}, place.uri(), tmp_path / "before")
    assert before.attempt().outcome == "recoverable"

    after = Migrated(
        EXAMPLES / "flytekit_counter.py",
        "counter",
        {"n_iterations": 10},
        place.uri(),
        tmp_path / "after",
        source=before.destination(1),
    )
    assert after.run(retries=3) == 10
    assert starts(after) == ["4", "8"]


# ---------------------------------------------------------------------------------------------------------------------
# The programs of Flyte 2's tutorial
# ---------------------------------------------------------------------------------------------------------------------


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    """Undo what an example that is imported here installs."""
    yield
    sys.modules.pop("flytekit_ckpt.auto", None)
    flytekit_ckpt.uninstall()


@on_flyte
def test_process_data_resumes_in_a_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flyte

    module = load("flyte_process_data")
    worked: list[int] = []

    def work(index: int) -> None:
        worked.append(index)
        if len(worked) in {43, 70}:
            msg = "simulated failure"
            raise RuntimeError(msg)

    monkeypatch.setattr(module, "work", work)
    run = flyte.with_runcontext(mode="local", raw_data_path=str(tmp_path)).run(module.process_data)
    assert run.outputs()[0] == 100
    assert worked == [*range(43), *range(42, 69), *range(68, 100)]


@on_flyte
def test_process_data_resumes_when_its_containers_are_killed(place: Place, tmp_path: Path) -> None:
    run = Flyte2(EXAMPLES / "flyte_process_data.py", "process_data", {}, place.uri(), tmp_path)
    assert run.run(retries=2, kill_at=["processing 3", "processing 6"]) == 100
    first, second = (int(start) for start in starts(run))
    assert 2 < first < second


@on_flyte
def test_the_resilient_counter_resumes_in_a_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import flyte

    module = load("flyte_counter")
    run = flyte.with_runcontext(mode="local", raw_data_path=str(tmp_path)).run(
        module.resilient_counter, n_iterations=10
    )
    assert run.outputs()[0] == 10
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        *(f"Processing iteration {index}" for index in range(5)),
        "Restoring from iteration 5",
        *(f"Processing iteration {index}" for index in range(5, 10)),
    ]


@on_flyte
def test_the_resilient_counter_resumes_in_containers(place: Place, tmp_path: Path) -> None:
    run = Flyte2(EXAMPLES / "flyte_counter.py", "resilient_counter", {"n_iterations": 10}, place.uri(), tmp_path)
    assert run.run(retries=1) == 10
    assert starts(run) == ["5"]


@on_flyte
def test_a_restarted_clustered_worker_resumes_from_its_own_attempt(place: Place, tmp_path: Path) -> None:
    models = pytest.importorskip("flyte.models")
    if not hasattr(models.TaskContext, "restart_attempt"):
        pytest.skip("this flyte has no clustered workers")
    run = Flyte2(EXAMPLES / "flyte_counter.py", "resilient_counter", {"n_iterations": 10}, place.uri(), tmp_path)
    run.attempt()
    assert run.attempt(restart=True).output == 10
    assert starts(run) == ["5"]


# ---------------------------------------------------------------------------------------------------------------------
# Model and data
# ---------------------------------------------------------------------------------------------------------------------


def test_model_and_data_resume_together_and_no_sample_counts_twice(place: Place) -> None:
    lines: list[str] = []
    target = f"{EXAMPLES / 'exactly_once.py'}:train"
    # The first request to S3 takes its time, and more of it with an old aiobotocore.
    seconds = 0.9 if place.is_local else 3.0
    result = runner.run(target, {}, retries=20, root=place.root, preempt_after=seconds, report=lines.append)
    assert result == {"least often": 2, "most often": 2}
    assert any("killed" in line for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Training frameworks
# ---------------------------------------------------------------------------------------------------------------------


# Whether the caller waits for saves, or not: then it may be killed while the last of them goes on.
ENVIRONMENTS: dict[str, dict[str, str]] = {"waiting": {}, "not waiting": {"FLYTEKIT_CKPT_ASYNCHRONOUS": "1"}}
WAITING = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)


@pytest.mark.heavy
@WAITING
@pytest.mark.parametrize("platform", BOTH)
def test_a_pytorch_task_ends_with_the_loss_of_an_uninterrupted_one(
    platform: type[Platform], tmp_path: Path, environment: dict[str, str]
) -> None:
    file, inputs = EXAMPLES / "torch_training.py", {"epochs": 10}
    whole, broken = (
        platform(file, "train", inputs, str(tmp_path / name), tmp_path / name, environment=environment)
        for name in ("whole", "broken")
    )
    loss = broken.run(retries=2, kill_at=["epoch 3", "epoch 6"])
    first, second, third = (int(start) for start in starts(broken))
    if environment:
        assert first == 0 <= second <= third
    else:
        assert first == 0 < 4 <= second < 7 <= third
    assert loss == whole.run(retries=0)


@pytest.mark.heavy
@WAITING
@pytest.mark.parametrize("platform", BOTH)
def test_a_hugging_face_trainer_ends_with_the_weights_of_an_uninterrupted_one(
    platform: type[Platform], s3: Place, tmp_path: Path, environment: dict[str, str]
) -> None:
    file, inputs = EXAMPLES / "transformers_training.py", {"steps": 18}
    whole, broken = (
        platform(file, "train", inputs, s3.uri(), tmp_path / name, environment=environment)
        for name in ("whole", "broken")
    )
    # Saved at steps 4, 8, 12, 16.
    weights = broken.run(retries=2, kill_at=["step 6", "step 11"])
    first, second, third = (int(start) for start in starts(broken))
    assert first == 0 <= second <= third if environment else first == 0 < second < third
    assert (second % 4, third % 4) == (0, 0)
    assert weights == whole.run(retries=0)


@pytest.mark.heavy
@WAITING
def test_lightning_ends_with_the_weights_of_an_uninterrupted_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    import flyte

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module = load("lightning_training")

    def trained(name: str, fail_at: int) -> tuple[object, list[str]]:
        context = flyte.with_runcontext(mode="local", raw_data_path=str(tmp_path / name))
        weights = context.run(module.train, epochs=6, fail_at=fail_at).outputs()[0]
        return weights, [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]

    whole, epochs = trained("whole", -1)
    assert epochs == [f"epoch {epoch}" for epoch in range(6)]
    broken, epochs = trained("broken", 3)
    # The fourth epoch is begun twice.
    assert epochs == [f"epoch {epoch}" for epoch in (0, 1, 2, 3, 3, 4, 5)]
    assert broken == whole
