"""Tars block by block, with everything in them that `tarfile` refuses to write."""

from __future__ import annotations

import struct
import tarfile
import zlib

BLOCK = tarfile.BLOCKSIZE
END = bytes(tarfile.RECORDSIZE)


def header(
    name: str | bytes,
    kind: bytes = tarfile.REGTYPE,
    size: int | bytes = 0,
    link: str | bytes = "",
    *,
    mode: int = 0o644,
    mtime: int = 0,
    tail: bytes = b"",
) -> bytes:
    """Make a header block, or several where a name is too long for one; `tail` is what stands behind the magic.

    A size given as bytes is the field as it is.
    """
    blocks = b""
    fields = []
    for kind_of_long, text in ((tarfile.GNUTYPE_LONGNAME, name), (tarfile.GNUTYPE_LONGLINK, link)):
        field = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        if len(field) > 100:
            blocks += header("././@LongLink", kind_of_long, len(field) + 1) + padded(field + b"\0")
        fields.append(field[:100])
    block = bytearray(BLOCK)
    struct.pack_into("100s8s8s8s12s12s8s1s100s8s", block, 0, fields[0], b"%07o" % mode, b"0" * 7, b"0" * 7,
                     size if isinstance(size, bytes) else number(size), number(mtime), b" " * 8, kind, fields[1],
                     b"ustar  \0")  # fmt: skip
    block[265 : 265 + len(tail)] = tail
    block[148:156] = b"%06o\0 " % sum(block)
    return blocks + bytes(block)


def number(value: int) -> bytes:
    """Write a number in octal digits, or as GNU tar writes those that do not fit or are negative."""
    if 0 <= value < 8**11:
        return b"%011o\0" % value
    return (b"\x80" if value >= 0 else b"\xff") + (value % 256**11).to_bytes(11, "big")


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def file(name: str | bytes, content: bytes = b"evil", **header_arguments: int) -> bytes:
    return header(name, tarfile.REGTYPE, len(content), **header_arguments) + padded(content)


def folder(name: str, mode: int = 0o755) -> bytes:
    return header(name, tarfile.DIRTYPE, mode=mode)


def link(name: str, target: str) -> bytes:
    return header(name, tarfile.SYMTYPE, link=target)


def hard_link(name: str, target: str) -> bytes:
    return header(name, tarfile.LNKTYPE, link=target)


def pax(records: dict[str, str | bytes], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Make a PAX header: for the entry that follows, or with `kind` `g` for all that follow."""
    content = b"".join(record(key, value) for key, value in records.items())
    return header("pax", kind, len(content)) + padded(content)


def record(key: str, value: str | bytes) -> bytes:
    value = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    text = b" %s=%s\n" % (key.encode(), value)
    length = len(text) + len(str(len(text)))
    return b"%d%s" % (len(text) + len(str(length)), text)


def gzipped(*parts: bytes, level: int = 1) -> bytes:
    """Compress a tar that need not be in memory as a whole."""
    engine = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join([*map(engine.compress, parts), engine.flush()])
