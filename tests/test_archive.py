"""The archive: what any tar reads, what any tar wrote, and nothing else."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import archive, compression, inflation
from flytekit_ckpt import members as gzip_members
from flytekit_ckpt.entries import stream_entry
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.folders import scan_folder
from flytekit_ckpt.recognition import Kind, recognise
from flytekit_ckpt.unpacking import unpack
from tests.trees import Tree, look, make, trees

modestly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

FORMATS = {"gz": tarfile.PAX_FORMAT, "bz2": tarfile.GNU_FORMAT, "xz": tarfile.PAX_FORMAT, "": tarfile.USTAR_FORMAT}


def ours(folder: Path) -> bytes:
    return b"".join(chunk for chunk in archive.pack(scan_folder(folder)) if isinstance(chunk, bytes))


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
    return recognise([content])[0]


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


def members(content: bytes) -> Iterator[bytes]:
    """Follow the lengths that the members state, past the notes between them and behind."""
    start = 0
    while start < len(content):
        if content[start + 12 : start + 14] == b"FI":
            start += 26 + struct.unpack_from("<H", content, start + 14)[0]
            continue
        assert content[start : start + 4] == b"\x1f\x8b\x08\x04"
        length = struct.unpack_from("<I", content, start + 16)[0]
        yield content[start : start + length]
        start += length


def test_every_member_states_its_length_inflates_alone_and_is_small(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"a": random.Random(2).randbytes(9_000_000), "b": bytes(5_000_000)})
    content = ours(source)
    plain_members = [gzip.decompress(member) for member in members(content)]
    assert all(len(member) <= gzip_members.MEMBER_SIZE + tarfile.RECORDSIZE for member in plain_members)
    assert len(plain_members) == 5 + 3 + 1
    assert b"".join(plain_members) == gzip.decompress(content)


def test_a_large_entry_starts_a_member_and_small_ones_share_one(tmp_path: Path) -> None:
    large = random.Random(2).randbytes(archive.packing.LARGE_ENTRY)
    source = make(tmp_path / "source", {"a": b"1", "b": b"2", "c": large, "d": b"3", "e": large, "f": b"4"})
    units: list[archive.Unit] = []
    content = b"".join(c for c in archive.pack(scan_folder(source), record=units.append) if isinstance(c, bytes))
    inside = []
    for member in members(content):
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(member) + bytes(1024))) as tar:
            inside.append([entry.name for entry in tar])
    assert inside == [["a", "b"], ["c"], ["d"], ["e"], ["f"], []]
    assert [[*unit.first, *unit.last] for unit in units] == [[names[0], names[-1]] for names in inside[:-1]]


@pytest.mark.parametrize("engine", ["isal", "zlib"])
def test_what_does_not_shrink_is_stored(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "zlib":
        monkeypatch.setattr(compression, "deflate", zlib)
        monkeypatch.setattr(compression, "igzip_lib", None)
    noise = random.Random(2).randbytes(3_000_000)
    # Exponents that hardly vary, as in a model's weights: a tenth of the bytes could be saved, and no more.
    weights = bytearray(noise)
    weights[3::4] = bytes(0x3C + byte % 16 for byte in weights[3::4])
    make(tmp_path / "source", {"noise": noise, "weights": bytes(weights[:2_000_000]), "x": b"x" * 3_000_000})
    content = ours(tmp_path / "source")
    sizes = {"noise": 0, "weights": 0, "x": 0}
    assert len(content) < 5_200_000
    assert noise[:60_000] in content
    for entry in archive.read([content]):
        sizes[entry.name] = sum(map(len, entry.chunks()))
    assert sizes == {"noise": 3_000_000, "weights": 2_000_000, "x": 3_000_000}


def test_what_shrinks_in_samples_only_is_stored(tmp_path: Path) -> None:
    content = bytearray(random.Random(2).randbytes(gzip_members.MEMBER_SIZE))
    for start in range(0, len(content), len(content) // 4):
        content[start : start + 8192] = bytes(8192)
    packed = ours(make(tmp_path / "source", {"a": bytes(content)}))
    assert bytes(content[10_000:60_000]) in packed


def test_equal_folders_give_equal_archives_whatever_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(2).randbytes(3_000_000)
    source = make(tmp_path / "source", {"a": noise, "b": bytes(5_000_000), "c": b"1"})
    contents = set()
    for threads in (1, 2, 8):
        monkeypatch.setattr(archive.packing, "processors", lambda threads=threads: threads)
        contents.add(ours(source))
    assert len(contents) == 1


ENGINES = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
from flytekit_ckpt import archive, compression, folders, unpacking
assert compression.deflate.__name__ == ("zlib" if "isal" in sys.argv[1].split() else "isal.isal_zlib")
source, made, other, target = map(Path, sys.argv[2:])
made.write_bytes(b"".join(archive.pack(folders.scan_folder(source))))
if other.exists():
    unpacking.unpack(archive.read([other.read_bytes()]), target)
"""


