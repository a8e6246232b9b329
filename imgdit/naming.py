"""Names that people type: refusals that say the nearest known one."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

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


def old_names(**names: str) -> Callable[[T], T]:
    """Let a class or function be used under names of version 0.1 until version 0.3: old name -> new name. Uses warn.

    Of a class they are attributes and keyword arguments of its constructor; of a function, keyword arguments.
    """

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return _takes_old_names(target, target.__name__, names)
        for old, new in names.items():
            setattr(target, old, _old_attribute(target.__name__, old, new))
        if not issubclass(target, tuple):
            init = _takes_old_names(target.__init__, target.__name__, names)
            type.__setattr__(target, "__init__", init)
        return target

    return decorate


def _warn_renamed(owner: str, old: str, new: str) -> None:
    warnings.warn(f"{owner}: {old!r} is now {new!r}; the old name goes with version 0.3", DeprecationWarning, 3)


def _old_attribute(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        _warn_renamed(owner, old, new)
        return getattr(self, new)

    return property(read, doc=f"Old name of `{new}`.")


def _takes_old_names(function: Callable[..., Any], owner: str, names: Mapping[str, str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old in names.keys() & kwargs.keys():
            _warn_renamed(owner, old, names[old])
            kwargs[names[old]] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call
