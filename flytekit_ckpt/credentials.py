"""What reaches an object store: the options a caller gives, and those that Flyte's platforms configure."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from flytekit_ckpt.options import StorageOptions

_S3 = ("s3", "s3a")
_AZURE = ("abfs", "abfss", "az")

# Whoever gives one of these has chosen a way to log in, which nothing of another is mixed into.
_S3_LOGINS = ("key", "secret", "token", "anon", "profile", "session", "username", "password")
_AZURE_LOGINS = ("account_key", "client_secret", "connection_string", "credential", "sas_token", "anon")
_AZURE_NAMES = ("account_key", "tenant_id", "client_id", "client_secret")


def resolved(protocol: str, given: StorageOptions) -> dict[str, Any]:
    """Fill in what the caller did not give.

    Asked in this order: what `flyte.init(storage=...)` was given, the `FLYTE_AWS_*` variables that Flyte sets in its
    containers, and flytekit's configuration, which may come from its file. What nobody gives is left to fsspec's
    configuration and the cloud SDK's own variables and files. Neither package is imported for it.

    Parameters
    ----------
    protocol : str
        What stands before `://`.
    given : mapping
        Keyword arguments of the fsspec filesystem; they are never replaced.

    Returns
    -------
    dict
    """
    options = dict(given)
    known = _inherited[-1] if _inherited else configured()
    if protocol in _S3:
        for told in known.s3:
            _fill_s3(options, told)
    elif protocol in _AZURE:
        for told in known.azure:
            _fill_azure(options, told)
    return options


class Configured(NamedTuple):
    """What the platforms say of each kind of store, those who are asked first in front."""

    s3: list[_Configured]
    azure: list[_Configured]


def configured() -> Configured:
    """Ask the platforms that run in this process."""
    return Configured([*_flyte("S3"), _environment(), *_flytekit("s3")], [*_flyte("ABFS"), *_flytekit("azure")])


def inherit(told: Configured) -> None:
    """Go by what the platforms have said in the process that they run in, instead of this one."""
    _inherited[:] = [told]


_inherited: list[Configured] = []


class _Configured(dict[str, Any]):
    """What a platform says, by the names of its own attributes; `None` where it says nothing."""

    def __missing__(self, name: str) -> None:
        return None


def _flyte(kind: str) -> Iterator[_Configured]:
    """Give what `flyte.init` was told, if it was told of this kind of store."""
    if not (is_imported("flyte") and is_imported("flyte.storage")):
        return
    import flyte.storage
    from flyte._initialize import get_storage
    from flyte.errors import InitializationError

    with contextlib.suppress(InitializationError):
        storage = get_storage()
        if isinstance(storage, getattr(flyte.storage, kind)):
            yield _Configured(vars(storage))


def is_imported(name: str) -> bool:
    """Tell whether a module has been imported to its end: two threads in the midst of one may block each other."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _environment() -> _Configured:
    """Give what Flyte sets in its containers."""
    names = {
        "endpoint": "FLYTE_AWS_ENDPOINT",
        "access_key_id": "FLYTE_AWS_ACCESS_KEY_ID",
        "secret_access_key": "FLYTE_AWS_SECRET_ACCESS_KEY",
        "addressing_style": "FLYTE_AWS_S3_ADDRESSING_STYLE",
    }
    return _Configured({name: os.environ[variable] for name, variable in names.items() if variable in os.environ})


def _flytekit(kind: str) -> Iterator[_Configured]:
    """Give flytekit's configuration for a kind of store."""
    if not is_imported("flytekit"):
        return
    from flytekit.core.context_manager import FlyteContextManager

    found = getattr(FlyteContextManager.current_context().file_access.data_config, kind, None)
    if found is not None:
        # The name is flytekit's.
        yield _Configured({**vars(found), "addressing_style": getattr(found, "adressing_style", None)})


def _fill_s3(options: dict[str, Any], configured: _Configured) -> None:
    client = options.get("client_kwargs") or {}
    endpoint, key, secret = (configured[name] for name in ("endpoint", "access_key_id", "secret_access_key"))
    if endpoint and "endpoint_url" not in options and "endpoint_url" not in client:
        options["endpoint_url"] = endpoint
    if key and secret and options.keys().isdisjoint(_S3_LOGINS) and not any(name.startswith("aws_") for name in client):
        # Nor is a login of fsspec's configuration mixed in.
        options.update(key=key, secret=secret, token=None, anon=False)
    if configured["region"] and "region_name" not in client:
        options["client_kwargs"] = {**client, "region_name": configured["region"]}
    config = options.get("config_kwargs") or {}
    if configured["addressing_style"] and "s3" not in config:
        options["config_kwargs"] = {**config, "s3": {"addressing_style": configured["addressing_style"]}}


def _fill_azure(options: dict[str, Any], configured: _Configured) -> None:
    if configured["account_name"]:
        options.setdefault("account_name", configured["account_name"])
    if options.keys().isdisjoint(_AZURE_LOGINS):
        options.update({name: configured[name] for name in _AZURE_NAMES if configured[name]})
