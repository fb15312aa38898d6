"""The fuzzer's corpus, without the fuzzer."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from flytekit_ckpt import inflation, layout, restoration, unpacking
from flytekit_ckpt.errors import CorruptCheckpointError
from tests import limits
from tests.fuzz import check, corpus
from tests.fuzz.check import ours
from tests.tars import END, file, link

FILES = sorted(corpus.FOLDER.iterdir())


@pytest.mark.parametrize("name", [file.name for file in FILES])
def test_an_input_is_no_finding(name: str) -> None:
    pytest.importorskip("numpy")
    with limits.file_size(check.LARGEST_FILE), limits.seconds(60):
        check.check((corpus.FOLDER / name).read_bytes())


def test_the_corpus_is_what_its_program_writes() -> None:
    written = {file.name: file.read_bytes() for file in FILES}
    made = corpus.inputs()
    # Releases of Python write gzip files with other headers.
    same = {name: content for name, content in made.items() if not name.startswith("object-")}
    assert same.items() <= written.items()
    assert made.keys() <= written.keys()
    assert len(made) > 40
    assert max(map(len, written.values())) < 10_000


def test_the_corpus_reaches_what_it_is_for() -> None:
    made = corpus.inputs()
    assert {content[0] for content in made.values()} == set(check.Shape)
    found = {}
    for name, content in made.items():
        if content[0] in (check.Shape.OBJECT, check.Shape.OUR_TAR):
            found[name] = check.load(check.as_object(check.Shape(content[0]), content[1:]))
    refused = {name for name, tree in found.items() if tree is None}
    assert refused == {"our-links-out", "our-hard-links", "our-kinds", "our-escapes", "object-gzip-cut-short"}
    same = ["gzip", "gzip-named", "bz2", "xz", "lzma", "plain", "ours", "ours-then-gzip"]
    trees = [found[f"object-{name}"] for name in same]
    assert len(trees[0] or ()) == 7
    assert all(tree == trees[0] for tree in trees)


def test_a_changed_header_gets_its_checksum() -> None:
    tar = bytearray(file("a") + END)
    tar[0] = ord("b")
    assert check.load(check.ours(bytes(tar))) is None
    assert set(check.load(check.as_object(check.Shape.OUR_TAR, bytes(tar))) or ()) == {"b"}


# Were the library as wrong as this, the fuzzer would say so.


def test_a_restore_that_writes_outside_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoration, "restore", lambda found, name, folder, settings: (folder.parent / "evil").touch())
    with pytest.raises(AssertionError, match="outside the folder"):
        check.load(ours(file("a") + END))


def test_a_refusal_that_leaves_something_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(found: layout.Found, name: str, folder: Path, settings: object) -> None:
        (folder / "half").touch()
        raise CorruptCheckpointError(found.uri)

    monkeypatch.setattr(restoration, "restore", half)
    with pytest.raises(AssertionError):
        check.load(ours(file("a") + END))


def test_an_error_that_is_not_documented_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking.os, "utime", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check.load(ours(file("a") + END))


def test_a_link_that_leads_out_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "stays_inside", lambda *_: True)
    with pytest.raises(AssertionError, match="leads out"):
        check.load(ours(link("l", "../outside") + END))


def test_damage_that_restores_something_else_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = check.good()[0]
    monkeypatch.setattr(inflation, "inflated_member", lambda member: zlib.decompress(member[20:-8], -15))
    at = next(at for at in range(60, len(content)) if is_wrong_when_changed(at))
    assert at > 60


def is_wrong_when_changed(at: int) -> bool:
    try:
        check.check_damage(bytes([0]) + struct.pack("<HBB", at, 3, 1))
    except (AssertionError, zlib.error) as error:
        return "restored something else" in str(error)
    return False
