"""The command line: `flytekit-ckpt`."""

from __future__ import annotations

import contextlib
import datetime
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from flytekit_ckpt import __version__, layout, runner, storage
from flytekit_ckpt.checkpointer import SyncCheckpoint
from flytekit_ckpt.entries import file_entry
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.folders import folder_size, scan_folder
from flytekit_ckpt.options import InstallOptions


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Checkpoints for Flyte tasks."""


@main.command()
@click.argument("target", metavar="FILE:FUNCTION")
@click.argument("inputs", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--retries", type=click.IntRange(min=0), default=0, show_default=True, help="Attempts after the first.")
@click.option("--root", metavar="URI", help="Where the checkpoints go: a folder (default: a temporary one) or s3://...")
@click.option(
    "--preempt-after",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Kill every attempt with SIGKILL after this time.",
)
@click.option("--home", metavar="URI", help="Where pointers to the newest checkpoints of all runs are kept.")
@click.option(
    "--resume-from",
    metavar="URI|RUN|latest",
    help="Where to resume from if the run has no checkpoint: one's URI, or with --home a run's name.",
)
@click.option("--asynchronous", is_flag=True, help="Save in the background.")
def run(
    target: str,
    inputs: tuple[str, ...],
    retries: int,
    root: str | None,
    preempt_after: float | None,
    *,
    asynchronous: bool,
    **options: str | None,
) -> None:
    """Run a task on this machine, attempt after attempt, as the platform does.

    Every attempt is a process of its own, and finds the checkpoint of the one before it. An attempt that raises
    FlyteRecoverableException, or is killed, is retried; any other exception ends the run.
    """
    # So that the attempt ends, and its temporary files go, with a runner that is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments: dict[str, str] = {}
    for text in inputs:
        name, separator, value = text.partition("=")
        if not separator or not name:
            message = f"an input is given as NAME=VALUE, not {text!r}"
            raise click.BadArgumentUsage(message)
        arguments[name] = value
    try:
        result = runner.run(
            target,
            arguments,
            retries=retries,
            root=root,
            preempt_after=preempt_after,
            options=_checkpoint_options(options, asynchronous=asynchronous),
            report=click.echo,
        )
    except runner.TaskFailedError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"result: {result!r}")


def _checkpoint_options(given: Mapping[str, str | None], *, asynchronous: bool) -> InstallOptions:
    def absolute(uri: str | None) -> str | None:
        path = None if uri is None else storage.local_path(uri)
        return uri if path is None else str(path.absolute())

    # Otherwise the environment variable says it.
    options = InstallOptions(asynchronous=True) if asynchronous else InstallOptions()
    # The task may change its working directory.
    if (home := absolute(given["home"])) is not None:
        options["home"] = home
    if (resume_from := given["resume_from"]) is not None:
        # Without a slash it is the name of a run.
        options["resume_from"] = (absolute(resume_from) or "") if "/" in resume_from else resume_from
    return options


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("uri")
def save(source: Path, uri: str) -> None:
    """Save a file or a folder as the checkpoint at URI, in place of what is there."""
    with _errors_shown(), _progress_bar(f"saving {source}") as bar:
        exclude = layout.not_into_itself(uri)
        entries = scan_folder(source, exclude) if source.is_dir() else iter([file_entry(source, source.name)])

        def size() -> int:
            return folder_size(source, exclude) if source.is_dir() else source.stat().st_size

        layout.put_tree(uri, entries, storage.Settings(), size=size, callback=bar)
    click.echo(f"saved {source} to {uri}")


@main.command()
@click.argument("uri")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, help="A pattern of the entries to restore, such as 'model/*'; repeatable.")
def restore(uri: str, folder: Path, only: tuple[str, ...]) -> None:
    """Restore the checkpoint at URI, whoever saved it, into FOLDER."""
    with _errors_shown(), _progress_bar(f"restoring {uri}") as bar:
        folder.mkdir(parents=True, exist_ok=True)
        found = SyncCheckpoint("", uri).restore(folder, only=only or None, callback=bar)
    if found is None:
        raise _nothing_at(uri)
    click.echo(f"restored {uri} into {folder}")


@main.command(name="list")
@click.argument("uri")
def list_entries(uri: str) -> None:
    """List what the checkpoint at URI holds: size, time and name of each entry."""
    with _errors_shown():
        found = SyncCheckpoint("", uri).entries()
    if found is None:
        raise _nothing_at(uri)
    for entry in found:
        time = "" if entry.mtime_ns is None else f"{_as_utc(entry.mtime_ns):%Y-%m-%d %H:%M:%S}"
        ending = "/" if entry.kind == "folder" else ""
        click.echo(f"{entry.size:>15,}  {time:19}  {entry.name}{ending}")


def _as_utc(time_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.timezone.utc)


def _nothing_at(uri: str) -> click.ClickException:
    message = f"there is no checkpoint at {uri}"
    return click.ClickException(message)


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except (CheckpointError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _progress_bar(label: str) -> Iterator[_ProgressBar | None]:
    """Give a callback that draws a bar, where there is a terminal to draw it on."""
    if not sys.stderr.isatty():
        yield None
        return
    with contextlib.ExitStack() as stack:
        yield _ProgressBar(label, stack)


class _ProgressBar:
    """An fsspec callback; the bar appears when it is known how much there is to do, and goes with the stack."""

    def __init__(self, label: str, stack: contextlib.ExitStack) -> None:
        self._label = label
        self._stack = stack
        self._bar: Any = None

    def set_size(self, size: int) -> None:
        self._bar = self._stack.enter_context(click.progressbar(length=size, label=self._label, file=sys.stderr))

    def relative_update(self, inc: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(inc)
