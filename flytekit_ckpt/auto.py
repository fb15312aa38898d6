"""Importing this calls `flytekit_ckpt.install()`, for programs that may gain an import line and nothing else."""

from flytekit_ckpt.context import install

install()
