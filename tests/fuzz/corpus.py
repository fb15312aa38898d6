"""The inputs that the fuzzer begins with, and what it has found: `python -m tests.fuzz.corpus` writes them anew."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import tarfile
from pathlib import Path

import numpy as np

from flytekit_ckpt import state
from tests.fuzz.check import Shape, ours
from tests.tars import END, file, folder, gzipped, hard_link, header, link, padded, pax

FOLDER = Path(__file__).with_name("corpus")
NOISE = random.Random(5).randbytes(1500)
TIME = {"mtime": "1700000000.123456789"}

TARS: dict[str, bytes] = {
    "files": pax(TIME) + file("a", NOISE) + file("b", b"") + file("c", b"x" * 513),
    "folders": folder("d", 0o700) + folder("d/e") + file("d/e/f") + folder("empty", 0),
    "links": file("a") + folder("d") + link("d/up", "../a") + link("l", "d") + link("loop", "loop"),
    "links-out": link("l", "../outside") + file("l/evil") + link("a", "/etc/passwd") + file("a"),
    "hard-links": file("a") + hard_link("h", "a") + file("h") + hard_link("out", "../canary"),
    "long-names": file("n" * 150) + link("l", "t" * 150) + file("d/" * 70 + "x"),
    "pax-names": pax({"path": "n" * 150, "linkpath": "ü"}) + file("x") + pax({"path": b"\xff"}) + file("y"),
    "pax-global": pax({"size": "2", "comment": "c"}, tarfile.XGLTYPE) + file("a") + pax({"path": "b"}) + file("x"),
    "sparse-0.0": pax({"GNU.sparse.size": "10", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "6",
                       "GNU.sparse.numbytes": "4"}) + file("s"),
    "sparse-0.1": pax({"GNU.sparse.map": "0,2,6,2", "GNU.sparse.size": "8", "GNU.sparse.name": "named"}) + file("s"),
    "sparse-1.0": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s",
                       "GNU.sparse.realsize": "10"}) + file("x", padded(b"1\n6\n4\n") + b"evil"),
    "sparse-old": header("s", b"S", 4, tail=bytes(121) + b"00000000006\x0000000000004\0" + bytes(73) + b"00000000012")
                  + padded(b"evil"),
    "duplicates": file("a", b"1") + file("a", b"2") + folder("d") + folder("d", 0o500) + link("l", "a") + file("l"),
    "numbers": header("a", size=b"\x80" + bytes(9) + b"\x02\x00", mtime=1 << 40, mode=0o7777) + NOISE[:512],
    "kinds": header("c", b"7", 4) + padded(b"evil") + header("o", b"\0", 4) + padded(b"evil") + header("f", b"6"),
    "wrapped-payload": pax({"flytekit_ckpt.payload": "1"}) + file("payload", bytes(600)),
    "part": pax({"flytekit_ckpt.part": "1"}) + file("_dst_cp"),
    "escapes": file("a/../../x") + file("/etc/x") + file(".."),
    "nothing": b"",
}  # fmt: skip

FOUND: dict[str, bytes] = {
    "negative-pax-size": pax({"size": "-5"}) + file("a"),
    "negative-size": file("a") + header("b", size=-1024),
    "negative-sparse-length": pax({"GNU.sparse.map": "0,-4,4,4", "GNU.sparse.size": "8"}) + file("a"),
    "negative-map-length": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"})
                           + file("x", padded(b"-1\n0\n-5\n")),
    "nul-in-a-name": pax({"path": "a\0b"}) + file("x"),
    "nul-in-a-link": pax({"linkpath": "a\0b"}) + link("x", "y"),
    "time-of-many-digits": pax({"mtime": "1e999000"}) + file("a"),
}  # fmt: skip

STATES: dict[str, object] = {
    "dict": {"at": 5, "epoch": [1, 2.5, None, True, "x"], "long": 1 << 70, "nan": float("nan")},
    "tuple": {1: (b"bytes", {"$odd": "key"}), "rng": random.Random(1).getstate()[1][:3]},
    "array": {"array": np.arange(6, dtype="<i4").reshape(2, 3).T, "scalar": np.float32(1.5), "text": np.str_("x")},
    "fields": {"array": np.zeros(2, dtype=[("a", "<f8"), ("b", "S3")])},
}


TOO_LARGE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}\n"
NESTED = b"-" * 7000 + b"1\n"


def inputs() -> dict[str, bytes]:
    """Make all inputs, by name."""
    made: dict[str, bytes] = {}
    for name, tar in TARS.items():
        made[f"our-{name}"] = shaped(Shape.OUR_TAR, tar + END[:1024])
    for name, tar in FOUND.items():
        made[f"found-{name}"] = shaped(Shape.PLAIN_TAR, tar + END[:1024])
    tar = TARS["files"] + TARS["links"] + END[:1024]
    objects = {
        "gzip": gzipped(tar),
        "gzip-named": b"\x1f\x8b\x08\x1c" + bytes(6) + b"\x02\0xx" + b"n\0comment\0" + gzip.compress(tar, mtime=0)[10:],
        "gzip-members": b"".join(gzip.compress(tar[at : at + 1024], mtime=0) for at in range(0, len(tar), 1024)),
        "bz2": bz2.compress(tar),
        "xz": lzma.compress(tar),
        "lzma": lzma.compress(tar, lzma.FORMAT_ALONE),
        "plain": tar,
        "ours": ours(tar),
        "ours-then-gzip": ours(tar[:4096]) + gzipped(tar[4096:]),
        "payload": b"42",
        "zeros": bytes(600),
        "zeros-compressed": gzip.compress(bytes(600), mtime=0),
        "gzip-cut-short": gzipped(tar)[:200],
    }  # fmt: skip
    made |= {f"object-{name}": shaped(Shape.OBJECT, content) for name, content in objects.items()}
    for which in range(6):
        changes = b"".join(
            struct.pack("<HBB", 300 * which + at, at, 1 + which) for at in range(3, 7 if which % 2 else 4)
        )
        made[f"damage-{which}"] = shaped(Shape.DAMAGE, bytes([which]) + changes)
    for name, value in STATES.items():
        text, *arrays = [b"".join(part.chunks()) for part in state.encode(value, "state", "state")]
        made[f"state-{name}"] = shaped(Shape.STATE, struct.pack("<H", len(text)) + text + b"".join(arrays[:1]))
    for name, description in (("large", TOO_LARGE), ("nested", NESTED)):
        array = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(description)) + description
        made[f"found-{name}-array"] = shaped(Shape.STATE, struct.pack("<H", 2) + b"{}" + array)
    return made


def shaped(shape: Shape, content: bytes) -> bytes:
    return bytes([shape]) + content


def write() -> None:
    """Write the inputs; others that lie beside them are left."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in inputs().items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    write()
