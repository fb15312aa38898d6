"""A part of a checkpoint: listed, and restored without the rest."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import EntryInfo, SyncCheckpoint, compression, storage
from flytekit_ckpt.archive import index, units
from flytekit_ckpt.entries import stream_entry
from flytekit_ckpt.errors import CorruptCheckpointError, StorageError
from flytekit_ckpt.members import NOTE_SIZE, crc32, note
from flytekit_ckpt.patterns import Patterns
from flytekit_ckpt.pipeline import Range
from flytekit_ckpt.storage import LocalObject, S3Object
from flytekit_ckpt.v2 import Checkpoint
from tests import tars
from tests.conftest import Place
from tests.test_layout import bytes_at, damage
from tests.test_storage import requests
from tests.trees import Tree, look, make, trees


def v2_listed(place: Place, uri: str) -> list[EntryInfo] | None:
    return Checkpoint("", uri, storage_options=place.options).entries()


def v2_loaded(place: Place, uri: str, only: str | list[str] | None = None) -> Path | None:
    checkpoint = Checkpoint("", uri, storage_options=place.options)
    loaded = checkpoint.load_sync(only=only)
    # As long as the checkpoint is there, so is what it has loaded.
    KEPT.append(checkpoint)
    return loaded


KEPT: list[object] = []


def saved(place: Place, folder: Path) -> str:
    uri = place.uri()
    Checkpoint(uri, storage_options=place.options).save_sync(folder)
    return uri


def told(folder: Path) -> list[tuple[str, str, int, int]]:
    """What a list is to say of a folder's contents."""
    found = []
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            status = path.lstat()
            kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
            size = status.st_size if kind == "file" else 0
            found.append((path.relative_to(folder).as_posix(), kind, size, status.st_mtime_ns))
    return sorted(found, key=lambda entry: entry[0].split("/"))


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A folder as training runs leave them: small files among large ones."""
    chosen = random.Random(1)
    tree: Tree = {"logs": None, "model": None, "model/old": None}
    tree |= {f"logs/{number}.txt": chosen.randbytes(100) for number in range(50)}
    tree |= {f"model/{number}.bin": chosen.randbytes(5_000_000) for number in range(4)}
    tree |= {"model/old/a.bin": b"a", "trainer_state.json": b"{}", "weights.link": "model/0.bin"}
    return make(tmp_path / "training", tree)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=trees())
def test_a_list_says_what_was_saved(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder, "source"), tree)
        uri = saved(Place(folder), source)
        for listed in (SyncCheckpoint("", uri).entries(), v2_listed(Place(folder), uri)):
            assert listed == told(source)


def test_a_list_fetches_no_content(s3: Place, training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = saved(s3, training)
    item = S3Object(uri, s3.settings)
    made = requests(item, monkeypatch)
    assert v2_listed(s3, uri) == told(training)
    assert made == ["get_object"]


@pytest.mark.parametrize("load", [SyncCheckpoint, Checkpoint])
def test_of_no_checkpoint_nothing_is_listed_or_restored(place: Place, tmp_path: Path, load: type) -> None:
    checkpoint = load("", place.uri(), storage_options=place.options)
    assert checkpoint.entries() is None
    if isinstance(checkpoint, Checkpoint):
        assert checkpoint.load_sync(only="*") is None
    else:
        assert checkpoint.restore(tmp_path, only="*") is None


def test_of_bytes_the_name_is_listed_that_they_are_restored_to(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    SyncCheckpoint(uri, storage_options=place.options).write(b"12345")
    legacy = SyncCheckpoint("", uri, storage_options=place.options)
    assert legacy.entries() == [EntryInfo("_dst_cp", "file", 5, None)]
    target = tmp_path / "target"
    target.mkdir()
    assert legacy.restore(target, only="x") == target
    assert not list(target.iterdir())
    assert legacy.restore(target, only="_dst*") == target
    assert Path(target, "_dst_cp").read_bytes() == b"12345"
    assert v2_listed(place, uri) == [EntryInfo("payload", "file", 5, None)]
    assert [path.name for path in sorted((v2_loaded(place, uri, "payload") or tmp_path).iterdir())] == ["payload"]


# What matches a folder takes what is in it: pathlib only names the folder.
def globbed(folder: Path, patterns: list[str]) -> set[str]:
    found = [path for pattern in patterns for path in folder.glob(pattern) if path != folder]
    below = [
        Path(root, name)
        for path in found
        if path.is_dir() and not path.is_symlink()
        for root, folders, files in os.walk(path)
        for name in (*folders, *files)
    ]
    return {path.relative_to(folder).as_posix() for path in (*found, *below)}


COMPONENTS = st.sampled_from(["a", "b", "c", "*", "**", "?", "[ab]", "[!a]", "*.bin", "a*", "payload", "ab"])
PATTERNS = st.lists(st.lists(COMPONENTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=3)
PLAIN = st.sampled_from(["a", "b", "c", "ab", "a.bin", ".a", "payload", "aa"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=trees(PLAIN, links=False), patterns=PATTERNS)
def test_patterns_choose_what_pathlib_would_find(tree: Tree, patterns: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder, "source"), tree)
        # pathlib's `**` at the end finds folders only, here it is everything.
        expected = globbed(source, patterns) if not any(p.endswith("**") for p in patterns) else None
        chosen = {entry[0] for entry in told(source) if Patterns(patterns).match(entry[0])}
        if expected is not None:
            assert chosen == expected
        loaded = v2_loaded(Place(folder), saved(Place(folder), source), patterns)
        assert loaded is not None
        whole = look(source)
        files = {name: whole[name] for name in chosen if whole[name][0] == "file"}
        assert {name: seen for name, seen in look(loaded).items() if seen[0] == "file"} == files


@pytest.mark.parametrize("pattern", ["", "/a", "../a", "a/../b", "."])
def test_a_pattern_that_can_match_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="can match no entry"):
        SyncCheckpoint("", str(tmp_path / "none")).restore(tmp_path, only=pattern)
    with pytest.raises(ValueError, match="can match no entry"):
        Checkpoint("", str(tmp_path / "none")).load_sync(only=pattern)


def test_only_what_is_wanted_is_fetched(s3: Place, training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = saved(s3, training)
    read: list[int] = []
    original = S3Object._fetch

    def counted(self: S3Object, part: Range, version: str | None) -> object:
        piece = original(self, part, version)
        read.append(sum(map(len, piece.chunks)))
        return piece

    monkeypatch.setattr(S3Object, "_fetch", counted)
    made = requests(S3Object(uri, s3.settings), monkeypatch)
    loaded = v2_loaded(s3, uri, "trainer_state.json")
    assert loaded is not None
    assert look(loaded) == {"trainer_state.json": look(training)["trainer_state.json"]}
    assert made == ["get_object", "get_object"]
    assert sum(read) < 300_000
    read.clear()
    loaded = v2_loaded(s3, uri, ["model/[13].bin", "logs/7.txt"])
    assert loaded is not None
    assert set(look(loaded)) == {"logs", "logs/7.txt", "model", "model/1.bin", "model/3.bin"}
    assert 10_000_000 < sum(read) < 10_600_000


def test_the_same_is_chosen_where_there_is_no_index(place: Place, tmp_path: Path, training: Path) -> None:
    """Of an archive by another program, and of the files that flytekit leaves."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for item in sorted(training.iterdir()):
            tar.add(item, item.name)
    archived, loose = place.uri(), place.uri()
    storage.at(archived, place.settings).put([packed.getvalue()])
    for path in training.rglob("*"):
        if path.is_file() and not path.is_symlink():
            name = path.relative_to(training).as_posix()
            storage.at(f"{loose}/{name}", place.settings).put([path.read_bytes()])
    for uri in (archived, loose, saved(place, training)):
        target = tmp_path / "target" / uri.rpartition("/")[2]
        target.mkdir(parents=True)
        assert SyncCheckpoint("", uri, storage_options=place.options).restore(target, only=["model/old", "*.json"])
        files = {name: seen[1] for name, seen in look(target).items() if seen[0] == "file"}
        assert files == {"model/old/a.bin": b"a", "trainer_state.json": b"{}"}
        listed = SyncCheckpoint("", uri, storage_options=place.options).entries()
        assert listed is not None
        sizes = {entry.name: entry.size for entry in listed if entry.kind == "file"}
        assert sizes == {name: size for name, kind, size, _ in told(training) if kind == "file"}


