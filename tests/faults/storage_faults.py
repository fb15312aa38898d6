"""The same trial for this package and for those it replaces: saves and loads over a network that fails.

python -m tests.faults.storage_faults --rounds 100 --rate 0.05
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import s3fs

from tests import s3_server
from tests.conftest import Place, empty
from tests.faults import proxy
from tests.s3_server import S3Server
from tests.trees import Tree, look, make

OUTCOMES = ("right", "raised", "nothing", "wrong", "hung")
"""What a save and a load after it may come to; `nothing` is `None` although the save returned."""

# More than one part for whoever sends parts.
LARGE = 20 << 20
# A round has some twenty requests at most, each repeated a few times.
SECONDS_PER_ROUND = 60

Save = Callable[[str, "bytes | Path"], None]
Load = Callable[[str], "bytes | Path | None"]


def trial(
    server: S3Server, face: str, *, rounds: int, rate: float, seed: int = 0, kinds: Sequence[str] = proxy.QUICK
) -> Counter[str]:
    """Save and load many times, in a process of its own, with faults in between.

    Parameters
    ----------
    server
        The real server.
    face
        One of `FACES`.
    rounds
        How often; one byte, as a counter saves it, and a folder of 20 MB in turn, each at a URI that nothing else uses.
    rate, seed, kinds
        As for `proxy.serve`.

    Returns
    -------
    Counter
        How many rounds came to which of `OUTCOMES`, and under "faults" how many requests got one. After a round that
        hangs there are no more.
    """
    options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
    place = Place(f"s3://trial-{uuid.uuid4().hex[:8]}", options, server)
    s3fs.S3FileSystem(**options).mkdir(place.root)
    with contextlib.ExitStack() as emptied, proxy.serve(server.endpoint, rate=rate, seed=seed, kinds=kinds) as faulty:
        emptied.callback(empty, place)
        variables = {
            "FLYTE_AWS_ENDPOINT": faulty.endpoint,
            "FLYTE_AWS_ACCESS_KEY_ID": server.key,
            "FLYTE_AWS_SECRET_ACCESS_KEY": server.secret,
        }
        # Their clients are cached, with the endpoint that they began with.
        command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.faults.storage_faults"]
        process = subprocess.Popen(
            [*command, "--worker", face, "--root", place.root, "--rounds", str(rounds)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output, errors = process.communicate(timeout=SECONDS_PER_ROUND * rounds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return Counter([*_outcomes(output), "hung"]) + Counter(faults=len(faulty.history))
    outcomes = _outcomes(output)
    if len(outcomes) != rounds:
        message = f"{face} ended after {len(outcomes)} of {rounds} rounds:\n{errors[-3000:]}"
        raise RuntimeError(message)
    return Counter(outcomes) + Counter(faults=len(faulty.history))


def _outcomes(output: str) -> list[str]:
    # Whatever else the packages print.
    return [line.removeprefix("outcome ") for line in output.splitlines() if line.startswith("outcome ")]


# ---------------------------------------------------------------------------------------------------------------------
# The faces; what they need is imported where it is run
# ---------------------------------------------------------------------------------------------------------------------


def _flytekit() -> tuple[Save, Load]:
    from flytekit.core.checkpointer import SyncCheckpoint

    return _legacy(SyncCheckpoint)


def _legacy_face() -> tuple[Save, Load]:
    from flytekit_ckpt import SyncCheckpoint

    return _legacy(SyncCheckpoint)


def _flyte() -> tuple[Save, Load]:
    from flyte import Checkpoint

    return _new(Checkpoint)


def _new_face() -> tuple[Save, Load]:
    from flytekit_ckpt.v2 import Checkpoint

    return _new(Checkpoint)


def _legacy(kind: type) -> tuple[Save, Load]:
    def save(uri: str, data: bytes | Path) -> None:
        checkpoint = kind(uri)
        checkpoint.write(data) if isinstance(data, bytes) else checkpoint.save(data)

    def load(uri: str) -> bytes | Path | None:
        # It keeps the folder as long as it lives.
        load.checkpoint = kind(uri + "-next", uri)  # type: ignore[attr-defined]
        if uri.endswith("bytes"):
            return load.checkpoint.read()  # type: ignore[attr-defined]
        found = load.checkpoint.restore()  # type: ignore[attr-defined]
        return None if found is None else Path(found)

    return save, load


def _new(kind: type) -> tuple[Save, Load]:
    def save(uri: str, data: bytes | Path) -> None:
        kind(uri).save_sync(data)

    def load(uri: str) -> bytes | Path | None:
        load.checkpoint = kind(uri + "-next", uri)  # type: ignore[attr-defined]
        found = load.checkpoint.load_sync()  # type: ignore[attr-defined]
        return found.read_bytes() if found is not None and uri.endswith("bytes") else found

    return save, load


FACES = {
    "flytekit": _flytekit,
    "flyte": _flyte,
    "flytekit_ckpt.SyncCheckpoint": _legacy_face,
    "flytekit_ckpt.v2.Checkpoint": _new_face,
}


def _work(face: str, root: str, rounds: int) -> None:
    """Be the process that a trial starts."""
    save, load = FACES[face]()
    with tempfile.TemporaryDirectory() as scratch:
        tree: Tree = {"weights.bin": random.Random(0).randbytes(LARGE), "step": b"5", "log": b"line\n" * 100}
        folder = make(Path(scratch) / "state", tree)
        for number in range(rounds):
            is_bytes = number % 2 == 0
            uri = f"{root}/{number}-{'bytes' if is_bytes else 'folder'}"
            data = b"%d" % (number // 2 % 10) if is_bytes else folder
            sys.stdout.write(f"\noutcome {_outcome(save, load, uri, data)}\n")
            sys.stdout.flush()


def _outcome(save: Save, load: Load, uri: str, data: bytes | Path) -> str:
    try:
        save(uri, data)
        found = load(uri)
    except Exception as error:  # noqa: BLE001 - whatever it raises, the task learns of it
        sys.stderr.write(f"{uri}: {type(error).__name__}: {error}\n")
        return "raised"
    if found is None:
        return "nothing"
    if isinstance(data, Path) and isinstance(found, Path):
        return "right" if look(found, modes=False) == look(data, modes=False) else "wrong"
    return "right" if found == data else "wrong"


@click.command()
@click.option("--rounds", default=100, show_default=True)
@click.option("--rate", default=0.05, show_default=True, help="Share of the requests that get a fault.")
@click.option("--seed", default=0, show_default=True)
@click.option("--faces", default=",".join(FACES), show_default=True)
@click.option("--kinds", default=",".join(proxy.QUICK), show_default=True, help="Kinds of faults, in turn at random.")
@click.option("--worker", hidden=True)
@click.option("--root", default="", hidden=True)
def main(rounds: int, rate: float, seed: int, faces: str, kinds: str, worker: str | None, root: str) -> None:
    """Save and load over a network that fails: this package, flytekit and flyte in turn."""
    if worker is not None:
        _work(worker, root, rounds)
        return
    with tempfile.TemporaryDirectory() as folder, s3_server.serve(Path(folder)) as server:
        for face in faces.split(","):
            counts = trial(server, face, rounds=rounds, rate=rate, seed=seed, kinds=kinds.split(","))
            click.echo(json.dumps({"face": face, **{name: counts[name] for name in (*OUTCOMES, "faults")}}))


if __name__ == "__main__":
    main()
