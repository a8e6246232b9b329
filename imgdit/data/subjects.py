"""A data set of subjects: pairs of images of the same thing, made, scored, and the good ones kept.

As OminiControl made Subjects200K (arXiv 2411.15098, section 3.4). What makes and scores is given as functions, so that
the library need not know pipelines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from imgdit.data.folders import METADATA
from imgdit.io.atomic import write_text
from imgdit.io.text import lines_or_errors
from imgdit.naming import old_names

LOG = "pairs.jsonl"
"""A line per pair that was made: what a run that goes on need not make again."""


class Idea(NamedTuple):
    """What a pair is to show."""

    subject: str
    """The thing, such as "red cube"."""
    places: tuple[str, str]
    """A caption about the thing for each of the two images."""


class Pair(NamedTuple):
    """Two images of the same thing."""

    reference: Image.Image
    target: Image.Image


@old_names(made="generated")
class SubjectReport(NamedTuple):
    """How a data set came about."""

    generated: int
    kept: int
    scores: list[float]
    """Of all pairs, in the order of the ideas."""


def make_subjects(
    ideas: Sequence[Idea],
    make: Callable[[Idea, int], Pair],
    score: Callable[[Idea, Pair], float],
    out: Path,
    *,
    threshold: float = 0.5,
    seed: int = 0,
) -> SubjectReport:
    """Write a folder that can be trained on with `condition: condition`: the image, its caption, and the reference
    as the condition. A run that was stopped goes on.

    Args:
        ideas: one per pair.
        make: draws a pair from a seed.
        score: how good it is, in [0, 1].
        out: folder.
        threshold: pairs with less are not kept.
        seed: of the first pair; the others count up.

    Raises:
        ValueError: the folder's log is of other ideas, or a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a score in [0, 1], got {threshold}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOG
    log = _read_log(path)
    for number, line in enumerate(log):
        if number >= len(ideas) or line["subject"] != ideas[number].subject or line["seed"] != seed + number:
            raise ValueError(f"{path} is of other ideas from line {number + 1} on; choose another folder")
    write_text(path, "".join(json.dumps(line) + "\n" for line in log))
    with open(path, "a", encoding="utf-8") as file:
        for number in tqdm(range(len(log), len(ideas)), desc="subjects", unit="pair", disable=None):
            idea = ideas[number]
            pair = make(idea, seed + number)
            line = {"subject": idea.subject, "seed": seed + number, "score": round(score(idea, pair), 4)}
            if line["score"] >= threshold:
                pair.target.save(out / f"{number:06d}.png")
                pair.reference.save(out / f"{number:06d}-reference.png")
            file.write(json.dumps(line) + "\n")
            file.flush()
            log.append(line)
    kept = [n for n, line in enumerate(log) if line["score"] >= threshold and (out / f"{n:06d}.png").is_file()]
    rows = [
        {"file_name": f"{n:06d}.png", "text": ideas[n].places[1], "condition_file_name": f"{n:06d}-reference.png"}
        for n in kept
    ]
    write_text(out / METADATA, "".join(json.dumps(row) + "\n" for row in rows))
    return SubjectReport(len(log), len(kept), [line["score"] for line in log])


def _read_log(path: Path) -> list[dict]:
    """Whole lines; one that a kill cut short is made again."""
    lines = []
    for line in lines_or_errors(path.read_bytes(), str(path)) if path.exists() else []:
        try:
            lines.append(json.loads(str(line)))
        except ValueError:
            break
    return lines
