"""Checkpoints that are damaged where they are stored: bits flipped, ends missing."""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Place
from tests.faults.objects import Part, parts
from tests.faults.outcomes import Outcome, Outcomes, judged, one_of
from tests.faults.peers import Attempt, Content, Flyte, Flytekit, look
from tests.faults.trials import Trial, UnsuitedError
from tests.trees import Tree, make

_RANDOM = random.Random(5)
NOISE = _RANDOM.randbytes(200_000)
TEXT = b"".join(b"step %d loss %d\n" % (step, step * 7919 % 1000) for step in range(150_000))

CONTENTS: dict[str, bytes | Tree] = {
    "small folder": {"model": NOISE[:40], "state": None, "state/step": b"12"},
    # More than one of our gzip members, some of them stored.
    "folder": {"model": NOISE, "log": TEXT, "state": None, "state/step": b"12", "zeros": bytes(100_000)},
    "small bytes": b"epoch 3, step 12",
    "bytes": NOISE,
}


@dataclass(frozen=True)
class Damage:
    """A flipped bit, or the number of bytes that are left.

    Attributes
    ----------
    kind : str
        "flip" or "truncation".
    position : int
        Bits, or bytes, from the beginning.
    """

    kind: str
    position: int

    def done_to(self, content: bytes) -> bytes:
        if self.kind == "truncation":
            return content[: self.position]
        byte, bit = divmod(self.position, 8)
        return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]


def flips(size: int, count: int, seed: int, *, edge: int) -> Iterator[Damage]:
    """Flip every bit of the first and the last bytes, and `count` of the others; every one if these are few."""
    return _damages("flip", size * 8, count, seed, edge * 8)


def truncations(size: int, count: int, seed: int, *, edge: int) -> Iterator[Damage]:
    """Cut at every place near the ends that leaves a byte, and at `count` others; at every one if these are few."""
    # An object of which nothing is left is an empty one, and those are no checkpoint.
    return (damage for damage in _damages("truncation", size, count, seed, edge) if damage.position)


def _damages(kind: str, size: int, count: int, seed: int, edge: int) -> Iterator[Damage]:
    edges = {*range(min(edge, size)), *range(max(0, size - edge), size)}
    chosen = random.Random(seed).sample(range(size), min(count, size))
    return (Damage(kind, position) for position in sorted({*edges, *chosen}))


def _save(attempt: Attempt, content: bytes | Tree) -> None:
    with contextlib.closing(attempt), tempfile.TemporaryDirectory() as scratch:
        if isinstance(content, bytes):
            attempt.save_bytes(content)
        else:
            attempt.save_folder(make(Path(scratch) / "folder", content))


class Victim:
    """A checkpoint to damage again and again.

    Parameters
    ----------
    place : Place
        Where it is kept.
    writer : type of Attempt
        Who saves it.
    content : bytes or Tree
        What it holds.
    """

    def __init__(self, place: Place, writer: type[Attempt], content: bytes | Tree) -> None:
        self._uri = place.uri()
        _save(writer(self._uri), content)
        self._parts: list[tuple[Part, bytes]] = [(part, part.read()) for part in parts(place, self._uri)]
        self._kind = bytes if isinstance(content, bytes) else dict
        self._saved: Content
        if isinstance(content, bytes):
            self._saved = content
        else:
            with tempfile.TemporaryDirectory() as scratch:
                self._saved = look(make(Path(scratch) / "folder", content))
        self.size = sum(len(stored) for _, stored in self._parts)

    def outcomes(self, reader: type[Attempt], damages: Iterable[Damage]) -> Iterator[tuple[Damage, Outcome]]:
        """Do one damage after the other, each to the whole checkpoint, and load it."""
        for damage in damages:
            part, stored, within = self._located(damage)
            part.overwrite(within.done_to(stored))
            try:
                yield damage, judged(reader("", self._uri), self._kind, one_of([self._saved]))
            finally:
                part.overwrite(stored)

    def _located(self, damage: Damage) -> tuple[Part, bytes, Damage]:
        """Find the file that a position falls into, where there are several."""
        unit = 8 if damage.kind == "flip" else 1
        position = damage.position
        for part, stored in self._parts:
            if position < len(stored) * unit:
                return part, stored, Damage(damage.kind, position)
            position -= len(stored) * unit
        raise IndexError(damage)


def damaged(
    name: str, by_flyte: bool, peer: type[Attempt], place: Place, rounds: int, seed: int, *, edge: int | None = None
) -> dict[str, Outcomes]:
    """Damage what a checkpointer saved itself, or what flyte saved."""
    if by_flyte and issubclass(peer, (Flyte, Flytekit)):
        message = "flyte's own archives are its own, and flytekit reads none"
        raise UnsuitedError(message)
    victim = Victim(place, Flyte if by_flyte else peer, CONTENTS[name])
    if edge is None:
        # Each damage to an object on S3 is a request of its own.
        edge, rounds = (64, rounds) if place.is_local else (3, rounds // 20)
    found = {}
    for kind, damages in (("bits flipped", flips), ("truncated", truncations)):
        made = damages(victim.size, rounds, seed, edge=edge)
        if by_flyte:
            # Of the one byte that every gzip file begins with, nobody can tell that it was more: it may be a counter.
            made = (damage for damage in made if damage != Damage("truncation", 1))
        outcomes = (outcome for _, outcome in victim.outcomes(peer, made))
        found[f", {kind}"] = Outcomes(outcomes)
    return found


TRIALS = [
    Trial(f"{name} of {'flyte' if by_flyte else 'its own'}", functools.partial(damaged, name, by_flyte))
    for by_flyte in (False, True)
    for name in CONTENTS
]
