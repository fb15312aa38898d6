"""Which object or folder a URI means."""

from __future__ import annotations

import os
from pathlib import Path

from flytekit_ckpt import storage
from flytekit_ckpt.folders import Exclude
from flytekit_ckpt.layout.shapes import OBJECT_NAME
from flytekit_ckpt.scratch import is_scratch


def written_uri(uri: str) -> str:
    """The object to write: inside a local destination that is a folder, else the URI itself."""
    path = storage.local_path(uri)
    return str(path / OBJECT_NAME) if path is not None and path.is_dir() else uri


def check_is_outside(uri: str, folder: Path) -> None:
    """Refuse to have a folder given away that the object at a URI lies in."""
    written = storage.local_path(written_uri(uri))
    if written is not None and Path(os.path.realpath(written)).is_relative_to(os.path.realpath(folder)):
        message = f"{folder} cannot be given away with move=True: the checkpoint itself is saved into it, to {written}"
        raise ValueError(message)


def not_into_itself(uri: str) -> Exclude:
    """Exclude the object at a URI, and what is kept for it meanwhile, from a folder that is saved there."""
    written = storage.local_path(written_uri(uri))
    object_name = None if written is None else written.name

    def reason(item: os.DirEntry[str]) -> str | None:
        is_object = item.name == object_name
        if not is_object and not item.name.startswith("."):
            # What is kept meanwhile is hidden.
            return None
        if is_scratch(item.name):
            return ""
        if written is None or not (is_object or storage.is_temporary(item.name, written)):
            return None
        if os.path.realpath(os.path.dirname(item.path)) != os.path.realpath(written.parent):
            return None
        return "it is what the checkpoint itself is saved to" if is_object else ""

    return reason


def located(uri: str) -> tuple[Path | None, bool]:
    """Return the local path to read, if it is one, and whether that is a folder of loose files."""
    path = storage.local_path(uri)
    if path is None or not path.is_dir():
        return path, False
    return (path / OBJECT_NAME, False) if (path / OBJECT_NAME).is_file() else (path, True)
