"""Medians, and what is read off them: the tables and the targets."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cases import CASES, LOCAL, S3
from peers import OURS, PEERS

QUANTITIES: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("Seconds", lambda value: f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"),
    "cpu": ("CPU seconds", lambda value: f"{value:.2f} s"),
    "memory": ("Peak memory above import", lambda value: f"{value / 1e6:.0f} MB"),
    "disk": ("Temporary disk", lambda value: f"{value / 1e6:.0f} MB"),
    "size": ("Stored", lambda value: f"{value / 1e6:.1f} MB"),
}
PACKAGES = (OURS, "flytekit", "flyte", "fsspec", "s3fs", "aiobotocore", "obstore", "isal", "numpy")
LOAD_THEIRS = "load flyte's object"
IMPORT = "import"

Key = tuple[str, str, str]
"""A case, a place and an action."""


@dataclass
class Results:
    """Every measurement as a record: its case, place, action, peer and round, and the quantities."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, key: Key, peer: str, number: int, **quantities: float | None) -> None:
        case, place, action = key
        rounded = {name: value if value is None else round(value, 6) for name, value in quantities.items()}
        self.records.append({"case": case, "place": place, "action": action, "peer": peer, "round": number, **rounded})

    def rows(self) -> list[Key]:
        return list(dict.fromkeys((record["case"], record["place"], record["action"]) for record in self.records))

    def median(self, quantity: str, key: Key, peer: str) -> float | None:
        """Give a peer's median; `None` if it was not measured."""
        if peer == "flyte" and key[0] == "change" and key[2] == "save again":
            key = ("default", key[1], "save")
        if peer == "flyte" and key[2] == LOAD_THEIRS:
            key = (*key[:2], "load")
        values = [
            record[quantity]
            for record in self.records
            if (record["case"], record["place"], record["action"]) == key
            and record["peer"] == peer
            and record.get(quantity) is not None
        ]
        return statistics.median(values) if values else None

    def ratio(self, quantity: str, key: Key, peer: str) -> float | None:
        """Give how many times as much as us a peer takes."""
        ours, theirs = self.median(quantity, key, OURS), self.median(quantity, key, peer)
        return theirs / ours if ours and theirs is not None else None

    def medians(self) -> list[dict[str, Any]]:
        return [
            {"case": key[0], "place": key[1], "action": key[2], "peer": peer, **found}
            for key in self.rows()
            for peer in dict.fromkeys(record["peer"] for record in self.records)
            if (found := {name: value for name in QUANTITIES if (value := self.median(name, key, peer)) is not None})
        ]


@dataclass(frozen=True)
class Target:
    """What is aimed at, what was measured in its words, and whether that is enough; `None` if it was not measured."""

    text: str
    measured: str
    reached: bool | None


def targets(results: Results) -> list[Target]:
    return list(_targets(results))


def _targets(results: Results) -> Iterator[Target]:
    local, s3 = ("default", LOCAL), ("default", S3)
    for action in ("save", "load"):
        yield _at_most(results, (*local, action), "tar", 1.1)
        yield _faster(results, (*local, action), "flyte", 4)
    yield _faster(results, (*local, LOAD_THEIRS), "flyte", 2)
    yield _faster(results, (*s3, "save"), "flytekit", 2.2)
    yield _faster(results, (*s3, "load"), "flytekit", 3.5)
    yield _faster(results, (*s3, "load"), "flyte", 4)
    yield _at_most(results, ("small", LOCAL, "save"), "tar", 2.5)
    yield _at_most(results, ("small", LOCAL, "load"), "tar", 1.6)
    yield _faster(results, ("small", LOCAL, "load"), "flytekit", 1)
    yield _faster(results, ("few", S3, "write"), "flyte", 1)
    yield _faster(results, ("few", S3, "read"), "flyte", 1)
    yield _at_most(results, ("large", LOCAL, "save"), "tar", 1.3)
    yield _at_most(results, (*local, "save"), "flyte", 1.15, "size")
    ours = [record for record in results.records if record["peer"] == OURS]
    yield _megabytes("peak memory above import, any case", [record.get("memory") for record in ours], 300)
    # A file that is still being written may hold a few blocks more than when it is done.
    for action in ("save", "load"):
        actions = ("load", LOAD_THEIRS) if action == "load" else (action,)
        used = [record.get("disk") for record in ours if record["action"] in actions]
        beyond = " beyond what is restored" if action == "load" else ""
        yield _megabytes(f"temporary disk for a {action}{beyond}, any case (none)", used, 1)
    seconds = results.median("seconds", (IMPORT, "", IMPORT), OURS)
    text = "import, above that of nothing: at most 60 ms"
    yield _target(text, seconds, lambda value: f"{value * 1000:.0f} ms", lambda value: value <= 0.06)


