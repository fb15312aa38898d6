"""The legacy face against real flytekit: the same calls, the same results, but for the listed deviations."""

from __future__ import annotations

import inspect
import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import flytekit_ckpt
from flytekit_ckpt import SyncCheckpoint, checkpointer, storage, v2
from tests import s3_server
from tests.conftest import Place
from tests.trees import CONTENTS, Tree, look, make, trees

theirs = pytest.importorskip("flytekit.core.checkpointer")

# A payload that is itself a tar must come back as it went in.
_TAR = io.BytesIO()
with tarfile.open(fileobj=_TAR, mode="w:gz") as _tar:
    _tar.add(__file__, "inside")
PAYLOADS = CONTENTS | st.sampled_from([_TAR.getvalue(), bytes(512), b"\x1f\x8b", b"BZh9"])

# flytekit takes these for patterns when it saves a file, or reads a prefix on S3.
_FILE_NAMES = st.sampled_from(
    ["a", "b", "model.pt", "v1.tar.gz", "_dst_cp", " sp ", "ü", "payload", "#h", "no_suffix."]
)


@pytest.fixture(autouse=True)
def flytekit_finds_the_server(s3: Place) -> Iterator[None]:
    """Let flytekit read the environment anew: it did so once, when it was imported."""
    from flytekit.configuration import DataConfig
    from flytekit.core.context_manager import FlyteContextManager
    from flytekit.core.data_persistence import FileAccessProvider

    with tempfile.TemporaryDirectory() as folder:
        access = FileAccessProvider(f"{folder}/sandbox", f"{folder}/raw", data_config=DataConfig.auto())
        context = FlyteContextManager.current_context().with_file_access(access)
        with FlyteContextManager.with_context(context):
            yield


def outcome(call: Callable[[], Any], *, folders: bool) -> object:
    """What a call gives, comparably: a value, the contents of a restored folder, or the type of an error."""
    try:
        value = call()
    except Exception as error:  # noqa: BLE001 - any error is an outcome
        return type(error)
    return contents(value, folders=folders) if isinstance(value, Path) else value


def contents(folder: Path, *, folders: bool) -> object:
    """Files by content, as flytekit copies what links point to and keeps no modes; on S3 it loses empty folders."""
    empty = {p.relative_to(folder) for p in folder.rglob("*") if p.is_dir()} if folders else set()
    return look(folder, follow=True, modes=False), empty


def without_empty_folders(tree: Tree) -> Tree:
    """Leave out what flytekit loses on S3."""
    files = [name for name, content in tree.items() if content is not None]
    return {
        name: content
        for name, content in tree.items()
        if content is not None or any(file.startswith(f"{name}/") for file in files)
    }


class BothPackages(RuleBasedStateMachine):
    """One attempt saves through both packages; other attempts look at what is there."""

    place: Place

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.uris = self.place.uri(), self.place.uri()
        self.savers = SyncCheckpoint(self.uris[0]), theirs.SyncCheckpoint(self.uris[1])
        self.kinds: dict[str, bool] = {}
        self.linked: set[str] = set()
        self.sources = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def fits(self, tree: Tree | dict[str, bytes]) -> bool:
        """Whether the packages should agree on what becomes of these names.

        No file falls on a folder or the reverse, where flytekit fails or mixes them up, nor on what a link points to:
        that is a deviation with a test of its own.
        """
        kinds = {name: content is None for name, content in tree.items()}
        if not (self.place.is_local or s3_server.checks_credentials() or all(map(str.isprintable, kinds))):
            return False  # moto's server does not find its way to such keys
        if any(self.kinds.get(name, kind) != kind for name, kind in kinds.items()) or self.linked & kinds.keys():
            return False
        self.kinds |= kinds
        self.linked |= {name.removesuffix(".link") for name, content in tree.items() if isinstance(content, str)}
        return True

    def source(self) -> Path:
        self.sources += 1
        return self.folder / f"source-{self.sources}"

    @rule(content=PAYLOADS)
    def write(self, content: bytes) -> None:
        if self.fits({"_dst_cp": content}):
            for saver in self.savers:
                saver.write(content)

    @rule(content=PAYLOADS, start=st.integers(0, 8))
    def save_a_reader(self, content: bytes, start: int) -> None:
        if self.fits({"_dst_cp": content}):
            path = self.source()
            path.write_bytes(content)
            for saver in self.savers:
                with path.open("rb") as reader:
                    reader.seek(start)
                    saver.save(reader)
                    assert not reader.closed

    @rule(content=PAYLOADS, name=_FILE_NAMES, as_text=st.booleans())
    def save_a_file(self, content: bytes, name: str, as_text: bool) -> None:
        if self.fits({name: content}):
            path = make(self.source(), {name: content}) / name
            for saver in self.savers:
                saver.save(str(path) if as_text else path)

    @rule(tree=trees())
    def save_a_folder(self, tree: Tree) -> None:
        if not self.place.is_local:
            tree = without_empty_folders(tree)
        if any(content is not None for content in tree.values()) and self.fits(tree):
            folder = make(self.source(), tree)
            for saver in self.savers:
                saver.save(folder)
            # What was saved must not be needed again.
            shutil.rmtree(folder)

    @rule(bad=st.sampled_from(["text", 3, None, object()]), call=st.sampled_from(["write", "save"]))
    def save_something_else(self, bad: object, call: str) -> None:
        value = io.StringIO("text") if (call, bad) == ("save", "text") else bad
        if (call, bad) != ("write", None):  # which flytekit takes for b""
            ours, flytekits = (outcome(lambda s=s: getattr(s, call)(value), folders=False) for s in self.savers)
            assert ours == flytekits

    @precondition(lambda self: self.kinds)
    @rule(calls=st.lists(st.sampled_from(["read", "restore", "restore to", "restore nowhere"]), min_size=1, max_size=3))
    def look_from_the_next_attempt(self, calls: list[str]) -> None:
        results: list[list[object]] = []
        for saver, uri in zip((SyncCheckpoint, theirs.SyncCheckpoint), self.uris, strict=True):
            attempt = saver(f"{uri}-next", uri)
            target = self.source()
            target.mkdir()
            arguments = {"restore to": [target], "restore nowhere": [self.folder / "missing"]}
            seen: list[object] = [attempt.prev_exists()]
            for call in calls:
                method = getattr(attempt, call.split()[0])
                seen.append(outcome(lambda: method(*arguments.get(call, [])), folders=self.place.is_local))  # noqa: B023
                seen.append(contents(target, folders=self.place.is_local))
            results.append(seen)
        assert results[0] == results[1]


