"""Iterator checkpoints against real datarax, which wants an environment of its own: the same calls, the same answers.

`FLYTEKIT_CKPT_DATARAX` names that environment's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from flytekit_ckpt.iterators import PipelineCheckpoint

PYTHON = os.environ.get("FLYTEKIT_CKPT_DATARAX")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(PYTHON is None, reason="FLYTEKIT_CKPT_DATARAX names no Python that has datarax"),
]

WORKER = """
import json, sys
from datarax.checkpoint.iterators import PipelineCheckpoint

for line in sys.stdin:
    print(json.dumps(answer(PipelineCheckpoint, *json.loads(line))), flush=True)
"""

# Used on both sides: a call, and its answer or the kind of its error.
ANSWER = """
class Iterator:
    def __init__(self, state):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def answer(kind, base, method, state, arguments):
    import pathlib
    iterator = Iterator(state)
    given = [iterator] if method.startswith(("save", "restore")) else []
    try:
        result = getattr(kind(base), method)(*given, **arguments)
    except Exception as error:
        return ["error", [name for name in ("ValueError", "TypeError") if isinstance(error, __builtins__[name]
                if isinstance(__builtins__, dict) else getattr(__builtins__, name))], iterator.state]
    if result is iterator:
        result = "the iterator"
    if isinstance(result, str):
        result = str(pathlib.Path(result).relative_to(base)) if result.startswith(base) else result
    if isinstance(result, dict):
        result = [[step, str(pathlib.Path(path).relative_to(base))] for step, path in result.items()]
    return ["result", result, iterator.state]
"""

exec(ANSWER)

VALUES = st.one_of(st.integers(-(2**31), 2**31 - 1), st.floats(-1e6, 1e6), st.text("abc é", max_size=5), st.booleans())
STATES = st.dictionaries(
    st.sampled_from(["position", "epoch", "shuffle", "sampler"]),
    st.one_of(
        VALUES, st.lists(VALUES, min_size=1, max_size=3), st.dictionaries(st.sampled_from("ab"), VALUES, min_size=1)
    ),
    min_size=1,
)
IDENTITY = st.sampled_from(
    [{}, {"shard_count": 1}, {"shard_count": 2}, {"shard_count": 1, "worker_count": 2}, {"sampler_repr": "a"}]
)


class Datarax:
    """The other interpreter."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(PYTHON), "-c", ANSWER + WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *call: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


_datarax: list[Datarax] = []


@pytest.fixture(scope="module", autouse=True)
def _running() -> Any:
    _datarax.append(Datarax())
    yield
    _datarax.pop().close()


