"""Files that tell rows: JSON lines, one JSON array, or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgdit.io.safe_json import parse_json
from imgdit.io.text import decode_text, lines_or_errors

DELIMITERS = ",;\t|"
"""What may stand between the columns of a CSV file."""
_LISTS = ("frames_file_names", "cameras")
_NUMBERS = ("focal_length", "repeats")


def read_metadata(path: Path, file_name: str = "file_name") -> list[tuple[int, Any]]:
    """Number and values of each line or entry; of one that cannot be read the error.

    Args:
        path: metadata.jsonl, .json or .csv, in UTF-8 or UTF-16.
        file_name: the column that names images, by which a CSV file's delimiter is found.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".csv":
        return list(_csv_rows(decode_text(data, str(path)), str(path), file_name))
    lines = lines_or_errors(data, str(path))
    first = next((line for line in lines if isinstance(line, ValueError) or line.strip()), "")
    if isinstance(first, str) and (first.lstrip().startswith("[") or not _is_json(first)):
        # One value over many lines, or a damaged line, of which its number is told.
        text = "" if any(isinstance(line, ValueError) for line in lines) else "\n".join(map(str, lines))
        if first.lstrip().startswith("[") or _is_json(text):
            return _entries(parse_json(decode_text(data, str(path)), str(path)), path)
    return list(_lines(lines))


def _entries(values: Any, path: Path) -> list[tuple[int, Any]]:
    if not isinstance(values, list):
        raise ValueError(
            f"{path} holds one JSON {type(values).__name__}; expected a line for each image, such as "
            '{"file_name": "0001.png", "text": "a red cube"}, or one array of such objects'
        )
    return list(enumerate(values, start=1))


def _lines(lines: list[str | ValueError]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            try:
                yield number, parse_json(line, "the line")
            except ValueError as error:
                yield number, error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _csv_rows(text: str, source: str, file_name: str) -> Iterator[tuple[int, Any]]:
    """Rows with their columns' names; cells that are empty are left out."""
    head = text.lstrip("\r\n").partition("\n")[0].rstrip("\r")
    for delimiter in DELIMITERS:
        columns = _cells(head, delimiter)
        if file_name in columns:
            break
    else:
        raise ValueError(
            f"{source}: its first line has no column {file_name!r}, got {head!r:.200}; expected the names of the "
            "columns, divided by commas, semicolons or tabs"
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    started = False
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, ValueError(f"{source} is damaged from here on: {error}")
            return
        if cells is None:
            return
        if not any(cells):
            continue
        if started:
            yield reader.line_num, _csv_row(columns, cells, delimiter)
        started = True


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of one line, none of what is no CSV."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _csv_row(columns: list[str], cells: list[str], delimiter: str) -> Any:
    if len(cells) > len(columns):
        return ValueError(
            f"the line has {len(cells)} cells under {len(columns)} columns; a text with {delimiter!r} in it "
            'must stand between "…"'
        )
    return {name: cell for name, cell in zip(columns, cells) if cell.strip()}


def typed_cells(values: dict[str, Any]) -> dict[str, Any]:
    """Cells of a CSV file, by our names, as JSON would have them.

    Raises:
        ValueError: a list or number that is none.
    """
    numbers = {name: values[name].replace(",", ".") for name in _NUMBERS if name in values}
    lists = {name: values[name] for name in _LISTS if name in values}
    return {**values, **{name: parse_json(cell, name) for name, cell in {**numbers, **lists}.items()}}
