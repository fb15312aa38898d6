"""Entries as a gzip-compressed tar: entries in, chunks of bytes out, and back.

Nothing here knows a URI. An archive is produced and consumed as an iterator of chunks, so that packing and uploading
(or downloading and unpacking) overlap and neither an archive nor a large file is ever in memory.
"""

from flytekit_ckpt.archive.packing import Item, end_of_archive, pack
from flytekit_ckpt.archive.reading import read
from flytekit_ckpt.archive.reuse import repeated, unchanged
from flytekit_ckpt.archive.units import Unit

__all__ = ["Item", "Unit", "end_of_archive", "pack", "read", "repeated", "unchanged"]
