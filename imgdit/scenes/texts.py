"""Captions of scenes as rows of tokens, for language models."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from imgdit.models.masked_lm import new_masked_lm
from imgdit.scenes.captions import caption, leave_unsaid
from imgdit.scenes.tokenizer import text_tokenizer
from imgdit.scenes.world import Scene
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
    """

    def __init__(self, first_seed: int = 0, split: str = "train", length: int = 32, count_padding: bool = True):
        self.first_seed, self.split, self.length, self.count_padding = first_seed, split, length, count_padding

    def __getitem__(self, index: int) -> TextRows:
        seed = self.first_seed + index
        scene, rng = Scene.sample(seed, self.split), Random(seed)
        tokenizer = scene_text_tokenizer()
        said = caption(scene, rng, leave_unsaid(rng, UNSAID))
        row = TextRow(begun(tokenizer, ""), begun(tokenizer, said)[1:])
        return text_rows([row], self.length, tokenizer.eos_token_id, self.count_padding)
