"""Everything that the processes of the trials use, imported once, in the server that they are forked from."""

import contextlib

import s3fs  # noqa: F401

import flytekit_ckpt.archive
import flytekit_ckpt.checkpointer
import flytekit_ckpt.v2  # noqa: F401
import tests.faults.crashes
import tests.faults.losses  # noqa: F401

with contextlib.suppress(ImportError):
    import flyte
    import flyte.io  # noqa: F401
with contextlib.suppress(ImportError):
    import flytekit  # noqa: F401
