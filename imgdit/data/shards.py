"""Webdataset shards: tar files whose members belong together by the name before the first dot.

    0001.png  0001.txt                 an image and its caption (or 0001.caption)
    0002.jpg  0002.json                {"text": […], "cameras": […], "focal_length": …, "repeats": …}
    0003.png  0003.depth.png           a condition
    0004.png  0004.frames.0.png        a further frame

Rows are found by number and not in a stream, which a run needs to go on at the exact row: a shard's table of contents
is read once, afterwards every member is a piece of the file.
"""

from __future__ import annotations

import io
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape as glob_escape
from glob import glob
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from imgdit.data.listing import is_stranger, strangers_note
from imgdit.data.rows import (
    CONDITIONS,
    IMAGE_ENDINGS,
    VALUES,
    Columns,
    FileBlob,
    Note,
    Problem,
    Row,
    Rows,
    Unknown,
    gather,
    make_row,
    refuse_unknown,
)
from imgdit.io.atomic import written_whole
from imgdit.io.safe_json import climbs, parse_object
from imgdit.io.text import decode_text

KNOWN = VALUES
"""Keys of a row's JSON."""
CAPTIONS = ("txt", "caption")
"""Members that hold a caption; the first one counts, and what the JSON says before both."""
_OWN = ("__key__", "__url__")
BLOCK = 512
"""Bytes; a tar's members fill whole blocks, and blocks of zeros mark its end."""


def shard_files(pattern: str) -> list[Path]:
    """Shards that a folder, a file, or a pattern with `*` or `{000..007}` names, sorted."""
    path = Path(pattern)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar" and not is_stranger(file.name))
    files = [Path(name) for part in _spread(pattern) for name in (sorted(glob(part)) or [part])]
    if is_pattern(pattern):
        files = [file for file in files if not is_stranger(file.name)]
    return files if all(file.suffix.lower() == ".tar" and file.is_file() for file in files) else []


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files."""
    return glob_escape(name) != name or re.search(r"\{\d+\.\.\d+\}", name) is not None


def shard_rows(files: list[Path], columns: Columns, source: str, strangers: Sequence[str] = ()) -> Rows:
    """Rows of shards, see `open_rows`; `strangers` are files that lie beside them."""
    left = list(strangers)
    rows = gather(source, (row for file in files for row in _shard(file, columns, left)))
    return rows._replace(notes=(*rows.notes, *strangers_note(source, left)))


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
        try:
            with written_whole(path) as temporary, tarfile.open(temporary, "w") as tar:
                total = 0
                while row is not None and total < size:
                    for ending, content in row[1].items():
                        member = tarfile.TarInfo(f"{row[0]}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                        total += len(content)
                    row = next(pending, None)
        except ValueError as error:
            raise ValueError(f"{error}. The {len(written)} shards before it are complete") from error
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


class _Strange(NamedTuple):
    """What a shard has that means nothing here, as keys of dictionaries, which keep their order."""

    columns: dict[str, None]
    endings: dict[str, None]
    conditions: dict[str, None]

    def refuse(self, path: Path) -> None:
        """Name all of it at once."""
        endings = (*(ending[1:] for ending in IMAGE_ENDINGS), "json", *CAPTIONS)
        refuse_unknown(
            str(path),
            Unknown("column", list(self.columns), KNOWN),
            Unknown("ending of names after the first dot", list(self.endings), endings),
            Unknown("condition", list(self.conditions), CONDITIONS),
        )


def _shard(path: Path, columns: Columns, strangers: list[str]) -> Iterator[Row | Problem]:
    members, problem = _members(path)
    strange = [member for member in members if any(map(is_stranger, PurePosixPath(member.name).parts))]
    strangers += [f"{path.name}: {member.name}" for member in strange]
    members = [member for member in members if member not in strange] if strange else members
    whole = groupby(members, key=lambda member: _split(member.name)[0])
    groups = [(key, list(group)) for key, group in whole]
    if problem is not None and groups:
        groups.pop()  # the last key may lack what was cut off
    unknown = _Strange({}, {}, {})
    rows: list[list[Row | Problem]] = []
    for key, group in groups:
        parts = {_split(m.name)[1]: FileBlob(path, m.offset_data, m.size) for m in group}
        images = [m.name for m in group if f".{_split(m.name)[1]}" in IMAGE_ENDINGS]
        if len(parts) < len(group) or len(images) > 1:
            names = ", ".join(m.name for m in group[:6])
            message = f"{path}: several rows have the key {key!r}, or one has several images ({names}); rename them"
            rows.append([Problem(key, "duplicate", f"{message}: a row's key ends at the first dot")])
        else:
            rows.append(list(_row(path, key, parts, columns, unknown)))
    unknown.refuse(path)
    for found in rows:
        yield from found
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
    """Key with its folder, accents composed, and ending in lower case."""
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _row(
    path: Path, key: str, parts: dict[str, FileBlob], columns: Columns, unknown: _Strange
) -> Iterator[Row | Problem]:
    """The row of a key, or what is wrong with it, after notes."""
    if climbs(key):
        message = f"{path}: {key!r:.200} leads out of the shard; expected a name from its top"
        yield Problem(key, "outside", message)
        return
    values: dict[str, Any] = {}
    if "json" in parts:
        try:
            found = parse_object(parts.pop("json").read(), f"{key}.json")
        except ValueError as error:
            yield Problem(key, "metadata", f"{path}: {error}")
            return
        names = [name for name in found if name not in _OWN]
        columns.check_renamed(f"{path}: {key}.json", names, KNOWN)
        unknown.columns.update(dict.fromkeys(columns.unknown(names, KNOWN)))
        values = {name: found[theirs] for name, theirs in columns.chosen(names).items()}
    texts = {ending: parts.pop(ending) for ending in CAPTIONS if ending in parts}
    for ending, blob in texts.items():
        try:
            caption = decode_text(blob.read(), f"{key}.{ending}").strip()
        except ValueError as error:
            yield Problem(key, "caption", f"{path}: {error}")
            return
        if values.get("text") is None:
            values["text"] = caption
        elif values["text"] not in (caption, [caption]):
            yield Note(
                key, "two captions", f"{path}: {key}.{ending} does not count, another text of {key} comes first"
            )
    image, conditions, frames = _images(parts, columns, unknown)
    if image is None:
        yield Problem(key, "missing", f"{path}: {key} has no image, only {', '.join(parts) or 'text'}")
        return
    yield make_row(key, values, image, conditions, [frames[n] for n in sorted(frames)])


def _images(
    parts: Mapping[str, FileBlob], columns: Columns, unknown: _Strange
) -> tuple[FileBlob | None, dict[str, FileBlob], dict[int, FileBlob]]:
    """The image of a row, its conditions and its frames."""
    image = None
    conditions: dict[str, FileBlob] = {}
    frames: dict[int, FileBlob] = {}
    for ending, blob in parts.items():
        words = ending.split(".")
        if f".{words[-1]}" not in IMAGE_ENDINGS or len(words) > 3:
            if ending not in columns.ignored:
                unknown.endings[ending] = None
        elif len(words) == 1:
            image = blob
        elif len(words) == 3 and words[0] == "frames" and words[1].isdigit():
            frames[int(words[1])] = blob
        elif words[0] in CONDITIONS:
            conditions[words[0]] = blob
        elif words[0] not in columns.ignored:
            unknown.conditions[words[0]] = None
    return image, conditions, frames
