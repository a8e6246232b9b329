"""The scenes' text encoder and their probe in training: questions, tokenizer, batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerFast

from imgdit.scenes.answers import SLOTS
from imgdit.scenes.caption_reader import CaptionReader
from imgdit.scenes.geometry import FAR
from imgdit.scenes.objectives import Captions, Readings
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.readings import QUESTIONS, Sample
from imgdit.scenes.tokenizer import caption_tokenizer


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return caption_tokenizer()


def scene_reader(d_model: int = 192, num_layers: int = 3, num_heads: int = 6, d_ff: int = 512) -> CaptionReader:
    """A reader of the scenes' captions; arguments as of `CaptionReader`."""
    return CaptionReader(SLOTS, len(_tokenizer()), d_model, num_layers, num_heads, d_ff)


def collate_captions(samples: Sequence[tuple[str, list[int]]]) -> Captions:
    """Captions and their answers to one batch, padded to the longest."""
    tokens = _tokenizer()([caption for caption, _ in samples], padding="longest", return_tensors="pt")
    answers = torch.tensor([numbers for _, numbers in samples])
    return Captions(tokens.input_ids, tokens.attention_mask.bool(), answers)


def scene_probe(channels: tuple[int, ...] = (16, 48, 96, 128), layers: int = 2) -> SceneProbe:
    """A probe of the scenes' images; arguments as of `SceneProbe`."""
    return SceneProbe(tuple(QUESTIONS.items()), channels=channels, layers=layers, far=FAR)


def collate_readings(samples: Sequence[Sample]) -> Readings:
    """The images of all samples in one batch."""
    looks = len(samples[0].pixels) - 1
    shows = torch.tensor([True] * looks + [False]).repeat(len(samples))
    return Readings(
        torch.cat([sample.pixels for sample in samples]),
        torch.cat([sample.answers for sample in samples]),
        torch.cat([sample.depth.expand(looks + 1, -1, -1, -1) for sample in samples]),
        torch.cat([sample.classes.expand(looks + 1, -1, -1) for sample in samples]),
        shows,
    )
