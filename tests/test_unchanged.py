"""Saves that cost what has changed: what is as it was is carried over, and never anything that is not."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flytekit_ckpt import SyncCheckpoint, archive, layout, storage, v2
from flytekit_ckpt.archive import index, packing, units
from flytekit_ckpt.files import OpenFile
from flytekit_ckpt.members import note
from flytekit_ckpt.pipeline import Range
from flytekit_ckpt.storage import S3Object, local
from tests.conftest import Place
from tests.test_storage import requests
from tests.trees import look, make

CHOSEN = random.Random(5)
LARGE = 3_000_000


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """Large and small files that have been there for a while."""
    folder = make(
        tmp_path / "training",
        {
            "model": None,
            "small": None,
            **{f"model/{number}.bin": CHOSEN.randbytes(LARGE) for number in range(8)},
            **{f"small/{number}.txt": CHOSEN.randbytes(100) for number in range(200)},
        },
    )
    aged(folder)
    return folder


def aged(folder: Path, seconds: float = 3600.0) -> None:
    """Make the files look as if they had been written some time ago."""
    for path in folder.rglob("*"):
        written = path.lstat().st_mtime - seconds
        os.utime(path, (written, written), follow_symlinks=False)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files settle at once: a change time cannot be set, and waiting takes long."""
    monkeypatch.setattr("flytekit_ckpt.entries.SETTLED_NS", -1)


Maker = Callable[..., Any]


def legacy(place: Place, destination: str, source: str | None = None, **options: Any) -> Any:
    return SyncCheckpoint(destination, source, storage_options=place.options, **options)


def flyte2(place: Place, destination: str, source: str | None = None, **options: Any) -> Any:
    return v2.Checkpoint(destination, source, storage_options=place.options, **options)


def save(checkpoint: Any, folder: Path) -> None:
    (checkpoint.save if isinstance(checkpoint, SyncCheckpoint) else checkpoint.save_sync)(folder)


def load(checkpoint: Any) -> Path:
    found = checkpoint.restore() if isinstance(checkpoint, SyncCheckpoint) else checkpoint.load_sync()
    assert isinstance(found, Path)
    # With the checkpoint, what it has loaded goes.
    KEPT.append(checkpoint)
    return found


KEPT: list[object] = []


