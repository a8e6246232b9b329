"""What is wrong with data, per file, before anything is trained on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from imgdit import display
from imgdit.data.opening import decode_image
from imgdit.data.rows import Blob, Problem, Row, Rows, content_hash

RATIO = 0.02
"""Relative difference of the aspect ratios of an image and its condition from which they do not belong together."""


class Inspection(NamedTuple):
    """What reading a row found."""

    hashes: dict[str, str]
    """Of the content: "image", each condition by its name, each frame by its number."""
    size: tuple[int, int]
    """Width and height in pixels, upright; (0, 0) for an image that cannot be read."""
    notes: tuple[str, ...]
    """What had to be repaired, see `Opened`."""
    problem: Problem | None
    """Why the row cannot be trained on."""


def inspect_row(row: Row, min_side: int) -> Inspection:
    """Read everything of a row.

    Args:
        min_side: pixels that the shorter side must have.
    """
    hashes: dict[str, str] = {}
    size = (0, 0)
    notes: set[str] = set()
    parts: dict[str, Blob] = {"picture": row.image, **row.conditions}
    parts |= {str(n): frame for n, frame in enumerate(row.frames)}
    for name, blob in parts.items():
        what = (
            "the image" if name == "picture" else f"the condition {name!r}" if not name.isdigit() else f"frame {name}"
        )
        kind = "broken" if name == "picture" else f"broken {'frame' if name.isdigit() else 'condition'}"
        try:
            data = blob.read()
            opened = decode_image(data)
        except (ValueError, OSError) as error:
            return Inspection(hashes, size, tuple(sorted(notes)), Problem(row.name, kind, f"{what}: {error}"))
        hashes[name] = content_hash(data)
        notes |= set(opened.notes)
        width, height = opened.image.size
        if name == "picture":
            size = (width, height)
            if min(size) < min_side:
                message = f"{width}x{height} pixels; the shorter side must have {min_side}"
                return Inspection(hashes, size, tuple(sorted(notes)), Problem(row.name, "too small", message))
        elif name in row.conditions and abs(width * size[1] / (height * size[0]) - 1) > RATIO:
            message = f"{what} has {width}x{height} pixels, another shape than the image's {size[0]}x{size[1]}"
            return Inspection(hashes, size, tuple(sorted(notes)), Problem(row.name, "condition shape", message))
    return Inspection(hashes, size, tuple(sorted(notes)), None)


def inspect_rows(rows: Sequence[Row], min_side: int, workers: int = 4) -> Iterator[Inspection]:
    """`inspect_row` of each, in their order; decoding leaves Python's lock, so threads are enough."""
    with ThreadPoolExecutor(workers) as pool:
        yield from tqdm(
            pool.map(lambda row: inspect_row(row, min_side), rows),
            total=len(rows),
            desc="reading images",
            unit="row",
            disable=None,
        )


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    source: str
    rows: int
    """Usable rows."""
    problems: list[Problem]
    """One for each row that cannot be used."""
    warnings: list[Problem]
    """Rows that can, but may not be what was meant."""
    repaired: Counter[str]
    """Rows by what is done about them: "rotated", "alpha", …"""
    sizes: Counter[tuple[int, int]]
    """Usable rows by width and height."""
    captions: list[str]
    """Of the usable rows."""

    def __str__(self) -> str:
        """For a person."""
        lines = [f"{self.source}: {self.rows:,} usable rows, {len(self.problems):,} problems"]
        for title, found in (("problems", self.problems), ("warnings", self.warnings)):
            counts = Counter(problem.kind for problem in found)
            lines += [f"  {title}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common())] * bool(found)
        if self.repaired:
            lines += ["  handled: " + ", ".join(f"{n:,} {kind}" for kind, n in self.repaired.most_common())]
        if self.sizes:
            common = ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in self.sizes.most_common(5))
            lines += [f"  sizes: {len(self.sizes):,} different; {common}"]
        lines += [f"  {line}" for line in caption_summary(self.captions)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return display.lines(str(self))


def check(
    rows: Rows, *, min_side: int = 256, workers: int = 4, unfit: Callable[[Row], Problem | None] = lambda row: None
) -> Report:
    """Read everything once.

    Args:
        rows: of `open_rows`.
        min_side: pixels that the shorter side of an image must have.
        workers: threads that decode.
        unfit: why a sound row is none for the purpose at hand.
    """
    problems, warnings = list(rows.problems), list[Problem](rows.notes)
    repaired: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    captions: list[str] = []
    first: dict[str, str] = {}
    usable = 0
    for row, found in zip(rows.rows, inspect_rows(rows.rows, min_side, workers)):
        problem = found.problem or unfit(row)
        if problem is not None:
            problems.append(problem)
            continue
        usable += 1
        repaired.update(found.notes)
        sizes[found.size] += 1
        captions += row.captions
        if not row.captions:
            warnings.append(Problem(row.name, "no caption", "it is trained with the empty text"))
        same = first.setdefault(found.hashes["picture"], row.name)
        if same != row.name:
            warnings.append(Problem(row.name, "same image", f"has the content of {same}"))
    return Report(rows.source, usable, problems, warnings, repaired, sizes, captions)


def caption_summary(captions: Sequence[str]) -> list[str]:
    """How many captions there are, how long, and what they begin with and talk about most."""
    if not captions:
        return ["captions: none"]
    spoken = [re.findall(r"\w+", caption.lower()) for caption in captions]
    lengths = sorted(len(words) for words in spoken)
    starts = Counter(" ".join(words[:2]) for words in spoken)
    long = Counter(word for words in spoken for word in set(words) if len(word) > 3)
    return [
        f"captions: {len(captions):,}, {len(set(captions)):,} different; words: {lengths[0]} to {lengths[-1]}, "
        f"half have {lengths[len(lengths) // 2]} or fewer",
        "  begin with: " + ", ".join(f"{start!r} ({n:,})" for start, n in starts.most_common(5)),
        "  say often: " + ", ".join(f"{word} ({n:,})" for word, n in long.most_common(12)),
    ]
