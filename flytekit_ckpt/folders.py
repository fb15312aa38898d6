"""A folder on the local disk as entries: walked, sorted, links judged."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flytekit_ckpt.entries import Entry, file_entry, header
from flytekit_ckpt.files import mapped_files

Exclude = Callable[["os.DirEntry[str]"], str | None]
"""Says why what lies in a folder is not to be saved: `None` if it is, an empty string where nobody needs to know."""


def scan_folder(folder: Path, exclude: Exclude = lambda _: None) -> Iterator[Entry]:
    """Walk a folder's contents, sorted, without following links that stay inside it.

    A link that leads out of the folder, or is absolute, is given as what it points to: in the next container it would
    dangle. Hard links are files. Sockets, fifos, devices and links to nothing are left out with a warning.
    """
    return _Scan(os.path.realpath(folder), exclude, _warn_left_out, mapped_files()).entries(str(folder))


def folder_size(folder: Path, exclude: Exclude = lambda _: None) -> int:
    """Sum up the bytes of the files that `scan_folder` will give."""
    entries = _Scan(os.path.realpath(folder), exclude, lambda *_: None).entries(str(folder))
    return sum(entry.info.size for entry in entries)


@dataclass(frozen=True)
class _Scan:
    """A walk through a folder.

    Attributes
    ----------
    root : str
        The folder that links are to stay in.
    exclude : callable
        Says why something is not to be saved.
    left_out : callable
        Takes each path that is left out, and the reason.
    mapped : frozenset or None
        What `files.mapped_files` has given.
    """

    root: str
    exclude: Exclude
    left_out: Callable[[str, str], object]
    mapped: frozenset[tuple[int, int]] | None = None

    def entries(self, folder: str, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[Entry]:
        here = os.stat(folder)
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            self.left_out(folder, "a link leads from a folder back to itself")
            return
        for item in sorted(os.scandir(folder), key=lambda item: item.name):
            path, name = item.path, prefix + item.name
            reason = self.exclude(item)
            if reason is not None:
                if reason:
                    self.left_out(path, reason)
                continue
            if item.is_symlink():
                link = os.readlink(path)
                if not os.path.exists(path):
                    self.left_out(path, f"it is a link to {link}, which does not exist")
                    continue
                if stays_inside(path, link, self.root):
                    if _is_storable(os.stat(path)):
                        yield _link_entry(path, name, link)
                    else:
                        self.left_out(path, f"it is a link to {link}, which is neither a file nor a folder")
                    continue
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                yield Entry(header(name, status, tarfile.DIRTYPE))
                # Behind a link that leads out, links are judged by the folder that they lie in.
                inner = replace(self, root=os.path.realpath(path)) if item.is_symlink() else self
                yield from inner.entries(path, name + "/", (*above, identity))
            elif stat.S_ISREG(status.st_mode):
                yield file_entry(path, name, status, self.mapped)
            else:
                self.left_out(path, "it is neither a file, a folder nor a link")


def _link_entry(path: str, name: str, link: str) -> Entry:
    info = header(name, os.lstat(path), tarfile.SYMTYPE)
    info.linkname = link
    return Entry(info)


def stays_inside(path: str, link: str, root: str) -> bool:
    """Whether a link is relative and neither its text nor where it ends leaves the folder `root`."""
    if os.path.isabs(link):
        return False
    places = [os.path.normpath(os.path.join(os.path.realpath(os.path.dirname(path)), link))]
    try:
        os.stat(path)
    except OSError as error:
        # A circle, or more links after links than the system follows: it leads nowhere, and there may be any number.
        leads_nowhere = error.errno == errno.ELOOP
    else:
        leads_nowhere = False
    if not leads_nowhere:
        places.append(os.path.realpath(path))
    return all(os.path.commonpath((root, place)) == root for place in places)


def _is_storable(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)


def _warn_left_out(path: str, reason: str) -> None:
    warnings.warn(f"{path} is left out of the checkpoint: {reason}", RuntimeWarning, stacklevel=3)