class Calls(RuleBasedStateMachine):
    """Any sequence of calls, on both."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.steps: set[int] = set()
        self.unversioned = False

    def both(self, method: str, state: dict[str, Any] | None = None, **arguments: object) -> Any:
        ours, theirs = (Path(self.folder.name) / name for name in ("ours", "theirs"))
        found = json.loads(json.dumps(answer(PipelineCheckpoint, str(ours), method, state, arguments)))  # noqa: F821
        expected = _datarax[0](str(theirs), method, state, arguments)
        assert found == expected, (method, state, arguments)
        return found

    @rule(state=STATES, identity=IDENTITY, ahead=st.integers(0, 3), keep=st.integers(0, 3), overwrite=st.booleans())
    def save(self, state: dict[str, Any], identity: dict[str, int], ahead: int, keep: int, overwrite: bool) -> None:
        # A step before the latest is another matter: see below.
        step = max(self.steps, default=-1) + ahead
        if step < 0:
            return
        kind, *_ = self.both(
            "save_to_directory", {**state, **identity}, step=step, keep=keep, overwrite=overwrite, metadata={"a": 1}
        )
        if kind == "result":
            self.steps = set(sorted(self.steps | {step})[-keep if keep else None :])
            self.both("list_checkpoints")

    @rule(state=STATES, overwrite=st.booleans())
    def save_unversioned(self, state: dict[str, Any], overwrite: bool) -> None:
        kind, *_ = self.both("save_to_directory", state, overwrite=overwrite)
        self.unversioned = self.unversioned or kind == "result"

    @rule(state=STATES, ahead=st.integers(1, 3), interval=st.integers(1, 3))
    def save_to_step(self, state: dict[str, Any], ahead: int, interval: int) -> None:
        step = max(self.steps, default=-1) + ahead
        *_, result, _ = self.both("save_to_step", state, step=step, interval=interval, keep=2)
        if result is not None:
            self.steps = set(sorted(self.steps | {step})[-2:])

    @rule(identity=IDENTITY, step=st.none() | st.integers(0, 8))
    def restore(self, identity: dict[str, int], step: int | None) -> None:
        # datarax takes the unversioned checkpoint for a step that is not there.
        if step is None or step in self.steps or not self.unversioned:
            self.both("restore", {"live": 1, **identity}, step=step)

    @rule(identity=IDENTITY)
    def restore_latest(self, identity: dict[str, int]) -> None:
        self.both("restore_latest", {"live": 1, **identity})

    @rule(method=st.sampled_from(["get_latest_step", "list_checkpoints", "has_checkpoint"]))
    def ask(self, method: str) -> None:
        self.both(method)

    @rule(state=st.sampled_from([[1], "text", 5, None]))
    def save_no_dict(self, state: object) -> None:
        self.both("save_to_directory", state, step=100)  # type: ignore[arg-type]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestCalls = Calls.TestCase
TestCalls.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_where_datarax_removes_the_step_that_it_has_just_saved_ours_stays(tmp_path: Path) -> None:
    for base, expected in ((str(tmp_path / "theirs"), [10]), (str(tmp_path / "ours"), [5, 10])):
        for step in (10, 5):
            call = (base, "save_to_directory", {"a": step}, {"step": step, "keep": 1})
            _datarax[0](*call) if expected == [10] else answer(PipelineCheckpoint, *call)  # noqa: F821
        listed = (base, "list_checkpoints", None, {})
        _, found, _ = _datarax[0](*listed) if expected == [10] else answer(PipelineCheckpoint, *listed)  # noqa: F821
        assert [step for step, _ in found] == expected


PIPELINES = """
import sys, tempfile
import jax
import numpy as np
from datarax import Pipeline
from datarax.checkpoint.handlers import OrbaxCheckpointHandler
from datarax.sources.memory_source import MemorySource, MemorySourceConfig
from flax import nnx
from flytekit_ckpt.iterators import CheckpointableIterator, IteratorCheckpoint

def source():
    return MemorySource(MemorySourceConfig(shuffle=True), {"x": np.arange(40)}, rngs=nnx.Rngs(7))

def pipeline():
    return iter(Pipeline(source=source(), stages=[], batch_size=4, rngs=nnx.Rngs(0)))

def rest(iterator):
    return [np.asarray(batch["x"]).tolist() for batch in iterator]

for handler in (None, OrbaxCheckpointHandler()):
    iterator = pipeline()
    assert isinstance(iterator, CheckpointableIterator)
    for _ in range(3):
        next(iterator)
    checkpoint = IteratorCheckpoint(tempfile.mkdtemp(), handler)
    checkpoint.save_to_directory(iterator, step=3)
    assert len(expected := rest(iterator)) == 7
    assert rest(checkpoint.restore_latest(pipeline())) == expected

# A module's state holds keys of random generators.
checkpoint = IteratorCheckpoint(tempfile.mkdtemp())
first = source()
first.epoch.set_value(5)
checkpoint.save_to_directory(first, step=1)
assert checkpoint.restore_latest(source()).epoch.get_value() == 5
found = checkpoint.handler.restore(checkpoint.base_dir)
assert found["rngs"]["default"]["key"] == first.get_state()["rngs"]["default"]["key"]
for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
    keys = jax.random.split(jax.random.key(3, impl=implementation), 4)
    checkpoint.handler.save_to_directory(checkpoint.base_dir, {"keys": keys}, step=2, overwrite=True)
    found = checkpoint.handler.restore(checkpoint.base_dir, step=2)["keys"]
    assert found.dtype == keys.dtype and (found == keys).all()
"""


def test_dataraxes_own_pipelines_and_modules_resume() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([str(PYTHON), "-c", PIPELINES], env=environment, check=True)
