"""Where the options of an object store come from: the caller, flyte, Flyte's variables, flytekit, in this order."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flytekit_ckpt import StorageError, SyncCheckpoint
from flytekit_ckpt.credentials import resolved
from tests.conftest import Place
from tests.platforms import EXAMPLES, Flyte1

VARIABLES = {
    "FLYTE_AWS_ENDPOINT": "http://variable",
    "FLYTE_AWS_ACCESS_KEY_ID": "variable",
    "FLYTE_AWS_SECRET_ACCESS_KEY": "secret of the variable",
    "FLYTE_AWS_S3_ADDRESSING_STYLE": "virtual",
}

# What fsspec's configuration may say is not mixed into a login.
NOTHING_ELSE = {"token": None, "anon": False}

FLYTEKIT_FILE = """
storage:
  connection:
    endpoint: http://file
    access-key: file
    secret-key: secret of the file
    addressing-style: path
"""

FLYTE = """
import flyte, flyte.storage
flyte.init(storage=flyte.storage.S3(
    endpoint="http://flyte", access_key_id="flyte", secret_access_key="secret of flyte", region="eu-central-1",
    addressing_style="path"))
"""


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def resolved_after(code: str, tmp_path: Path, protocol: str = "s3", **given: object) -> dict[str, object]:
    """Give the options that hold in an interpreter of its own, where flytekit has a configuration file."""
    file = tmp_path / "config.yaml"
    file.write_text(FLYTEKIT_FILE)
    code = f"""
