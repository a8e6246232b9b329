"""Folders of images, with `metadata.jsonl` as the `datasets` library's imagefolder has them, or with captions beside.

{"file_name": "0001.png", "text": "a red cube"}
{"file_name": "0002.png", "text": ["a ball", "a blue sphere"], "depth_file_name": "depth/0002.png"}
{"file_name": "0003.png", "text": "a cone", "frames_file_names": ["0003b.png"], "cameras": [[[1, 0, …]…]…]}

Without metadata every image is a row, and `0001.txt` or `0001.caption` beside `0001.png` is its caption. Images in a
folder that is called `4_name` count four times in an epoch, as in kohya's scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from imgdit.data.listing import (
    METADATA_FILES,
    SHEET,
    Listing,
    caption_files,
    list_folder,
    some,
    strangers_note,
)
from imgdit.data.metadata import read_metadata, typed_cells
from imgdit.data.rows import (
    CONDITIONS,
    MOST_REPEATS,
    Columns,
    FileBlob,
    Note,
    Problem,
    Row,
    Rows,
    gather,
    make_row,
)
from imgdit.io.safe_json import climbs
from imgdit.io.text import read_text

METADATA = METADATA_FILES[0]
FILE = "_file_name"
"""What a condition's column ends in."""
KNOWN = (
    "file_name", "text", *(name + FILE for name in CONDITIONS), "frames_file_names", "cameras", "focal_length",
    "repeats",
)  # fmt: skip
"""Columns."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of the sub-folders that splits are kept in, as `datasets` knows them."""


class _Line(NamedTuple):
    """A line of metadata and where it stands."""

    file: str
    number: int
    values: Any

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def base(self) -> str:
        """Folder that its names are of."""
        return str(PurePosixPath(self.file).parent)


def folder_rows(listing: Listing, columns: Columns) -> Rows:
    """Rows of a folder, see `open_rows`."""
    return gather(str(listing.folder), _FolderRows(listing, columns).rows())


def choose_split(folder: Path, listing: Listing, split: str) -> tuple[Listing, list[Note]]:
    """The folder itself, or the sub-folder of a split where it has nothing but splits.

    Raises:
        ValueError: it has splits, but not this one.
    """
    files = (*listing.images, *listing.captions, *listing.metadata)
    tops = {PurePosixPath(name).parts[0] for name in files}
    known = {name: part for part, names in SPLITS.items() for name in names}
    if not any("/" in name for name in files) or any(top.lower() not in known for top in tops):
        return listing, []
    chosen = sorted(top for top in tops if split in (top, known[top.lower()]))
    if len(chosen) != 1:
        reason = "has no split" if not chosen else f"has {len(chosen)} folders for the split"
        raise ValueError(f"{folder} {reason} {split!r}; its sub-folders are {', '.join(sorted(tops))}")
    others = sorted(tops - set(chosen))
    notes = [Note(str(folder), "left alone", f"the splits {', '.join(others)}: only {chosen[0]} is read")]
    inner = list_folder(folder / chosen[0])
    inner.strangers = listing.strangers
    return inner, notes if others else []


