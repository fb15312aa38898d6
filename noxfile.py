"""The tests on every version that is claimed: `nox` runs all rows, `nox -t corners` those of CI.

uv makes the environments, and fetches a Python that is not there. What each row was is kept below .nox/matrix, from
where `nox -s table` writes it into docs/compatibility.md.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv"

RESULTS = Path(".nox/matrix")
PAGE = Path("docs/compatibility.md")

# Contract, installation, whose checkpoint it is, examples, storage on a real server.
TESTS = (
    "tests/contract",
    "tests/test_install.py",
    "tests/test_context.py",
    "tests/test_examples.py",
    "tests/test_storage.py",
    "--hypothesis-profile=few",
    # Minutes of processes that save and are killed, to which no release of a package matters.
    "--deselect=tests/contract/test_accumulation.py::test_what_anybody_saves_accumulates_as_in_flytekits_folder",
)


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes
    ----------
    name : str
        What `nox -s` calls it.
    python : str
        The release of Python.
    packages : sequence of str
        What is installed beside this package; anything else is the newest that fits.
    is_corner : bool
        Whether CI runs it.
    is_lowest : bool
        Whether everything that pyproject.toml names is the oldest that it allows.
    tests : sequence of str
        What pytest is told to run.
    """

    name: str
    python: str
    packages: Sequence[str] = field(default=())
    is_corner: bool = False
    is_lowest: bool = False
    tests: Sequence[str] = TESTS


ROWS = (
    # The oldest of everything. flytekit and flyte ask for later releases of click, and flyte of fsspec.
    Row("alone-oldest", "3.10", ["aiobotocore==2.5.4"], is_lowest=True),
    Row("oldest-flytekit", "3.10", ["flytekit==1.10.0", "aiobotocore==2.5.4"], is_corner=True, is_lowest=True),
    Row("oldest-flyte", "3.10", ["flyte==2.1.3", "aiobotocore==2.5.4"], is_corner=True, is_lowest=True),
    # The last flyte without checkpoints, beside which this package is of no use but must do no harm.
    Row("flyte-2.1.2", "3.11", ["flyte==2.1.2", "flyteidl2==2.0.9"], tests=["tests/test_install.py", "-k=says_so"]),
    # aiobotocore's 2.x of each year, its first 3.x, and releases in between of the rest.
    Row("aiobotocore-2023", "3.11", ["flytekit==1.11.0", "aiobotocore==2.9.0", "s3fs==2024.9.0"]),
    Row("aiobotocore-2024", "3.12", ["flytekit==1.13.15", "aiobotocore==2.15.2", "s3fs==2024.12.0"], is_corner=True),
    Row("aiobotocore-2025", "3.11", ["flytekit==1.15.4", "aiobotocore==2.21.1", "s3fs==2025.12.0"]),
    Row("aiobotocore-2.26", "3.12", ["flyte==2.3.9", "aiobotocore==2.26.0"]),
    Row("aiobotocore-3.0", "3.11", ["flytekit==1.14.9", "aiobotocore==3.0.0"]),
    Row("aiobotocore-3.5", "3.12", ["flyte==2.9.0", "aiobotocore==3.5.0"]),
    Row("oldest-flyte-migrate", "3.11", ["flyte-migrate==0.0.2", "flytekit==1.16.29", "flyte==2.5.18"]),
    # The newest of everything, with both, either and neither.
    Row("newest-3.10", "3.10", ["flytekit==1.16.31", "flyte==2.12.1", "flyte-migrate==0.0.3"]),
    Row("newest-3.11", "3.11", ["flytekit==1.16.31", "flyte==2.12.1", "flyte-migrate==0.0.3"]),
    Row("newest-3.12", "3.12", ["flytekit==1.16.31", "flyte==2.12.1", "flyte-migrate==0.0.3"]),
    Row("newest-3.13", "3.13", ["flyte==2.12.1"], is_corner=True),
    # pip refuses flytekit on 3.13, which flytekit does not allow; uv installs it.
    Row("flytekit-3.13", "3.13", ["flytekit==1.16.31", "flyte==2.12.1", "flyte-migrate==0.0.3"]),
    Row("newest-flytekit", "3.12", ["flytekit==1.16.31"]),
    Row("alone-newest", "3.13"),
)

# What the table names, in its order.
SHOWN = ("flytekit", "flyte", "flyte-migrate", "fsspec", "s3fs", "aiobotocore", "click", "tenacity", "wrapt", "isal")

_VERSIONS = """
import json, platform, sys
from importlib import metadata

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"

print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def _tested(session: nox.Session, row: Row) -> None:
    lowest = ("--resolution", "lowest-direct") if row.is_lowest else ()
    session.install(*lowest, "-e", ".[tools]", *row.packages)
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = str(session.run("python", "-c", _VERSIONS, *SHOWN, silent=True))
    (RESULTS / f"{row.name}.json").write_text(found)
    session.run("python", "-m", "pytest", "-q", f"--junitxml={RESULTS / row.name}.xml", *(session.posargs or row.tests))


def _add(row: Row) -> None:
    @nox.session(name=row.name, python=row.python, tags=["corners"] if row.is_corner else [])
    def session(session: nox.Session) -> None:
        """Run the tests on one row."""
        _tested(session, row)


for _row in ROWS:
    _add(_row)


@nox.session(default=False, python=False)
def table(session: nox.Session) -> None:
    """Write what was run into docs/compatibility.md."""
    lines = [f"| row | Python | {' | '.join(SHOWN)} | passed | skipped | failed |", "|---" * (len(SHOWN) + 5) + "|"]
    for row in ROWS:
        if not (RESULTS / f"{row.name}.xml").exists():
            session.warn(f"{row.name} was not run")
            continue
        versions = json.loads((RESULTS / f"{row.name}.json").read_text())
        suite = xml.etree.ElementTree.parse(RESULTS / f"{row.name}.xml").getroot()[0].attrib
        failed = int(suite["failures"]) + int(suite["errors"])
        skipped = int(suite["skipped"])
        passed = int(suite["tests"]) - failed - skipped
        name = f"{row.name} *" if row.is_corner else row.name
        lines.append("| " + " | ".join([name, *versions.values(), str(passed), str(skipped), str(failed)]) + " |")
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    PAGE.write_text(before + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end of table -->" + after)
