"""What a folder of people's files holds: images, captions beside them, metadata, and what nobody meant as data."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from imgdit.data.rows import IMAGE_ENDINGS, Note

CAPTION_ENDINGS = (".txt", ".caption")
"""Of captions beside an image, in lower case; the first one counts."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.json")
"""Files that tell rows, in lower case; the first one counts. `metadata.parquet` is read by `datasets`."""
_LEFT_BEHIND = (
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin",
    "system volume information",
)  # fmt: skip
_HALF = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".tmp", ".writing", "~")
SHEET = "sheet.png"
"""What `imgdit generate` and `imgdit data check` call a contact sheet."""
SHOWN = 5
"""Names that a message shows."""


def is_stranger(name: str) -> bool:
    """Whether a file's or folder's own name says that nobody meant it as data: hidden (`._x`, `.DS_Store`,
    `.ipynb_checkpoints`), left behind by a system (`Thumbs.db`, `__MACOSX`), or a download that is not complete."""
    small = name.lower()
    hidden = small.startswith(".") and small not in (".", "..")
    return hidden or small in _LEFT_BEHIND or small.endswith(_HALF)


def strangers_note(source: str, names: Sequence[str]) -> list[Note]:
    """What is told of strangers; nothing if there are none."""
    why = "left by systems, hidden, or downloads that are not complete"
    return [Note(source, "left alone", f"{some(names, 'file')} {why}")] if names else []


def some(names: Sequence[str], what: str) -> str:
    """How many there are, and the first names: "7 files (a.png, b.png, …)"."""
    shown = ", ".join(map(str, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")
    return f"{len(names):,} {what}{'s' * (len(names) != 1)} ({shown})"


def alike(name: str) -> str:
    """What two names of one file have in common: letter case and composed or decomposed accents aside."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


@dataclass
class Listing:
    """Files of a folder and its sub-folders, by their paths from it with `/`, sorted."""

    folder: Path
    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    """Folders among them end in `/`."""

    def __post_init__(self) -> None:
        self._alike: dict[str, list[str]] | None = None

    def find(self, name: str, base: str = "") -> list[str]:
        """Files that a name in `base` can mean: the one that is called so, or those whose names differ in letter case,
        in how accents are composed, or by having `/` where the name has a backslash."""
        for exact in (name, name.replace("\\", "/")):
            path = str(PurePosixPath(base, exact))
            if os.path.isfile(self.folder / path):
                return [path]
        if self._alike is None:
            self._alike = {}
            for file in (*self.images, *self.captions, *self.others):
                self._alike.setdefault(alike(file), []).append(file)
        return self._alike.get(alike(str(PurePosixPath(base, name.replace("\\", "/")))), [])


def list_folder(folder: Path) -> Listing:
    """Look through a folder. Links to folders are followed, but for those to a folder that holds this one; each folder
    is seen once."""
    found = Listing(folder)
    seen: set[str] = set()
    home = os.path.realpath(folder)
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _leads_up(os.path.join(place, name), home)]
        base = Path(place).relative_to(folder).as_posix()
        inside = "" if base == "." else f"{base}/"
        found.strangers += [f"{inside}{name}/" for name in folders if is_stranger(name)]
        folders[:] = sorted(name for name in folders if not is_stranger(name))
        for name in sorted(files):
            _kind(found, name).append(inside + name)
    for names in (found.images, found.captions, found.metadata, found.others, found.strangers):
        names.sort()
    return found


def _leads_up(path: str, home: str) -> bool:
    """Whether a link names a folder that holds `home`."""
    real = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([real, home]) == real


def _kind(found: Listing, name: str) -> list[str]:
    ending = os.path.splitext(name)[1].lower()
    if is_stranger(name):
        return found.strangers
    if name.lower() in METADATA_FILES:
        return found.metadata
    if ending in IMAGE_ENDINGS:
        return found.images
    return found.captions if ending in CAPTION_ENDINGS else found.others


def caption_files(images: Iterable[str], captions: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Captions of each image, `0001.txt` or `0001.png.txt` for `0001.png`; and those that belong to none."""
    by_name: dict[str, list[str]] = {}
    for caption in captions:
        by_name.setdefault(alike(os.path.splitext(caption)[0]), []).append(caption)
    found: dict[str, list[str]] = {}
    used: set[str] = set()
    for image in images:
        stem = os.path.splitext(image)[0]
        able = [*by_name.get(alike(stem), []), *by_name.get(alike(image), [])]
        # On a system that tells letter case apart, `A.txt` is not `a.png`'s while there is an `a.txt`.
        exact = [name for name in able if os.path.splitext(name)[0] in (stem, image)]
        found[image] = sorted(exact or able, key=lambda name: _rank(name))
        used |= set(found[image])
    return found, sorted(set().union(*by_name.values(), ()) - used)


def _rank(caption: str) -> tuple[int, str]:
    return CAPTION_ENDINGS.index(os.path.splitext(caption)[1].lower()), caption
