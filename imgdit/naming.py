"""Names and numbers that people type: refusals that say the nearest known one."""

from __future__ import annotations

import difflib
import functools
import inspect
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


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`; `True` and `False` are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def shown(value: Any) -> str:
    """A value as an error shows it: what kind it is, and itself where that is short."""
    text = repr(value)
    return type(value).__name__ + (f" {text}" if len(text) <= 40 else "")


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that a name is an earlier version's; every old name of modules, arguments and values comes here.

    Args:
        old, new: as the message says them.
        stacklevel: as of `warnings.warn`, for a warning by the caller.
    """
    message = f"{old} is now {new}; the old name goes with version 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel + 1)


def renamed_value(value: str, table: Mapping[str, str], where: str) -> str:
    """A value of a recipe as it is written now; an earlier version's is accepted with a warning."""
    if value not in table:
        return value
    warn_renamed(f"{where}: {value!r}", repr(table[value]))
    return table[value]


def old_names(**names: str) -> Callable[[T], T]:
    """Let a class or function be used under names of version 0.1 until version 0.3: old name -> new name. Uses warn.

    Of a class they are attributes, class methods and keyword arguments of its constructor; of a function, keyword
    arguments. `old_arguments` tells those of a target.
    """

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return _takes_old_names(target, target.__name__, names)
        for old, new in names.items():
            is_method = isinstance(inspect.getattr_static(target, new, None), classmethod)
            setattr(target, old, (_old_method if is_method else _old_attribute)(target.__name__, old, new))
        if not issubclass(target, tuple) and target.__init__ is not object.__init__:
            init = _takes_old_names(target.__init__, target.__name__, names)
            type.__setattr__(target, "__init__", init)
        return target

    return decorate


def old_arguments(target: Any) -> Mapping[str, str]:
    """Keyword arguments of earlier versions that a class or function takes, and what they are called now."""
    function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009
    return getattr(function, "old_arguments", {})


def _old_attribute(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(f"{owner}: {old!r}", repr(new))
        return getattr(self, new)

    return property(read, doc=f"Old name of `{new}`.")


def _old_method(owner: str, old: str, new: str) -> Any:
    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(cls, new)(*args, **kwargs)

    return classmethod(call)


def _takes_old_names(function: Callable[..., Any], owner: str, names: Mapping[str, str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old, new in names.items():
            if old in kwargs:
                warn_renamed(f"{owner}: {old!r}", repr(new))
                kwargs[new] = kwargs.pop(old)
        return function(*args, **kwargs)

    call.old_arguments = names  # type: ignore[attr-defined]
    return call
