"""The command line: `flytekit-ckpt`."""

from __future__ import annotations

import signal
import sys

import click

from flytekit_ckpt import __version__, runner


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
def run(target: str, inputs: tuple[str, ...], retries: int, root: str | None, preempt_after: float | None) -> None:
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
            target, arguments, retries=retries, root=root, preempt_after=preempt_after, report=click.echo
        )
    except runner.TaskFailedError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"result: {result!r}")
