"""Rows: images with their captions, whatever they are stored in.

A row has an image and, if its source says so, captions, condition images, further frames, cameras. The names are
those of the `datasets` library's imagefolder convention, see `folders`; `shards` and `hub` have the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from imgdit.naming import SIMILAR, closest, nearest, old_names
from imgdit.tasks import KINDS

CONDITIONS = (
    *KINDS[1:-1], "blur", "grey", "mask", "super_resolution", "subject", "style_reference", "views", "condition",
)  # fmt: skip
"""Names that a column of condition images may have: maps, degraded images, references, and "condition" for anything
else."""
IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".jfif",
)  # fmt: skip
"""Of files that count as images, in lower case."""
VALUES = ("text", "cameras", "focal_length", "repeats")
"""What a row says besides its images."""
MOST_REPEATS = 1000
"""Above it, a number before a folder's name is a year or a count and no number of repeats."""


class Blob(Protocol):
    """An encoded image that is not read yet."""

    @property
    def stamp(self) -> str:
        """Changes when the content does, and costs no reading."""

    def read(self) -> bytes:
        """The encoded image."""


@dataclass(frozen=True)
class FileBlob:
    """A file, or a part of one."""

    path: Path
    offset: int = 0
    size: int = -1
    """Bytes; -1: to the end."""

    @property
    def stamp(self) -> str:
        state = self.path.stat()
        return f"{os.path.abspath(self.path)}:{state.st_size}:{state.st_mtime_ns}:{self.offset}:{self.size}"

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@old_names(picture="image")
@dataclass(frozen=True)
class Row:
    """One image and what belongs to it."""

    name: str
    """Its place in the source: a file's name, a key in a shard, a number."""
    image: Blob
    captions: tuple[str, ...] = ()
    """Any number; one of them is drawn whenever the row is trained on."""
    conditions: Mapping[str, Blob] = field(default_factory=dict)
    """By names of `CONDITIONS`."""
    frames: tuple[Blob, ...] = ()
    """Further images of the same, such as other views."""
    cameras: torch.Tensor | None = None
    """Camera-to-world matrices (1 + frames, 4, 4), the image's first; OpenCV's axes."""
    focal_length: float | None = None
    """Of all cameras, in image widths."""
    repeats: int = 1
    """How often it is trained on in an epoch."""


class Problem(NamedTuple):
    """Something that is wrong with a row, or with a file of many."""

    name: str
    kind: str
    """A word or two to count by: "broken", "too small", "caption", "duplicate", …"""
    message: str


class Note(Problem):
    """Something that is told and costs no row: what was left alone, or which of two captions counts."""


class Rows(NamedTuple):
    """What a source holds."""

    rows: list[Row]
    problems: list[Problem]
    """Of rows that cannot be given. A problem of kind "shard" stands for any number of them."""
    source: str
    notes: tuple[Note, ...] = ()
    """What is told and costs no row."""


@dataclass(frozen=True)
class Columns:
    """What a source's columns are called, and which are left alone."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Our name -> the source's: {"text": "caption"}."""
    ignored: tuple[str, ...] = ()
    """Columns that mean nothing here."""

    def ours(self, source: str, found: Iterable[str], known: Sequence[str]) -> dict[str, str]:
        """Our name -> the source's, of the columns that are there.

        Raises:
            ValueError: columns that are neither known nor ignored, or one that should be there and is not.
        """
        found = list(found)
        self.check_renamed(source, found, known)
        refuse_unknown(source, Unknown("column", self.unknown(found, known), known))
        return self.chosen(found)

    def check_renamed(self, source: str, found: Sequence[str], known: Sequence[str]) -> None:
        """Refuse new names for what there is not."""
        for name, theirs in self.renamed.items():
            if name not in known:
                raise ValueError(f"columns renames {nearest(name, known)}")
            if theirs not in found:
                raise ValueError(f"{source} has no column {nearest(theirs, found)}")

    def unknown(self, found: Iterable[str], known: Sequence[str]) -> list[str]:
        """Columns that are neither known nor ignored nor renamed."""
        taken = {*self.renamed.values(), *known, *self.ignored}
        return [theirs for theirs in found if theirs not in taken]

    def chosen(self, found: Iterable[str]) -> dict[str, str]:
        """Our name -> the source's, of columns that are known or renamed."""
        back = {theirs: name for name, theirs in self.renamed.items()}
        return {back.get(theirs, theirs): theirs for theirs in found if theirs not in self.ignored or theirs in back}