def test_a_hard_link_to_what_is_left_out_is_an_error(tmp_path: Path) -> None:
    uri = tmp_path / "object"
    uri.write_bytes(tars.gzipped(tars.file("a", b"1"), tars.hard_link("b", "a"), tars.END))
    with pytest.raises(ValueError, match="'b' is a hard link to 'a', which `only` leaves out"):
        SyncCheckpoint("", str(uri)).restore(tmp_path, only="b")
    assert list(tmp_path.iterdir()) == [uri]
    target = tmp_path / "target"
    target.mkdir()
    SyncCheckpoint("", str(uri)).restore(target, only=["a", "b"])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a": b"1", "b": b"1"}


def test_a_part_is_not_the_one_restore(place: Place, training: Path, tmp_path: Path) -> None:
    uri = saved(place, training)
    legacy = SyncCheckpoint("", uri, storage_options=place.options)
    part = legacy.restore(only="*.json")
    assert part is not None
    assert [path.name for path in part.iterdir()] == ["trainer_state.json"]
    target = tmp_path / "target"
    target.mkdir()
    assert legacy.restore(target) == target
    assert look(target) == look(training)
    other = tmp_path / "other"
    other.mkdir()
    assert legacy.restore(other, only="logs/1?.txt") == other
    assert len(list(other.rglob("*.txt"))) == 10
    assert legacy.restore(other) == target
    new = Checkpoint("", uri, storage_options=place.options)
    first, whole = new.load_sync(only="*.json"), new.load_sync()
    assert whole == new.path
    assert whole is not None
    assert look(whole) == look(training)
    second = new.load_sync(only="logs")
    assert first is not None
    assert second is not None
    assert [path.name for path in first.iterdir()] == ["trainer_state.json"]
    assert [path.name for path in second.iterdir()] == ["logs"]
    assert look(whole) == look(training)


