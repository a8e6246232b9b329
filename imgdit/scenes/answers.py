"""Scenes as captions with what they mean, for a text encoder."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from imgdit.scenes.captions import caption, leave_out, meaning
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene, pick
from imgdit.tasks import TASK_TOKENS, task_caption

NOTHING = "nothing"
SLOTS = {
    "left object": (*OBJECTS, NOTHING),
    "left colour": (*COLOURS, NOTHING),
    "right object": (*OBJECTS, NOTHING),
    "right colour": (*COLOURS, NOTHING),
    "style": (*STYLES, NOTHING),
    "background": (*BACKGROUNDS, NOTHING),
    "task": (*TASK_TOKENS, NOTHING),
}
"""What a prompt says, and the answers there are; a single object counts as the left one."""

# Fractions of the prompts: those that begin with a task's token, those that are nothing else, and those that leave the
# place or the style unsaid.
TASKED, BARE, UNSAID = 0.5, 0.05, 0.1


class SceneCaptions:
    """Endless: sample i is a prompt about the scene with seed `first_seed + i` and its answers, one per slot.

    Args:
        first_seed: of the scenes.
        split: "train", "heldout" or "heldout_triples", see `Scene.sample`.
    """

    def __init__(self, first_seed: int = 0, split: str = "train"):
        self.first_seed, self.split = first_seed, split

    def __getitem__(self, index: int) -> tuple[str, list[int]]:
        seed = self.first_seed + index
        scene, rng = Scene.sample(seed, self.split), Random(seed)
        bare = rng.random() < BARE
        task = pick(rng, tuple(TASK_TOKENS)) if bare or rng.random() < TASKED else None
        left_out = leave_out(rng, UNSAID)
        text = "" if bare else caption(scene, rng, left_out)
        return task_caption(text, task), answers(None if bare else scene, left_out, task)


def answers(scene: Scene | None, left_out: Collection[str] = (), task: str | None = None) -> list[int]:
    """Number of the right answer of each slot; no scene, no caption."""
    values = [NOTHING] * (len(SLOTS) - 1)
    if scene is not None:
        truth_values = meaning(scene)
        things = [*truth_values["objects"], {"object": NOTHING, "colour": NOTHING}][:2]
        values = [thing[name] for thing in things for name in ("object", "colour")]
        values += [NOTHING if "style" in left_out else truth_values["style"]]
        values += [NOTHING if "place" in left_out else truth_values["background"]]
    return [names.index(value) for names, value in zip(SLOTS.values(), [*values, task or NOTHING], strict=True)]
