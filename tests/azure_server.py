"""The Azure Blob Storage that the tests run against: Azurite, where it is installed below `.emulators`."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.servers import reserved_port, running

_PACKAGE = Path(__file__).parents[1] / ".emulators" / "node_modules" / "azurite"
_PROGRAM = _PACKAGE / "dist" / "src" / "blob" / "main.js"


@dataclass(frozen=True)
class AzureServer:
    """A running emulator.

    Parameters
    ----------
    kind
        Its name and version.
    connection
        The connection string of its only account.
    key
        That account's key.
    """

    kind: str
    connection: str
    key: str


def missing() -> str | None:
    """Say what is not installed; `None` if everything is."""
    if importlib.util.find_spec("adlfs") is None:
        return "the extra `clouds` is not installed"
    if shutil.which("node") is None or not _PROGRAM.exists():
        return "Azurite is not installed: `npm install --prefix .emulators azurite`"
    return None


def available() -> str:
    """Say which server `serve` would start, without starting it."""
    return missing() or f"Azurite {json.loads((_PACKAGE / 'package.json').read_text())['version']}"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[AzureServer]:
    """Run Azurite on a free port of 127.0.0.1, with everything in memory.

    Parameters
    ----------
    folder
        Where it logs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    account, key = f"a{secrets.token_hex(8)}", base64.b64encode(secrets.token_bytes(48)).decode()
    with reserved_port() as port:
        command = ["node", str(_PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
        # The client may be newer than it.
        command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
        environment = {**os.environ, "AZURITE_ACCOUNTS": f"{account}:{key}"}
        with running(command, port, folder / "azurite.log", environment):
            connection = (
                f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};"
                f"BlobEndpoint=http://127.0.0.1:{port}/{account};"
            )
            yield AzureServer(available(), connection, key)
