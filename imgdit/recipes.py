"""YAML files read strictly into frozen dataclasses: an unknown key, a wrong type or a value out of range is a
`ValueError` that names the file and the key."""

from __future__ import annotations

import dataclasses
import inspect
import re
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from imgdit.io.paths import at_home
from imgdit.io.text import decode_text
from imgdit.naming import nearest, old_arguments

EXPONENT = r"[+-]?\d+(\.\d*)?[eE][+-]?\d+"
"""Numbers that YAML takes for text without a dot or a sign."""


class _AtHome(yaml.SafeLoader):
    """Plain values, with `~/` at the beginning of a text as the home folder."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        text = super().construct_scalar(node)
        return at_home(text) if isinstance(text, str) and text.startswith("~/") else text


def read_yaml(path_or_name: str | Path) -> tuple[Any, str]:
    """Plain values of a recipe's file or of a packaged recipe, and what errors in them should name."""
    path = Path(at_home(path_or_name))
    source: Path | Traversable = path
    if not path.is_file():
        known = packaged_recipes()
        if str(path_or_name) not in known:
            raise ValueError(f"there is no file and no packaged recipe {nearest(str(path_or_name), known)}")
        source = known[str(path_or_name)]
    try:
        return yaml.load(decode_text(source.read_bytes(), "its text"), _AtHome), str(source)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # The last three come from dates that are none, tags on the wrong values, and lists in lists without end.
        raise ValueError(f"{source} is not a YAML file: {error}") from error


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Path and value of each text "run.steps=2000", the value read as YAML.

    Raises:
        ValueError: no such text.
    """
    changes = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not (equals and all(path.split("."))):
            raise ValueError(f"expected FIELD=VALUE, such as run.steps=2000; got {text!r}")
        try:
            changes[path] = float(value) if re.fullmatch(EXPONENT, value) else yaml.load(value, _AtHome)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r}: its value is not YAML: {error}") from error
    return changes


def with_values(values: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of nested mappings with other values at some paths ("run.steps").

    Raises:
        ValueError: a path through something that is no mapping.
    """
    for path, value in changes.items():
        *sections, last = path.split(".")
        values = inner = dict(values) if isinstance(values, Mapping) else values
        for section in sections:
            if not isinstance(inner, dict) or not isinstance(inner.get(section, {}), Mapping):
                raise ValueError(f"{path}: {section!r} is no section of the recipe")
            inner[section] = inner = dict(inner.get(section, {}))
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: the recipe is no mapping of keys to values")
        inner[last] = value
    return values


def packaged_recipes() -> dict[str, Traversable]:
    """Recipes that come with imgdit, by name."""
    found: dict[str, Traversable] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry

    walk(files("imgdit.configs"), "")
    return found


def parse_as(cls: Any, values: Any, source: str) -> Any:
    """A dataclass like `Recipe` from nested plain values."""
    return _section(cls, values, source, "")


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments that `function` does not take, or of another type than it declares.

    Only keyword arguments with a default count; what comes without one is the caller's to give.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.default is not p.empty]
    hints = get_type_hints(function if inspect.isfunction(function) else function.__init__)
    old = old_arguments(function)
    for name, value in ((old.get(name, name), value) for name, value in arguments.items()):
        if name not in known:
            raise ValueError(f"{where} has an unknown key {nearest(name, known)}")
        if name in hints:
            _convert(hints[name], value, f"{where}.{name}")


def _section(cls: Any, values: Any, source: str, where: str) -> Any:
    """One dataclass from a mapping."""
    name = where or "a recipe"
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {name} must be a mapping of keys to values, got {_named(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    inner = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            place = f" in {where}" if where else ""
            raise ValueError(f"{source}: unknown key{place} {nearest(str(key), fields)}")
    for f in fields.values():
        missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if missing and f.name not in values:
            raise ValueError(f"{source}: {inner}{f.name} is missing; {name} needs it")
    converted = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            converted[key] = _section(hints[key], value, source, inner + key)
            continue
        try:
            converted[key] = _convert(hints[key], value, inner + key)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{source}: {inner.rstrip('.')}{': ' if inner else ''}{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; only what YAML cannot say otherwise is converted (lists to tuples, 1 to 1.0)."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        options = [option for option in inner if option is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, where)
        for option in options:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if any(value is choice or (value == choice and type(value) is type(choice)) for choice in inner):
            return value
        if value is False and "no" in inner:  # YAML takes a bare `no` for false
            return "no"
        raise ValueError(f"{where} must be one of {', '.join(map(repr, inner))}, got {_named(value)}")
    elif origin is tuple and isinstance(value, (list, tuple)):
        if inner[-1] is Ellipsis or len(inner) == 1:  # diffusers writes tuple[int] for any number of them
            return tuple(_convert(inner[0], part, f"{where}[{i}]") for i, part in enumerate(value))
        if len(inner) == len(value):
            return tuple(_convert(t, part, f"{where}[{i}]") for i, (t, part) in enumerate(zip(inner, value)))
        raise ValueError(f"{where} must have {len(inner)} entries, got {len(value)}: {reprlib.repr(value):.200}")
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif (hint is dict or origin is dict) and isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"{where} must be {_type_name(hint)}, got {_named(value)}{_yaml_hint(hint, value)}")


def _yaml_hint(hint: Any, value: Any) -> str:
    """YAML 1.1 reads `1e-3` as text, because its floats need a dot."""
    if hint is float and isinstance(value, str):
        try:
            return f"; YAML takes {value} for text, write {float(value)!r} with a dot, as in 1.0e-3"
        except ValueError:
            pass
    return ""


def _type_name(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is tuple:
        return "a list"
    if hint is dict or get_origin(hint) is dict:
        return "a mapping"
    return str(hint)


def _named(value: Any) -> str:
    # A few lines of YAML whose aliases name each other are gigabytes when they are written out, so not all is.
    return "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value):.200}"


def find_object(name: str, known: Mapping[str, str], group: str, refusal: str) -> Any:
    """What a recipe names: an objective, a data source or a model class.

    Args:
        name: a short name of `known`, an entry point of `group`, or "package.module:attribute".
        known: short name -> "package.module:attribute".
        group: of entry points, as an installed package declares them in its `pyproject.toml`.
        refusal: how the message begins, as "unknown objective".

    Raises:
        ValueError: no such name, module or attribute.
    """
    path = known.get(name)
    if path is None and ":" not in name:
        declared = {entry.name: entry.value for entry in entry_points(group=group)}
        if name not in declared:
            raise ValueError(
                f"{refusal} {nearest(name, [*known, *declared])}; an own one is named 'package.module:attribute'"
            )
        path = declared[name]
    module, _, attribute = (path or name).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{refusal} {name!r}, which cannot be imported: {error}") from error
