"""Folders as values: made from a description, and looked at for comparison."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hypothesis import strategies as st

Tree = dict[str, bytes | None | str]
"""Relative names and what is there: a file's bytes, `None` for a folder, a link's target as text."""

# Slashes and NULs cannot be in a name; lone surrogates stand for bytes that are not UTF-8.
_NAMES = st.one_of(
    st.sampled_from(
        ["a", "b", "c", "payload", "_dst_cp", " sp ", "ü", "new\nline", "back\\slash", "-dash", "#h", "%41"]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12),
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)

CONTENTS = st.one_of(st.just(b""), st.binary(max_size=64), st.sampled_from([bytes(600), b"x" * 5000]))


def trees(names: st.SearchStrategy[str] = _NAMES, *, links: bool = True) -> st.SearchStrategy[Tree]:
    """Folders three levels deep at most, with empty folders, empty files and links between siblings."""
    level: st.SearchStrategy[dict] = st.dictionaries(names, CONTENTS, max_size=3)
    for _ in range(2):
        level = st.dictionaries(names, CONTENTS | level, max_size=4)
    return st.builds(_flattened, level, st.booleans() if links else st.just(False))


def _flattened(nested: dict, with_link: bool, prefix: str = "") -> Tree:
    tree: Tree = {}
    for name, content in nested.items():
        if isinstance(content, dict):
            tree[prefix + name] = None
            tree |= _flattened(content, with_link, f"{prefix}{name}/")
        else:
            tree[prefix + name] = content
            if with_link and f"{name}.link" not in nested:
                tree[f"{prefix}{name}.link"] = name
    return tree


def make(folder: Path, tree: Tree) -> Path:
    """Create a folder as described."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    return folder


def look(folder: Path, *, follow: bool = False, modes: bool = True) -> dict[str, tuple[object, ...]]:
    """Describe everything below a folder; with `follow`, links as what they point to and no empty folders."""
    seen: dict[str, tuple[object, ...]] = {}
    for root, folders, files in os.walk(folder, followlinks=follow):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            relative = os.path.relpath(path, folder)
            status = os.stat(path) if follow else os.lstat(path)
            mode = stat.S_IMODE(status.st_mode) if modes else 0
            if stat.S_ISLNK(status.st_mode):
                seen[relative] = ("link", os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                if not follow:
                    seen[relative] = ("folder", mode)
            else:
                with open(path, "rb") as file:
                    seen[relative] = ("file", file.read(), mode)
    return seen
