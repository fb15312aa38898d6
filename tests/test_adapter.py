"""What is carried from one object to the next: merged as if it were unpacked, and hardly any of it read."""

from __future__ import annotations

import io
import random
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import archive, layout, storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.checkpointer import SyncCheckpoint
from flytekit_ckpt.entries import Entry, in_part
from flytekit_ckpt.folders import scan_folder
from flytekit_ckpt.merging import merge
from flytekit_ckpt.pipeline import Range
from flytekit_ckpt.storage import StoredObject
from tests.conftest import Place
from tests.trees import Tree, look, make, trees

modestly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def packed(items: Iterator[Entry | Unit], old: bytes, small: int = 8000) -> tuple[bytes, list[Unit]]:
    """Pack with tiny members, of three entries or so, so that small trees have several units."""
    units: list[Unit] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive.packing, "MEMBER_SIZE", small)
        patch.setattr(archive.packing, "LARGE_ENTRY", small // 4)
        patch.setattr(archive.units, "ALIGNED_SIZE", small // 8)
        patch.setattr(archive.units, "ALIGNMENT", 512)
        chunks = [
            old[chunk.start : chunk.start + chunk.length] if isinstance(chunk, Range) else chunk
            for chunk in archive.pack(items, record=units.append)
        ]
    return b"".join(chunks), units


def found_in(content: bytes) -> dict[str, bytes | None]:
    return {entry.name: None if entry.info.isdir() else b"".join(entry.chunks()) for entry in archive.read([content])}


@settings(modestly, max_examples=200)
@given(st.lists(trees(links=False), min_size=2, max_size=4), st.booleans(), st.data())
def test_parts_merge_name_by_name_whether_units_are_carried_or_not(
    parts: list[Tree], is_replaced: bool, data: st.DataObject
) -> None:
    numbers = ["", *map(str, range(1, len(parts)))]
    if is_replaced:
        numbers.append(data.draw(st.sampled_from(numbers[:-1])))
        parts = [*parts, data.draw(trees(links=False))]
    opened: list[Unit] = []
    content, units = b"", list[Unit]()
    wanted: dict[str, tuple[str, bytes | None]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number, (part, tree) in enumerate(zip(numbers, parts, strict=True)):
            folder = make(Path(name) / f"part-{number}", tree)

            def open_unit(unit: Unit, old: bytes = content, part: str = part) -> Iterator[Entry]:
                assert unit.parts != {part}
                opened.append(unit)
                members = old[unit.start : unit.start + unit.length]
                return archive.read([members, archive.end_of_archive()])

            newer = in_part(scan_folder(folder), part)
            content, units = packed(merge(units, newer, part, open_unit), content)
            files = [entry for entry, held in tree.items() if held is not None]
            wanted = {
                entry: held
                for entry, held in wanted.items()
                if held[0] != part and not any(entry == file or entry.startswith(f"{file}/") for file in files)
            }
            wanted |= {entry: (part, held) for entry, held in tree.items()}
            # In order, so that the next part can be merged.
            assert list(found_in(content)) == sorted(wanted, key=lambda entry: entry.split("/"))
    assert found_in(content) == {entry: held for entry, (_, held) in wanted.items()}
    # A unit of one entry is kept or dropped, and nobody has to look into it.
    assert all(unit.first != unit.last for unit in opened)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert {entry.name for entry in tar} == wanted.keys()
    assert [unit.start - unit.gap for unit in units] == [0, *(unit.end for unit in units)][:-1]
    assert all(unit.start % 512 == 0 for unit in units if unit.members[0].length >= 1000)


def test_a_part_that_shares_a_unit_with_another_is_replaced_alone(tmp_path: Path) -> None:
    content, units = b"", list[Unit]()
    # The second part falls between the first one's entries, which then share a unit with it.
    for part, tree in (("", {"a": b"1", "c": b"2"}), ("1", {"b": b"3"}), ("", {"d": b"4"})):
        folder = make(tmp_path / f"{part}-{len(tree)}", tree)

        def open_unit(unit: Unit, old: bytes = content) -> Iterator[Entry]:
            return archive.read([old[unit.start : unit.start + unit.length], archive.end_of_archive()])

        content, units = packed(merge(units, in_part(scan_folder(folder), part), part, open_unit), content)
    assert found_in(content) == {"b": b"3", "d": b"4"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of stored objects that are read, as they are read."""
    sizes: list[int] = []

    def counted(kind: type[StoredObject]) -> None:
        original = kind.get_range

        def get_range(self: StoredObject, part: Range, written: storage.Written) -> Iterator[storage.Chunk]:
            sizes.append(part.length)
            return original(self, part, written)

        monkeypatch.setattr(kind, "get_range", get_range)

    for kind in (storage.LocalObject, storage.S3Object):
        counted(kind)
    return sizes


def test_large_files_are_carried_without_being_read(place: Place, tmp_path: Path, read: list[int]) -> None:
    noise = random.Random(4).randbytes(30_000_000)
    source = make(tmp_path / "source", {"model": noise, "small": b"1"})
    (tmp_path / "z").write_bytes(b"z" * 3_000_000)
    uri = place.uri()
    cp = SyncCheckpoint(uri, storage_options=place.options)
    cp.save(source)
    cp.write(b"5")
    cp.save(tmp_path / "z")
    cp.write(b"6")
    # On S3 a range that is no part of its own, and what a part lacks that comes before one, are fetched.
    assert sum(read) < (20_000_000 if place.root.startswith("s3") else 100_000)
    target = tmp_path / "target"
    target.mkdir()
    SyncCheckpoint(place.uri(), uri, storage_options=place.options).restore(target)
    wanted = {**look(source), "_dst_cp": b"6", "z": b"z" * 3_000_000}
    assert {name: held[1] if isinstance(held, tuple) else held for name, held in wanted.items()} == {
        name: held[1] for name, held in look(target).items()
    }


def test_a_part_is_replaced_by_itself_however_often_it_is_saved(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    cp = SyncCheckpoint(uri, storage_options=place.options)
    make(tmp_path / "other", {"other": random.Random(1).randbytes(1_000_000)})
    cp.save(tmp_path / "other")
    sizes = set()
    for step in range(5):
        source = make(tmp_path / "steps", {f"model-{step}": random.Random(step).randbytes(2_000_000)})
        cp.save(source)
        (source / f"model-{step}").unlink()
        stored = storage.at(uri, place.settings).get()
        assert stored is not None
        sizes.add(stored.size // 100_000)
    assert sizes == {30}
    assert layout.get(uri, place.settings) is not None


def test_parts_are_carried_on_any_storage_that_fsspec_reaches(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/object"
    source = make(tmp_path / "source", {"model": random.Random(1).randbytes(9_000_000), "opt": b"x" * 3_000_000})
    cp = SyncCheckpoint(uri)
    for name in ("model", "opt", "opt"):
        cp.save(source / name)
        cp.write(b"5")
    target = tmp_path / "target"
    target.mkdir()
    SyncCheckpoint("", uri).restore(target)
    assert {name: held[1] for name, held in look(target).items()} == {
        "_dst_cp": b"5",
        **{name: held[1] for name, held in look(source).items()},
    }
    SyncCheckpoint(uri).write(b"of another instance")
    cp.save(source / "opt")
    assert {name: held[1] for name, held in look(restored(uri, tmp_path / "again")).items()} == {
        "_dst_cp": b"of another instance",
        **{name: held[1] for name, held in look(source).items()},
    }


def restored(uri: str, target: Path) -> Path:
    target.mkdir()
    SyncCheckpoint("", uri).restore(target)
    return target
