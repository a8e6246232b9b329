"""How well a model of scenes reads images and writes about them: captions, answers, fillings, round trips.

Images are (N, 3, S, S) in [0, 1]. Texts are read by the grammar of the captions, images by a probe; every draw comes
from the held-out splits and fixed seeds.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from imgdit.benchmarks.scenes.text_to_image import HeldOut, Score, expected, fraction_score, held_out, mean_score, read
from imgdit.scenes.caption_parser import ParsedCaption, parse_caption
from imgdit.scenes.captions import caption, words
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.questions import ANSWERS, Question, chance, heldout_questions
from imgdit.scenes.render import render
from imgdit.scenes.world import COLOURS, OBJECTS, STYLES, Scene, pick

HOLE = "[?]"
"""What stands in a text where one word is to be filled in."""
SHIFTS = (1 / 3, 1.0, 3.0)
"""Of LaViDa's schedule (arXiv 2505.16839, section 3.3): below 1 more tokens are revealed in early steps."""
STEPS = (2, 4, 8, 16, 32)
TRUTH = ("left object", "left colour", "right object", "right colour", "style")
"""What round trips must keep, by the probe's questions."""
HOLES = ("object", "colour", "style", "relation", "time")
"""Kinds of words that an image decides."""


class Writer(Protocol):
    """What is measured. The results are the same for the same seed and do not depend on the number of images."""

    def caption(
        self,
        images: torch.Tensor,
        seed: int,
        steps: int | None = None,
        shift: float | None = None,
        cache: bool | None = None,
    ) -> list[str]:
        """A caption of each image, in a number of steps with a shift of the schedule, or its own for `None`.

        Args:
            cache: whether what does not change over the steps is kept; `None`: as the pipeline does.
        """

    def answer(self, images: torch.Tensor, questions: Sequence[str], seed: int) -> list[str]:
        """An answer to one question about each image."""

    def fill(self, texts: Sequence[str], images: torch.Tensor, seed: int) -> list[str]:
        """The whole texts, with a word in the place of every `HOLE`."""