def rewritten(path: Path) -> None:
    """Give a file other content, of which its size and its modification time tell nothing."""
    status = path.stat()
    path.write_bytes(CHOSEN.randbytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


both = pytest.mark.parametrize("maker", [legacy, flyte2])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read while something is saved."""
    opened: list[Path] = []
    large, small = OpenFile.__init__, packing.file_content

    def read_large(self: OpenFile, path: str) -> None:
        opened.append(Path(path))
        large(self, path)

    def read_small(path: str, size: int) -> bytes:
        opened.append(Path(path))
        return small(path, size)

    monkeypatch.setattr(OpenFile, "__init__", read_large)
    monkeypatch.setattr(packing, "file_content", read_small)
    return opened


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the members that are made, one number for each."""
    made: list[int] = []
    original = packing.member

    def recorded(data: memoryview) -> bytes:
        member = original(data)
        made.append(len(member))
        return member

    monkeypatch.setattr(packing, "member", recorded)
    return made


@both
def test_what_has_not_changed_is_neither_read_nor_sent(
    place: Place, training: Path, maker: Maker, read: list[Path], sent: list[int]
) -> None:
    checkpoint = maker(place, uri := place.uri())
    save(checkpoint, training)
    first = sum(sent)
    read.clear()
    sent.clear()
    (training / "model" / "3.bin").write_bytes(CHOSEN.randbytes(LARGE))
    save(checkpoint, training)
    assert set(read) == {training / "model" / "3.bin"}
    assert sum(sent) < first / 7
    assert look(load(maker(place, place.uri(), uri))) == look(training)
    # Once more, now that most lies elsewhere in the object.
    (training / "model" / "0.bin").unlink()
    (training / "new").write_bytes(b"new")
    read.clear()
    save(checkpoint, training)
    assert set(read) == {training / "new"}
    assert look(load(maker(place, place.uri(), uri))) == look(training)


@both
def test_the_server_copies_what_has_not_changed(
    s3: Place, training: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = maker(s3, uri := s3.uri())
    save(checkpoint, training)
    made = requests(S3Object(uri, s3.settings), monkeypatch)
    (training / "model" / "7.bin").write_bytes(CHOSEN.randbytes(LARGE))
    save(checkpoint, training)
    assert "upload_part_copy" in made
    assert look(load(maker(s3, s3.uri(), uri))) == look(training)


@both
def test_where_nothing_has_changed_nothing_is_written(
    place: Place, training: Path, maker: Maker, sent: list[int]
) -> None:
    checkpoint = maker(place, uri := place.uri())
    save(checkpoint, training)
    item = storage.at(uri, place.settings)
    written = item.state()
    assert written.object is not None
    for is_compared in (False, True):
        if is_compared:
            # Times that nobody can trust.
            checkpoint = maker(place, uri, verify_unchanged=True)
            save(checkpoint, training)
            written = item.state()
        sent.clear()
        save(checkpoint, training)
        assert item.state() == written
        # The end of the archive.
        assert len(sent) == 1
    assert look(load(maker(place, place.uri(), uri))) == look(training)
    (training / "small" / "199.txt").unlink()
    save(checkpoint, training)
    assert item.state() != written
    assert look(load(maker(place, place.uri(), uri))) == look(training)


@both
def test_where_nothing_has_changed_s3_is_asked_once(
    s3: Place, training: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = maker(s3, uri := s3.uri())
    save(checkpoint, training)
    made = requests(S3Object(uri, s3.settings), monkeypatch)
    save(checkpoint, training)
    assert made == ["get_object"]


@both
def test_what_is_not_there_any_more_is_written_again(place: Place, training: Path, maker: Maker) -> None:
    checkpoint = maker(place, uri := place.uri())
    save(checkpoint, training)
    if maker is flyte2:
        # The legacy API raises, or keeps what another one has saved.
        storage.at(uri, place.settings).remove()
        save(checkpoint, training)
        assert look(load(maker(place, place.uri(), uri))) == look(training)
    item = storage.at(uri, place.settings)
    found = item.get()
    assert found is not None
    content = bytearray(b"".join(found.chunks))
    content[len(content) // 2] ^= 1
    item.put([bytes(content)], describe=lambda: found.metadata)
    if maker is flyte2:
        # What another one has saved is taken over unread by the legacy API.
        save(checkpoint, training)
        assert look(load(maker(place, place.uri(), uri))) == look(training)
    save(maker(place, uri), training / "small")
    save(checkpoint, training)
    found = look(load(maker(place, place.uri(), uri)))
    assert {name: found[name] for name in look(training)} == look(training)


@both
def test_an_index_that_would_be_another_is_written(
    place: Place, training: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another version of this package had made it."""
    checkpoint = maker(place, uri := place.uri())
    monkeypatch.setattr(index, "_VERSION", 2)
    save(checkpoint, training)
    monkeypatch.undo()
    save(checkpoint, training)
    item = storage.at(uri, place.settings)
    tail = item.tail(index.TAIL_SIZE)
    assert tail is not None
    assert index.place(tail.content, tail.object.size) is not None


@both
def test_what_is_the_same_but_was_carried_forward_is_written_again(s3: Place, tmp_path: Path, maker: Maker) -> None:
    """Of so few bytes, S3 gives the same tag to both; a later attempt must learn that this one has saved."""
    checkpoint = maker(s3, uri := s3.uri())
    folder = make(tmp_path / "few", {"a": b"a"})
    save(checkpoint, folder)
    item = storage.at(uri, s3.settings)
    for described in ({"shape": "tree", "carried": "yes"}, {"shape": "tree", "resumed": "elsewhere"}, {}):
        found = item.get()
        assert found is not None
        item.put(list(found.chunks), describe=lambda described=described: described)  # type: ignore[misc]
        save(checkpoint, folder)
        state = item.state()
        assert state.object is not None
        assert state.object.version == found.version
        assert state.metadata["shape"] == "tree"
        assert "carried" not in state.metadata


MEMBERS = bytes(range(60))
END = [b"the end", note(b"index")]
ENDS = st.sampled_from([END, END, END, [b"THE END", note(b"index")], [b"the end"], [note(b"index")], []])


@settings(max_examples=1000)
@given(st.data(), st.sets(st.integers(1, 59), max_size=4), ENDS, st.sampled_from([0, 0, 0, 1]))
def test_an_archive_is_taken_for_the_same_only_if_it_is(
    data: st.DataObject, edges: set[int], end: list[bytes], more: int
) -> None:
    """Whole ranges in any order, some of them missing or twice, and ends of several lengths."""
    earlier = MEMBERS + b"".join(END) + bytes(more)
    ranges = [Range(start, stop - start) for start, stop in itertools.pairwise((0, *sorted(edges), 60))]
    order = st.one_of(st.just(ranges), st.permutations(ranges), st.lists(st.sampled_from(ranges), max_size=5))
    chunks: list[bytes | Range] = [*data.draw(order), *end]
    if data.draw(st.booleans()):
        chunks.insert(data.draw(st.integers(0, len(chunks))), data.draw(st.sampled_from([b"new", ranges[0]])))
    found, again = archive.repeated(iter(chunks), len(earlier))

    def resolved(chunks: Iterable[bytes | memoryview | Range]) -> bytes:
        return b"".join(earlier[c.start : c.start + c.length] if isinstance(c, Range) else c for c in chunks)

    later = resolved(chunks)
    assert resolved(again) == later
    if found is not None and earlier.endswith(found):
        assert later == earlier
    elif chunks == [*ranges, *END] and not more:
        pytest.fail("it is the same")


@both
def test_what_is_gone_does_not_stay_as_the_gap_before_what_follows(place: Place, tmp_path: Path, maker: Maker) -> None:
    """Of a few bytes, it may be as long as the note that takes its place."""
    folder = make(tmp_path / "folder", {"a": CHOSEN.randbytes(LARGE), "b": b"b", "c": CHOSEN.randbytes(LARGE)})
    checkpoint = maker(place, uri := place.uri())
    save(checkpoint, folder)
    (folder / "b").unlink()
    save(checkpoint, folder)
    assert look(load(maker(place, place.uri(), uri))) == look(folder)


@pytest.mark.parametrize("second", [b"member", Range(13, 47)])
def test_of_an_archive_that_differs_no_more_is_kept_than_two_members(second: bytes | Range) -> None:
    chunks = iter([Range(0, 10), b"new", second, b"more", *END])
    assert archive.repeated(chunks, 80)[0] is None
    assert next(chunks) == b"more"


def test_a_save_gives_signs_of_life_while_much_is_copied(
    tmp_path: Path, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is before the first change has been looked at by then."""
    monkeypatch.setattr("flytekit_ckpt.archive.reuse.RUN", 1)
    uri, happened = str(tmp_path / "checkpoint"), list[str]()

    def put(known: layout.Known | None, step: Callable[[], object]) -> layout.Known:
        items = archive.unchanged(_scanned(training), known.units if known else [], is_verified=False)
        previous = known.previous(storage.Settings()) if known else None
        options = layout.PutOptions(step=step)
        written, units = layout.put_tree(
            uri, items, storage.Settings(), size=lambda: 0, previous=previous, options=options
        )
        return layout.Known(uri, written, units)

    saved = put(None, lambda: None)
    (training / "small" / "199.txt").write_bytes(b"changed")
    original = local.copy_part

    def copy(source: int, target: int, part: Range) -> int:
        happened.append("copied")
        return original(source, target, part)

    monkeypatch.setattr(local, "copy_part", copy)
    put(saved, lambda: happened.append("step"))
    copies = [position for position, what in enumerate(happened) if what == "copied"]
    assert len(copies) > 8
    assert all("step" in happened[copy:following] for copy, following in itertools.pairwise(copies))


@both
def test_the_first_save_of_an_attempt_takes_over_what_it_has_loaded(
    place: Place, training: Path, tmp_path: Path, maker: Maker, sent: list[int]
) -> None:
    save(maker(place, first := place.uri()), training)
    whole = sum(sent)
    checkpoint = maker(place, second := place.uri(), first)
    folder = load(checkpoint)
    (folder / "model" / "3.bin").write_bytes(CHOSEN.randbytes(LARGE))
    sent.clear()
    save(checkpoint, folder)
    assert sum(sent) < whole / 7
    expected = look(folder)
    assert look(load(maker(place, place.uri(), second))) == expected
    # Which does not depend on the object that it was taken from.
    storage.at(first, place.settings).remove()
    assert look(load(maker(place, place.uri(), second))) == expected


@both
def test_what_was_loaded_may_be_gone_or_another_when_it_is_saved(place: Place, training: Path, maker: Maker) -> None:
    for other in (False, True):
        save(maker(place, first := place.uri()), training)
        checkpoint = maker(place, second := place.uri(), first, carry_forward=False)
        folder = load(checkpoint)
        if other:
            save(maker(place, first), training / "small")
        else:
            storage.at(first, place.settings).remove()
        save(checkpoint, folder)
        assert look(load(maker(place, place.uri(), second))) == look(training)


@both
def test_an_object_that_is_replaced_while_it_is_taken_from_is_no_part_of_a_mixture(
    place: Place, training: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is replaced after its index has been read."""
    save(maker(place, first := place.uri()), training)
    checkpoint = maker(place, second := place.uri(), first, carry_forward=False)
    folder = load(checkpoint)
    original, is_replaced = archive.unchanged, []

    def replacing(items: Any, known: Any, *, is_verified: bool) -> Iterator[Any]:
        for item in original(items, known, is_verified=is_verified):
            if not is_replaced:
                is_replaced.append(True)
                other = place.uri()
                save(maker(place, other), training / "model")
                content = storage.at(other, place.settings).get()
                assert content is not None
                storage.at(first, place.settings).put(content.chunks)
            yield item

    monkeypatch.setattr(archive, "unchanged", replacing)
    save(checkpoint, folder)
    assert is_replaced
    assert look(load(maker(place, place.uri(), second))) == look(training)


@both
def test_a_file_that_has_just_been_written_is_compared(
    place: Place, training: Path, maker: Maker, read: list[Path], sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times may be the same when it is written once more."""
    monkeypatch.setattr("flytekit_ckpt.entries.SETTLED_NS", 2 * 10**9)
    checkpoint = maker(place, uri := place.uri())
    save(checkpoint, training)
    status = (training / "model" / "1.bin").stat()
    content = bytearray((training / "model" / "1.bin").read_bytes())
    content[2_500_000] ^= 1
    (training / "model" / "1.bin").write_bytes(content)
    os.utime(training / "model" / "1.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    read.clear()
    sent.clear()
    save(checkpoint, training)
    assert {path.name for path in read} >= {f"{number}.bin" for number in range(8)}
    # That member, and the end.
    assert len(sent) == 2
    assert look(load(maker(place, place.uri(), uri))) == look(training)


@both
def test_a_file_that_is_mapped_is_compared(place: Place, training: Path, maker: Maker) -> None:
    """Changes through a map that is there show in no time while the page has not been written to the disk."""
    checkpoint = maker(place, uri := place.uri())
    path = training / "model" / "1.bin"
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[7] ^= 1
        aged(training)
        save(checkpoint, training)
        status = path.stat()
        mapped[7] ^= 1
        mapped[2_999_999] ^= 1
        # As if it had not shown, which is a matter of chance.
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        save(checkpoint, training)
        assert look(load(maker(place, place.uri(), uri))) == look(training)


def test_files_that_are_mapped_are_never_settled(training: Path) -> None:
    path = training / "model" / "1.bin"

    def settled() -> dict[str, bool]:
        entries = list(archive.unchanged(_scanned(training), [], is_verified=False))
        return {entry.name: entry.identity.is_settled for entry in entries if getattr(entry, "identity", None)}  # type: ignore[union-attr]

    assert all(settled().values())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert [name for name, is_settled in settled().items() if not is_settled] == ["model/1.bin"]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert all(settled().values())


def _scanned(folder: Path) -> Iterator[Any]:
    from flytekit_ckpt.folders import scan_folder

    return scan_folder(folder)


@both
def test_on_demand_everything_is_compared(
    tmp_path: Path, training: Path, maker: Maker, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what would be taken for the same by all that can be seen of it."""
    place = Place(str(tmp_path))
    monkeypatch.setattr(units, "seen", lambda entries: b"the same")
    path = training / "model" / "1.bin"
    for is_verified in (False, True):
        original = path.read_bytes()
        checkpoint = maker(place, uri := place.uri(), verify_unchanged=is_verified)
        monkeypatch.setattr("flytekit_ckpt.archive.reuse.seen", lambda entries: b"the same")
        save(checkpoint, training)
        status = path.stat()
        path.write_bytes(bytes(LARGE))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        save(checkpoint, training)
        saved = (load(maker(place, place.uri(), uri)) / "model" / "1.bin").read_bytes()
        assert saved == (bytes(LARGE) if is_verified else original)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"x" * LARGE),
        rewritten,
        lambda path: path.chmod(0o600),
        lambda path: os.utime(path, (1, 1)),
        lambda path: (shutil.copy2(path, path.with_name("copy")), path.with_name("copy").replace(path)),
        lambda path: (path.rename(path.with_name("9.bin")), path.with_name("9.bin").rename(path)),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("0.bin")),
    ],
    ids=["content", "content, its time put back", "mode", "time", "inode", "renamed", "removed", "folder", "link"],
)
@both
def test_whatever_can_be_seen_of_a_change_is_seen(
    tmp_path: Path, training: Path, maker: Maker, change: Callable[[Path], object]
) -> None:
    place = Place(str(tmp_path))
    checkpoint = maker(place, uri := place.uri())
    save(checkpoint, training)
    for name in ("1.bin", "7.bin"):
        change(training / "model" / name)
        save(checkpoint, training)
        assert look(load(maker(place, place.uri(), uri))) == look(training)


def test_another_part_stays_what_it_was(place: Place, training: Path, tmp_path: Path, sent: list[int]) -> None:
    """Parts whose names lie between each other's, and are saved again in turn."""
    other = make(tmp_path / "other", {"model": None, "model/1a": b"between", "small": None, "small/x": b"x"})
    checkpoint = legacy(place, uri := place.uri())
    checkpoint.save(training)
    checkpoint.save(other)
    checkpoint.write(b"bytes")
    for number in range(3):
        (training / "model" / f"{number}.bin").write_bytes(CHOSEN.randbytes(LARGE))
        (other / "small" / "x").write_bytes(b"%d" % number)
        sent.clear()
        checkpoint.save(training)
        assert sum(sent) < 2 * LARGE
        checkpoint.write(b"%d" % number)
        checkpoint.save(other)
        found = load(legacy(place, place.uri(), uri))
        assert (found / "_dst_cp").read_bytes() == b"%d" % number
        expected = look(training) | look(other)
        # The folders' own times and modes are those saved last.
        assert {name: seen for name, seen in look(found).items() if name != "_dst_cp"} == expected


def test_what_another_instance_has_saved_is_carried_over_unread(
    place: Place, training: Path, tmp_path: Path, sent: list[int]
) -> None:
    uri = place.uri()
    legacy(place, uri).save(training)
    whole = sum(sent)
    sent.clear()
    small = make(tmp_path / "other", {"rank-1": b"1"})
    legacy(place, uri).save(small)
    assert sum(sent) < whole / 100
    assert look(load(legacy(place, place.uri(), uri))) == look(training) | look(small)


def test_progress_counts_what_is_carried_over_too(tmp_path: Path, training: Path) -> None:
    class Callback:
        size = done = 0

        def set_size(self, size: int) -> None:
            self.size = size

        def relative_update(self, inc: int = 1) -> None:
            self.done += inc

    checkpoint = legacy(Place(str(tmp_path)), str(tmp_path / "object"))
    for _ in range(2):
        callback = Callback()
        checkpoint.save(training, callback=callback)
        assert callback.done == callback.size > 8 * LARGE


def test_bytes_between_two_saves_of_a_folder_change_nothing(tmp_path: Path, training: Path) -> None:
    place = Place(str(tmp_path))
    checkpoint = flyte2(place, uri := place.uri())
    for _ in range(2):
        checkpoint.save_sync(training)
        checkpoint.save_sync(b"bytes")
        assert load(flyte2(place, place.uri(), uri)).read_bytes() == b"bytes"
    checkpoint.save_sync(training)
    assert look(load(flyte2(place, place.uri(), uri))) == look(training)


# ---------------------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "b/c", "b/d", "b/d/e", "f", "g"])
SIZES = st.sampled_from([0, 600, 5_000, 9_000, 40_000])


class Saves(RuleBasedStateMachine):
    """Files come, change and go between the saves of several instances and attempts; each load gives the last save.

    Some changes show neither in a file's size nor in its modification time.
    """

    is_legacy = True

    def __init__(self) -> None:
        super().__init__()
        self.chosen = random.Random(0)
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "folder"
        self.folder.mkdir()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(packing, "MEMBER_SIZE", 16 << 10)
        self.patch.setattr(packing, "LARGE_ENTRY", 4 << 10)
        self.patch.setattr(units, "ALIGNED_SIZE", 2 << 10)
        self.patch.setattr(units, "ALIGNMENT", 512)
        self.expected: dict[str, tuple[object, ...]] | None = None
        self.attempt = 0

    def teardown(self) -> None:
        KEPT.clear()
        self.patch.undo()
        shutil.rmtree(self.root)

    def made(self, attempt: int) -> Any:
        source = str(self.root / f"{attempt - 1}") if attempt else None
        return (legacy if self.is_legacy else flyte2)(Place(""), str(self.root / f"{attempt}"), source)

    @initialize(settles=st.booleans())
    def begin(self, settles: bool) -> None:
        self.patch.setattr("flytekit_ckpt.entries.SETTLED_NS", -1 if settles else 2 * 10**9)
        self.checkpoint = self.made(0)

    @rule(name=NAMES, size=SIZES)
    def write(self, name: str, size: int) -> None:
        path = self.folder / name
        for parent in reversed(path.relative_to(self.folder).parents[:-1]):
            if (self.folder / parent).is_file():
                (self.folder / parent).unlink()
            (self.folder / parent).mkdir(exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(self.chosen.randbytes(size))

    @rule(number=st.integers(0, 5))
    def rewrite(self, number: int) -> None:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size)
        if files:
            rewritten(files[number % len(files)])

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    @rule()
    def save(self) -> None:
        save(self.checkpoint, self.folder)
        self.expected = look(self.folder)
        # Times have ticks, and what happens in one tick is what files settle for.
        time.sleep(0.02)

    @rule()
    def begin_anew(self) -> None:
        """Another instance of the same attempt."""
        if not self.is_legacy or self.expected is None:
            self.checkpoint = self.made(self.attempt)

    @precondition(lambda self: self.expected is not None)
    @rule()
    def next_attempt(self) -> None:
        """The next attempt works in what it has loaded."""
        self.attempt += 1
        self.checkpoint = self.made(self.attempt)
        self.folder = load(self.checkpoint)
        assert look(self.folder) == self.expected
        self.expected = None

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.expected is not None:
            # Not as the next attempt, which would carry forward what is not the last.
            object_ = str(self.root / f"{self.attempt}")
            assert look(load(flyte2(Place(""), str(self.root / "none"), object_, carry_forward=False))) == self.expected


class Flyte2Saves(Saves):
    is_legacy = False


limits = settings(max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
TestSaves = Saves.TestCase
TestSaves.settings = limits
TestFlyte2Saves = Flyte2Saves.TestCase
TestFlyte2Saves.settings = limits
