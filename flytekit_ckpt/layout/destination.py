"""A destination before something is saved or carried forward to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from flytekit_ckpt import storage
from flytekit_ckpt.layout.locations import located, written_uri
from flytekit_ckpt.layout.loose import local_folder, remote_folder
from flytekit_ckpt.layout.reading import get, meaning
from flytekit_ckpt.layout.selection import indexed, selected
from flytekit_ckpt.layout.shapes import CARRIED, SHAPE, Payload, Tree, naming
from flytekit_ckpt.layout.writing import PutOptions, put_payload, put_tree
from flytekit_ckpt.patterns import EVERYTHING
from flytekit_ckpt.storage import Settings


def look(
    uri: str, settings: Settings, is_carried: Callable[[storage.State], bool]
) -> tuple[storage.Written | None, Payload | Tree | None]:
    """Look what is at a destination before something is added to it.

    Parameters
    ----------
    uri : str
        The object.
    settings : Settings
        How it is reached.
    is_carried : callable
        Tells whether an object was only carried forward.

    Returns
    -------
    Written or None
        The object that is to be replaced.
    Payload, Tree or None
        What has been saved there, in this package's format or in flytekit's.
    """
    target = storage.at(written_uri(uri), settings)
    # A limit is for what is restored.
    settings = replace(settings, restore_limit=None)
    while True:
        seen = target.state()
        if seen.object is None:
            path = storage.local_path(uri)
            if path is not None and path.is_dir():
                return None, local_folder(path)
            return None, remote_folder(uri, settings) if seen.has_files else None
        if CARRIED in seen.metadata or is_carried(seen):
            return seen.object, None
        if seen.metadata.get(SHAPE) != "payload" and (known := indexed(target)) is not None:
            entries = selected(target, known, EVERYTHING, settings, lambda chunks: chunks)
            return known.written, Tree(entries, known.written.version, known.metadata, known.units)
        stored = target.get()
        # Unless somebody has removed it in between.
        if stored is not None:
            with naming(uri):
                found = meaning(target.uri, stored, stored.chunks, settings)
            return storage.Written(stored.size, stored.version), found


def state(uri: str, settings: Settings) -> storage.State:
    """Look what is at a destination, in as few requests as possible."""
    found = storage.at(written_uri(uri), settings).state()
    local = storage.local_path(uri)
    has_files = found.has_files or (local is not None and local.is_dir() and any(local.iterdir()))
    return replace(found, has_files=has_files)


def link(source: str, destination: str, settings: Settings) -> bool:
    """Carry a checkpoint forward as `copy` does, if that takes no time; returns whether it did."""
    path, is_folder = located(source)
    if path is None or is_folder or storage.local_path(destination) is None:
        return False
    target = _vacant(destination, settings)
    return target is not None and storage.at(str(path), settings).link_to(target, _MARK)


def is_linked(source: str, destination: str) -> bool:
    """Tell whether a destination is one and the same file as its source, which it was carried forward from."""
    theirs, ours = located(source)[0], storage.local_path(written_uri(destination))
    if theirs is None or ours is None or os.path.realpath(theirs) == os.path.realpath(ours):
        return False
    try:
        return os.path.samefile(theirs, ours)
    except OSError:
        return False


def copy(
    source: str,
    destination: str,
    settings: Settings,
    given_up: Callable[[], bool],
    mark: storage.Metadata | None = None,
) -> storage.Written | None:
    """Carry a checkpoint forward, unless something is at the destination; what flytekit 1 left becomes one object.

    Parameters
    ----------
    source, destination : str
        URIs.
    settings : Settings
        How both are reached.
    given_up : callable
        Called repeatedly; tells whether to leave it, which raises `storage.GivenUpError`.
    mark : mapping, optional
        Added to the copy's metadata, where the storage keeps any.

    Returns
    -------
    Written or None
        The copy; `None` if there was nothing to copy.

    Raises
    ------
    ConflictError
        If something is at the destination.
    """
    path, is_folder = located(source)
    item = storage.at(source if path is None else str(path), settings)
    there = storage.State(None, has_files=True) if is_folder else item.state()
    # One request is all that a task costs which has no checkpoint.
    if there.object is None and not there.has_files:
        return None
    target = _vacant(destination, settings)
    if target is None:
        raise storage.ConflictError
    marks = {**_MARK, **(mark or {})}
    if there.object is not None:
        return item.copy_to(target, given_up, marks)
    found = get(source, replace(settings, restore_limit=None))

    def step() -> None:
        if given_up():
            raise storage.GivenUpError

    options = PutOptions(None, step, marks)
    if isinstance(found, Payload):
        return put_payload(destination, found.chunks, settings, size=found.size, options=options)
    if isinstance(found, Tree):
        return put_tree(destination, found.entries, settings, size=lambda: 0, options=options)[0]
    return None


_MARK = {CARRIED: "yes"}


def _vacant(destination: str, settings: Settings) -> storage.StoredObject | None:
    """Give the object to write, if there is nothing at its URI yet."""
    found = state(destination, settings)
    is_taken = found.object is not None or found.has_files
    return None if is_taken else storage.at(written_uri(destination), settings)