class Unknown(NamedTuple):
    """Names of a source that mean nothing here."""

    what: str
    """What they name: "column"."""
    names: Sequence[str]
    known: Sequence[str]

    def __str__(self) -> str:
        if len(self.names) == 1:
            return f"an unknown {self.what} {nearest(self.names[0], self.known)}"
        near = {name: closest(name, self.known, SIMILAR) for name in self.names}
        meant = [f"{name!r}: did you mean {close!r}?" for name, close in near.items() if close]
        head = f"{len(self.names)} unknown {self.what}s: {', '.join(map(repr, self.names))}"
        return "; ".join([head, *meant])


def refuse_unknown(source: str, *found: Unknown) -> None:
    """Name everything that is unknown at once.

    Raises:
        ValueError: there is anything.
    """
    groups = [group for group in found if group.names]
    if groups:
        them = "them" if sum(len(group.names) for group in groups) > 1 else "it"
        listed = ", ".join(repr(name) for group in groups for name in group.names)
        raise ValueError(
            f"{source} has {', and '.join(map(str, groups))}. Rename {them}, or leave {them} out by --ignore NAME, in "
            f"a recipe by ignore: [{listed}]"
        )


@old_names(picture="image")
def make_row(
    name: str,
    values: Mapping[str, Any],
    image: Blob,
    conditions: Mapping[str, Blob],
    frames: Sequence[Blob],
) -> Row | Problem:
    """A row, after its text and cameras were checked.

    Args:
        values: `text`, `cameras`, `focal_length` and `repeats`, as they were found.
    """
    text = values.get("text")
    captions = (text,) if isinstance(text, str) else () if text is None else tuple(text) if _is_list(text) else None
    if captions is None or not all(isinstance(caption, str) for caption in captions):
        return Problem(name, "caption", f"text must be a caption or a list of them, got {text!r}"[:200])
    if captions and not all(caption.strip() for caption in captions):
        return Problem(name, "caption", "text is empty; leave the column out for images without a caption")
    cameras = values.get("cameras")
    poses = None
    if cameras is not None:
        try:
            poses = torch.tensor(cameras, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            return Problem(name, "cameras", f"cameras must be 4x4 matrices of numbers: {error}")
        if tuple(poses.shape) != (1 + len(frames), 4, 4):
            wanted = f"a 4x4 matrix for the image and each of its {len(frames)} frames"
            return Problem(name, "cameras", f"cameras must be {wanted}, got shape {tuple(poses.shape)}")
    repeats = values.get("repeats", 1)
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        return Problem(name, "metadata", f"repeats must be a whole number from 1 to {MOST_REPEATS}, got {repeats!r}")
    focal = values.get("focal_length")
    if focal is not None and (not isinstance(focal, (int, float)) or not focal > 0):
        return Problem(name, "cameras", f"focal_length must be positive, in image widths, got {focal!r}")
    return Row(name, image, captions, dict(conditions), tuple(frames), poses, focal, repeats)


def gather(source: str, found: Iterable[Row | Problem], rename: Callable[[str], str] = str) -> Rows:
    """Rows, problems and notes apart; a name that comes again is a problem.

    Args:
        rename: a name as messages should say it.
    """
    rows: dict[str, Row] = {}
    problems: list[Problem] = []
    notes: list[Note] = []
    for one in found:
        if isinstance(one, Note):
            notes.append(one)
        elif isinstance(one, Problem):
            problems.append(one)
        elif one.name in rows:
            problems.append(Problem(one.name, "duplicate", f"{rename(one.name)} is there twice; the first one counts"))
        else:
            rows[one.name] = one
    if not rows and not problems:
        raise ValueError("; ".join([f"{source} holds no image", *(note.message for note in notes)]))
    return Rows(list(rows.values()), problems, source, tuple(notes))


def content_hash(data: bytes) -> str:
    """A name for content."""
    return hashlib.sha256(data).hexdigest()[:32]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0
