"""Questions about scenes, answered by the most likely of some answers: how often a model that reads images and the
probe agree, and what such a model finds in generated images.

Images are (N, 3, S, S) in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

import torch

from imgdit.benchmarks.scenes.image_text import Keep
from imgdit.benchmarks.scenes.text_to_image import Score, expected, fraction_score, read
from imgdit.scenes.answers import NOTHING
from imgdit.scenes.captions import PLACES
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.questions import ANSWERS, FORMS, Question, heldout_questions
from imgdit.scenes.render import render
from imgdit.scenes.world import COLOURS, OBJECTS, STYLES, Scene

SIDES = ("left", "right")
KINDS = tuple(kind for kind in ANSWERS if kind != "nearer")
"""Kinds of questions that a probe answers too; it is not asked which object is nearer."""
_ONE_OF = {"side": SIDES, "kind": OBJECTS, "other": OBJECTS, "colour": COLOURS, "style": STYLES}


class Judge(Protocol):
    """What chooses answers. Results do not depend on the number of images."""

    def choose(self, images: torch.Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
        """Number of the most likely one of the choices of one question about each image."""


def judge_scores(judge: Judge, probe: SceneProbe, count: int, keep: Keep) -> list[Score]:
    """Questions about held-out scenes: is the most likely answer the probe's, and the right one?"""
    scores: list[Score] = []
    every: list[bool] = []
    for kind in KINDS:
        asked = heldout_questions(kind, count)
        questions = [question for _, question in asked]
        images = render([scene for scene, _ in asked]).rgb
        seen = read(probe, images).answers
        replies = chosen(judge, images, questions)
        agree = [one == probe_answer(question, known) for one, question, known in zip(replies, questions, seen)]
        right = [one == question.value for one, question in zip(replies, questions)]
        texts = [f"{question.text} {one}" for question, one in zip(questions, replies)]
        keep(f"judge, {kind}", (texts, images, [i for i, one in enumerate(agree) if not one]))
        task = f"judge, {kind.replace('_', ' or ')}"
        scores += [fraction_score(task, "agrees with the probe", agree), fraction_score(task, "right", right)]
        every += agree
    return [*scores, fraction_score("judge, all questions", "agrees with the probe", every, 0.95)]


def chosen(judge: Judge, images: torch.Tensor, questions: Sequence[Question]) -> list[str]:
    """The answers that a judge chooses, as values of `ANSWERS`."""
    replies = [[PLACES[one][0] if one in PLACES else one for one in question.choices] for question in questions]
    best = judge.choose(images, [question.text for question in questions], replies)
    return [question.choices[number] for question, number in zip(questions, best, strict=True)]


def finds(judge: Judge, images: torch.Tensor, scenes: Sequence[Scene]) -> list[bool]:
    """Whether a judge finds in each image what its scene has: all objects and colours, each at its side, and the
    style."""
    asked = [(n, question) for n, scene in enumerate(scenes) for question in questions_of(scene)]
    replies = chosen(judge, images[[n for n, _ in asked]], [question for _, question in asked])
    wrong = {n for (n, question), one in zip(asked, replies) if one != question.value}
    return [n not in wrong for n in range(len(scenes))]


def questions_of(scene: Scene) -> list[Question]:
    """What a prompt of a scene says, as questions: the style, and of each object what it is and its colour."""
    found = [Question("style", FORMS["style"][0], scene.style, ANSWERS["style"])]
    known = expected(scene)
    for side in SIDES[: len(scene.objects)]:
        kind, colour = known[f"{side} object"], known[f"{side} colour"]
        if len(scene.objects) == 1:
            forms = (FORMS["object"][0], FORMS["colour"][0])
        elif scene.relation is None:  # neither is called left or right
            forms = (FORMS["object"][2], FORMS["colour"][1])
        else:
            forms = (FORMS["object"][1], FORMS["colour"][2])
        texts = [form.format(side=side, kind=kind, colour=colour) for form in forms]
        found += [
            Question("object", texts[0], kind, ANSWERS["object"]),
            Question("colour", texts[1], colour, ANSWERS["colour"]),
        ]
    return found


def probe_answer(question: Question, seen: Mapping[str, str]) -> str | None:
    """The answer to a question of `KINDS` that follows from what a probe sees; `None` where it sees nothing that is
    asked for.

    Args:
        seen: the probe's answers, see `imgdit.scenes.readings.QUESTIONS`.
    """
    asked = _fields(question.text)
    things = [(side, seen[f"{side} object"], seen[f"{side} colour"]) for side in SIDES]
    things = [thing for thing in things if thing[1] != NOTHING]
    if question.kind in ("style", "place"):
        return seen["style" if question.kind == "style" else "background"]
    if question.kind == "count":
        return ANSWERS["count"][len(things) - 1] if things else None
    if question.kind == "yes_no":
        return "yes" if _holds(asked, seen, things) else "no"
    if "other" in asked or (question.kind == "object" and "kind" in asked):  # beside another object
        kinds = [kind for _, kind, _ in things]
        if asked["kind"] not in kinds or len(kinds) < 2:
            return None
        place = kinds.index(asked["kind"])
        if question.kind == "relation":
            return SIDES[place] if asked["other"] in kinds else None
        return kinds[1 - place] if SIDES[1 - place] == asked["side"] else None
    names = ("side", "kind", "colour")
    fitting = [thing for thing in things if all(asked.get(name, value) == value for name, value in zip(names, thing))]
    return fitting[0][names.index("kind" if question.kind == "object" else "colour")] if fitting else None


def _holds(asked: Mapping[str, str], seen: Mapping[str, str], things: Sequence[tuple[str, str, str]]) -> bool:
    """Whether a claim of a question of yes or no is what a probe sees."""
    if "style" in asked:
        return seen["style"] == asked["style"]
    if "other" in asked:
        return [kind for _, kind, _ in things] == [asked["kind"], asked["other"]]
    return any((kind, colour) == (asked["kind"], asked["colour"]) for _, kind, colour in things)


def _fields(text: str) -> dict[str, str]:
    """What stands in the fields of a question's form."""
    found = next(match for pattern in _patterns() if (match := pattern.fullmatch(text)))
    return found.groupdict()


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Of all forms."""
    groups = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in _ONE_OF.items()}
    groups["noun"] = f"an? {groups['colour']} {groups['kind']}"
    forms = [re.escape(form) for kind in KINDS for form in FORMS[kind]]
    return tuple(re.compile(re.sub(r"\\{(\w+)\\}", lambda field: groups[field[1]], form)) for form in forms)