def test_the_limit_counts_what_is_restored(training: Path, tmp_path: Path) -> None:
    uri = saved(Place(str(tmp_path)), training)
    limited = SyncCheckpoint("", uri, restore_limit=10_000)
    target = tmp_path / "target"
    target.mkdir()
    assert limited.restore(target, only="logs") == target
    with pytest.raises(CorruptCheckpointError, match="restore_limit"):
        limited.restore(target, only=["logs", "model"])


def test_an_object_that_is_replaced_meanwhile_is_an_error(
    place: Place, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = saved(place, training)
    kind = type(storage.at(uri, place.settings))
    original = kind.tail

    def replaced(self: storage.StoredObject, size: int) -> storage.Tail | None:
        tail = original(self, size)
        Checkpoint(uri, storage_options=place.options).save_sync(training / "logs")
        return tail

    monkeypatch.setattr(kind, "tail", replaced)
    with pytest.raises(StorageError, match="another writer has replaced it meanwhile"):
        v2_loaded(place, uri, "trainer_state.json")


# The index ------------------------------------------------------------------------------------------------------------


def lies(content: bytes) -> tuple[int, int]:
    """Where the index of an object lies."""
    end = index._end(content)
    assert end is not None
    assert end.start + end.size == len(content)
    return end.start, end.size


def test_an_index_is_small(tmp_path: Path) -> None:
    chosen = random.Random(1)
    small: Tree = {f"{number % 20:02}": None for number in range(20)}
    for number in range(10_000):
        small[f"{number % 20:02}/{number}.bin"] = chosen.randbytes(chosen.randrange(1000, 7000))
    source = make(tmp_path / "small", small)
    content = bytes_at(Place(str(tmp_path)), saved(Place(str(tmp_path)), source))
    assert lies(content)[1] < len(content) / 100
    large = make(tmp_path / "large", {f"{number}.bin": chosen.randbytes(8_000_000) for number in range(3)})
    content = bytes_at(Place(str(tmp_path)), saved(Place(str(tmp_path)), large))
    assert lies(content)[1] < 500


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """So many files that their index takes several members, and more than a first look at the end brings."""
    chosen = random.Random(1)
    return make(tmp_path / "many", {f"{chosen.randbytes(60).hex()}": b"" for _ in range(3000)})


def test_a_large_index_is_read_and_passed_over(
    place: Place, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = saved(place, many)
    content = bytes_at(place, uri)
    assert lies(content)[1] > 2 * NOTE_SIZE
    assert lies(content)[1] > index.TAIL_SIZE
    assert v2_listed(place, uri) == told(many)
    if isinstance(storage.at(uri, place.settings), S3Object):
        made = requests(S3Object(uri, place.settings), monkeypatch)
        assert v2_listed(place, uri) == told(many)
        assert made == ["get_object", "get_object"]
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        tar.extractall(tmp_path / "python", filter="fully_trusted")
    assert look(tmp_path / "python") == look(many)
    (tmp_path / "gnu").mkdir()
    subprocess.run(["tar", "xzf", "-", "-C", tmp_path / "gnu"], input=content, check=True)
    assert look(tmp_path / "gnu") == look(many)
    subprocess.run(["gzip", "-t"], input=content, check=True)
    whole = v2_loaded(place, uri)
    assert whole is not None
    assert look(whole) == look(many)


def test_a_damaged_index_costs_a_reading_through_and_nothing_else(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    source = make(tmp_path / "source", {"a": b"1" * 700, "b": None, "b/c": b"2" * 1_000_000, "d": b"3"})
    uri = saved(place, source)
    content = bytes_at(place, uri)
    start, length = lies(content)
    for position in range(start, start + length):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        damage(place, uri, bytes(flipped))
        # Where the index is whole, what was damaged is passed over by everyone, as is a time in a gzip header.
        try:
            assert v2_listed(place, uri) == told(source)
            loaded = v2_loaded(place, uri, ["b", "d"])
            assert loaded is not None
            assert look(loaded) == {name: seen for name, seen in look(source).items() if name != "a"}
        except CorruptCheckpointError:
            # Read through, every member counts.
            pass
        KEPT.clear()


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_an_index_that_is_cut_off_is_damage(tmp_path: Path, training: Path, cut: int) -> None:
    place = Place(str(tmp_path))
    uri = saved(place, training)
    damage(place, uri, bytes_at(place, uri)[:-cut])
    with pytest.raises(CorruptCheckpointError):
        v2_listed(place, uri)
    with pytest.raises(CorruptCheckpointError):
        v2_loaded(place, uri, "logs")


def relisted(content: bytes, change: Callable[[list[units.Unit]], list[units.Unit]]) -> bytes:
    """Give an object another index."""
    start, _ = lies(content)
    found = index.decoded(content)
    assert found is not None
    return content[:start] + b"".join(index.encoded(change(found), start))


def test_an_index_is_not_trusted_over_the_headers(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    chosen = random.Random(3)
    source = make(tmp_path / "source", {name: chosen.randbytes(1_000_000) for name in ("a", "b", "c")})
    uri = saved(place, source)
    content = bytes_at(place, uri)

    def renamed(found: list[units.Unit]) -> list[units.Unit]:
        entry = stream_entry("bb", [], 5)
        lie = units.Unit.of(found[1].start, [entry], found[1].members)
        return [found[0], lie, found[2]]

    damage(place, uri, relisted(content, renamed))
    with pytest.raises(CorruptCheckpointError, match="its index lists 'bb', which it does not hold"):
        v2_loaded(place, uri, "bb")
    loaded = v2_loaded(place, uri, ["a", "c"])
    assert loaded is not None
    assert set(look(loaded)) == {"a", "c"}
    whole = v2_loaded(place, uri)
    assert whole is not None
    assert look(whole) == look(source)
    # Out of order, it is no index.
    damage(place, uri, relisted(content, lambda found: [found[0], found[0], found[2]]))
    assert v2_listed(place, uri) == told(source)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 12,
        index._UNIT.pack(0, 0, 8) + bytes(8),
        index._UNIT.pack(0, 0, 2**32 - 1),
        index._UNIT.pack(0, 12, 8) + bytes(12) + (b"\xff" * 8),
        index._UNIT.pack(0, 11, 30) + bytes(41),
    ],
)
def test_an_index_of_nonsense_is_passed_over(tmp_path: Path, content: bytes) -> None:
    place = Place(str(tmp_path))
    source = make(tmp_path / "source", {"a": b"1"})
    uri = saved(place, source)
    whole = bytes_at(place, uri)
    start, _ = lies(whole)
    end = index._END.pack(index._VERSION, start, len(content), crc32(content))
    damage(place, uri, whole[:start] + (note(content) if content else b"") + note(end))
    assert v2_listed(place, uri) == told(source)


def test_an_index_that_would_fill_the_memory_does_not(tmp_path: Path) -> None:
    """A megabyte that inflates to a gigabyte, and one whose end says that it is larger than anything."""
    place = Place(str(tmp_path))
    uri = saved(place, make(tmp_path / "source", {"a": b"1"}))
    whole = bytes_at(place, uri)
    start, _ = lies(whole)
    bomb = units._HEADER.pack(1, (1 << 30)) + compression.deflated(bytes(1 << 20))
    content = index._UNIT.pack(0, 12, len(bomb)) + bytes(12) + bomb
    for length in (len(content), 1 << 40):
        end = index._END.pack(index._VERSION, start, length, crc32(content))
        damage(place, uri, whole[:start] + note(content) + note(end))
        tracemalloc.start()
        assert [entry.name for entry in v2_listed(place, uri) or ()] == ["a"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000


def test_an_index_is_left_out_where_it_would_be_too_large(
    tmp_path: Path, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "INDEX_LIMIT", 100)
    uri = saved(Place(str(tmp_path)), training)
    content = LocalObject(Path(uri)).tail(100)
    assert content is not None
    assert index.place(content.content, content.object.size) is None
    assert v2_listed(Place(str(tmp_path)), uri) == told(training)