import json, os
os.environ["FLYTECTL_CONFIG"] = {str(file)!r}
{textwrap.dedent(code)}
from flytekit_ckpt.credentials import resolved
print(json.dumps(resolved({protocol!r}, {given!r})))
"""
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def test_flytes_variables_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved("s3", {}).keys() <= {"endpoint_url", "key", "secret", "token", "anon", "config_kwargs"}
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert resolved("s3", {}) == {
        "endpoint_url": "http://variable",
        "key": "variable",
        "secret": "secret of the variable",
        **NOTHING_ELSE,
        "config_kwargs": {"s3": {"addressing_style": "virtual"}},
    }
    assert resolved("gs", {}) == {}


@pytest.mark.parametrize(
    "given",
    [
        {"endpoint_url": "http://given", "key": "given", "secret": "given", "config_kwargs": {"s3": {}}},
        {"client_kwargs": {"endpoint_url": "http://given"}, "anon": True, "config_kwargs": {"s3": {}}},
        {"endpoint_url": "http://given", "profile": "given", "config_kwargs": {"s3": {}}},
        {"endpoint_url": "http://given", "username": "given", "password": "given", "config_kwargs": {"s3": {}}},
        {"client_kwargs": {"endpoint_url": "http://given", "aws_access_key_id": "given"}, "config_kwargs": {"s3": {}}},
    ],
)
def test_what_is_given_stays_and_no_login_is_mixed_into_another(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object]
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert resolved("s3", given) == given


def test_what_is_given_is_completed_and_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    given = {"endpoint_url": "http://given", "config_kwargs": {"connect_timeout": 5}}
    assert resolved("s3", given) == {
        "endpoint_url": "http://given",
        "key": "variable",
        "secret": "secret of the variable",
        **NOTHING_ELSE,
        "config_kwargs": {"connect_timeout": 5, "s3": {"addressing_style": "virtual"}},
    }
    assert given == {"endpoint_url": "http://given", "config_kwargs": {"connect_timeout": 5}}


def test_options_that_are_none_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYTE_AWS_ENDPOINT", "http://variable")
    found = resolved("s3", {"client_kwargs": None, "config_kwargs": None})
    assert found["endpoint_url"] == "http://variable"


def test_no_login_appears_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYTE_AWS_ENDPOINT", "somebody:PASSWORD@nowhere")
    monkeypatch.setenv("FLYTE_AWS_ACCESS_KEY_ID", "IDENTITY")
    monkeypatch.setenv("FLYTE_AWS_SECRET_ACCESS_KEY", "SECRET")
    with pytest.raises(StorageError) as error:
        SyncCheckpoint("s3://bucket/key").write(b"x")
    assert "s3://bucket/key" in str(error.value)
    for word in ("PASSWORD", "IDENTITY", "SECRET"):
        assert word not in str(error.value)


def test_flyte_init_goes_before_the_variables(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    code = f"os.environ.update({VARIABLES!r})\n{FLYTE}"
    assert resolved_after(code, tmp_path, client_kwargs={"verify": False}) == {
        "endpoint_url": "http://flyte",
        "key": "flyte",
        "secret": "secret of flyte",
        **NOTHING_ELSE,
        "client_kwargs": {"verify": False, "region_name": "eu-central-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }


def test_flyte_init_without_a_login_is_completed_by_the_variables(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    code = f"""
os.environ.update({VARIABLES!r})
import flyte, flyte.storage
flyte.init(storage=flyte.storage.S3(endpoint="http://flyte"))
"""
    found = resolved_after(code, tmp_path)
    assert (found["endpoint_url"], found["key"]) == ("http://flyte", "variable")


@pytest.mark.parametrize(
    "code",
    ["", "import flyte.storage", "import flyte, flyte.storage; flyte.init(storage=flyte.storage.GCS())"],
    ids=["no flyte", "not initialized", "another store"],
)
def test_where_flyte_says_nothing_the_rest_is_asked(tmp_path: Path, code: str) -> None:
    if code:
        pytest.importorskip("flyte")
    assert resolved_after(code, tmp_path) == {}


def test_flytekits_configuration_comes_last(tmp_path: Path) -> None:
    pytest.importorskip("flytekit")
    assert resolved_after("import flytekit", tmp_path) == {
        "endpoint_url": "http://file",
        "key": "file",
        "secret": "secret of the file",
        **NOTHING_ELSE,
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    code = f"import flytekit\nos.environ.update({VARIABLES!r})"
    assert resolved_after(code, tmp_path)["key"] == "variable"


def test_azures_options_are_flytes(tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    code = """
    import flyte, flyte.storage
    flyte.init(storage=flyte.storage.ABFS(account_name="a", tenant_id="t", client_id="c", client_secret="s"))
    """
    expected = {"account_name": "a", "tenant_id": "t", "client_id": "c", "client_secret": "s"}
    assert resolved_after(code, tmp_path, "abfs") == expected
    given = {"account_name": "mine", "sas_token": "mine"}
    assert resolved_after(code, tmp_path, "abfss", **given) == given


# ---------------------------------------------------------------------------------------------------------------------
# On the real server
# ---------------------------------------------------------------------------------------------------------------------


def test_a_flyte_task_reaches_the_store_that_flyte_init_names(s3: Place, tmp_path: Path) -> None:
    pytest.importorskip("flyte")
    uri = s3.uri()
    SyncCheckpoint(f"{uri}/prev_checkpoint", storage_options=s3.options).write(b"5")
    code = f"""
    import sys
    import flyte, flyte.storage
    import flytekit_ckpt.auto

    flyte.init(storage=flyte.storage.S3(
        endpoint={s3.options["endpoint_url"]!r}, access_key_id={s3.options["key"]!r},
        secret_access_key={s3.options["secret"]!r}))

    @flyte.TaskEnvironment(name="tests").task
    def work() -> str:
        before = flyte.ctx().checkpoint.load_sync().read_text() + flytekit_ckpt.current_checkpoint().read().decode()
        flyte.ctx().checkpoint.save_sync(b"6")
        by_hand = flyte.Checkpoint("unused", {uri!r} + "/checkpoint")
        return before + by_hand.load_sync().read_text()

    print("read", flyte.with_runcontext(mode="local", raw_data_path={uri!r}).run(work).outputs()[0])
    """
    output = subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)], text=True, cwd=tmp_path)
    assert "read 556" in output


def test_a_flytekit_task_reaches_the_store_that_its_configuration_file_names(s3: Place, tmp_path: Path) -> None:
    pytest.importorskip("flytekit")
    file = tmp_path / "config.yaml"
    connection = {
        "endpoint": s3.options["endpoint_url"],
        "access-key": s3.options["key"],
        "secret-key": s3.options["secret"],
    }
    file.write_text(json.dumps({"storage": {"connection": connection}}))
    run = Flyte1(
        EXAMPLES / "flytekit_counter.py",
        "counter",
        {"n_iterations": 6},
        s3.uri(),
        tmp_path,
        environment={"FLYTECTL_CONFIG": str(file)},
    )
    assert run.run(retries=1) == 6
    lines = [line for attempt in run.attempts for line in attempt.starting()]
    assert lines == ["starting at iteration 0", "starting at iteration 4"]
