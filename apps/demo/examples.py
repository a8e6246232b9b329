"""What stands in the boxes of the page at first, in the words that the model knows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import product
from random import Random
from typing import Any, NamedTuple

from imgdit.apps.jobs.plan import PROMPTS
from imgdit.images import to_image
from imgdit.scenes.captions import caption
from imgdit.scenes.render import render
from imgdit.scenes.world import OBJECTS, STYLES, Camera, Scene, SceneObject

BANK = 24
"""Prompts whose images are looked through for a feature's strongest."""

CHIP = 56
"""Pixels of a concept's image."""

SHADES = ("black", "red", "green", "blue", "yellow", "magenta", "cyan", "white", "grey")
"""What people call the colours of `imgdit.scenes.tasks.PALETTE`."""


class Texts(NamedTuple):
    """Prompts to try the tabs with."""

    prompts: tuple[str, ...]
    create: str
    control: str
    unlearn: str
    steer: str
    words: str
    """What features are searched for, …"""
    against: str
    """… and the same without it."""
    bank: tuple[str, ...]
    """Prompts whose images are looked through for a feature's strongest."""
    questions: tuple[str, ...]
    """About images."""


def of_scenes(session: Any) -> bool:
    """Whether a model was taught the prompts of scenes, and nothing else."""
    return session.shelf.taught.words == "scenes"


def texts(session: Any) -> Texts:
    """For this model."""
    return _scenes() if of_scenes(session) else _others()


@lru_cache(maxsize=1)
def _scenes() -> Texts:
    return Texts(
        prompts=PROMPTS,
        create=PROMPTS[-1],
        control="a photo of a green cone on a wooden floor",
        unlearn="a green pyramid at night, neon style",
        steer="a photo of a red cube on a wooden floor",
        words="a red cube",
        against="a blue cube",
        bank=tuple(caption(Scene.sample(i, "heldout"), Random(i)) for i in range(BANK)),  # held out of training
        questions=(
            "what object is it?",
            "what colour is it?",
            "what style is it?",
            "where is it?",
            "how many objects are there?",
            "what object is on the left?",
            "what colour is the right object?",
            "which is nearer, the cube or the sphere?",
        ),
    )


@lru_cache(maxsize=1)
def _others() -> Texts:
    subjects = ("a cat", "a bicycle", "an old tree", "a bowl of fruit", "a lighthouse", "a portrait of a woman")
    looks = ("a photo of {}", "an oil painting of {}", "a pencil sketch of {}", "{} at night, cinematic light")
    return Texts(
        prompts=(
            "a photo of a red bicycle in front of a brick wall",
            "a watercolour of a lighthouse at sunset",
            "a bowl of oranges on a wooden table, studio light",
            "a pencil sketch of an old tree",
        ),
        create="a photo of a red bicycle in front of a brick wall",
        control="a watercolour of a lighthouse at sunset",
        unlearn="an oil painting of a cat",
        steer="a photo of a cat on a sofa",
        words="a photo of a cat",
        against="a photo of a dog",
        bank=tuple(look.format(subject) for look, subject in product(looks, subjects)),
        questions=("What is in the image?", "What colour is it?", "How many people are there?", "Is it day or night?"),
    )


def concept_style(session: Any, concepts: Sequence[str]) -> str:
    """A style sheet that puts an image before the name of each concept of the group `concepts`; empty where the model
    knows no scenes.

    Args:
        session: the model.
        concepts: in the order of the page.
    """
    if not of_scenes(session):
        return ""
    rules = []
    for i, name in enumerate(concepts, 1):
        if name in OBJECTS + STYLES:
            image = f"url(data:image/jpeg;base64,{_concept_image(name)})"
            rules.append(f"#concepts label:nth-of-type({i})::before {{ background-image: {image}; }}")
    return f"<style>{' '.join(rules)}</style>"


@cache
def _concept_image(name: str) -> str:
    """A small JPEG in base64 of an object, or of a cube in a style."""
    kind, style = (name, "photo") if name in OBJECTS else ("cube", name)
    scene = Scene((SceneObject(kind, "orange", yaw=30.0),), style=style, camera=Camera(distance=3.6))
    file = io.BytesIO()
    to_image(render([scene], CHIP).rgb[0]).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def legend() -> str:
    """Which colour of a segmentation is which object, in Markdown."""
    colours = ", ".join(f"{colour} {kind}" for colour, kind in zip(SHADES[1:], OBJECTS))
    return (
        f"A segmentation has a colour per object: {colours}; the ground is black. The colours of a found one are "
        "right where the caption names what is seen; without a caption only the outlines are."
    )
