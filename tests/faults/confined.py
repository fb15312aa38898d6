"""Takes from this process what an ordinary one does not have: a root's rights, room on the disk."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CAPABILITIES_VERSION = 0x20080522
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


def give_up_capabilities() -> None:
    """Have permissions bind this process even if it is root's; what root owns stays its own."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()))


def mount_small_disk(folder: Path, size: int) -> None:
    """Mount an empty disk of some bytes, which only this process sees and which ends with it.

    Raises
    ------
    OSError
        Where that is not allowed.
    """
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _checked(_libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None))
    _checked(_libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%d" % size))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
