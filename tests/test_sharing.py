"""Disks whose file systems share the blocks of two files: what has been saved once is not copied, there, either."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flytekit_ckpt import SyncCheckpoint, v2
from flytekit_ckpt.snapshots import Snapshot
from tests.trees import look, make

LARGE = 24_000_000
SMALL = 2_000_000
CHOSEN = random.Random(11)

MAKERS = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}


@pytest.fixture(scope="module", params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of that kind in a file, which only root may mount."""
    maker = MAKERS[request.param]
    if os.geteuid() or shutil.which(maker[0]) is None:
        pytest.skip(f"needs root and {maker[0]}")
    folder = tmp_path_factory.mktemp(request.param)
    image, mounted = folder / "image", folder / "disk"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    mounted.mkdir()
    subprocess.run([*maker, str(image)], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system mounts no {request.param}: {error.stderr.decode()}")
    yield mounted
    # What a test has left behind may be removed a little later than it ends.
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


class Used:
    """Bytes that are taken of a disk, beyond those that were."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._before = self._now()

    def _now(self) -> int:
        # Some file systems count blocks only when they have been written.
        os.sync()
        status = os.statvfs(self._disk)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def __call__(self) -> int:
        return self._now() - self._before


@pytest.fixture
def training(disk: Path) -> Iterator[Path]:
    folder = make(
        disk / "training",
        {
            "model": None,
            "small": None,
            **{f"model/{number}.bin": CHOSEN.randbytes(LARGE) for number in range(4)},
            **{f"small/{number}.txt": CHOSEN.randbytes(100) for number in range(300)},
            "state.json": b"{}",
            "tail.bin": CHOSEN.randbytes(SMALL),
        },
    )
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files settle at once: a change time cannot be set, and waiting takes long."""
    monkeypatch.setattr("flytekit_ckpt.entries.SETTLED_NS", -1)


def loaded(uri: Path) -> object:
    with v2.Checkpoint(str(uri.parent / "none"), str(uri), carry_forward=False) as checkpoint:
        folder = checkpoint.load_sync()
        assert folder is not None
        return look(folder)


@pytest.mark.parametrize("kind", [SyncCheckpoint, v2.Checkpoint])
def test_what_has_not_changed_shares_its_blocks_with_what_was_saved(
    disk: Path, training: Path, kind: type[SyncCheckpoint | v2.Checkpoint]
) -> None:
    """Also where it lies elsewhere in the object, because what is before it has grown or shrunk."""
    uri = disk / "saved" / kind.__module__
    checkpoint = kind(str(uri))
    save = checkpoint.save if isinstance(checkpoint, SyncCheckpoint) else checkpoint.save_sync
    save(training)
    # The old object, which is removed when the new one is whole.
    os.link(uri, disk / "kept")
    used = Used(disk)
    (training / "model" / "0.bin").write_bytes(CHOSEN.randbytes(SMALL + 777))
    (training / "small" / "12.txt").unlink()
    save(training)
    # A file of 2 MB takes the place of one of 24, of which the old object holds a copy.
    assert used() < SMALL - LARGE + 2 * SMALL
    assert loaded(uri) == look(training)
    (disk / "kept").unlink()
    shutil.rmtree(disk / "saved")


def test_the_first_save_of_an_attempt_shares_blocks_with_what_it_has_loaded(disk: Path, training: Path) -> None:
    uri = disk / "saved"
    v2.Checkpoint(str(uri / "1")).save_sync(training)
    with v2.Checkpoint(str(uri / "2"), str(uri / "1"), carry_forward=False) as checkpoint:
        folder = checkpoint.load_sync()
        assert folder is not None
        (folder / "model" / "2.bin").write_bytes(CHOSEN.randbytes(SMALL))
        used = Used(disk)
        checkpoint.save_sync(folder)
        assert used() < 2 * SMALL
        assert loaded(uri / "2") == look(folder)
    shutil.rmtree(uri)


def test_what_is_carried_forward_is_a_clone(disk: Path, training: Path) -> None:
    uri = disk / "saved"
    SyncCheckpoint(str(uri / "1")).save(training)
    used = Used(disk)
    with SyncCheckpoint(str(uri / "2"), str(uri / "1")):
        pass
    assert used() < SMALL
    assert not os.path.samefile(uri / "1", uri / "2")
    assert loaded(uri / "2") == look(training)
    shutil.rmtree(uri)


def test_a_snapshot_is_a_clone(disk: Path, training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(disk / "temporary"))
    expected = look(training)
    used = Used(disk)
    snapshot = Snapshot.of_folder(training, lambda _: None)
    assert used() < SMALL
    (training / "model" / "0.bin").write_bytes(b"later")
    assert look(snapshot.path) == expected
    snapshot.discard()
    shutil.rmtree(disk / "temporary")
