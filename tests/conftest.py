"""Places to keep checkpoints in: the local disk and the servers that the tests run against."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from flytekit_ckpt.storage import Settings
from tests import azure_server, gcs_server, s3_server

# For the matrix: the releases are tried there, not the code.
settings.register_profile("few", max_examples=25)


def pytest_report_header() -> list[str]:
    return [
        f"S3 server: {s3_server.available()}",
        f"Google Cloud Storage: {gcs_server.available()}",
        f"Azure Blob Storage: {azure_server.available()}",
    ]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: compressed, they hold the time, and pytest-xdist's workers must agree."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if all(map(importlib.util.find_spec, ("lightning", "torch", "transformers"))):
        return
    for item in items:
        if item.get_closest_marker("heavy") is not None:
            item.add_marker(pytest.mark.skip(reason="the extra `heavy` is not installed"))


@dataclass(frozen=True)
class Place:
    """A folder or a prefix to put checkpoints below, and the server that it is on."""

    root: str
    options: dict[str, str] = field(default_factory=dict)
    server: s3_server.S3Server | gcs_server.GcsServer | azure_server.AzureServer | None = None

    def uri(self) -> str:
        """Give an object's URI that nothing else uses."""
        return f"{self.root}/{uuid.uuid4().hex}"

    @property
    def settings(self) -> Settings:
        return Settings(self.options)

    @property
    def is_local(self) -> bool:
        return not self.root.startswith(("s3://", "gs://", "abfs://"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have pytest-xdist's workers share one S3 server, which this process starts before the first of them."""
    config = node.config
    if not hasattr(config, "shared_s3"):
        resources = contextlib.ExitStack()
        config.add_cleanup(resources.close)
        folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="s3-", ignore_cleanup_errors=True))
        config.shared_s3 = asdict(resources.enter_context(s3_server.serve(Path(folder) / "server")))
    node.workerinput["s3"] = config.shared_s3


@pytest.fixture(scope="session")
def s3_server_running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[s3_server.S3Server]:
    shared = getattr(request.config, "workerinput", {}).get("s3")
    if shared is not None:
        yield s3_server.S3Server(**shared)
        return
    with s3_server.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


def empty(place: Place) -> None:
    """Remove everything from a bucket, and the uploads of processes that were killed: a server that is full hangs."""
    import s3fs

    filesystem = s3fs.S3FileSystem(**place.options)
    bucket = place.root.removeprefix("s3://")
    while stored := filesystem.call_s3("list_objects_v2", Bucket=bucket).get("Contents"):
        keys = [item["Key"] for item in stored]
        # In XML there is no place for these.
        odd = [key for key in keys if not key.isprintable()]
        for key in odd:
            filesystem.call_s3("delete_object", Bucket=bucket, Key=key)
        if plain := [{"Key": key} for key in keys if key.isprintable()]:
            filesystem.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": plain, "Quiet": True})
    for upload in filesystem.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", ()):
        # What is carried forward in the background may come to its end just now.
        with contextlib.suppress(FileNotFoundError):
            filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


@pytest.fixture(scope="session")
def s3_bucket(s3_server_running: s3_server.S3Server) -> Iterator[Place]:
    """A bucket on the S3 server; flytekit, flyte and this package find the server through Flyte's variables."""
    import s3fs

    server = s3_server_running
    options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
    bucket = f"checkpoints-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem(**options).call_s3("create_bucket", Bucket=bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYTE_AWS_ENDPOINT", server.endpoint)
        patch.setenv("FLYTE_AWS_ACCESS_KEY_ID", server.key)
        patch.setenv("FLYTE_AWS_SECRET_ACCESS_KEY", server.secret)
        yield Place(f"s3://{bucket}", options, server)


@pytest.fixture
def s3(s3_bucket: Place) -> Iterator[Place]:
    """The bucket, empty."""
    yield s3_bucket
    empty(s3_bucket)


@pytest.fixture(scope="session")
def gcs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A bucket on Google Cloud Storage; child processes find it and its login in fsspec's variables."""
    if reason := gcs_server.missing():
        pytest.skip(reason)
    import gcsfs

    with gcs_server.serve(tmp_path_factory.mktemp("gcs")) as server, pytest.MonkeyPatch.context() as patch:
        # Google would be asked about the token.
        patch.setenv("FETCH_RAW_TOKEN_EXPIRY", "false")
        patch.setenv("FSSPEC_GS_ENDPOINT_URL", server.endpoint)
        patch.setenv("FSSPEC_GS_TOKEN", server.token)
        options = {"endpoint_url": server.endpoint, "token": server.token}
        bucket = f"checkpoints-{uuid.uuid4().hex[:8]}"
        gcsfs.core.GCSFileSystem(**options, project="tests").call("POST", "b", json={"name": bucket})
        yield Place(f"gs://{bucket}", options, server)


@pytest.fixture(scope="session")
def azure_container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A container on Azure; child processes find it and its login in the SDK's variable."""
    if reason := azure_server.missing():
        pytest.skip(reason)
    import adlfs

    with azure_server.serve(tmp_path_factory.mktemp("azure")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection)
        options = {"connection_string": server.connection}
        container = f"checkpoints-{uuid.uuid4().hex[:8]}"
        adlfs.AzureBlobFileSystem(**options).mkdir(container)
        yield Place(f"abfs://{container}", options, server)


@pytest.fixture
def gcs(gcs_bucket: Place) -> Iterator[Place]:
    """The bucket, empty."""
    yield gcs_bucket
    emptied(gcs_bucket)


@pytest.fixture
def azure(azure_container: Place) -> Iterator[Place]:
    """The container, empty."""
    yield azure_container
    emptied(azure_container)


def filesystem(place: Place) -> Any:
    """fsspec's own filesystem for a place, which knows nothing of this package."""
    import fsspec
    from fsspec.registry import known_implementations

    protocol = place.root.partition("://")[0]
    module, _, name = known_implementations[protocol]["class"].rpartition(".")
    # Flyte registers others.
    kind = getattr(importlib.import_module("gcsfs.core" if module == "gcsfs" else module), name)
    assert issubclass(kind, fsspec.AbstractFileSystem)
    return kind(**place.options, use_listings_cache=False)


def emptied(place: Place) -> None:
    store = filesystem(place)
    for key in store.find(place.root):
        store.rm_file(key)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Everything that takes this runs on the local disk and on S3."""
    if request.param == "local":
        return Place(str(tmp_path / "checkpoints"))
    return request.getfixturevalue("s3")


# What tasks are made of. flytekit's own exception would cost each attempt the import of flytekit.
IMPORTS = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from flytekit_ckpt import current_checkpoint
from flytekit_ckpt.errors import FlyteRecoverableException

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""

Task = Callable[[str], str]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Write a task file that defines `work`, and give the target that names it."""

    def written(source: str) -> str:
        file = tmp_path / "tasks.py"
        file.write_text(IMPORTS + textwrap.dedent(source))
        return f"{file}:work"

    return written