def test_both_packages_answer_alike_whatever_is_saved_and_read(place: Place) -> None:
    machine = type("Machine", (BothPackages,), {"place": place})
    examples = settings.default.max_examples * (200 if place.is_local else 60) // 100
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("name", ["Checkpoint", "SyncCheckpoint"])
def test_names_parameters_and_class_attributes_are_flytekits(name: str) -> None:
    ours, flytekits = getattr(checkpointer, name), getattr(theirs, name)
    assert getattr(flytekit_ckpt, name) is ours
    for attribute, value in vars(flytekits).items():
        if not attribute.startswith("_") and not callable(value):
            assert getattr(ours, attribute) == value
    for method in ("__init__", "prev_exists", "restore", "save", "read", "write"):
        wanted, given = (
            [
                (parameter.name, parameter.default)
                for parameter in inspect.signature(getattr(kind, method)).parameters.values()
                if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
            ]
            for kind in (flytekits, ours)
        )
        assert given == wanted, method


def v1_folder(place: Place, *saved: object) -> str:
    uri = place.uri()
    saver = theirs.SyncCheckpoint(uri)
    for item in saved:
        saver.write(item) if isinstance(item, bytes) else saver.save(item)
    return uri


def test_what_flytekit_wrote_is_read_by_both_faces(place: Place, tmp_path: Path) -> None:
    uri = v1_folder(place, b"progress")
    assert SyncCheckpoint(place.uri(), uri).read() == b"progress"
    new = v2.Checkpoint(place.uri(), uri)
    loaded = new.load_sync()
    assert loaded is not None
    assert loaded.read_bytes() == (loaded / "payload").read_bytes() == b"progress"


def test_a_folder_that_flytekit_wrote_is_read_by_both_faces(place: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "source", {"a": b"1", "sub": None, "sub/b": b"", "sub/c d": b"3"})
    uri = v1_folder(place, folder)
    legacy = SyncCheckpoint(place.uri(), uri)
    restored = legacy.restore()
    assert restored is not None
    assert look(restored, follow=True, modes=False) == look(folder, follow=True, modes=False)
    new = v2.Checkpoint(place.uri(), uri)
    assert new.load_sync() == new.path
    assert look(new.path, follow=True, modes=False) == look(folder, follow=True, modes=False)
    with pytest.raises(ValueError, match="Expected exactly one checkpoint - found 2"):
        SyncCheckpoint(place.uri(), uri).read()


# The deviations, one by one -------------------------------------------------------------------------------------------


def test_deviation_saving_a_folder_again_mirrors_it(place: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "source", {"old": b"1", "kept": b"2"})
    other = make(tmp_path / "other", {"from other": b"3", "old too": b"4"})
    uri = place.uri()
    saver = SyncCheckpoint(uri)
    saver.save(folder)
    saver.save(other)
    (folder / "old").unlink()
    (folder / "new").write_bytes(b"5")
    saver.save(folder)
    attempt = SyncCheckpoint(place.uri(), uri)
    restored = attempt.restore()
    assert restored is not None
    assert sorted(path.name for path in restored.iterdir()) == ["from other", "kept", "new", "old too"]


