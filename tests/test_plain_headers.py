"""Headers read directly: of any archive, exactly what tarfile reads of it, and what it refuses."""

from __future__ import annotations

import io
import itertools
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import archive
from flytekit_ckpt.archive import plain_headers, reading
from flytekit_ckpt.folders import scan_folder
from tests import tars
from tests.fuzz.check import with_checksums
from tests.trees import make

T = TypeVar("T")

ATTRIBUTES = [name for name in tarfile.TarInfo.__slots__ if name not in ("tarfile", "_tarfile", "_link_target")]

thoroughly = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def outcome(content: bytes, size: int) -> list[object]:
    """Everything that reading an archive, which comes in chunks of a size, gives, and the error that ends it."""
    chunks = (content[start : start + size] for start in range(0, len(content), size))
    seen: list[object] = []
    try:
        for entry in archive.read(chunks):
            # A number as it was read, also one that equals nothing.
            seen.append({name: repr(getattr(entry.info, name, None)) for name in ATTRIBUTES})
            # A file may claim to have a hole larger than any disk.
            seen.append(b"".join(itertools.islice(entry.chunks(), 3)))
    except Exception as error:  # noqa: BLE001 - whatever it is
        seen.append((type(error), str(error)))
    return seen


def strictly(content: bytes, size: int) -> list[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_plain", lambda *_: None)
        return outcome(content, size)


read_by: Counter[str] = Counter()


def check(content: bytes, size: int) -> None:
    """Compare the two readers; keep count of who has read how many headers."""
    with pytest.MonkeyPatch.context() as patch:

        def counted(data: memoryview, position: int) -> tarfile.TarInfo | None:
            info = plain_headers.read_plain(data, position)
            read_by["tarfile" if info is None else "this package"] += 1
            return info

        patch.setattr(reading, "read_plain", counted)
        found = outcome(content, size)
    assert found == strictly(content, size)


sizes = st.sampled_from([1 << 20, 1 << 20, 1 << 20, 10_000, 1536, 512, 77])

WORDS = ["a", "b", "a/b", "a//b", "./a", "a/", "/", "/a", "../a", ".", "", "ü", "\udcff", "a\0b", "n" * 100, "n" * 101,
         "d/" * 60 + "n", "d" * 155 + "/" + "n" * 99, " a ", "é" * 60, "12 hdrcharset=BINARY\n"]  # fmt: skip
usual = st.sampled_from(["a", "b", "a/b", "c", "a//c", "./a", "d/", "n" * 60])
names = usual | usual | st.sampled_from(WORDS) | st.text(st.characters(max_codepoint=300), max_size=8)
texts = names | st.sampled_from(["0", "1", "-1", "1.5", "1e400", "nan", "x", "", "1_0", " 7 ", "BINARY", "0,4",
                                 "3,1,0,2", "=", "a=b", "1\n2", "5 x=\n", "512", "1700000000.123456789"])  # fmt: skip
KEYS = ["path", "linkpath", "mtime", "atime", "ctime", "size", "uid", "gid", "uname", "gname", "hdrcharset", "comment",
        "flytekit_ckpt.part", "flytekit_ckpt.payload", "flytekit_ckpt.ü", "flytekit_ckpt", "mtimes", "SCHILY.dev",
        "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.name", "GNU.sparse.major", "GNU.sparse.minor",
        "GNU.sparse.realsize", "GNU.sparse.numblocks", "GNU.sparse.offset", "GNU.sparse.numbytes"]  # fmt: skip
plain_records = st.dictionaries(st.sampled_from(KEYS[:5] + KEYS[12:14]), texts, max_size=3)
records = plain_records | st.dictionaries(st.sampled_from(KEYS), texts, max_size=3)
numbers = st.sampled_from([0, 0, 1, 7, 8, 511, 0o7777, 0o7777777, 1 << 21, 1 << 33, 1 << 40, -1, -512, 1.5])
kinds = st.sampled_from([bytes([code]) for code in b"000552210\x0034567SLKxgXDVZ"])
contents = st.sampled_from([b"", b"1", b"x" * 511, b"x" * 512, b"x" * 513]) | st.binary(max_size=40)


def seldom(usual: st.SearchStrategy[T], odd: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    return st.integers(0, 7).flatmap(lambda number: usual if number else odd)


@st.composite
def made_by_tarfile(draw: st.DrawFn) -> bytes:
    """An archive of any entries, in any format, by Python's tarfile."""
    out = io.BytesIO()
    format_ = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
    globals_ = draw(records) if format_ == tarfile.PAX_FORMAT and draw(st.integers(0, 9)) == 0 else None
    try:
        tar = tarfile.TarFile(fileobj=out, mode="w", format=format_, pax_headers=globals_)
    except (ValueError, UnicodeError):
        return b""
    for _ in range(draw(st.integers(1, 5))):
        info = tarfile.TarInfo(draw(names))
        content = draw(contents)
        info.type = draw(seldom(st.sampled_from([b"0", b"0", b"5", b"2"]), kinds))
        info.size = len(content) if info.isreg() else draw(seldom(st.just(0), st.sampled_from([1, 600])))
        info.linkname = draw(st.just("") | names)
        for attribute in draw(st.lists(st.sampled_from(["mode", "uid", "gid", "mtime", "devmajor", "devminor"]))):
            setattr(info, attribute, draw(numbers))
        info.uname, info.gname = draw(st.sampled_from([("", ""), ("root", "wheel"), ("ü", "\udcff")]))
        info.pax_headers = draw(seldom(plain_records, records))
        try:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
        except (ValueError, UnicodeError, TypeError, OverflowError):
            continue
    tar.close()
    return out.getvalue()


@st.composite
def made_of_blocks(draw: st.DrawFn) -> bytes:
    """An archive with what tarfile does not write, most of it whole."""
    # The first header comes with its chunk, and is left to tarfile.
    parts = [tars.file("first")]
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            kind = draw(st.sampled_from([tarfile.XHDTYPE] * 4 + [tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE]))
            parts.append(tars.pax(draw(seldom(plain_records, records)), kind))
        content = draw(contents)
        kind = draw(seldom(st.sampled_from([b"0", b"0", b"5", b"2"]), kinds))
        content = content if kind == b"0" else b""
        odd_sizes = st.sampled_from([0, 1, -1, 1 << 34, b"        12 ", b"00000000008\0"])
        size = draw(seldom(st.just(len(content)), odd_sizes))
        mode, mtime = draw(st.sampled_from([0o644, 0o100644])), draw(st.sampled_from([0, 1 << 30, 1 << 40, -5]))
        tail = draw(st.sampled_from([b"", b"root\0", b"\xff", bytes(64) + b"0000008\0", bytes(80) + b"prefix"]))
        block = tars.header(draw(names), kind, size, draw(st.just("") | names), mode=mode, mtime=mtime, tail=tail)
        parts.append(block + tars.padded(content))
    return b"".join(parts) + draw(seldom(st.just(tars.END), st.just(b"")))


archives = made_by_tarfile() | made_of_blocks()


@thoroughly
@given(archives, sizes)
def test_an_archive_reads_as_tarfile_reads_it(content: bytes, size: int) -> None:
    check(content, size)


@thoroughly
@given(
    archives.filter(bool),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4),
    st.booleans(),
    sizes,
)
def test_a_damaged_archive_reads_as_tarfile_reads_it(
    content: bytes, changes: list[tuple[int, int]], are_summed: bool, size: int
) -> None:
    damaged = bytearray(content)
    for place, bits in changes:
        damaged[place % min(len(damaged), 4096)] ^= bits
    # With the right checksums, so that what is in the blocks is looked at.
    check(with_checksums(bytes(damaged)) if are_summed else bytes(damaged), size)


RECORDS = [
    b"", b"11 mtime=1\n", b"10 path=p/\n", b"12 linkpath=", b"8 uid=1\n", b"9 size=2\n", b"21 GNU.sparse.map=0,1\n",
    tars.record("flytekit_ckpt.part", "ü"), tars.record("flytekit_ckpt.\xff", "x"), tars.record("path", "x" * 5000),
    tars.record("mtime", "nan"), tars.record("mtime", "x"), tars.record("mtime", "1_0"), tars.record("path", ""),
    tars.record("atime", "1 hdrcharset=BINARY\n"), tars.record("comment", "c"), tars.record("path", "a=b"),
    b"0 mtime=1\n", b"011 mtime=1\n", b"11 mtime=1x", b"12 mtime=1\n", b"10 mtime=1\n", b"mtime=1\n", b"\0", b"\n",
    b"000011 mtime=1\n", b"0000011mtime=1\n", b"000015xmtime=1\n", tars.record("path", "/"),
    b"8 mtime\n", b"4 =\n", b"5 x=\n", b"99999 path=a\n",
    b"10 path=\xff\n", b"11 path=\xc3\xbc\n", b"11  path=a\n", b"+9 path=a\n", b"10 \xff\xff\xff\xff=a\n",
]  # fmt: skip


def test_pax_records_read_as_tarfile_reads_them() -> None:
    for one, other in itertools.product(RECORDS, RECORDS):
        content = one + other
        # The header may say that there are fewer bytes than there are, or more.
        for size in {len(content), len(one), len(content) - 1, len(content) + 1} - {-1}:
            length = size + -size % 512
            header = tars.header("pax", tarfile.XHDTYPE, size) + content.ljust(length, b"\0")[:length]
            check(tars.file("first") + header + tars.file("a", mtime=7) + tars.file("b") + tars.END, 1 << 20)


@pytest.mark.parametrize("kind", [b"0", b"5", b"2", b"x"])
def test_any_byte_of_a_header_reads_as_tarfile_reads_it(kind: bytes) -> None:
    header = tars.header("name", kind, 11 if kind == b"x" else 0, "link" if kind == b"2" else "")
    rest = (tars.padded(b"11 mtime=1\n") if kind == b"x" else b"") + tars.file("a") + tars.END
    for place, value in itertools.product(range(tars.BLOCK), (0, ord("1"), ord("8"), 255)):
        changed = bytearray(header)
        changed[257:265] = b"ustar\x0000"
        changed[place] = value
        check(tars.file("first") + with_checksums(bytes(changed)) + rest, 1 << 20)


# Its bytes add up to more than 65521, which Adler-32 is modulo of.
HIGH = tars.header(b"\xff" * 100, link=b"\xff" * 100, tail=b"\xff" * 64)

ODD = {
    "the root": tars.folder("/"),
    "two PAX headers": tars.pax({"mtime": "1"}) + tars.pax({"mtime": "2"}),
    "two PAX headers, one empty": tars.pax({"mtime": "1"}) + tars.header("pax", tarfile.XHDTYPE),
    "an empty PAX header": tars.header("pax", tarfile.XHDTYPE),
    "a folder with content": tars.header("d", tarfile.DIRTYPE, 4) + tars.padded(b"evil"),
    "no more than half a header": tars.file("b")[:300],
    "a name that is not ASCII": tars.file("ü" * 50),
    "a checksum that is right": HIGH,
    "a checksum that is less by 65521": HIGH[:148] + b"%06o\0 " % (int(HIGH[148:154], 8) - 65521) + HIGH[156:],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_headers_read_as_tarfile_reads_them(name: str) -> None:
    check(tars.file("first") + ODD[name] + tars.file("a") + tars.END, 1 << 20)


@pytest.mark.parametrize("count", [1, 46, 47, 60])
def test_large_headers_read_as_tarfile_reads_them(count: int) -> None:
    headers = tars.pax({f"flytekit_ckpt.{number}": "x" * 90_000 for number in range(count)})
    check(tars.file("first") + headers + tars.file("a") + tars.END, 1 << 24)


def test_global_headers_hold_for_all_that_follow() -> None:
    globals_ = tars.pax({"path": "b", "mtime": "5"}, tarfile.XGLTYPE)
    content = tars.file("a") + tars.file("c") + globals_ + tars.file("d") + tars.file("e") + tars.END
    check(content, 1 << 20)
    assert [entry.name for entry in archive.read([content])] == ["a", "c", "b", "b"]


def test_most_headers_of_those_archives_were_plain() -> None:
    """The tests above would prove nothing about headers that are all left to tarfile."""
    read_by.clear()
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            for name in ("a", "b", "ü" * 20, "c"):
                info = tarfile.TarInfo(name)
                info.uname, info.mtime = "root", 1.5 if kind == tarfile.PAX_FORMAT else 1
                tar.addfile(info)
        check(out.getvalue(), 1 << 20)
    # The first header, which comes with its chunk, and the end.
    assert read_by == {"tarfile": 3 * 2, "this package": 3 * 3}


def test_what_this_package_writes_is_read_without_tarfile() -> None:
    with tempfile.TemporaryDirectory() as name:
        source = make(Path(name), {"a": b"1", "b": b"2", "c": None, "c/d": b"", "c/link": "d", "long" * 40: b"3"})
        packed = b"".join(chunk for chunk in archive.pack(scan_folder(source)) if isinstance(chunk, bytes))
    read_by.clear()
    check(packed, 1 << 20)
    # The first one of the one member, and the end, which is a member of its own.
    assert read_by == {"tarfile": 2, "this package": 5}