class Illustrator(Protocol):
    """What round trips need besides."""

    def images(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        """An image per prompt."""

    @property
    def joint_task(self) -> str:
        """What `joint` is called in the table."""

    def joint(self, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
        """Images and their captions, generated together."""


Keep = Callable[[str, Any], None]


def caption_scores(writer: Writer, count: int, keep: Keep) -> list[Score]:
    """Captions of held-out scenes: what they say against the truth."""
    scores = []
    for name, split, objects, bar in (
        ("one object", "heldout", 1, 0.95),
        ("held-out triples", "heldout_triples", 1, None),
        ("two objects", "heldout", 2, 0.85),
    ):
        truths = held_out(count, split, objects)
        texts = writer.caption(truths.rendering.rgb, seed=0)
        parsed = [parse_caption(text) for text in texts]
        right = right_objects(parsed, truths)
        keep(f"caption, {name}", (texts, truths.rendering.rgb, [i for i, one in enumerate(right) if not one]))
        task = f"image → caption, {name}"
        style = [one is not None and one.style == scene.style for one, scene in zip(parsed, truths.scenes)]
        place = [one is not None and one.background == scene.background for one, scene in zip(parsed, truths.scenes)]
        what = "object and colour right" if objects == 1 else "both objects and colours right, each at its side"
        scores += [
            fraction_score(task, what, right, bar),
            fraction_score(task, "style right", style, 0.95),
            fraction_score(task, "place right", place, 0.95),
            fraction_score(task, "grammatical", [one is not None for one in parsed], 0.98),
        ]
    return scores


def right_objects(parsed: Sequence[ParsedCaption | None], truths: HeldOut) -> list[bool]:
    """Whether captions name all objects with their colours, each at its side."""
    return [one is not None and one.names_objects(scene) for one, scene in zip(parsed, truths.scenes)]


def answer_scores(writer: Writer, count: int, keep: Keep) -> list[Score]:
    """Answers to every kind of question, with the image and with a grey one in its place."""
    scores = []
    for kind in ANSWERS:
        asked = heldout_questions(kind, count)
        questions = [question for _, question in asked]
        images = render([scene for scene, _ in asked]).rgb
        texts = [question.text for question in questions]
        seen, blind = (_right(writer, shown, questions) for shown in (images, torch.full_like(images, 0.5)))
        captions = [f"{text} {answer}" for text, answer in zip(texts, seen.texts)]
        keep(f"answer, {kind}", (captions, images, [i for i, right in enumerate(seen.right) if not right]))
        task = f"image and question → answer, {kind.replace('_', ' or ')}"
        gain = torch.tensor(seen.right, dtype=torch.float) - torch.tensor(blind.right, dtype=torch.float)
        scores += [
            fraction_score(task, "right", seen.right, 0.95),
            fraction_score(task, f"right without the image (chance {chance(questions):.3f})", blind.right),
            mean_score(task, "right over that without the image", gain, at_least=0.3),
        ]
    return scores


class _Answered(NamedTuple):
    texts: list[str]
    right: list[bool]


def _right(writer: Writer, images: torch.Tensor, questions: Sequence[Question]) -> _Answered:
    texts = writer.answer(images, [question.text for question in questions], seed=0)
    return _Answered(texts, [question.is_right(text) for question, text in zip(questions, texts)])


class Filling(NamedTuple):
    """A caption of which the image decides one word."""

    text: str
    """With `HOLE` in its place."""
    whole: str
    word: str


def filling(scene: Scene, rng: Random, kind: str) -> Filling | None:
    """A caption with a hole of a kind of `HOLES`; `None` if this draw has no such word, or more than one."""
    whole = caption(scene, rng)
    patterns = {
        "object": rf"(?<= )({'|'.join(OBJECTS)})\b",
        "colour": rf"(?<=a )({'|'.join(c for c in COLOURS if c[0] not in 'aeiou')})(?= ({'|'.join(OBJECTS)})\b)",
        "style": rf"\b({'|'.join(STYLES)})(?= style)",
        "relation": r"\b(left|right)(?= of an? )",
        "time": r"(?<=^at )(sunset|night)\b|(?<= at )(sunset|night)\b",
    }
    found = list(re.finditer(patterns[kind], whole))
    if not found:
        return None
    hole = pick(rng, found)
    return Filling(f"{whole[: hole.start()]}{HOLE}{whole[hole.end() :]}", whole, hole[0])


def heldout_fillings(kind: str, count: int, first_seed: int = 300_000) -> list[tuple[Scene, Filling]]:
    """The first fillings of a kind about held-out scenes, the same on every machine."""
    found: list[tuple[Scene, Filling]] = []
    seed = first_seed
    while len(found) < count:
        scene = Scene.sample(seed, "heldout", 2 if kind == "relation" else None)
        case = filling(scene, Random(seed), kind)
        if case is not None:
            found.append((scene, case))
        seed += 1
    return found


def fill_scores(writer: Writer, count: int, keep: Keep) -> list[Score]:
    """Captions with one word left out that the image decides."""
    scores = []
    for kind in HOLES:
        cases = heldout_fillings(kind, count)
        images = render([scene for scene, _ in cases]).rgb
        texts = writer.fill([case.text for _, case in cases], images, seed=0)
        right = [words(text) == words(case.whole) for text, (_, case) in zip(texts, cases)]
        keep(f"fill, {kind}", (texts, images, [i for i, one in enumerate(right) if not one]))
        scores.append(fraction_score("image and text → word", f"{kind} exact, the rest unchanged", right, 0.95))
    return scores


def round_trip_scores(
    writer: Writer, illustrator: Illustrator, probe: SceneProbe, count: int, keep: Keep
) -> list[Score]:
    """Text to image to text, image to text to image, and both generated: is the same said and shown?"""
    truths = held_out(count)
    drawn = illustrator.images(truths.prompts, seed=0)
    texts = writer.caption(drawn, seed=0)
    parsed = [parse_caption(text) for text in texts]
    style = [one is not None and one.style == scene.style for one, scene in zip(parsed, truths.scenes)]
    kept = [a and b for a, b in zip(right_objects(parsed, truths), style)]
    keep("text to image to text", (texts, drawn, [i for i, one in enumerate(kept) if not one]))
    scores = [fraction_score("text → image → text", "objects, colours, style kept", kept, 0.9)]

    captions = writer.caption(truths.rendering.rgb, seed=0)
    again = illustrator.images(captions, seed=0)
    seen = read(probe, again).answers
    truth = [expected(scene) for scene in truths.scenes]
    kept = [all(a[name] == b[name] for name in TRUTH) for a, b in zip(seen, truth)]
    wrong = [i for i, one in enumerate(kept) if not one]
    original = truths.rendering.rgb
    shown = F.interpolate(again, original.shape[-2:], mode="bilinear", antialias=True)
    keep("image to text to image", (captions, torch.stack([original, shown], 1), wrong))
    scores.append(fraction_score("image → text → image", "objects, colours, style kept", kept, 0.9))

    images, texts = illustrator.joint(count, seed=0)
    agree = [
        one is not None and agrees(one, shown)
        for one, shown in zip(map(parse_caption, texts), read(probe, images).answers)
    ]
    keep("joint", (texts, images, [i for i, one in enumerate(agree) if not one]))
    scores.append(fraction_score(illustrator.joint_task, "probe and caption agree", agree, 0.85))
    return scores


def agrees(parsed: ParsedCaption, shown: dict[str, str]) -> bool:
    """Whether a caption says what a probe sees: objects, colours and style, at their sides where it names sides."""
    sides = [(shown[f"{side} object"], shown[f"{side} colour"]) for side in ("left", "right")]
    sides = [pair for pair in sides if pair[0] in OBJECTS]
    things = list(parsed.objects)
    same = things == sides if parsed.relation else sorted(things) == sorted(sides)
    return same and parsed.style == shown["style"]


def cache_scores(writer: Writer, count: int, rounds: int = 3) -> list[Score]:
    """Captions with the image's keys and values kept over the steps, and with full attention in every step: whether
    they are the same, and the median seconds of each."""
    truths = held_out(count)
    texts: dict[bool, list[str]] = {}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for cache in (True, False) if number % 2 == 0 else (False, True):
            start = time.process_time()
            texts[cache] = writer.caption(truths.rendering.rgb, seed=0, cache=cache)
            seconds[cache].append((time.process_time() - start) / count)
    same = [one == other for one, other in zip(texts[True], texts[False])]
    score = fraction_score("image → caption, cached image", "the same text as by full attention", same)
    for name, kept in (("cache", True), ("full_attention", False)):
        score.counts[f"seconds_per_caption_{name}"] = round(statistics.median(seconds[kept]), 4)
    return [score]


def schedule_scores(writer: Writer, count: int, steps: Sequence[int] = STEPS) -> list[Score]:
    """Captions by the number of steps and the shift of the schedule, and the seconds of each."""
    truths = held_out(count)
    scores = []
    for shift in SHIFTS:
        for number in steps:
            start = time.perf_counter()
            texts = writer.caption(truths.rendering.rgb, seed=0, steps=number, shift=shift)
            seconds = (time.perf_counter() - start) / count
            right = right_objects([parse_caption(text) for text in texts], truths)
            score = fraction_score(f"image → caption, shift {shift:.3g}", f"objects right in {number} steps", right)
            score.counts["seconds_per_caption"] = round(seconds, 4)
            scores.append(score)
    return scores
