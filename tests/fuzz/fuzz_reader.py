"""Look for archives that the reader does not stand, guided by which of its code they reach.

Usage, from the project's folder (atheris has wheels for Linux, Python 3.11 to 3.13)::

    pip install -e '.[test,fuzz]'
    python -m tests.fuzz.fuzz_reader -max_total_time=600 /tmp/found tests/fuzz/corpus

New inputs go to the first folder, which must be there. Arguments are libFuzzer's; `-timeout=10` and `-max_len=8192` are
taken if nothing else is said. A finding is written to `./crash-...` or `./timeout-...`; as the only argument it is
tried again, and `-minimize_crash=1` makes it small. One that is to stay found goes to `corpus.FOUND`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["flytekit_ckpt", "tarfile"]):
    import tarfile  # noqa: F401 - instrumented: it reads the headers

    from flytekit_ckpt import archive, entries, layout, state, unpacking  # noqa: F401

from tests import limits
from tests.fuzz.check import LARGEST_FILE, check

# A file that grows too large is an error of the disk to the reader, and not the end of the fuzzer.
DEFAULTS = ["-timeout=10", "-max_len=8192", "-handle_xfsz=0"]


def main() -> None:
    """Run libFuzzer until it has found something, or its time is up."""
    atheris.Setup([sys.argv[0], *DEFAULTS, *sys.argv[1:]], check)
    with limits.file_size(LARGEST_FILE):
        atheris.Fuzz()


if __name__ == "__main__":
    main()
