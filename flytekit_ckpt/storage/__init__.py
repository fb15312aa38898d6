"""One object at a URI, through fsspec: chunks in, all or nothing; chunks out, read ahead.

Knows nothing of what the bytes mean. Local files and S3 have a path of their own, everything else goes through
fsspec's general interface.
"""

from __future__ import annotations

from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, overwritten, undisturbed
from flytekit_ckpt.storage.general import FsspecObject
from flytekit_ckpt.storage.local import ATTRIBUTE, LocalObject
from flytekit_ckpt.storage.objects import (
    ANYTHING,
    CONCURRENCY,
    PART_SIZE,
    RETRIES,
    TIMEOUT,
    Metadata,
    Replaced,
    Settings,
    State,
    Stored,
    StoredObject,
    Written,
)
from flytekit_ckpt.storage.s3 import S3Object
from flytekit_ckpt.storage.slots import is_temporary
from flytekit_ckpt.storage.turns import turn
from flytekit_ckpt.storage.uris import local_path, public

__all__ = [
    "ANYTHING",
    "ATTRIBUTE",
    "CONCURRENCY",
    "PART_SIZE",
    "RETRIES",
    "TIMEOUT",
    "ConflictError",
    "FsspecObject",
    "GivenUpError",
    "LocalObject",
    "Metadata",
    "Replaced",
    "S3Object",
    "Settings",
    "State",
    "Stored",
    "StoredObject",
    "Written",
    "at",
    "is_temporary",
    "local_path",
    "overwritten",
    "public",
    "turn",
    "undisturbed",
]


def at(uri: str, settings: Settings | None = None) -> StoredObject:
    """Name the object at a URI; a plain path or a `file://` URI is a local file."""
    path = local_path(uri)
    if path is not None:
        return LocalObject(path, settings)
    # But for the root of a store.
    uri = uri if uri.endswith("://") else uri.rstrip("/")
    return S3Object(uri, settings) if uri.startswith(("s3://", "s3a://")) else FsspecObject(uri, settings)
