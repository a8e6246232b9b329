"""Names that people type: refusals that say the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """`name` quoted, with its nearest known spelling, or all known names where none is near."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}; did you mean {close[0]!r}?" if close else f"{name!r}; known are {', '.join(known)}"


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Args:
        what: kind of thing it names, for the message.
    """
    known = list(known)
    if name not in known:
        raise ValueError(f"unknown {what} {nearest(name, known)}")


def check_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse the value of an option that has few."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def shown(value: Any) -> str:
    """A value as an error shows it: what kind it is, and itself where that is short."""
    text = repr(value)
    return type(value).__name__ + (f" {text}" if len(text) <= 40 else "")
