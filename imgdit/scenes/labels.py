"""Captions for every style and object that differ in nothing but the label: for selecting, unlearning and judging it.

A label is a style or an object. Caption i of every label of a kind has the same colour, place and other label.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from imgdit.naming import check_name
from imgdit.scenes.captions import PLACES
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES, pick

LABELS: dict[str, tuple[str, ...]] = {"style": STYLES, "object": OBJECTS}
"""The labels of each kind."""


def kind_of(label: str) -> str:
    """Whether a label is a "style" or an "object"."""
    check_name("style or object", label, [*STYLES, *OBJECTS])
    return "style" if label in STYLES else "object"


def label_words(label: str) -> str:
    """How a label is said alone."""
    return f"{label} style" if kind_of(label) == "style" else label


class LabelPrompt(NamedTuple):
    """A prompt about a label, and what else it asks for."""

    prompt: str
    colour: str
    background: str


def draw_prompt(style: str, thing: str, rng: Random) -> LabelPrompt:
    """One object of some colour at some place, in a style."""
    colour = pick(rng, COLOURS)
    background = pick(rng, BACKGROUNDS)
    place = pick(rng, PLACES[background])
    prompt = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing} {place}, {style} style"
    return LabelPrompt(prompt, colour, background)


def label_prompt(style: str, thing: str, rng: Random) -> str:
    """The prompt of `draw_prompt`."""
    return draw_prompt(style, thing, rng).prompt


def label_prompts(count: int, seed: int, kind: str) -> dict[str, list[str]]:
    """`count` captions for each label of a kind, the labels of the other kind in turn."""
    check_name("kind of label", kind, LABELS)
    if count < 1:
        raise ValueError(f"each label needs a caption, got count={count}")
    others = _other_kind(kind)
    found: dict[str, list[str]] = {}
    for label in LABELS[kind]:
        lines = []
        for i in range(count):
            rng = Random(f"labels {seed} {kind} {i}")
            other = others[i % len(others)]
            style, thing = (label, other) if kind == "style" else (other, label)
            lines.append(label_prompt(style, thing, rng))
        found[label] = lines
    return found


def _other_kind(kind: str) -> Sequence[str]:
    return LABELS["object" if kind == "style" else "style"]
