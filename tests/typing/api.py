"""Every public name, used as a user would; strict mypy checks this file, nothing runs it."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import flytekit_ckpt
from flytekit_ckpt import v2
from flytekit_ckpt.checkpointer import Checkpoint, SyncCheckpoint
from flytekit_ckpt.iterators import IteratorCheckpoint, PipelineCheckpoint, StateDictIterator, StateHandler


def legacy(cp: Checkpoint) -> None:
    exists: bool = cp.prev_exists()
    content: bytes | None = cp.read()
    folder: Path | None = cp.restore("folder")
    cp.write(b"")
    cp.save("file")
    cp.save(Path("file"))
    with Path("file").open("rb") as reader:
        cp.save(reader)
    print(exists, content, folder)


def legacy_made_by_hand() -> None:
    legacy(SyncCheckpoint("dest"))
    legacy(SyncCheckpoint("dest", None, storage_options={"key": "k", "secret": "s"}))
    legacy(flytekit_ckpt.SyncCheckpoint(checkpoint_dest="dest", checkpoint_src="src"))
    temporary: Path | None = SyncCheckpoint("dest", "src").restore()
    print(temporary, SyncCheckpoint.SRC_LOCAL_FOLDER, SyncCheckpoint.TMP_DST_PATH)


def current() -> None:
    legacy(flytekit_ckpt.current_context().checkpoint)
    legacy(flytekit_ckpt.current_checkpoint())


def installed() -> None:
    flytekit_ckpt.install()
    flytekit_ckpt.install(retries=20, carry_forward=False)
    flytekit_ckpt.uninstall()


def with_every_option() -> None:
    legacy(SyncCheckpoint("dest", memory_budget=1 << 26, retries=3, timeout=5, restore_limit=None, carry_forward=False))
    cp = v2.Checkpoint("dest", memory_budget=1 << 26, retries=3, timeout=0.5, restore_limit=1 << 40, carry_forward=True)
    iterators = IteratorCheckpoint("base", StateHandler(retries=0, timeout=1, restore_limit=1 << 20))
    print(cp, iterators)


def terminated(callback: Callable[[], object]) -> None:
    flytekit_ckpt.on_termination(callback)


async def new(cp: v2.BaseCheckpoint) -> None:
    awaited: Path | None = await cp.load()
    await cp.save(b"")
    loaded: Path | None = cp.load_sync()
    for data in (b"", bytearray(), memoryview(b""), "file", Path("file")):
        cp.save_sync(data)
    print(awaited, loaded, cp.path.name, cp.prev_exists())


async def new_made_by_hand() -> None:
    cp = v2.Checkpoint("dest", "src", storage_options={})
    await new(cp)
    destination: str = cp.remote_destination
    source: str | None = cp.remote_source
    latest: Path | None = flytekit_ckpt.latest_checkpoint(cp.path, "*.ckpt", key=lambda path: path.name)
    print(destination, source, latest)


def errors() -> None:
    try:
        legacy_made_by_hand()
    except flytekit_ckpt.UnsafeCheckpointError as error:
        value: ValueError = error
    except flytekit_ckpt.CorruptCheckpointError as error:
        value = error
    except flytekit_ckpt.StorageError as error:
        system: OSError = error
    except flytekit_ckpt.CheckpointUnavailableError as error:
        unavailable: NotImplementedError = error
    except flytekit_ckpt.CheckpointError as error:
        print(error)
    else:
        raise flytekit_ckpt.FlyteRecoverableException("try again", io.DEFAULT_BUFFER_SIZE)
    print(value, system, unavailable)


def in_background(folder: Path) -> None:
    with flytekit_ckpt.AsyncCheckpoint("s3://bucket/a", when_busy="wait", grace=10.0) as legacy:
        legacy.save(folder, move=True)
        future: Future[None] = legacy.save_async(str(folder))
        legacy.write_async(b"1").result()
        legacy.wait_until_finished()
        base: flytekit_ckpt.SyncCheckpoint = legacy
    new = v2.AsyncCheckpoint("s3://bucket/b", grace=5.0)
    new.save_sync(folder, move=True)
    both: list[Future[None]] = [future, new.save_async(b"1"), v2.Checkpoint("b").save_async(folder)]
    flytekit_ckpt.install(asynchronous=True, when_busy="latest")
    print(base, both)


class Data:
    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        print(state)


def iterators(checkpoint: IteratorCheckpoint, data: Data) -> None:
    uri: str = checkpoint.save_to_directory(data, 5, 1, overwrite=True, metadata={"loss": 0.5})
    restored: Data = checkpoint.restore_latest(checkpoint.restore(data, step=5))
    latest: int | None = checkpoint.get_latest_step()
    steps: dict[int, str] = checkpoint.list_checkpoints()
    exists: bool = checkpoint.has_checkpoint()
    checkpoint.wait_until_finished()
    print(uri, restored, latest, steps, exists, StateDictIterator(data).get_state())


def iterators_made_by_hand(data: Data) -> None:
    iterators(IteratorCheckpoint("s3://bucket/steps", storage_options={"key": "k", "secret": "s"}), data)
    with StateHandler(async_checkpointing=True, memory_budget=1 << 20) as handler:
        iterators(IteratorCheckpoint(Path("steps"), handler), data)
    saved: str | None = PipelineCheckpoint("steps", async_checkpointing=True).save_to_step(data, 5, interval=5, keep=2)
    print(saved)
