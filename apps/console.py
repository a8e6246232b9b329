"""How commands talk: bars only where somebody looks on, one message for what a person can put right."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
import typer.core

from imgdit.io.paths import at_home_in_word


class Commands(typer.core.TyperGroup):
    """The whole command line, in which `~` is the home folder also where the shell leaves it alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [at_home_in_word(word) for word in args])


EVERY = 20.0
"""Seconds between two lines that tell a file or a pipe how far an image is."""


@contextmanager
def user_errors(words: Mapping[str, str] = {}) -> Iterator[None]:
    """What a person can put right ends the command with exit code 2 and a message; anything else is a traceback.

    Args:
        words: patterns of what the library calls its arguments -> the command's options.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(_reason(error).split())
        for pattern, option in words.items():
            message = re.sub(pattern, option, message)
        raise typer.BadParameter(message) from error


@contextmanager
def at_work(words: Mapping[str, str] = {}) -> Iterator[None]:
    """`user_errors` for commands that load models, whose bars stay out of files and pipes."""
    with user_errors(words):
        calm()
        yield


def _reason(error: Exception) -> str:
    """What an error says; of a system's error the file and what is wrong with it, without its number."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"there is no file or folder {str(error.filename)!r}"
    return f"{str(error.filename)!r}: {error.strerror}"


class Steps:
    """A `Watch` that tells files and pipes how far an image is, where bars would not do; not of quick ones."""

    def __init__(self) -> None:
        self.begin = self.last = time.monotonic()

    def __call__(self, step: int, steps: int, draw: Any) -> bool:
        now = time.monotonic()
        if now - self.last > EVERY and step < steps:
            self.last = now
            typer.echo(f"step {step} of {steps}, {step / (now - self.begin):.2g} steps/s", err=True)
        return True


def calm() -> None:
    """Keep the bars of libraries out of files and pipes."""
    if not sys.stderr.isatty():
        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        disable_progress_bars()
