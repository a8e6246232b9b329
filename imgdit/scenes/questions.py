"""Questions about scenes with exact answers, of eight kinds.

Questions are drawn so that their text alone does not tell the answer: `blind_accuracy` measures how much it does.
Answers are one word, or the first phrase of `captions.PLACES` for a place. "yes" and "no" about an object are followed
by what the image shows in its place ("no, blue"), which masked diffusion may generate before them. `read_answer` reads
any phrase that means the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple

from imgdit.naming import check_name
from imgdit.scenes.captions import PLACES, words
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, SPLITS, STYLES, Scene, SceneObject, is_heldout, pick

ANSWERS: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": COLOURS,
    "count": ("one", "two"),
    "relation": ("left", "right"),
    "style": STYLES,
    "place": BACKGROUNDS,
    "yes_no": ("yes", "no"),
    "nearer": OBJECTS,
}
"""What the answer to each kind of question can be."""

FORMS = {
    "object": (
        "what object is it?",
        "what object is on the {side}?",
        "what object is {colour}?",
        "what object is {side} of the {kind}?",
    ),
    "colour": ("what colour is it?", "what colour is the {kind}?", "what colour is the {side} object?"),
    "count": ("how many objects are there?",),
    "relation": ("is the {kind} left or right of the {other}?",),
    "style": ("what style is it?",),
    "place": ("where is it?",),
    "yes_no": (
        "is there {noun}?",
        "is the {kind} {colour}?",
        "is the style {style}?",
        "is the {kind} left of the {other}?",
    ),
    "nearer": ("which is nearer, the {kind} or the {other}?",),
}
"""The questions of each kind."""

CONFIRMATIONS = {FORMS["yes_no"][0]: "yes, {noun}", FORMS["yes_no"][1]: "yes, {colour}"}
"""By the form of a claim about an object: the answer that confirms it. One that denies it tells what is there."""

NEW_WORDS = (
    *("?", "are", "colour", "how", "is", "it", "many", "nearer", "no", "object", "objects", "one", "or", "there"),
    *("two", "what", "where", "which", "yes"),
)
"""Words and signs of questions and answers that no caption has. Their order is that of the tokens: append only."""

NEARER = 0.2
"""Least difference of the places of two objects, in world units along the ground away from the camera, where one is
called nearer: about three of 128 pixels."""
ONE_OBJECT = 0.6
"""Fraction of scenes with one object, see `world.draw`."""


class Question(NamedTuple):
    """A question about a scene."""

    kind: str
    """A key of `ANSWERS`."""
    text: str
    answer: str
    """As it is said: one word, or a phrase for a place or about an object."""
    choices: tuple[str, ...]
    """Answers that the text leaves open."""

    @property
    def value(self) -> str:
        """The right one of `choices`."""
        read = read_answer(self.kind, self.answer)
        assert read is not None
        return read

    def is_right(self, text: str) -> bool:
        """Whether a text gives the right answer."""
        return read_answer(self.kind, text) == self.value


def possible_kinds(scene: Scene) -> tuple[str, ...]:
    """Kinds of questions that a scene answers."""
    unclear = {"relation"} if scene.relation is None else set()
    return tuple(kind for kind in ANSWERS if kind not in unclear and (kind != "nearer" or nearer_object(scene)))


def nearer_object(scene: Scene) -> SceneObject | None:
    """The one of two objects that stands nearer to the camera on the ground; `None` where it is not clear."""
    if len(scene.objects) < 2:
        return None
    angle = math.radians(scene.camera.azimuth)
    first, second = (thing.y * math.cos(angle) - thing.x * math.sin(angle) for thing in scene.objects)
    if abs(first - second) < NEARER:
        return None
    return scene.objects[0 if first < second else 1]


def question(scene: Scene, rng: Random, kind: str | None = None, split: str = "train") -> Question:
    """A question about a scene.

    Args:
        scene: what is asked about.
        rng: chooses the question.
        kind: one of `possible_kinds`; `None`: at random, so that as many questions of "count" are answered "one" as
            "two".
        split: of the scene, see `Scene.sample`: wrong claims are as frequent as right ones there.
    """
    check_name("split", split, SPLITS)
    possible = possible_kinds(scene)
    if kind is None:
        rare = [name for name in possible if name in ("relation", "nearer")]  # only two objects are asked for them
        others = [name for name in possible if name != "count"]
        kind = "count" if rng.random() < _count_probability(len(scene.objects)) else pick(rng, others + rare)
    elif kind not in possible:
        check_name("kind of question", kind, ANSWERS)
        raise ValueError(f"this scene answers no question of the kind {kind!r}, but of {', '.join(possible)}")
    form, fields, answer, choices = _ASK[kind](scene, rng, split)
    return Question(kind, form.format(**fields), answer, choices)


def _count_probability(objects: int) -> float:
    """Probability of "how many": a sixth for one object, and for two what makes both answers equally frequent."""
    one = 1 / 6
    return one if objects == 1 else one * ONE_OBJECT / (1 - ONE_OBJECT)


_Asked = tuple[str, dict[str, str], str, tuple[str, ...]]


def _ask_object(scene: Scene, rng: Random, split: str) -> _Asked:
    it, left_or_right, coloured, beside = FORMS["object"]
    thing, other, side = _one_of(scene, rng)
    if other is None:
        form = pick(rng, (it, coloured))
    else:
        form = pick(rng, (coloured,) if scene.relation is None else (left_or_right, coloured, beside))
    fields = {"colour": thing.colour, "side": side, "kind": "" if other is None else other.kind}
    choices = tuple(kind for kind in OBJECTS if form != beside or kind != fields["kind"])
    return form, fields, thing.kind, choices


def _ask_colour(scene: Scene, rng: Random, split: str) -> _Asked:
    it, named, at_side = FORMS["colour"]
    thing, other, side = _one_of(scene, rng)
    form = pick(rng, (it, named) if other is None else (named,) if scene.relation is None else (named, at_side))
    return form, {"kind": thing.kind, "side": side}, thing.colour, COLOURS


def _ask_count(scene: Scene, rng: Random, split: str) -> _Asked:
    return FORMS["count"][0], {}, ANSWERS["count"][len(scene.objects) - 1], ANSWERS["count"]


def _ask_relation(scene: Scene, rng: Random, split: str) -> _Asked:
    thing, other, side = _one_of(scene, rng)
    assert other is not None
    return FORMS["relation"][0], {"kind": thing.kind, "other": other.kind}, side, ANSWERS["relation"]


def _ask_style(scene: Scene, rng: Random, split: str) -> _Asked:
    return FORMS["style"][0], {}, scene.style, STYLES


def _ask_place(scene: Scene, rng: Random, split: str) -> _Asked:
    return FORMS["place"][0], {}, PLACES[scene.background][0], BACKGROUNDS


def _ask_nearer(scene: Scene, rng: Random, split: str) -> _Asked:
    nearer = nearer_object(scene)
    assert nearer is not None
    first, second = _one_of(scene, rng)[:2]
    assert second is not None
    kinds = (first.kind, second.kind)
    return FORMS["nearer"][0], dict(zip(("kind", "other"), kinds)), nearer.kind, kinds


def _ask_yes_no(scene: Scene, rng: Random, split: str) -> _Asked:
    """A claim that is right or wrong with the same probability, and as frequent in either case. Where it is about an
    object, the answer tells what is shown: that of the claim's kind, or else that of its colour."""
    there, coloured, styled, beside = FORMS["yes_no"]
    thing, other, side = _one_of(scene, rng)
    form = pick(rng, (there, coloured, styled) if scene.relation is None else (there, coloured, styled, beside))
    right = rng.random() < 0.5
    kind, colour, style = thing.kind, thing.colour, scene.style
    if not right and form == there:
        kind, colour = _other_pair(scene, thing, other, rng, split)
    elif not right and form == coloured:
        colour = _other_colour(thing, other, rng, split)
    elif not right and form == styled:
        style = pick(rng, [name for name in STYLES if name != style])
    fields = {"kind": kind, "colour": colour, "style": style, "noun": _noun(kind, colour)}
    if other is not None and form == beside:
        left, far = (thing, other) if (side == "left") == right else (other, thing)
        fields |= {"kind": left.kind, "other": far.kind}
    shown = next((one for one in scene.objects if one.kind == kind), None)
    shown = shown or next((one for one in scene.objects if one.colour == colour), thing)
    told = {"noun": _noun(shown.kind, shown.colour), "colour": shown.colour}
    answer = CONFIRMATIONS.get(form, "yes").format(**told)
    return form, fields, answer if right else answer.replace("yes", "no", 1), ANSWERS["yes_no"]


