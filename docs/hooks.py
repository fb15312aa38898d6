"""Brings the benchmark's chart into the documentation: mkdocs takes files from `docs` only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

CHART = Path(__file__).parents[1] / "benchmarks" / "results" / "chart.svg"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the chart."""
    files.append(File.generated(config, "chart.svg", abs_src_path=str(CHART)))
    return files
