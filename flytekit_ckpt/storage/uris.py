"""What a URI names, and what of it may be shown."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit


def local_path(uri: str) -> Path | None:
    """Return the local path that a URI means, or `None` if it is not local."""
    for scheme in ("file://", "local://", "file:"):
        if uri.startswith(scheme):
            return Path(uri[len(scheme) :])
    return None if "://" in uri else Path(uri)


def canonical(uri: str) -> str:
    """Return one and the same text for a URI or path, however it is written."""
    path = local_path(uri)
    return uri.rstrip("/") if path is None else os.path.abspath(path)


def public(uri: str) -> str:
    """Return a URI without the user, password and query that it may carry."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
