"""One object at a URI, through fsspec: chunks in, all or nothing; chunks out, read ahead.

Knows nothing of what the bytes mean. Local files, S3, Google Cloud Storage and Azure have a path of their own,
everything else goes through fsspec's general interface.
"""

from __future__ import annotations

import contextlib

from flytekit_ckpt.credentials import is_imported
from flytekit_ckpt.storage.azure import AzureObject
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, is_forbidden, overwritten, undisturbed
from flytekit_ckpt.storage.gcs import GcsObject
from flytekit_ckpt.storage.general import FsspecObject, filesystem_class
from flytekit_ckpt.storage.local import ATTRIBUTE, LocalObject
from flytekit_ckpt.storage.objects import (
    ANYTHING,
    CONCURRENCY,
    PART_SIZE,
    RETRIES,
    TIMEOUT,
    Metadata,
    Previous,
    Replaced,
    Settings,
    State,
    Stored,
    StoredObject,
    Tail,
    Written,
)
from flytekit_ckpt.storage.s3 import S3Object
from flytekit_ckpt.storage.slots import is_temporary
from flytekit_ckpt.storage.surroundings import Surroundings
from flytekit_ckpt.storage.turns import turn
from flytekit_ckpt.storage.uris import canonical, local_path, public

__all__ = [
    "ANYTHING",
    "ATTRIBUTE",
    "CONCURRENCY",
    "PART_SIZE",
    "RETRIES",
    "TIMEOUT",
    "AzureObject",
    "ConflictError",
    "FsspecObject",
    "GcsObject",
    "GivenUpError",
    "LocalObject",
    "Metadata",
    "Previous",
    "Replaced",
    "S3Object",
    "Settings",
    "State",
    "Stored",
    "StoredObject",
    "Surroundings",
    "Tail",
    "Written",
    "at",
    "canonical",
    "import_client",
    "is_client_imported",
    "is_forbidden",
    "is_shared",
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
    return _kind(uri)(uri, settings)


def _kind(uri: str) -> type[FsspecObject]:
    return _KINDS.get(uri.partition("://")[0], FsspecObject)


def is_shared(uri: str) -> bool:
    """Tell whether another process reaches the same by a URI: the memory of this one, for example, it does not."""
    return local_path(uri) is not None or uri.partition("://")[0] in _KINDS


def is_client_imported(uri: str) -> bool:
    """Tell whether an import of what reaches a shared URI takes no time; nothing is imported for it."""
    return local_path(uri) is not None or is_imported(_CLIENTS.get(_kind(uri), ""))


def import_client(uri: str) -> None:
    """Import what reaches a URI, in the calling thread, before another one uses it.

    Two threads that import parts of one package block each other, for which Python fails one of the two imports.
    """
    if local_path(uri) is None:
        # Whoever uses it is told.
        with contextlib.suppress(ImportError, ValueError):
            filesystem_class(uri.partition("://")[0])


_KINDS: dict[str, type[FsspecObject]] = {
    "s3": S3Object,
    "s3a": S3Object,
    "gs": GcsObject,
    "gcs": GcsObject,
    "abfs": AzureObject,
    "abfss": AzureObject,
    "az": AzureObject,
}

_CLIENTS: dict[type[FsspecObject], str] = {S3Object: "s3fs", GcsObject: "gcsfs", AzureObject: "adlfs"}
