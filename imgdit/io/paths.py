"""Names of files and folders as people write them."""

from __future__ import annotations

import os
import re


def at_home(path: str | os.PathLike[str]) -> str:
    """A path whose leading `~` or `~somebody` is that home folder; anything else is as it was."""
    return os.path.expanduser(path)


def at_home_in_word(word: str) -> str:
    """A word of a command line, in which the shell leaves some paths alone: `--out=~/x` and `depth=~/x.png`."""
    found = re.fullmatch(r"(-*[\w.-]+=)?(~([\\/].*)?)", word, re.DOTALL)
    return word if found is None else (found[1] or "") + at_home(found[2])
