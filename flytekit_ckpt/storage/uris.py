"""What a URI names, and what of it may be shown."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit


def local_path(uri: str) -> Path | None:
    """Return the local path that a URI means, or `None` if it is not local."""
    for scheme in ("file://", "local://", "file:"):
        if uri.startswith(scheme):
            return Path(uri[len(scheme) :])
    return None if "://" in uri else Path(uri)


def public(uri: str) -> str:
    """Return a URI without the user, password and query that it may carry."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
