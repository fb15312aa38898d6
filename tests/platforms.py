"""Calls tasks as Flyte's platforms do: attempt after attempt, each through the real entry point."""

from __future__ import annotations

import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip a test where one of these packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"without {' and '.join(missing)}")


on_flytekit, on_flyte, on_migrate = needs("flytekit"), needs("flyte"), needs("flyte_migrate")


def retries_at_once(count: int) -> Any:
    """Give retries for a flyte task, without the half second that flyte waits where it can be told to."""
    import flyte

    if not hasattr(flyte, "Backoff"):
        return flyte.RetryStrategy(count=count)
    return flyte.RetryStrategy(count=count, backoff=flyte.Backoff(base=datetime.timedelta(0)))


EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass
class Attempt:
    """What is left of an attempt.

    Attributes
    ----------
    lines : list of str
        What it printed, and its error.
    outcome : str
        "succeeded", "recoverable", "failed" or "killed".
    output : object
        What the task returned.
    """

    lines: list[str]
    outcome: str
    output: object = None

    def starting(self) -> list[str]:
        """Give what it printed of where it starts."""
        beginnings = ("starting at", "resuming from", "restoring from")
        return [line for line in self.lines if line.lower().startswith(beginnings)]


class Platform(ABC):
    """A platform with one task to run.

    Parameters
    ----------
    file : pathlib.Path
        The module that the task is in.
    task : str
        Its name there.
    inputs : mapping of str to int
        Its arguments.
    root : str
        Folder or URI that the checkpoints are kept below.
    scratch : pathlib.Path
        Folder for everything else.
    source : str, optional
        Where the first attempt's checkpoint comes from.
    environment : mapping, optional
        Variables that every attempt's process gets in addition.
    run_name : str, default "r"
        The run that it belongs to.
    node : str, default "n0"
        Which of the run's tasks it is.
    """

    def __init__(
        self,
        file: Path,
        task: str,
        inputs: Mapping[str, int],
        root: str,
        scratch: Path,
        *,
        source: str | None = None,
        environment: Mapping[str, str] | None = None,
        run_name: str = "r",
        node: str = "n0",
    ) -> None:
        self.run_name, self.node = run_name, node
        self.file, self.task, self.inputs, self.root, self.scratch = file, task, inputs, root, scratch
        self.source = source
        self.environment = environment or {}
        self.attempts: list[Attempt] = []

    def run(self, retries: int, *, kill_at: Sequence[str] = ()) -> object:
        """Call attempt after attempt until one succeeds; return its output.

        Each of `kill_at` is the beginning of a line at which an attempt is killed, in turn.
        """
        lines = list(kill_at)
        for _ in range(retries + 1):
            attempt = self.attempt(lines.pop(0) if lines else None)
            if attempt.outcome == "succeeded":
                return attempt.output
            assert attempt.outcome != "failed", "\n".join(attempt.lines)
        msg = "no attempt is left"
        raise AssertionError(msg)

    def attempt(self, kill_at: str | None = None, *, restart: bool = False) -> Attempt:
        """Call one attempt, whose source is where the attempt before it saved to; or restart the last one."""
        number = len(self.attempts) + (not restart)
        source = self.destination(number - 1) if number > 1 else self.source
        # As the platform names it; an attempt that is restarted has it again.
        outputs = self.scratch / f"p-d-{self.run_name}" / self.node / "data" / str(number - 1)
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir(parents=True)
        (outputs / "inputs.pb").write_bytes(self._encoded())
        command = self._command(outputs, self.destination(number), source)
        variables = {"FLYTE_ATTEMPT_NUMBER": str(number - 1), **self.environment}
        if restart:
            variables["JOBSET_RESTART_ATTEMPT"] = "1"
        lines, killed = printed(command, self.file.parent, kill_at, variables)
        attempt = Attempt(lines, "killed") if killed else self._ended(outputs, lines)
        self.attempts.append(attempt)
        return attempt

    def destination(self, number: int) -> str:
        return f"{self.root}/{number}/_flytecheckpoints"

    @abstractmethod
    def _encoded(self) -> bytes: ...

    @abstractmethod
    def _command(self, outputs: Path, destination: str, source: str | None) -> list[str]: ...

    @abstractmethod
    def _error_document(self, content: bytes) -> Any: ...

    @abstractmethod
    def _output(self, content: bytes) -> Any: ...

    def _ended(self, outputs: Path, lines: list[str]) -> Attempt:
        if (outputs / "error.pb").exists():
            error = self._error_document((outputs / "error.pb").read_bytes()).error
            return Attempt([*lines, error.message], "recoverable" if error.kind == error.RECOVERABLE else "failed")
        if not (outputs / "outputs.pb").exists():
            return Attempt(lines, "failed")
        primitive = self._output((outputs / "outputs.pb").read_bytes()).scalar.primitive
        return Attempt(lines, "succeeded", getattr(primitive, primitive.WhichOneof("value")))