_ASK = {
    "object": _ask_object,
    "colour": _ask_colour,
    "count": _ask_count,
    "relation": _ask_relation,
    "style": _ask_style,
    "place": _ask_place,
    "yes_no": _ask_yes_no,
    "nearer": _ask_nearer,
}


def _one_of(scene: Scene, rng: Random) -> tuple[SceneObject, SceneObject | None, str]:
    """An object of the scene, the other one, and the first one's side."""
    order = scene.order
    if len(order) == 1:
        return scene.objects[0], None, "left"
    place = pick(rng, (0, 1))
    return scene.objects[order[place]], scene.objects[order[1 - place]], ("left", "right")[place]


def _noun(kind: str, colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


@cache
def _frequency(kind: str, colour: str, split: str) -> int:
    """In how many styles scenes of a split show an object of this kind and colour."""
    return sum(is_heldout(kind, colour, style) == (split == "heldout_triples") for style in STYLES)


def _weighted(rng: Random, pairs: Sequence[tuple[str, str]], split: str) -> tuple[str, str]:
    """One of (kind, colour) pairs, as frequent as scenes of a split show it; any, where they show none."""
    weights = [_frequency(*pair, split) for pair in pairs]
    if not sum(weights):
        return pick(rng, pairs)
    place = rng.random() * sum(weights)
    for pair, weight in zip(pairs, weights):
        place -= weight
        if place < 0:
            return pair
    return pairs[-1]


def _other_pair(
    scene: Scene, thing: SceneObject, other: SceneObject | None, rng: Random, split: str
) -> tuple[str, str]:
    """An object that the scene does not show: of the same kind, of the same colour, or two that it shows mixed."""
    shown = {(one.kind, one.colour) for one in scene.objects}
    same = pick(rng, ("kind", "colour", "mixed")) if other is not None else pick(rng, ("kind", "colour"))
    if same == "mixed" and other is not None:
        return thing.kind, other.colour
    if same == "kind":
        pairs = [(thing.kind, colour) for colour in COLOURS]
    else:
        pairs = [(kind, thing.colour) for kind in OBJECTS]
    return _weighted(rng, [pair for pair in pairs if pair not in shown], split)


def _other_colour(thing: SceneObject, other: SceneObject | None, rng: Random, split: str) -> str:
    """A colour that an object does not have, in one of two cases that of the other object."""
    if other is not None and rng.random() < 0.5:
        return other.colour
    return _weighted(rng, [(thing.kind, c) for c in COLOURS if c != thing.colour], split)[1]


def read_answer(kind: str, text: str) -> str | None:
    """What an answer says: the one of `ANSWERS[kind]` that it names; `None` where it names none, or more than one."""
    check_name("kind of question", kind, ANSWERS)
    spoken = words(text)
    if kind == "place":
        whole = f" {' '.join(spoken)} "
        found = {name for name, phrases in PLACES.items() if any(f" {phrase} " in whole for phrase in phrases)}
    else:
        found = set(spoken) & set(ANSWERS[kind])
    return next(iter(found)) if len(found) == 1 else None


def heldout_questions(
    kind: str, count: int, split: str = "heldout", first_seed: int = 200_000
) -> list[tuple[Scene, Question]]:
    """The first questions of a kind about scenes of a split, the same on every machine."""
    check_name("kind of question", kind, ANSWERS)
    found: list[tuple[Scene, Question]] = []
    seed = first_seed
    while len(found) < count:
        objects = {"count": 1 + len(found) % 2, "relation": 2, "nearer": 2}.get(kind)
        scene = Scene.sample(seed, split, objects)
        if kind in possible_kinds(scene):
            found.append((scene, question(scene, Random(seed), kind, split)))
        seed += 1
    return found


def chance(questions: Iterable[Question]) -> float:
    """Expected fraction of right answers of one who picks among each question's choices at random."""
    odds = [1 / len(one.choices) for one in questions]
    return sum(odds) / len(odds)


def blind_accuracy(known: Iterable[Question], asked: Sequence[Question]) -> float:
    """Fraction of right answers by the text of questions alone: each is answered as most of the known questions with
    the same text are, or as most of their kind.

    Args:
        known: questions of other scenes, with their answers.
        asked: what is to be answered.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for one in known:
        by_text[one.text][one.value] += 1
        by_kind[one.kind][one.value] += 1
    guesses = [(by_text.get(one.text) or by_kind[one.kind]).most_common(1) for one in asked]
    return sum(bool(guess) and guess[0][0] == one.value for guess, one in zip(guesses, asked)) / len(asked)


def question_forms() -> dict[str, Any]:
    """Forms of all questions, the words that stand for each name in them, and what confirms a claim; as
    `QuestionForms` takes them."""
    words = {"kind": OBJECTS, "other": OBJECTS, "colour": COLOURS, "side": ("left", "right"), "style": STYLES}
    words["article"] = ("a", "an")
    forms = tuple(_without_noun(form) for kind in FORMS.values() for form in kind)
    confirmations = {_without_noun(form): _without_noun(answer) for form, answer in CONFIRMATIONS.items()}
    return {"forms": forms, "words": words, "confirmations": confirmations}


def _without_noun(form: str) -> str:
    return form.replace("{noun}", "{article} {colour} {kind}")


def question_words() -> set[str]:
    """Every word and sign of questions and answers."""
    texts = [form for forms in FORMS.values() for form in forms]
    texts += [answer for kind, answers in ANSWERS.items() if kind != "place" for answer in answers]
    texts += [phrases[0] for phrases in PLACES.values()]
    plain = " ".join(re.sub(r"\{\w+\}", " ", text) for text in texts)
    return {*re.findall(r"[a-z]+|[?,]", plain), *COLOURS, *OBJECTS, "a", "an"}