def test_deviation_a_link_stays_a_link_when_another_part_replaces_what_it_points_to(
    place: Place, tmp_path: Path
) -> None:
    for package, expected in ((checkpointer, b"second"), (theirs, b"first")):
        uri = place.uri()
        saver = package.SyncCheckpoint(uri)
        folder = tmp_path / package.__name__
        saver.save(make(folder / "first", {"weights": b"first", "last": "weights"}))
        saver.save(make(folder / "second", {"weights": b"second"}))
        attempt = package.SyncCheckpoint(place.uri(), uri)
        restored = attempt.restore()
        assert restored is not None
        assert (restored / "last").read_bytes() == expected
        assert (restored / "last").is_symlink() == (package is checkpointer)


def test_deviation_empty_folders_are_kept_on_s3_too(s3: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "source", {"empty": None, "file": b"x"})
    for package, expected in ((checkpointer, {"empty", "file"}), (theirs, {"file"})):
        uri = s3.uri()
        package.SyncCheckpoint(uri).save(folder)
        attempt = package.SyncCheckpoint("", uri)
        restored = attempt.restore()
        assert restored is not None
        assert {path.name for path in restored.iterdir()} == expected


def test_deviation_a_source_that_is_not_there_is_none(place: Place) -> None:
    attempt = SyncCheckpoint(place.uri(), place.uri())
    assert attempt.prev_exists()
    assert attempt.read() is None
    assert attempt.restore() is None
    from flytekit.exceptions import user

    # It has a name since 1.13.4.
    with pytest.raises(getattr(user, "FlyteDataNotFoundException", user.FlyteAssertion)):
        theirs.SyncCheckpoint(place.uri(), place.uri()).restore()


def test_deviation_read_after_restore_does_not_count_the_users_own_files(place: Place, tmp_path: Path) -> None:
    uri = v1_folder(place, b"progress")
    for package, expected in ((checkpointer, b"progress"), (theirs, ValueError)):
        target = make(tmp_path / package.__name__, {"mine": b"x"})
        attempt = package.SyncCheckpoint(place.uri(), uri)
        assert attempt.restore(target) == target
        assert outcome(attempt.read, folders=True) == expected
        assert (target / "mine").read_bytes() == b"x"


def test_deviation_a_path_that_is_not_there_is_a_file_not_found_error(place: Place, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        SyncCheckpoint(place.uri()).save(tmp_path / "missing")


def test_deviation_quotes_and_blanks_as_source_mean_none(place: Place) -> None:
    for source in (None, "", '""', "  ", ' "" '):
        attempt = SyncCheckpoint(place.uri(), source)
        assert not attempt.prev_exists()
        assert attempt.read() is None
        assert attempt.restore() is None


def test_deviation_none_is_not_written_as_no_bytes(place: Place) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        SyncCheckpoint(place.uri()).write(None)  # type: ignore[arg-type]


# Subclasses -----------------------------------------------------------------------------------------------------------


def test_a_subclass_sees_the_calls_that_flytekits_sees(place: Place, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    for package in (checkpointer, theirs):
        calls: list[str] = []

        class Extended(package.SyncCheckpoint):  # type: ignore[name-defined, misc]
            def save(self, cp: Any) -> None:
                calls.append(f"save {type(cp).__name__}")  # noqa: B023
                super().save(cp)

            def restore(self, path: Any = None) -> Any:
                calls.append("restore")  # noqa: B023
                return super().restore(path)

        uri = place.uri()
        Extended(uri).write(b"5")
        assert Extended(place.uri(), uri).read() == b"5"
        seen.append(calls)
    assert seen[0] == seen[1] == ["save BytesIO", "restore"]


def test_a_subclass_that_restores_by_itself_is_read_from(tmp_path: Path) -> None:
    for package in (checkpointer, theirs):

        class Extended(package.SyncCheckpoint):  # type: ignore[name-defined, misc]
            def restore(self, path: Any = None) -> Any:
                return make(tmp_path / package.__name__, {"own": b"6"})  # noqa: B023

        assert Extended(str(tmp_path / "next"), str(tmp_path / "source")).read() == b"6"


@pytest.mark.parametrize("size", [1, 3 << 20])
def test_what_was_read_once_is_read_again(place: Place, size: int) -> None:
    for package in (checkpointer, theirs):
        uri = place.uri()
        package.SyncCheckpoint(uri).write(b"5" * size)
        attempt = package.SyncCheckpoint(place.uri(), uri)
        assert attempt.read() == attempt.read() == b"5" * size
        if size == 1 and package is checkpointer:
            storage.at(uri, place.settings).remove()
            assert attempt.read() == b"5"
