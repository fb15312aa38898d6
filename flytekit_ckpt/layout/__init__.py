"""What a checkpoint's bytes mean: a payload, a tree, or a folder that flytekit 1 left.

A payload is an object that holds the saved bytes as they are, a tree one that holds a gzip-compressed tar: both are
what Flyte 2 reads and writes. Payloads that a reader would take for something else are wrapped, that is stored as a
tree whose one member, `payload`, is marked.
"""

from flytekit_ckpt.layout.destination import copy, is_linked, link, look, state
from flytekit_ckpt.layout.locations import check_is_outside, not_into_itself, written_uri
from flytekit_ckpt.layout.reading import get, get_unit
from flytekit_ckpt.layout.selection import Known, known
from flytekit_ckpt.layout.shapes import (
    CARRIED,
    LEGACY_PAYLOAD_NAME,
    OBJECT_NAME,
    PAYLOAD_NAME,
    RESUMED,
    Event,
    Found,
    Origin,
    Payload,
    Tree,
    as_bytes,
    in_background,
    log_nothing,
    naming,
    not_savable,
)
from flytekit_ckpt.layout.writing import PutOptions, put_payload, put_tree, sized

__all__ = [
    "CARRIED",
    "LEGACY_PAYLOAD_NAME",
    "OBJECT_NAME",
    "PAYLOAD_NAME",
    "RESUMED",
    "Event",
    "Found",
    "Known",
    "Origin",
    "Payload",
    "PutOptions",
    "Tree",
    "as_bytes",
    "check_is_outside",
    "copy",
    "get",
    "get_unit",
    "in_background",
    "is_linked",
    "known",
    "link",
    "log_nothing",
    "look",
    "naming",
    "not_into_itself",
    "not_savable",
    "put_payload",
    "put_tree",
    "sized",
    "state",
    "written_uri",
]
