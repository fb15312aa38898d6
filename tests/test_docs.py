"""The documentation: every block of code runs, and every error message is explained."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import flytekit_ckpt
from flytekit_ckpt import runner
from tests.conftest import Place
from tests.platforms import script

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A block of code, with the comment right above it that says why it is not run.
_BLOCK = re.compile(
    r'^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>python|sh)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_INCLUDED = re.compile(r'^--8<-- "(.+)"\n', re.MULTILINE)


class Block(NamedTuple):
    """A block of code.

    Attributes
    ----------
    language : str
        "python" or "sh".
    title : str or None
        The file that it is to be saved as.
    code : str
    line : int
        Where it begins, in the page.
    """

    language: str
    title: str | None
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Give the blocks of a page that are to run: those of Python, and of commands of this package."""
    # The programs in examples/ are shown as they are.
    text = _INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(), page.read_text())
    found = []
    for match in _BLOCK.finditer(text):
        is_ours = match["language"] == "python" or match["code"].startswith("flytekit-ckpt ")
        if is_ours and not match["reason"]:
            line = text.count("\n", 0, match.start("code"))
            found.append(Block(match["language"], match["title"], match["code"], line))
    return found


@pytest.fixture
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a page does to this process."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    signal.signal(signal.SIGTERM, before)
    sys.modules.pop("flytekit_ckpt.auto", None)
    flytekit_ckpt.uninstall()


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = "".join(block.code for block in blocks(page))
    for package in ("flytekit", "numpy"):
        if re.search(rf"^(from|import) {package}\b", text, re.MULTILINE) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    replaced = {}
    if "s3://" in text:
        s3: Place = request.getfixturevalue("s3")
        options = s3.options
        names = ("http://minio:9000", "the-key", "the-secret")
        replaced = {"s3://bucket": s3.root, **dict(zip(names, options.values(), strict=True))}
    # flytekit looks for the module that a task is in.
    module = ModuleType("page")
    module.__file__ = str(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        code = block.code
        for theirs, ours in replaced.items():
            code = code.replace(theirs, ours)
        if block.language == "sh":
            for command in code.replace("\\\n", " ").splitlines():
                _run(command)
            continue
        if block.title:
            Path(block.title).write_text(code)
        # With the numbers of the page's lines, for tracebacks.
        exec(compile("\n" * block.line + code, str(page), "exec"), vars(module))


def _run(command: str) -> None:
    words = shlex.split(command, comments=True)
    done = subprocess.run([script(words[0]), *words[1:]], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_task_of_the_readme_does_its_work(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(ROOT / "README.md") if block.title)
    file = tmp_path / str(block.title)
    file.write_text(block.code)
    assert runner.run(f"{file}:counter", {"n_iterations": "3"}, report=lambda _: None) == 3


def test_few_blocks_are_not_run() -> None:
    reasons = [match["reason"] for page in PAGES for match in _BLOCK.finditer(page.read_text()) if match["reason"]]
    assert len(reasons) <= 5, reasons


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

# What programs do wrong, not what goes wrong for them.
NOT_EXPLAINED = {"module {} has no attribute {}", "the content of {} can be read once only, before the next entry"}

# Names of what a message is assigned to, of what makes a warning of it, and of what returns a part of one.
_MESSAGES = {"message", "_TRUNCATED", "_CODE_ADVICE"}
_REPORTING = {"warn", "warning", "left_out"}
_RETURNING = {"_advice", "reason"}


def messages() -> set[str]:
    """Give the texts of all errors and warnings in the source, `{}` for what differs."""
    found = set()
    for path in (ROOT / "flytekit_ckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found |= {text for value in _values(node) for text in _texts(value)}
    # A text has words; what is logged of every save is no warning.
    plain = {re.sub(r"%[sd]", "{}", text) for text in found if re.search(r"[a-z]{2} ", text) and "%.3f" not in text}
    return plain - NOT_EXPLAINED


def _values(node: ast.AST) -> list[ast.expr]:
    """Give the expressions in a statement or call that are messages."""
    if isinstance(node, ast.Assign):
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        return [node.value] if names & _MESSAGES else []
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        return node.args if name.endswith("Error") or name in _REPORTING else []
    if isinstance(node, ast.FunctionDef) and node.name in _RETURNING:
        returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
        return [value for value in returned if value is not None]
    return []


def _texts(value: ast.expr) -> list[str]:
    if isinstance(value, ast.Constant):
        return [value.value] if isinstance(value.value, str) else []
    if isinstance(value, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in value.values)]
    if isinstance(value, ast.IfExp):
        return _texts(value.body) + _texts(value.orelse)
    if isinstance(value, ast.Dict):
        return [text for item in value.values for text in _texts(item)]
    return []


def explained() -> list[str]:
    """Give the messages that the page explains: what stands in the code spans of its table rows' first cells."""
    rows = re.findall(r"^\| (`+) ?(.+?) ?\1 \|", TROUBLESHOOTING.read_text(), re.MULTILINE)
    return [text for _, text in rows if " " in text]


def fits(text: str, message: str) -> bool:
    """Tell whether a text, with names for what differs, is a message of the source."""
    pattern = ".+".join(re.escape(part) for part in message.split("{}"))
    return re.fullmatch(pattern, text) is not None


def test_every_message_of_the_source_is_explained() -> None:
    texts = explained()
    missing = {message for message in messages() if not any(fits(text, message) for text in texts)}
    assert not missing


def test_every_message_that_is_explained_is_in_the_source() -> None:
    found = messages()
    gone = {text for text in explained() if not any(fits(text, message) for message in found)}
    assert not gone


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

_TABLES = """
import json, report
found = json.load(open("results/results.json"))
print(report.tables(report.Results(found["measurements"])))
print(report.target_table([report.Target(**target) for target in found["targets"]]))
"""


def test_the_tables_are_those_of_the_benchmark() -> None:
    pytest.importorskip("numpy")
    command = [sys.executable, "-c", _TABLES]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "benchmarks").stdout
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    missing = [line for line in printed.splitlines() if line not in page]
    assert not missing


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


def test_every_link_of_the_readme_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert targets
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_the_page_of_a_command_names_its_options() -> None:
    """The reference is made from the commands; this finds options that are used in a page and are none."""
    from flytekit_ckpt.cli import main

    known = {name for command in main.commands.values() for param in command.params for name in param.opts}
    for page in PAGES:
        for line in page.read_text().splitlines():
            if "flytekit-ckpt run" in line:
                assert set(re.findall(r"(?<=\s)--[a-z-]+", line.partition("flytekit-ckpt run")[2])) <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_field_has_a_word_for_it(page: Path) -> None:
    text = " ".join(page.read_text().split())
    ours = ["behind the caller", "carry behind", "legacy face", "making way", "new face", "told of", "what is asked of"]
    assert not [words for words in ours if words in text]


def test_the_readme_fits_on_a_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


if __name__ == "__main__":
    for text in sorted(messages()):
        sys.stdout.write(text + os.linesep)
