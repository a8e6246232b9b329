"""What files of others say: JSON that may be anything, and names that may point anywhere."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from imgdit.io.text import decode_text


def parse_json(text: str | bytes, source: str) -> Any:
    """A JSON value.

    Args:
        source: file, for the message.

    Raises:
        ValueError: it is no JSON, neither UTF-8 nor UTF-16, or nested without end.
    """
    try:
        return json.loads(decode_text(text, "its text") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged, expected JSON: {error}") from error


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON object, see `parse_json`."""
    return as_object(parse_json(text, source), source)


def as_object(values: Any, source: str) -> dict[str, Any]:
    """The value, which must be an object.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold an object, got {type(values).__name__}")
    return values


def read_json(path: str | Path) -> Any:
    """The JSON value of a file, see `parse_json`."""
    return parse_json(Path(path).read_bytes(), str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file, see `parse_json`."""
    return parse_object(Path(path).read_bytes(), str(path))


def inside(folder: Path, name: str) -> Path:
    """The file of a folder that a list of its files names. Links in the folder are the owner's own and are followed.

    Raises:
        ValueError: the name leads out of the folder.
    """
    if climbs(name):
        raise ValueError(f"{name!r} leads out of {folder}; expected a file in it, named from there")
    return folder / name


def climbs(name: str) -> bool:
    """Whether a file's name leads out of the folder that it is named from, on whichever system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.root) or ".." in posix.parts or ".." in windows.parts