def test_without_isal_the_format_is_the_same(tmp_path: Path) -> None:
    noise = random.Random(2).randbytes(3_000_000)
    source = make(tmp_path / "source", {"a": noise, "b": noise[:1000] * 3000, "c": b"1", "d": None, "d/e": b""})
    for hidden, made, other in (("-", "isal", "-"), ("isal", "zlib", "isal"), ("-", "again", "zlib")):
        target = tmp_path / f"from-{other}"
        target.mkdir()
        paths = [str(path) for path in (source, tmp_path / made, tmp_path / other, target)]
        subprocess.run([sys.executable, "-c", ENGINES, hidden, *paths], check=True)
        if other != "-":
            assert look(target) == look(source)
    # What Python's gzip makes is read without isal, too.
    (tmp_path / "python").write_bytes(theirs(source))
    target = tmp_path / "from-python"
    target.mkdir()
    paths = [str(path) for path in (source, tmp_path / "made", tmp_path / "python", target)]
    subprocess.run([sys.executable, "-c", ENGINES, "isal", *paths], check=True)
    assert look(target) == look(source)


def test_an_archive_of_very_many_members_is_read_in_little_memory() -> None:
    """A member more must not leave anything behind: an archive may have a million of them."""
    content = gzip_members.member(memoryview(bytes(100))) * 10_000
    tracemalloc.start()
    read = sum(map(len, inflation.inflated(iter([content]), 8 << 20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == 1_000_000
    assert peak < 1_000_000


def test_members_of_others_may_follow_ours(folder: Path) -> None:
    content = ours(folder)
    *ours_alone, _ = members(content)
    end = gzip.compress(bytes(tarfile.RECORDSIZE))
    mixed = b"".join(ours_alone) + end
    assert entries(mixed) == entries(content)
    assert entries(mixed + bytes(700)) == entries(content + bytes(700)) == entries(content)
    for damaged in (content + b"x", content + b"\x1f", content + end[:-1], mixed + b"x"):
        with pytest.raises(CorruptCheckpointError):
            entries(damaged)


def test_a_member_that_inflates_to_more_than_it_says_is_not_inflated_further() -> None:
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = body.compress(bytes(300_000_000)) + body.flush()
    length = 20 + len(deflated) + 8
    header = struct.pack("<4sIBBH2sHI", b"\x1f\x8b\x08\x04", 0, 0, 255, 8, b"FC", 4, length)
    for stated in (1000, 2**32 - 1):
        member = header + deflated + struct.pack("<II", 0, stated)
        tracemalloc.start()
        with pytest.raises(CorruptCheckpointError):
            entries(member)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000


def test_a_slow_reader_or_writer_holds_up_the_other(tmp_path: Path) -> None:
    memory = 32 << 20
    source = make(tmp_path / "source", {"big": random.Random(1).randbytes(60_000_000)})
    read_to = 0

    def watched() -> Iterator[bytes]:
        nonlocal read_to
        with (source / "big").open("rb") as file:
            while chunk := file.read(1 << 20):
                read_to += len(chunk)
                yield chunk

    entry = stream_entry("big", watched(), 60_000_000)
    chunks = archive.pack([entry], memory=memory)
    next(chunks)
    assert read_to <= memory
    content = ours(source)
    given_out = 0

    def pieces() -> Iterator[bytes]:
        nonlocal given_out
        for start in range(0, len(content), 1 << 20):
            given_out += 1 << 20
            yield content[start : start + (1 << 20)]

    opened = next(archive.read(pieces(), memory=memory))
    next(iter(opened.chunks()))
    assert given_out <= memory


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
    found, again = recognise(pieces)
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
        assert kind(content[:length]) in (Kind.ARCHIVE, Kind.DAMAGED)
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
        assert kind(content) is Kind.DAMAGED
        return
    assert is_tar == (kind(content) in (Kind.ARCHIVE, Kind.ZEROS, Kind.COMPRESSED_ZEROS))
    assert (kind(content) is Kind.EMPTY) == (not content)


@pytest.mark.parametrize("compression", FORMATS)
@pytest.mark.parametrize("first_chunk", [1, 5, 600, 10_000_000])
def test_an_archive_is_recognised_from_chunks_of_any_size(compression: str, first_chunk: int, folder: Path) -> None:
    content = theirs(folder, compression) if compression else plain(folder)
    found, again = recognise(iter([content[:first_chunk], content[first_chunk:]]))
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


@settings(modestly, max_examples=300)
@given(
    st.text(st.characters(max_codepoint=300, exclude_characters="\0"), min_size=1, max_size=120),
    st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]),
    st.integers(0, 1 << 40),
    st.integers(0, 0o7777),
    st.integers(-(1 << 40), 1 << 40),
    st.dictionaries(st.sampled_from(["mtime", "flytekit_ckpt.part", "ü"]), st.text(max_size=110).filter(bool)),
)
@example("a/", tarfile.DIRTYPE, 0, 0, 0, {})
@example("a" * 100, tarfile.REGTYPE, (1 << 33) - 1, 0o7777, (1 << 33) - 1, {"mtime": "1.5"})
@example("a" * 100, tarfile.DIRTYPE, 1 << 33, 0, -1, {})
def test_headers_are_those_that_tarfile_makes(
    name: str, kind: bytes, size: int, mode: int, mtime: int, headers: dict[str, str]
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime, info.pax_headers = kind, size, mode, mtime, headers
    info.linkname = "target" if kind == tarfile.SYMTYPE else ""
    try:
        wanted = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return
    assert without_device(archive.packing._tar_header(info)) == without_device(wanted)


def without_device(header: bytes) -> list[bytes]:
    """Blank what Python writes in one version and not in the next: a file's device numbers, and so its checksum."""
    blocks = [header[start : start + 512] for start in range(0, len(header), 512)]
    return [b[:148] + b[156:329] + b[345:] if b[257:262] == b"ustar" else b for b in blocks]