class _FolderRows:
    """What the files of a folder say."""

    def __init__(self, listing: Listing, columns: Columns):
        self.listing, self.folder, self.columns = listing, listing.folder, columns
        self.captions, self.lost_captions = caption_files(listing.images, listing.captions)
        self.conflicts: list[str] = []
        self.repeated: dict[str, int] = {}

    def rows(self) -> Iterator[Row | Problem]:
        """Rows, problems and notes."""
        files, notes = self._metadata()
        lines = [_Line(f, n, values) for f in files for n, values in read_metadata(self.folder / f, self._file_name)]
        found = dict.fromkeys(key for line in lines if isinstance(line.values, dict) for key in line.values)
        ours = self.columns.ours(str(self.folder / files[0]), list(found), KNOWN) if files else {}
        named = []
        for line in lines:
            row = self._line(line, ours)
            named.append(row)
            yield row
        yield from self._bare(files, self._named(named))
        yield from notes
        yield from self._notes()

    @property
    def _file_name(self) -> str:
        return self.columns.renamed.get("file_name", "file_name")

    # Which files are metadata

    def _metadata(self) -> tuple[list[str], list[Note]]:
        """The files that count, and what is told of the others: one at the top is for all, otherwise each is for its
        folder."""
        best: dict[str, str] = {}
        for file in self.listing.metadata:
            base, name = str(PurePosixPath(file).parent), PurePosixPath(file).name.lower()
            if name == "metadata.json" and not read_text(self.folder / file).lstrip().startswith("["):
                continue  # of a program that keeps something else there
            if base not in best or _rank(file) < _rank(best[base]):
                best[base] = file
        kept = [best["."]] if "." in best else sorted(best.values())
        others = [file for file in self.listing.metadata if file not in kept]
        note = f"{some(others, 'file')} of metadata: {', '.join(kept) or 'none'} is read"
        return kept, [Note(str(self.folder), "left alone", note)] if others else []

    # Lines of metadata

    def _line(self, line: _Line, ours: Mapping[str, str]) -> Row | Problem:
        if not isinstance(line.values, dict):
            what = "" if isinstance(line.values, ValueError) else "the line is no JSON object: "
            return Problem(line.place, "metadata", f"{what}{line.values!s:.300}")
        values = {name: line.values[theirs] for name, theirs in ours.items() if line.values.get(theirs) is not None}
        if line.file.lower().endswith(".csv"):
            try:
                values = typed_cells(values)
            except ValueError as error:
                return Problem(line.place, "metadata", str(error))
        name = values.get("file_name")
        if not isinstance(name, str):
            return Problem(line.place, "metadata", f"file_name must name a file, got {name!r}")
        files = {key.removesuffix(FILE): value for key, value in values.items() if key.endswith(FILE)}
        frames = values.get("frames_file_names", [])
        if not isinstance(frames, list):
            message = f"{line.place}: frames_file_names must be a list, got {frames!r:.200}"
            return Problem(name, "metadata", message)
        found = []
        for file in (name, *files.values(), *frames):
            real = self._real(name, file, line)
            if isinstance(real, Problem):
                return real
            found.append(real)
        image, *others = found
        blobs = [FileBlob(self.folder / file) for file in others]
        caption = self._caption(image)
        if isinstance(caption, Problem):
            return caption
        if caption is not None and values.setdefault("text", caption) not in (caption, [caption]):
            self.conflicts.append(f"{image}: {line.place} counts, {self.captions[image][0]} says something else")
        return make_row(image, values, FileBlob(self.folder / image), dict(zip(files, blobs)), blobs[len(files) :])

    def _real(self, name: str, file: Any, line: _Line) -> str | Problem:
        """The file that a name means, by its path from the folder."""
        if isinstance(file, str) and climbs(file):
            return Problem(name, "outside", f"{line.place} names {file!r:.200}, which leads out of {self.folder}")
        found = self.listing.find(file, line.base) if isinstance(file, str) and file.strip() else []
        if len(found) == 1:
            return found[0]
        what = "which is not in"
        if found:
            what = f"which can be {' or '.join(found[:5])} (names differ in letter case or accents only) in"
        return Problem(name, "missing", f"{line.place} names {file!r:.200}, {what} {self.folder}")

    def _named(self, rows: Iterable[Row | Problem]) -> set[str]:
        """Images that rows of metadata use, or whose row was refused."""
        used: set[str] = set()
        for row in rows:
            used.add(row.name)
            if isinstance(row, Row):
                blobs = (row.image, *row.conditions.values(), *row.frames)
                used |= {b.path.relative_to(self.folder).as_posix() for b in blobs if isinstance(b, FileBlob)}
        return used

    # Images without metadata

    def _bare(self, files: list[str], named: set[str]) -> Iterator[Row | Problem]:
        """Rows of images that no metadata is for; what metadata leaves out is told."""
        bases = [PurePosixPath(file).parent for file in files]
        left: list[str] = []
        for image in self.listing.images:
            if any(base in PurePosixPath(image).parents for base in bases):
                left += [image] * (image not in named)
                continue
            caption = self._caption(image)
            repeats = self._repeats(image)
            if isinstance(caption, Problem):
                yield caption
            elif PurePosixPath(image).name == SHEET and caption is None:
                message = (
                    f"{image} has no caption and the name of a contact sheet; give it another name to train on it"
                )
                yield Note(image, "left alone", message)
            elif repeats:
                values: dict[str, Any] = {"repeats": repeats} | ({} if caption is None else {"text": caption})
                yield make_row(image, values, FileBlob(self.folder / image), {}, ())
        if left:
            yield Note(str(self.folder), "left alone", f"{some(left, 'image')} that no line of {files[0]} names")

    def _caption(self, image: str) -> str | Problem | None:
        """What the files beside an image say."""
        found: str | None = None
        for number, file in enumerate(self.captions.get(image, [])):
            try:
                caption = read_text(self.folder / file).strip()
            except ValueError as error:
                return Problem(image, "caption", str(error))
            if number == 0:
                found = caption
            elif caption != found:
                self.conflicts.append(f"{image}: {self.captions[image][0]} counts, {file} says something else")
        if found == "":
            file = self.captions[image][0]
            return Problem(image, "caption", f"{file} is empty; delete it if the image is to have no caption")
        return found

    def _repeats(self, image: str) -> int:
        """The number in the name of the nearest folder that has one; what is no number of repeats counts once."""
        for parent in reversed(PurePosixPath(image).parent.parts):
            match = re.fullmatch(r"(\d{1,9})_.+", parent)
            if match and int(match[1]) <= MOST_REPEATS:
                self.repeated[parent] = int(match[1])
                return int(match[1])
        return 1

    # What is told

    def _notes(self) -> Iterator[Note]:
        source = str(self.folder)
        yield from strangers_note(source, self.listing.strangers)
        for name, number in self.repeated.items():
            if number != 1:
                yield Note(name, "repeats", f"its images count {number} times in an epoch")
        for conflict in self.conflicts:
            name, _, message = conflict.partition(": ")
            yield Note(name, "two captions", message)
        if self.lost_captions:
            yield Note(source, "left alone", f"{some(self.lost_captions, 'text')} beside no image of that name")
        if self.listing.others:
            yield Note(source, "left alone", f"{some(self.listing.others, 'file')} of no known kind of image")


def _rank(file: str) -> int:
    return METADATA_FILES.index(PurePosixPath(file).name.lower())