class Flyte1(Platform):
    """Runs a flytekit task, on flytekit."""

    entry_point = "pyflyte-execute"

    def _encoded(self) -> bytes:
        from flyteidl.core.literals_pb2 import Literal, LiteralMap

        literals = {name: _integer(Literal, value) for name, value in self.inputs.items()}
        return LiteralMap(literals=literals).SerializeToString()

    def _command(self, outputs: Path, destination: str, source: str | None) -> list[str]:
        # As in flytekit's images: not every release looks into the working directory.
        self.environment = {
            "PYTHONPATH": str(self.file.parent),
            "FLYTE_INTERNAL_EXECUTION_PROJECT": "p",
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": "d",
            "FLYTE_INTERNAL_EXECUTION_ID": self.run_name,
            "FLYTE_INTERNAL_TASK_NAME": f"{self.file.stem}.{self.task}",
            **self.environment,
        }
        return [
            script(self.entry_point),
            *("--inputs", str(outputs / "inputs.pb"), "--output-prefix", str(outputs)),
            *("--raw-output-data-prefix", str(outputs / "raw")),
            # The platform writes a missing source in quotes.
            *("--checkpoint-path", destination, "--prev-checkpoint", source or '""'),
            *self._resolver(),
            *("task-module", self.file.stem, "task-name", self.task),
        ]

    def _resolver(self) -> list[str]:
        return ["--resolver", "flytekit.core.python_auto_container.default_task_resolver", "--"]

    def _error_document(self, content: bytes) -> Any:
        from flyteidl.core.errors_pb2 import ErrorDocument

        return ErrorDocument.FromString(content)

    def _output(self, content: bytes) -> Any:
        from flyteidl.core.literals_pb2 import LiteralMap

        return LiteralMap.FromString(content).literals["o0"]


class Flyte1Map(Flyte1):
    """Runs one of the tasks of a map, on flytekit; `index` is which."""

    entry_point = "pyflyte-map-execute"

    def __init__(self, *arguments: Any, index: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.index = index
        # As the platform sets them for an array of containers.
        variables = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX", "FLYTE_K8S_ARRAY_INDEX": str(index)}
        self.environment = {**variables, **self.environment}

    def _encoded(self) -> bytes:
        from flyteidl.core.literals_pb2 import Literal, LiteralMap

        # Every task of the map gets all inputs, and takes its own.
        lists = {name: Literal() for name in self.inputs}
        for name, literal in lists.items():
            literal.collection.literals.extend([_integer(Literal, self.inputs[name])] * (self.index + 1))
        return LiteralMap(literals=lists).SerializeToString()

    def _resolver(self) -> list[str]:
        own = "flytekit.core.array_node_map_task.ArrayNodeMapTaskResolver"
        return ["--resolver", own, "--", "vars", "", "resolver", super()._resolver()[1]]


class Flyte2(Platform):
    """Runs a flyte task, or, through flyte-migrate, a flytekit task, on flyte."""

    resolver = "flyte._internal.resolvers.default.DefaultTaskResolver"

    def _encoded(self) -> bytes:
        from flyteidl2.core.literals_pb2 import Literal
        from flyteidl2.task.common_pb2 import Inputs, NamedLiteral

        literals = [NamedLiteral(name=name, value=_integer(Literal, value)) for name, value in self.inputs.items()]
        return Inputs(literals=literals).SerializeToString()

    def _command(self, outputs: Path, destination: str, source: str | None) -> list[str]:
        # A clustered worker is the one kind of container that needs no connection to the platform.
        self.environment = {"FLYTE_CLUSTERED_WORKER": "1", **self.environment}
        return [
            script("a0"),
            *("--inputs", str(outputs / "inputs.pb"), "--outputs-path", str(outputs)),
            *("--version", "v", "--run-base-dir", str(outputs), "--raw-data-path", str(outputs / "raw")),
            *("--checkpoint-path", destination, "--prev-checkpoint", source or ""),
            *("--name", self.node, "--run-name", self.run_name, "--org", "o", "--project", "p", "--domain", "d"),
            *("--resolver", self.resolver, "mod", self.file.stem, "instance", self.task),
        ]

    def _error_document(self, content: bytes) -> Any:
        try:
            from flyteidl2.core.execution_pb2 import ErrorDocument
        except ImportError:  # before 2.0.12
            from flyteidl2.core.errors_pb2 import ErrorDocument

        return ErrorDocument.FromString(content)

    def _output(self, content: bytes) -> Any:
        from flyteidl2.task.common_pb2 import Outputs

        return Outputs.FromString(content).literals[0].value


class Migrated(Flyte2):
    """Runs a flytekit task on flyte, through flyte-migrate."""

    resolver = "flyte_migrate._resolver.MigrateTaskResolver"


def script(name: str) -> str:
    """Give the path of a console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def printed(
    command: list[str], folder: Path, kill_at: str | None = None, environment: Mapping[str, str] | None = None
) -> tuple[list[str], bool]:
    """Run a command; kill it once it prints a line that begins so. Gives its lines, and whether it was killed."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    lines: list[str] = []
    killed = False
    with subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if kill_at is not None and not killed and line.startswith(kill_at):
                process.kill()
                killed = True
    return lines, killed


def _integer(kind: Any, value: int) -> Any:
    literal = kind()
    literal.scalar.primitive.integer = value
    return literal
