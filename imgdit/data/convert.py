"""Data from one form to another, byte for byte: folders to shards, shards or `datasets` to folders."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from imgdit.data.folders import FILE, METADATA
from imgdit.data.rows import Blob, Row, Rows
from imgdit.data.shards import write_shards
from imgdit.images.opening import heif_kind


def convert(rows: Rows, out: Path, *, shards: bool, skip_broken: bool = False, shard_size: int = 256 << 20) -> Path:
    """Write rows in another form. Their encoded images are copied as they are.

    Args:
        rows: to write.
        out: new folder.
        shards: webdataset shards; otherwise a folder with `metadata.jsonl`.
        skip_broken: leave out the rows that the source could not give, instead of refusing.
        shard_size: bytes of a shard, about.

    Raises:
        ValueError: the source has problems that `skip_broken` does not allow, `out` is not empty, or the disk is full.
    """
    if rows.problems and not skip_broken:
        first = rows.problems[0]
        raise ValueError(
            f"{rows.source} has {len(rows.problems)} problem(s) and nothing was written; the first: {first.name}: "
            f"{first.message}. `imgdit data check` lists all; skip_broken leaves these rows out"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose a new folder")
    if shards:
        write_shards(out, (_members(number, row) for number, row in enumerate(rows.rows)), shard_size)
        return out
    # Beside and renamed at the end: a folder is there as a whole or not at all.
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with open(temporary / METADATA, "w", encoding="utf-8") as file:
            for number, row in enumerate(rows.rows):
                file.write(json.dumps(_line(number, row, temporary)) + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"could not write {out}: {error}; nothing is left of it") from error
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    return out


def _members(number: int, row: Row) -> tuple[str, dict[str, bytes]]:
    """A row as the members of a shard."""
    blobs: dict[str, Blob] = {"": row.image, **{f"{name}.": blob for name, blob in row.conditions.items()}}
    blobs |= {f"frames.{n}.": frame for n, frame in enumerate(row.frames)}
    members = {}
    for prefix, blob in blobs.items():
        data = blob.read()
        members[prefix + ending(data)] = data
    return f"{number:08d}", {**members, "json": json.dumps(_values(row)).encode()}


def _line(number: int, row: Row, folder: Path) -> dict[str, Any]:
    """A row as a line of metadata, after its files were written."""

    def write(blob: Blob, place: str) -> str:
        data = blob.read()
        name = f"{place}{number:08d}.{ending(data)}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return name

    line: dict[str, Any] = {"file_name": write(row.image, ""), **_values(row)}
    line |= {name + FILE: write(blob, f"{name}/") for name, blob in row.conditions.items()}
    if row.frames:
        line["frames_file_names"] = [write(frame, f"frames{n}/") for n, frame in enumerate(row.frames)]
    return line


def _values(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if row.captions:
        values["text"] = row.captions[0] if len(row.captions) == 1 else list(row.captions)
    if row.cameras is not None:
        values["cameras"] = row.cameras.tolist()
    if row.focal_length is not None:
        values["focal_length"] = row.focal_length
    if row.repeats != 1:
        values["repeats"] = row.repeats
    return values


def ending(data: bytes) -> str:
    """The usual ending of an encoded image's format, "png" for what cannot be told."""
    try:
        form = str(Image.open(io.BytesIO(data)).format).lower()
    except (UnidentifiedImageError, OSError):
        return heif_kind(data) or "png"
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(form, form)
