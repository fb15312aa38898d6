"""Checkpoints that tell which one they are, in every file of them."""

from __future__ import annotations

import functools
import random

from tests.faults.peers import Attempt, Content

NOISE = random.Random(11).randbytes(9 << 20)
TEXT = b"".join(b"step %d loss %d\n" % (step, step * 7919 % 1000) for step in range(180_000))

_SIZES = {"small folder": (3000, 3000), "folder of 12 MB": (len(NOISE), len(TEXT))}

KINDS = ("bytes", *_SIZES)
"""The last takes more than one request to S3."""

LARGE_BYTES = "bytes of 12 MB"
"""A kind in which nothing but its content tells a mixture."""


def numbered(kind: str, number: int) -> Content:
    """Describe the checkpoint of a number; no file of it is like that of another number."""
    if kind == "bytes":
        return b"%d " % number + _turned(NOISE[:60_000], number)
    if kind == LARGE_BYTES:
        return b"%d " % number + _turned(NOISE, number) + _turned(TEXT, number)
    noise, text = _SIZES[kind]
    return {
        "log": ("file", b"%d " % number + _turned(TEXT[:text], number)),
        "model": ("file", b"%d " % number + _turned(NOISE[:noise], number)),
        "number": ("file", b"%d " % number),
    }


def number_of(content: Content) -> int | None:
    """Read the number out of what was loaded, `None` if it has none."""
    data = content if isinstance(content, bytes) else content.get("number", ("file", b""))[-1]
    digits = data.partition(b" ")[0] if isinstance(data, bytes) else b""
    return int(digits) if digits.isdigit() else None


@functools.cache
def large(size: int) -> Content:
    """Describe a folder with one file that does not compress."""
    return {"model": ("file", (NOISE * (size // len(NOISE) + 1))[:size])}


def save(attempt: Attempt, content: Content) -> None:
    """Save, by way of a folder where it is one; its files are written anew."""
    if isinstance(content, bytes):
        attempt.save_bytes(content)
        return
    for name, (_, data) in content.items():
        assert isinstance(data, bytes)
        (attempt.scratch / name).write_bytes(data)
    attempt.save_folder(attempt.scratch)


def _turned(content: bytes, number: int) -> bytes:
    start = number * 4099 % len(content)
    return content[start:] + content[:start]
