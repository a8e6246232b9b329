"""Scenes as sentences with what they mean, for a text encoder."""

from __future__ import annotations

from random import Random

from .captions import caption, meaning
from .scenes import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene

NOTHING = "nothing"
SLOTS = {
    "left object": OBJECTS,
    "left colour": COLOURS,
    "right object": (*OBJECTS, NOTHING),
    "right colour": (*COLOURS, NOTHING),
    "style": STYLES,
    "background": BACKGROUNDS,
}
"""What a sentence says, and the answers there are; a single object counts as the left one."""


class SceneSentences:
    """Endless: sample i is a sentence about the scene with seed `first_seed + i` and its answers, one per slot.

    Args:
        first_seed: of the scenes.
        split: "train", "heldout" or "heldout_triples", see `Scene.sample`.
    """

    def __init__(self, first_seed: int = 0, split: str = "train"):
        self.first_seed, self.split = first_seed, split

    def __getitem__(self, index: int) -> tuple[str, list[int]]:
        seed = self.first_seed + index
        scene = Scene.sample(seed, self.split)
        return caption(scene, Random(seed)), answers(scene)


def answers(scene: Scene) -> list[int]:
    """Number of the right answer of each slot."""
    said = meaning(scene)
    things = [*said["objects"], {"object": NOTHING, "colour": NOTHING}][:2]
    values = [thing[name] for thing in things for name in ("object", "colour")] + [said["style"], said["background"]]
    return [names.index(value) for names, value in zip(SLOTS.values(), values)]
