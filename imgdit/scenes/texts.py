"""Captions of scenes as rows of tokens and in pairs, for language models."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from random import Random

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from imgdit.models.masked_lm import new_masked_lm
from imgdit.scenes.captions import caption, leave_out, plain_caption
from imgdit.scenes.tokenizer import text_tokenizer
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene, pick
from imgdit.training.text_pairs import TextPair
from imgdit.training.text_rows import TextRow, TextRows, begun, text_rows

UNSAID = 0.1
"""Probability that a caption leaves the place or the style unsaid."""


@lru_cache(maxsize=1)
def scene_text_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of these rows, made once."""
    return text_tokenizer()


def scene_masked_lm(
    hidden_size: int = 128, num_layers: int = 3, num_heads: int = 4, max_length: int = 64
) -> LlamaForCausalLM:
    """A masked language model of these rows; arguments as of `new_masked_lm`."""
    tokenizer = scene_text_tokenizer()
    return new_masked_lm(
        len(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id, hidden_size, num_layers, num_heads, max_length
    )


class SceneTexts:
    """Endless: sample i is the caption of the scene with seed `first_seed + i`.

    Args:
        first_seed: of the scenes.
        split: "train", "heldout" or "heldout_triples", see `Scene.sample`.
        length: tokens of a row; the longest caption has 27 and two more begin and end it.
        count_padding: also count the end tokens behind the first one.
        plain: the same caption for the same meaning (`plain_caption`), in place of paraphrases.
    """

    def __init__(
        self,
        first_seed: int = 0,
        split: str = "train",
        length: int = 32,
        count_padding: bool = True,
        plain: bool = False,
    ):
        self.first_seed, self.split, self.length, self.count_padding = first_seed, split, length, count_padding
        self.plain = plain

    def __getitem__(self, index: int) -> TextRows:
        seed = self.first_seed + index
        scene, rng = Scene.sample(seed, self.split), Random(seed)
        tokenizer = scene_text_tokenizer()
        text = plain_caption(scene) if self.plain else caption(scene, rng, leave_out(rng, UNSAID))
        row = TextRow(begun(tokenizer, ""), begun(tokenizer, text)[1:])
        return text_rows([row], self.length, tokenizer.eos_token_id, self.count_padding)


class SceneTextPairs:
    """Endless: sample i is two captions of the scene with seed `first_seed + i`, and one of a scene that differs from
    it in one thing.

    Args:
        first_seed: of the scenes.
        split: "train", "heldout" or "heldout_triples", see `Scene.sample`.
    """

    def __init__(self, first_seed: int = 0, split: str = "train"):
        self.first_seed, self.split = first_seed, split

    def __getitem__(self, index: int) -> TextPair:
        ids = [scene_text_tokenizer()(text)["input_ids"] for text in self.texts(index)]
        return TextPair(ids[0], ids[1], (ids[2],))

    def texts(self, index: int) -> tuple[str, str, str]:
        """Two captions of a scene, and one of the other scene."""
        seed = self.first_seed + index
        scene, rng = Scene.sample(seed, self.split), Random(seed)
        return caption(scene, rng), caption(scene, rng), caption(other_scene(scene, rng), rng)


def other_scene(scene: Scene, rng: Random) -> Scene:
    """A scene whose caption differs in one thing: a colour, an object, the style, the place, or which of two objects
    has which colour."""
    things = list(scene.objects)
    changes = ["colour", "object", "style", "place", *(["colours swapped"] if len(things) == 2 else [])]
    change, n = pick(rng, changes), pick(rng, range(len(things)))
    if change == "style":
        return replace(scene, style=pick(rng, [s for s in STYLES if s != scene.style]))
    if change == "place":
        return replace(scene, background=pick(rng, [b for b in BACKGROUNDS if b != scene.background]))
    if change == "colour":
        taken = {thing.colour for thing in things}
        things[n] = replace(things[n], colour=pick(rng, [c for c in COLOURS if c not in taken]))
    elif change == "object":
        taken = {thing.kind for thing in things}
        things[n] = replace(things[n], kind=pick(rng, [k for k in OBJECTS if k not in taken]))
    else:
        first, second = things
        things = [replace(first, colour=second.colour), replace(second, colour=first.colour)]
    return replace(scene, objects=tuple(things))
