"""Image folders with `metadata.jsonl`, as the `datasets` library's imagefolder has them.

{"file_name": "0001.png", "text": "a red cube"}
{"file_name": "0002.png", "text": ["a ball", "a blue sphere"], "depth_file_name": "depth/0002.png"}
{"file_name": "0003.png", "text": "a cone", "frames_file_names": ["0003b.png"], "cameras": [[[1, 0, …]…]…]}
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imgdit.io.text import lines_or_errors

from ...untrusted import climbs, parse_json
from .rows import CONDITIONS, Columns, FileBlob, Problem, Row, Rows, gather, make_row

METADATA = "metadata.jsonl"
FILE = "_file_name"
"""What a condition's column ends in."""
KNOWN = ("file_name", "text", *(name + FILE for name in CONDITIONS), "frames_file_names", "cameras", "focal_length")
"""Columns."""


def folder_rows(folder: Path, columns: Columns) -> Rows:
    """Rows of a folder, see `open_rows`."""
    lines = list(_lines(folder / METADATA))
    found = {key for _, line in lines if isinstance(line, dict) for key in line}
    ours = columns.ours(str(folder / METADATA), sorted(found), KNOWN)
    return gather(str(folder), (_row(folder, number, line, ours) for number, line in lines))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbers and values of lines; what is no JSON comes as the error."""
    for number, line in enumerate(lines_or_errors(path.read_bytes(), str(path)), start=1):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            try:
                yield number, parse_json(line, "the line")
            except ValueError as error:
                yield number, error


def _row(folder: Path, number: int, line: Any, ours: Mapping[str, str]) -> Row | Problem:
    place = f"{METADATA}:{number}"
    if not isinstance(line, dict):
        return Problem(place, "metadata", f"the line is no JSON object: {line!s:.200}")
    values = {name: line[theirs] for name, theirs in ours.items() if line.get(theirs) is not None}
    name = values.get("file_name")
    if not isinstance(name, str):
        return Problem(place, "metadata", f"file_name must name a file, got {name!r}")
    files = {key.removesuffix(FILE): value for key, value in values.items() if key.endswith(FILE)}
    frames = values.get("frames_file_names", [])
    if not isinstance(frames, list):
        return Problem(name, "metadata", f"{METADATA}:{number}: frames_file_names must be a list, got {frames!r:.200}")
    for file in (name, *files.values(), *frames):
        if isinstance(file, str) and climbs(file):
            return Problem(name, "outside", f"{METADATA}:{number} names {file!r:.200}, which leads out of {folder}")
        if not isinstance(file, str) or not os.path.isfile(folder / file):
            return Problem(name, "missing", f"{METADATA}:{number} names {file!r:.200}, which is not in {folder}")
    conditions = {task: FileBlob(folder / file) for task, file in files.items()}
    return make_row(name, values, FileBlob(folder / name), conditions, [FileBlob(folder / file) for file in frames])
