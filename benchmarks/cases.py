"""What is compared: which data, by whom, where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import data
from peers import OURS

LOCAL, S3 = "local", "S3"
EVERYONE = {LOCAL: (OURS, "flytekit", "flyte", "tar"), S3: (OURS, "flytekit", "flyte", "s3fs")}


@dataclass(frozen=True)
class Case:
    """One kind of data, or one kind of work.

    Attributes
    ----------
    title
        For the tables.
    make
        Makes the data in a folder that does not exist, at a scale; `None` if there is none.
    peers
        Who takes part, by place.
    actions
        What each of them does, in this order; a load takes what the save before it stored.
    most_rounds
        Stop after so many.
    note
        What the tables must say about it.
    """

    title: str
    make: Callable[[Path, float], None] | None
    peers: dict[str, tuple[str, ...]] = field(default_factory=lambda: EVERYONE)
    actions: tuple[str, ...] = ("save", "load")
    most_rounds: int = 1000
    note: str = ""


# The large one is last: for a while, its remains may slow the server.
CASES = {
    "few": Case(
        "100 bytes",
        None,
        {S3: (OURS, "flytekit", "flyte", "s3fs")},
        ("few bytes",),
        note="medians of 200 repetitions in one process, with flytekit's API; a new checkpoint instance for each read.",
    ),
    "default": Case("281 MB folder", data.make_default),
    "small": Case(
        "10,000 small files",
        data.make_small,
        most_rounds=1,
        note="there is one round: object by object, flytekit and s3fs take minutes on S3.",
    ),
    "random": Case("281 MB, incompressible", data.make_random),
    "zeros": Case("281 MB of zeros", data.make_zeros),
    "change": Case(
        "2 % change",
        data.make_change,
        {LOCAL: (OURS, "flytekit"), S3: (OURS, "flytekit")},
        ("add a part", "save again"),
        note="the default folder is saved with flytekit's API, and then, by the same instance, a second folder of 2 % "
        "of its size; or that folder again, after 2 % of it has changed. flyte saves everything anew: its time is that "
        "of its first save. Temporary disk counts the old object, which stays until the new one is whole.",
    ),
    "large": Case(
        "one 4 GiB file",
        data.make_large,
        {LOCAL: (OURS, "tar"), S3: (OURS, "s3fs")},
        most_rounds=1,
        note="flyte and flytekit are left out, and there is one round, to keep the benchmark short.",
    ),
}

IMPORTS = {
    OURS: "import flytekit_ckpt",
    f"{OURS}, Checkpoint": "from flytekit_ckpt.v2 import Checkpoint",
    "flytekit": "from flytekit.core.checkpointer import SyncCheckpoint",
    "flyte": "from flyte import Checkpoint",
}
