"""The headers that nearly all entries have, read directly: tarfile takes many times as long.

A header that is not exactly of this kind is left to tarfile, which is the judge of what it means, or whether it is
damaged. What is read here is what tarfile would have read.
"""

from __future__ import annotations

import functools
import re
import struct
import tarfile

from flytekit_ckpt.compression import byte_sum

_BLOCK = tarfile.BLOCKSIZE

# Mode, owner, group, size, time, checksum, and the type: a file, a folder, a symbolic link, a PAX header.
_NUMBERS = re.compile(rb"([0-7]{7})\0([0-7]{7})\0([0-7]{7})\0([0-7]{11})\0([0-7]{11})\0([0-7]{6})\0[\0 ]([052x])")
_NUMBERS_AT = 100
_CHECKSUM = slice(148, 156)
_KIND_AT = 156

# What follows: link target, (magic and version,) names of owner and group, (device,) the first byte of the prefix.
_REST = struct.Struct("100s8x32s32s16xc")
_REST_AT = 157
_NO_REST = bytes(100) + b"ustar\x0000" + bytes(_BLOCK - _REST_AT - 108)
_DEVICE = slice(329, 345)
_NO_DEVICE = (bytes(16), b"0000000\0" * 2)

# Then bytes that are no text are read alike everywhere.
_IS_UTF8 = tarfile.ENCODING == "utf-8"

_PAX_LIMIT = 4 << 10
"""Bytes of PAX records that are looked at here."""

_PLAIN_KEYS = {key.encode(): key for key in ("path", "linkpath", "mtime", "atime", "ctime")}
_OUR_KEYS = b"flytekit_ckpt."


def read_plain(data: memoryview, position: int) -> tarfile.TarInfo | None:
    """Read the header that some bytes begin with, if it is a plain one; where it ends is its `offset_data`.

    Plain is a file, folder or symbolic link that a ustar header describes, with or without a PAX header of its own. No
    global PAX header may have come before.

    Parameters
    ----------
    data : memoryview
        What is at hand of the tar from there on.
    position : int
        Where in the tar that is.
    """
    start = 0
    records: dict[str, str] = {}
    block = bytes(data[:_BLOCK])
    if not _IS_UTF8:
        return None
    size = _pax_size(block) if block[_KIND_AT : _KIND_AT + 1] == tarfile.XHDTYPE else 0
    if size is None:
        return None
    if size:
        end = _BLOCK + size
        start = end + -size % _BLOCK
        found = _pax_records(bytes(data[_BLOCK:end]))
        if found is None or data[end:start] != bytes(start - end):
            return None
        records = found
        block = bytes(data[start : start + _BLOCK])
    info = _described(block, records)
    if info is not None:
        info.offset = position
        info.offset_data = position + start + _BLOCK
    return info


@functools.lru_cache(64)
def _pax_size(block: bytes) -> int | None:
    """Tell how many bytes of PAX records follow a block; `None` if that is nothing to be read here."""
    numbers = _numbers(block)
    if numbers is None:
        return None
    size = int(numbers[4], 8)
    return size if 0 < size <= _PAX_LIMIT else None


def _numbers(block: bytes) -> re.Match[bytes] | None:
    """Find a block's numbers, if they are plain and their checksum is right."""
    numbers = _NUMBERS.match(block, _NUMBERS_AT)
    if numbers is None or len(block) < _BLOCK or block[_DEVICE] not in _NO_DEVICE:
        return None
    # Of the checksum's own bytes each counts as a blank.
    return numbers if byte_sum(block) - sum(block[_CHECKSUM]) + 8 * 0x20 == int(numbers[6], 8) else None


def _described(block: bytes, records: dict[str, str]) -> tarfile.TarInfo | None:
    """Read the block of a file, a folder or a symbolic link."""
    numbers = _numbers(block)
    if numbers is None:
        return None
    mode, uid, gid, size, mtime, checksum, kind = numbers.groups()
    info = tarfile.TarInfo(_text(block[:_NUMBERS_AT]))
    info.mode = int(mode, 8)
    info.size = int(size, 8)
    info.mtime = int(mtime, 8)
    info.chksum = int(checksum, 8)
    info.type = kind
    if kind != tarfile.REGTYPE:
        if info.size or kind == tarfile.XHDTYPE:
            return None
        if kind == tarfile.DIRTYPE:
            info.name = info.name.rstrip("/")
    if uid != b"0000000" or gid != b"0000000":
        info.uid = int(uid, 8)
        info.gid = int(gid, 8)
    if not block.endswith(_NO_REST):
        link, owner, group, prefix = _REST.unpack_from(block, _REST_AT)
        if prefix != b"\0":
            return None
        info.linkname = _text(link)
        info.uname = _text(owner)
        info.gname = _text(group)
    if records:
        info.pax_headers = records
        if "path" in records:
            info.name = records["path"].rstrip("/")
        if "linkpath" in records:
            info.linkname = records["linkpath"]
        if "mtime" in records:
            try:
                info.mtime = float(records["mtime"])
            except ValueError:
                info.mtime = 0
    return info


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")


def _pax_records(content: bytes) -> dict[str, str] | None:
    """Read PAX records that are well-formed to the last byte, and that mean nothing but what they say."""
    # tarfile looks for this one everywhere, within the values of others too.
    if b"hdrcharset" in content:
        return None
    records: dict[str, str] = {}
    start = 0
    while start < len(content):
        digits, blank, _ = content[start : start + 6].partition(b" ")
        if not blank or not digits.isdigit() or digits.startswith(b"0"):
            return None
        end = start + int(digits)
        key, equals, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            return None
        try:
            keyword = _PLAIN_KEYS.get(key) or (key.decode("ascii") if key.startswith(_OUR_KEYS) else "")
            if not keyword:
                return None
            records[keyword] = value.decode()
        except UnicodeDecodeError:
            return None
        start = end
    return records
