"""Webdataset shards: tar files whose members belong together by the name before the first dot.

    0001.png  0001.txt                 a picture and its caption
    0002.jpg  0002.json                {"text": […], "cameras": […], "focal_length": …}
    0003.png  0003.depth.png           a condition
    0004.png  0004.frames.0.png        a further frame

Rows are found by number and not in a stream, which a run needs to go on at the exact row: a shard's table of contents
is read once, afterwards every member is a piece of the file.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from ...naming import nearest
from ...untrusted import climbs, parse_json
from .rows import CONDITIONS, PICTURE_ENDINGS, Columns, FileBlob, Problem, Row, Rows, gather, make_row

KNOWN = ("text", "cameras", "focal_length")
"""Keys of a row's JSON."""
_OWN = ("__key__", "__url__")
BLOCK = 512
"""Bytes; a tar's members fill whole blocks, and blocks of zeros mark its end."""


def shard_files(pattern: str) -> list[Path]:
    """Shards that a folder, a file, or a pattern with `*` or `{000..007}` names, sorted."""
    path = Path(pattern)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    files = [Path(name) for part in _spread(pattern) for name in (sorted(glob(part)) or [part])]
    return files if all(file.suffix == ".tar" and file.is_file() for file in files) else []


def shard_rows(files: list[Path], columns: Columns, source: str) -> Rows:
    """Rows of shards, see `open_rows`."""
    return gather(source, (row for file in files for row in _shard(file, columns)))


def write_shards(folder: Path, rows: Iterable[tuple[str, dict[str, bytes]]], size: int = 256 << 20) -> list[Path]:
    """Write shards of about `size` bytes; they appear when they are complete.

    Args:
        rows: keys, and the content of their members by ending ("png", "json", "depth.png").
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    pending = iter(rows)
    row = next(pending, None)
    while row is not None:
        path = folder / f"{len(written):06d}.tar"
        temporary = path.with_suffix(".tar.writing")
        try:
            with tarfile.open(temporary, "w") as tar:
                total = 0
                while row is not None and total < size:
                    for ending, content in row[1].items():
                        member = tarfile.TarInfo(f"{row[0]}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                        total += len(content)
                    row = next(pending, None)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(
                f"could not write {path}: {error}. The {len(written)} shards before it are complete"
            ) from error
        written.append(path)
    return written


def _spread(pattern: str) -> list[str]:
    """`{000..007}` as the names that it stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _spread(pattern[: match.start()] + n + pattern[match.end() :])]


def _shard(path: Path, columns: Columns) -> Iterator[Row | Problem]:
    members, problem = _members(path)
    whole = groupby(members, key=lambda member: _split(member.name)[0])
    groups = [(key, list(group)) for key, group in whole]
    if problem is not None and groups:
        groups.pop()  # the last key may lack what was cut off
    for key, group in groups:
        yield _row(path, key, {_split(m.name)[1]: FileBlob(path, m.offset_data, m.size) for m in group}, columns)
    if problem is not None:
        after = f"after the row {groups[-1][0]!r}" if groups else "before its first whole row"
        yield Problem(path.name, "shard", f"{path} ends early, {after}: {problem}. Copy or make it again")


def _members(path: Path) -> tuple[list[tarfile.TarInfo], str | None]:
    """The whole files in a tar, and what is wrong where it ends."""
    members: list[tarfile.TarInfo] = []
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if end > size:
                    return members, f"{member.name} goes to byte {end:,}, {size:,} are there"
                if member.isfile():
                    members.append(member)
    except tarfile.TarError as error:
        return members, str(error)
    return members, None if size >= end + BLOCK else "its end mark is missing"


def _split(name: str) -> tuple[str, str]:
    """Key with its folder, and ending in lower case."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _row(path: Path, key: str, parts: dict[str, FileBlob], columns: Columns) -> Row | Problem:
    if climbs(key):
        return Problem(key, "outside", f"{path}: {key!r:.200} leads out of the shard; expected a name from its top")
    values: dict[str, Any] = {}
    if "json" in parts:
        try:
            found = parse_json(parts.pop("json").read(), f"{key}.json")
        except ValueError as error:
            return Problem(key, "metadata", f"{path}: {error}")
        if not isinstance(found, dict):
            return Problem(key, "metadata", f"{path}: {key}.json must be an object, got {type(found).__name__}")
        ours = columns.ours(f"{path}: {key}.json", (name for name in found if name not in _OWN), KNOWN)
        values = {name: found[theirs] for name, theirs in ours.items()}
    if "txt" in parts:
        try:
            values["text"] = parts.pop("txt").read().decode()
        except UnicodeDecodeError as error:
            return Problem(key, "caption", f"{path}: {key}.txt is no UTF-8 text: {error}")
    picture = None
    conditions: dict[str, FileBlob] = {}
    frames: dict[int, FileBlob] = {}
    for ending, blob in parts.items():
        words = ending.split(".")
        if f".{words[-1]}" not in PICTURE_ENDINGS or len(words) > 3:
            if ending not in columns.ignored:
                known = ("json", "txt", *(end[1:] for end in PICTURE_ENDINGS))
                raise ValueError(f"{path}: {key} has a member of an unknown kind {nearest(ending, known)}")
        elif len(words) == 1:
            picture = blob
        elif len(words) == 3 and words[0] == "frames" and words[1].isdigit():
            frames[int(words[1])] = blob
        elif words[0] in CONDITIONS:
            conditions[words[0]] = blob
        elif words[0] not in columns.ignored:
            raise ValueError(f"{path}: {key} has an unknown condition {nearest(words[0], CONDITIONS)}")
    if picture is None:
        return Problem(key, "missing", f"{path}: {key} has no picture, only {', '.join(parts) or 'text'}")
    return make_row(key, values, picture, conditions, [frames[n] for n in sorted(frames)])
