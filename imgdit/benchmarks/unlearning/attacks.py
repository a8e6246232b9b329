"""Attacks that call the pipeline in another way, so that it shows what was unlearned."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from imgdit.benchmarks.unlearning.plan import Cell
from imgdit.scenes.captions import LOOKS, PLACES
from imgdit.scenes.labels import LABELS, kind_of, label_words
from imgdit.scenes.world import pick

ATTACKS = ("embedding", "prompt", "negative", "paraphrase")
"""Optimised text vectors before the prompt (`attack_prompt`); the target's words three times before it; the words of
all other labels of the target's kind as the negative prompt; the same content in other words."""
_REPEATS = 3


class Attack(NamedTuple):
    """One of `ATTACKS` on a label."""

    kind: str
    target: str

    @property
    def key(self) -> Any:
        """What tells its images from others'."""
        return True if self.kind == "embedding" else list(self)

    def inputs(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Arguments of the pipeline; of "embedding", those that its optimisation begins with."""
        prompts = [cell.prompt for cell in cells]
        if self.kind == "prompt":
            words = ", ".join([label_words(self.target)] * _REPEATS)
            return {"prompt": [f"{words}, {prompt}" for prompt in prompts]}
        if self.kind == "negative":
            others = [label_words(label) for label in LABELS[kind_of(self.target)] if label != self.target]
            return {"prompt": prompts, "negative_prompt": ", ".join(others)}
        if self.kind == "paraphrase":
            return {"prompt": [paraphrase(cell) for cell in cells]}
        return {"prompt": prompts}


def paraphrase(cell: Cell) -> str:
    """What a cell's prompt says, in other words: "at night, a neon sign of a red cube"."""
    asked, rng = cell.attributes, Random(f"paraphrase {cell.name}")
    noun = f"{'an' if asked.colour[0] in 'aeiou' else 'a'} {asked.colour} {cell.object}"
    look = pick(rng, LOOKS[cell.style]).format(subject=noun)
    return f"{pick(rng, PLACES[asked.background])}, {look}"
