"""How commands talk: bars only where somebody looks on, one sentence for what a person can put right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import typer
import typer.core

from imgdit.io.paths import at_home_in_word


class Commands(typer.core.TyperGroup):
    """The whole command line, in which `~` is the home folder also where the shell leaves it alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [at_home_in_word(word) for word in args])


@contextmanager
def one_sentence() -> Iterator[None]:
    """What a person can put right ends the command with exit code 2 and a sentence; anything else is a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error


def calm() -> None:
    """Keep the bars of libraries out of files and pipes."""
    if not sys.stderr.isatty():
        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        disable_progress_bars()
