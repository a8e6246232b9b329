"""How well a model of the scenes draws prompts as people write them, read by the probe.

`people.jsonl` holds 200 prompts that were written before any rule that reads prompts, without the grammar of captions:
short and long, with synonyms, typing mistakes, numbers, negations and things that scenes do not have. Each line says
what of it scenes have: `objects` with their colours (`null`: none that scenes have), `left` where the first is to be
left of the second, `style` and `background`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imgdit.benchmarks.scenes.text_to_image import Maker, Score, fraction_score, read
from imgdit.io.safe_json import parse_object
from imgdit.io.text import read_text, split_lines
from imgdit.scenes.answers import NOTHING
from imgdit.scenes.probe import SceneProbe

FILE = Path(__file__).with_name("people.jsonl")
BAR = 0.9


class Asked(NamedTuple):
    """What a person's prompt asks for, as far as scenes have it."""

    prompt: str
    objects: tuple[tuple[str, str | None], ...]
    """Kind and colour of each."""
    left: bool
    """Whether the first is to be left of the second."""
    style: str | None
    background: str | None


def people_prompts(count: int | None = None, file: Path = FILE) -> list[Asked]:
    """Free-form prompts, evenly taken from the file; all by default.

    Raises:
        ValueError: a line that is no such prompt.
    """
    found = []
    for number, line in enumerate(split_lines(read_text(file)), start=1):
        if not line.strip():
            continue
        values = parse_object(line, f"{file.name}, line {number}")
        objects = tuple((thing["object"], thing["colour"]) for thing in values["objects"])
        found.append(Asked(values["prompt"], objects, values["left"], values["style"], values["background"]))
    if count is None or count >= len(found):
        return found
    return [found[i * len(found) // count] for i in range(count)]


def people_scores(
    maker: Maker, probe: SceneProbe, asked: Sequence[Asked], keep: Callable[[str, Any], None]
) -> list[Score]:
    """Images of free-form prompts: what the probe reads against what scenes have of what was asked."""
    images = maker.images([one.prompt for one in asked], seed=0)
    rows = list(zip(asked, read(probe, images).answers, strict=True))
    wrong = [i for i, (one, seen) in enumerate(rows) if not all(right(one, seen).values())]
    keep("free-form prompts", ([one.prompt for one in asked], images, wrong))
    scores = []
    for metric in ("object", "colour", "style", "background", "side"):
        values = [marks[metric] for marks in (right(one, seen) for one, seen in rows) if metric in marks]
        if values:
            bar = BAR if metric in ("object", "colour", "style") else None
            scores.append(fraction_score("free-form prompts → image", f"{metric} right", values, bar))
    return scores


def right(asked: Asked, seen: dict[str, str]) -> dict[str, bool]:
    """Whether what was asked is there: the kinds of objects and no other, their colours, the style, the background,
    and the left object at its side; only what was asked has an entry.

    Args:
        asked: of the prompt.
        seen: the probe's answers.
    """
    sides = [(seen[f"{side} object"], seen[f"{side} colour"]) for side in ("left", "right")]
    there = [thing for thing in sides if thing[0] != NOTHING]
    found: dict[str, bool] = {}
    if asked.objects:
        found["object"] = sorted(kind for kind, _ in there) == sorted(kind for kind, _ in asked.objects)
    colours = [colour for _, colour in asked.objects if colour is not None]
    if colours:
        found["colour"] = set(colours) <= {colour for _, colour in there}
    if asked.style is not None:
        found["style"] = seen["style"] == asked.style
    if asked.background is not None:
        found["background"] = seen["background"] == asked.background
    if asked.left:
        found["side"] = [kind for kind, _ in there] == [kind for kind, _ in asked.objects]
    return found
