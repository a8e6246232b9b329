"""How far a run is: a bar where somebody looks on, lines in files and pipes."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY = 10.0
"""Seconds between two lines; the last step has its line in any case."""


class Progress:
    """Tells steps and how training goes on the standard error stream.

    Args:
        name: of the run.
        total: steps of the whole run.
        step: those that are done.
        silent: tell nothing: of several processes one speaks.
    """

    def __init__(self, name: str, total: int, step: int = 0, *, silent: bool = False):
        self.name, self.total, self.silent = name, total, silent
        self.looked_at = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=step, desc=name, disable=silent or not self.looked_at)
        self.noted_at = time.monotonic()

    def update(self) -> None:
        """A step is done."""
        self.bar.update()

    def note(self, step: int, text: str, last: bool = False) -> None:
        """Say how it goes.

        Args:
            said: such as "loss 0.1234".
            last: whether the run ends or stops here.
        """
        self.bar.set_postfix_str(text)
        now = time.monotonic()
        if not (self.silent or self.looked_at) and (last or now - self.noted_at >= EVERY):
            self.noted_at = now
            print(f"{self.name}: step {step} of {self.total}, {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The run is over."""
        self.bar.close()
