"""What goes wrong with a checkpoint, as exceptions that existing programs already catch."""

from __future__ import annotations


class CheckpointError(Exception):
    """Root of this package's errors."""


class CheckpointUnavailableError(CheckpointError, NotImplementedError):
    """No checkpoint belongs to the running code.

    flytekit raises `NotImplementedError` here and programs catch it, so this is one too.
    """


class StorageError(CheckpointError, OSError):
    """Storage refused or failed: no permission, wrong credentials, no such bucket, a full disk, a dead network.

    Never raised for a checkpoint that is merely not there: loading that gives `None`. The message names the
    operation and the URI, the original exception is chained.
    """


class CorruptCheckpointError(CheckpointError, ValueError):
    """The object was read, but it is not what was saved: truncated, flipped bits, not an archive any more."""


class UnsafeCheckpointError(CorruptCheckpointError):
    """An archive holds an entry that could write outside the target folder, or a device, or more than `restore_limit`.

    Nothing was written.
    """


class SaveReplacedError(CheckpointError):
    """A save in the background was not done, since a later one of the same took its place while it waited."""


class SaveNotBegunError(CheckpointError):
    """A save in the background was not begun: the process was told to end, and there was no time left for it."""


class FlyteRecoverableException(Exception):  # noqa: N818 - the name is flytekit's
    """The attempt failed, but the next one may succeed: a runner should retry it.

    Stands in for `flytekit.exceptions.user.FlyteRecoverableException` where flytekit is not installed.
    """
