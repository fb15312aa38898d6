"""Paths of what was loaded, and in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

from flytekit_ckpt import layout


class PayloadPath(PosixPath):
    """The path of a loaded payload, `.../payload`; joined with `"payload"` it is itself.

    Flyte's tutorial opens `load_sync() / "payload"`, its API reference says that `load_sync()` is that file.
    """

    def __truediv__(self, key: str | os.PathLike[str]) -> PayloadPath:
        return self.joinpath(key)

    def joinpath(self, *others: str | os.PathLike[str]) -> PayloadPath:
        if others and self.name == os.fspath(others[0]) == layout.PAYLOAD_NAME:
            others = others[1:]
        return super().joinpath(*others)


def latest_checkpoint(
    root: Path, glob_pattern: str = "**/last.ckpt", *, key: Callable[[Path], Any] | None = None
) -> Path | None:
    """Return the newest match of a pattern in a loaded tree (flyte: `flyte.latest_checkpoint`).

    Parameters
    ----------
    root : pathlib.Path
        The tree, as `Checkpoint.load_sync` returns it.
    glob_pattern : str, default "**/last.ckpt"
        As for `pathlib.Path.glob`; `**/` searches every depth.
    key : callable, optional
        Ranks a match; its modification time if not given. Of equals, the last path in sorted order is taken.

    Returns
    -------
    pathlib.Path or None
        `None` if nothing matches.
    """
    rank = key if key is not None else _modification_time
    # Sorted by path first, so that max() settles ties by it.
    matches = sorted(Path(root).glob(glob_pattern), reverse=True)
    return max(matches, key=rank, default=None)


def _modification_time(path: Path) -> float:
    return path.stat().st_mtime
