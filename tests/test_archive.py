"""The archive: what any tar reads, what any tar wrote, and nothing else."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import struct
import subprocess
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import archive
from flytekit_ckpt.archive import Kind
from flytekit_ckpt.entries import scan_folder, unpack
from flytekit_ckpt.errors import CorruptCheckpointError
from tests.trees import Tree, look, make, trees

modestly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

FORMATS = {"gz": tarfile.PAX_FORMAT, "bz2": tarfile.GNU_FORMAT, "xz": tarfile.PAX_FORMAT, "": tarfile.USTAR_FORMAT}


def ours(folder: Path) -> bytes:
    return b"".join(archive.pack(scan_folder(folder)))


def theirs(folder: Path, compression: str = "gz", format_: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}", format=format_) as tar:  # type: ignore[call-overload]
        for child in sorted(folder.iterdir()):
            tar.add(child, child.name)
    return out.getvalue()


def entries(content: bytes, chunk_size: int = 1 << 16) -> list[tuple[object, ...]]:
    """Everything that reading an archive gives."""
    chunks = (content[start : start + chunk_size] for start in range(0, len(content), chunk_size))
    return [
        (
            e.name,
            e.info.type,
            e.info.mode,
            e.info.pax_headers.get("mtime", e.info.mtime),
            e.info.linkname,
            b"".join(e.chunks()),
        )
        for e in archive.read(chunks)
    ]


def kind(content: bytes) -> Kind:
    return archive.recognise([content])[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "source"
    noise = random.Random(1).randbytes(30_000)
    return make(path, {"a": noise, "b": b"x" * 20_000, "c": None, "c/d": b"", "c/link": "d", "long" * 40: b"1"})


@modestly
@given(trees())
def test_what_is_packed_other_programs_unpack(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, pythons, systems = (Path(name) / part for part in ("source", "python", "system"))
        make(source, tree)
        content = ours(source)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(pythons, filter="fully_trusted")
        systems.mkdir()
        subprocess.run(["tar", "xzf", "-", "-C", systems], input=content, check=True, stderr=subprocess.DEVNULL)
        assert look(pythons) == look(systems) == look(source)


def test_every_member_states_its_length_inflates_alone_and_is_small(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"a": random.Random(2).randbytes(9_000_000), "b": bytes(5_000_000)})
    content = ours(source)
    stream, start, members = b"", 0, 0
    while start < len(content):
        assert content[start : start + 4] == b"\x1f\x8b\x08\x04"
        length = struct.unpack_from("<I", content, start + 16)[0]
        member = gzip.decompress(content[start : start + length])
        assert len(member) <= archive.MEMBER_SIZE + tarfile.RECORDSIZE
        stream += member
        start += length
        members += 1
    assert start == len(content)
    assert members == 4
    assert stream == gzip.decompress(content)


@pytest.mark.parametrize("compression", FORMATS)
def test_archives_of_any_compression_and_format_read_alike(compression: str, folder: Path) -> None:
    short = [entry for entry in entries(ours(folder)) if len(str(entry[0])) < 100]
    found = entries(theirs(folder, compression, FORMATS[compression]) if compression else plain(folder), chunk_size=777)
    assert [(e[0], e[1], e[2], e[4], e[5]) for e in found if len(str(e[0])) < 100] == [
        (e[0], e[1], e[2], e[4], e[5]) for e in short
    ]


def plain(folder: Path) -> bytes:
    return zlib.decompress(theirs(folder), wbits=31)


@modestly
@given(st.integers(1, 5000))
def test_chunks_may_be_cut_anywhere(folder: Path, size: int) -> None:
    content = ours(folder)
    assert entries(content, size) == entries(content)
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    found, again = archive.recognise(pieces)
    assert found is Kind.ARCHIVE
    assert b"".join(again) == content


@pytest.mark.parametrize("pack", [ours, theirs])
def test_every_truncation_is_an_error(pack: object, folder: Path) -> None:
    content = pack(folder)  # type: ignore[operator]

    @settings(modestly, max_examples=300)
    @given(st.integers(2, len(content) - 1))
    @example(2)
    @example(len(content) - 1)
    def check(length: int) -> None:
        assert kind(content[:length]) in (Kind.ARCHIVE, Kind.BROKEN_GZIP)
        with pytest.raises(CorruptCheckpointError):
            entries(content[:length])

    check()


@pytest.mark.parametrize("pack", [ours, theirs])
def test_a_flipped_bit_is_an_error_or_changes_nothing(pack: object, folder: Path) -> None:
    content = pack(folder)  # type: ignore[operator]
    wanted = entries(content)
    harmless = 0

    @settings(modestly, max_examples=600)
    @given(st.integers(0, 8 * len(content) - 1))
    def check(bit: int) -> None:
        nonlocal harmless
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        if kind(bytes(flipped)) is Kind.OTHER:
            # In the first bytes: an archive no longer looks like one.
            assert bit // 8 < 600
            return
        try:
            found = entries(bytes(flipped))
        except CorruptCheckpointError:
            return
        assert found == wanted
        harmless += 1

    check()
    assert harmless < 100


def test_what_follows_a_damaged_header_of_a_plain_tar_is_not_dropped(folder: Path) -> None:
    content = bytearray(plain(folder))
    # The second entry's header: tarfile takes the damage for the archive's end.
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        header = tar.getmember("b").offset_data - tarfile.BLOCKSIZE
    content[header + 100] ^= 1
    with pytest.raises(CorruptCheckpointError, match="header"):
        entries(bytes(content))


def test_an_archive_without_an_end_is_an_error(folder: Path) -> None:
    content = plain(folder)
    with pytest.raises(CorruptCheckpointError):
        entries(content.rstrip(b"\0"))
    with pytest.raises(CorruptCheckpointError):
        entries(gzip.compress(content[: -tarfile.RECORDSIZE]))


@settings(modestly, max_examples=300)
@given(
    st.binary(max_size=700)
    | st.integers(0, 1500).map(bytes)
    | st.binary(max_size=600).map(gzip.compress)
    | st.integers(0, 1500).map(bytes).map(gzip.compress)
)
def test_what_looks_like_an_archive_is_what_tarfile_opens(content: bytes) -> None:
    try:
        is_tar = tarfile.is_tarfile(io.BytesIO(content))
    except EOFError:
        assert kind(content) is Kind.BROKEN_GZIP
        return
    assert is_tar == (kind(content) in (Kind.ARCHIVE, Kind.ZEROS, Kind.COMPRESSED_ZEROS))
    assert (kind(content) is Kind.EMPTY) == (not content)


@pytest.mark.parametrize("compression", FORMATS)
@pytest.mark.parametrize("first_chunk", [1, 5, 600, 10_000_000])
def test_an_archive_is_recognised_from_chunks_of_any_size(compression: str, first_chunk: int, folder: Path) -> None:
    content = theirs(folder, compression) if compression else plain(folder)
    found, again = archive.recognise(iter([content[:first_chunk], content[first_chunk:]]))
    assert found is Kind.ARCHIVE
    assert b"".join(again) == content


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"big": b""})
    with (source / "big").open("r+b") as file:
        file.truncate(200_000_000)
    target = tmp_path / "target"
    target.mkdir()
    tracemalloc.start()
    unpack(archive.read(archive.pack(scan_folder(source))), target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (target / "big").stat().st_size == 200_000_000
    assert peak < 40_000_000
    shutil.rmtree(target)


def test_reading_stops_where_the_reader_stops(folder: Path) -> None:
    given_out = 0

    def chunks() -> Iterator[bytes]:
        nonlocal given_out
        for start in range(0, len(content), 1000):
            given_out += 1
            yield content[start : start + 1000]

    content = theirs(folder) + bytes(1_000_000)
    assert next(archive.read(chunks())).name == "a"
    assert given_out < len(content) / 1000
