"""What a process has to know in order to reach storage as another one does."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

from flytekit_ckpt import credentials


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        # It has been removed.
        return None


def _fsspec_configuration() -> dict[str, Any]:
    # Without fsspec, nobody has changed it.
    config: Any = sys.modules.get("fsspec.config")
    return dict(config.conf) if config is not None else {}


@dataclass(frozen=True)
class Surroundings:
    """What decides where a URI leads and who may go there, as it is when this is made."""

    folder: str | None = field(default_factory=_working_folder)
    variables: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    configured: credentials.Configured = field(default_factory=credentials.configured)
    fsspec: dict[str, Any] = field(default_factory=_fsspec_configuration)

    def enter(self) -> None:
        """Make them this process's own."""
        if self.folder is not None:
            os.chdir(self.folder)
        if dict(os.environ) != self.variables:
            os.environ.clear()
            os.environ.update(self.variables)
        credentials.inherit(self.configured)
        if self.fsspec:
            import fsspec.config

            fsspec.config.conf.update(self.fsspec)
