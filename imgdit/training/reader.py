"""The scenes' text encoder in training: its tokenizer, its questions, its batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerFast

from ..data.sentences import SLOTS
from ..data.words import caption_tokenizer
from ..models.caption_reader import CaptionReader
from .objectives import Sentences


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return caption_tokenizer()


def scene_reader(d_model: int = 192, num_layers: int = 3, num_heads: int = 6, d_ff: int = 512) -> CaptionReader:
    """A reader of the scenes' sentences; arguments as of `CaptionReader`."""
    return CaptionReader(SLOTS, len(_tokenizer()), d_model, num_layers, num_heads, d_ff)


def collate_sentences(samples: Sequence[tuple[str, list[int]]]) -> Sentences:
    """Sentences and their answers to one batch, padded to the longest."""
    tokens = _tokenizer()([sentence for sentence, _ in samples], padding="longest", return_tensors="pt")
    answers = torch.tensor([numbers for _, numbers in samples])
    return Sentences(tokens.input_ids, tokens.attention_mask.bool(), answers)
