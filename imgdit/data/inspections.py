"""What inspecting rows found, kept beside the caches: images that did not change are not read again."""

from __future__ import annotations

import json
from pathlib import Path

from imgdit.data.linter import Inspection, inspect_rows
from imgdit.data.rows import Problem, Row
from imgdit.io.atomic import write_text
from imgdit.io.lock import one_at_a_time
from imgdit.io.safe_json import read_object
from imgdit.io.tensor_cache import tensor_key

FILE = "inspections.json"


def inspected(rows: list[Row], min_side: int, cache: str | Path | None, workers: int = 4) -> list[Inspection]:
    """`inspect_row` of each, remembered in the folder `cache`, if there is one."""
    if cache is None:
        return list(inspect_rows(rows, min_side, workers))
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    keys = [_key(row, min_side) for row in rows]
    with one_at_a_time(folder):  # the other ranks wait for the first, and find what it found
        path = folder / FILE
        known = read_object(path) if path.exists() else {}
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            found = inspect_rows([rows[i] for i in missing], min_side, workers)
            known |= {keys[i]: _plain(inspection) for i, inspection in zip(missing, found)}
            write_text(path, json.dumps(known))
    return [_inspection(row, known[key]) for row, key in zip(rows, keys)]


def _key(row: Row, min_side: int) -> str:
    blobs = {"": row.image, **row.conditions, **{str(n): frame for n, frame in enumerate(row.frames)}}
    return tensor_key(min_side, *((name, blob.stamp) for name, blob in blobs.items()))


def _plain(found: Inspection) -> dict[str, object]:
    problem = None if found.problem is None else found.problem[1:]
    return {"hashes": found.hashes, "size": found.size, "notes": found.notes, "problem": problem}


def _inspection(row: Row, values: dict) -> Inspection:
    problem = None if values["problem"] is None else Problem(row.name, *values["problem"])
    return Inspection(values["hashes"], tuple(values["size"]), tuple(values["notes"]), problem)
