"""Names that people type: refusals that say the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

SIMILAR = 0.6
"""Similarity from which a name counts as misspelt."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`name` quoted, with its nearest known spelling, or all known names where none is near."""
    known = list(known)
    close = closest(str(name), known, SIMILAR)
    return f"{name!r}; known are {', '.join(known)}" if close is None else f"{name!r}; did you mean {close!r}?"


def nearest_of_many(name: str, known: Iterable[str]) -> str:
    """`name` quoted, with the nearest known one however far it is: of hundreds, all cannot be listed."""
    return f"{name!r}; the nearest is {closest(name, known)!r}"


def closest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The nearest spelling, of a similarity in [0, 1] of `cutoff` at least; `None`: none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


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