def _faster(results: Results, key: Key, peer: str, factor: float) -> Target:
    text = f"{_label(key)}: at least {factor:g} times as fast as {peer}"
    return _target(text, results.ratio("seconds", key, peer), "{:.2f}x".format, lambda value: value >= factor)


def _at_most(results: Results, key: Key, peer: str, factor: float, quantity: str = "seconds") -> Target:
    theirs = results.ratio(quantity, key, peer)
    what = {"seconds": "the time", "size": "the stored size"}[quantity]
    text = f"{_label(key)}: at most {factor:g} times {what} of {peer}"
    return _target(text, 1 / theirs if theirs else None, "{:.2f}x".format, lambda value: value <= factor)


def _megabytes(text: str, values: list[float | None], limit: int) -> Target:
    # The worst of all rounds, not a median: one that does not fit ends a task.
    worst = max((value for value in values if value is not None), default=None)
    return _target(
        f"{text}: at most {limit} MB", worst, lambda value: f"{value / 1e6:.1f} MB", lambda value: value <= limit * 1e6
    )


def _target(
    text: str, value: float | None, form: Callable[[float], str], is_reached: Callable[[float], bool]
) -> Target:
    return Target(text, "-", None) if value is None else Target(text, form(value), is_reached(value))


def _label(key: Key) -> str:
    case, place, action = key
    return ", ".join(filter(None, [action, CASES[case].title if case in CASES else "", place]))


def tables(results: Results) -> str:
    """Give a markdown table for each quantity; in brackets, how many times as much as us a peer takes."""
    peers = [peer for peer in PEERS if any(record["peer"] == peer for record in results.records)]
    lines = []
    for quantity, (title, form) in QUANTITIES.items():
        lines += ["", f"| {title} | {' | '.join(peers)} |", "|---" * (len(peers) + 1) + "|"]
        for key in results.rows():
            cells = []
            for peer in peers:
                value, ratio = results.median(quantity, key, peer), results.ratio(quantity, key, peer)
                with_ratio = peer != OURS and ratio is not None and quantity in ("seconds", "cpu", "size")
                cells.append("-" if value is None else form(value) + (f" ({ratio:.3g}x)" if with_ratio else ""))
            if any(cell != "-" for cell in cells):
                lines.append(f"| {_label(key)} | {' | '.join(cells)} |")
    cases = dict.fromkeys(case for case, _, _ in results.rows())
    notes = [f"- {CASES[case].title}: {CASES[case].note}" for case in cases if case in CASES and CASES[case].note]
    return "\n".join([*lines, "", *notes])


def target_table(found: list[Target]) -> str:
    words = {True: "reached", False: "**not reached**", None: "not measured"}
    rows = [f"| {target.text} | {target.measured} | {words[target.reached]} |" for target in found]
    return "\n".join(["| Target | Measured | |", "|---|---|---|", *rows])


def machine(folder: Path, server: str) -> dict[str, Any]:
    """Tell what the numbers depend on."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory": memory[0] if memory else None,
        "system": platform.platform(),
        "file_system": subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip(),
        "python": platform.python_version(),
        "tar": subprocess.check_output(["tar", "--version"], text=True).splitlines()[0],
        "s3_server": server,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
