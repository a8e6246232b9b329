"""A small network that says what a picture of a scene shows: for measuring what a generator made.

B batch, S pixels per side, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config

from ..compat import ModelMixin


class Reading(NamedTuple):
    """What the probe sees in pictures."""

    answers: dict[str, torch.Tensor]
    """Logits (B, choices) of each question."""
    depth: torch.Tensor
    """(B, 1, S, S) z-depth in world units."""
    segmentation: torch.Tensor
    """(B, classes, S, S) logits."""
    features: torch.Tensor
    """(B, D), for Fréchet distances."""


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class SceneProbe(ModelMixin, ConfigMixin):
    """A convolutional encoder whose coarsest cells are asked the questions, and a decoder for depth and segmentation.

    Args:
        questions: names with their choices, in the order of the heads; a list, because JSON keeps no other order.
        classes: of the segmentation.
        channels: features at a half, a quarter, an eighth and a sixteenth of the picture's side.
        size: pixels per side the pictures are resized to.
        far: depth in world units that an output of 1 means.
    """

    @register_to_config
    def __init__(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        classes: int = 9,
        channels: tuple[int, ...] = (16, 32, 64, 96),
        size: int = 128,
        far: float = 10.0,
    ):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), _Block(b), _Block(b)) for a, b in pairwise(channels)
        )
        width, side = channels[-1], size // 2 ** len(channels)
        self.places = nn.Parameter(torch.randn(side * side, width) * 0.5)
        self.asked = nn.Parameter(torch.randn(len(questions), width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(choices)))
            for _, choices in questions
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, a, 1), _Block(a)) for a, b in reversed(list(pairwise(channels)))
        )
        self.dense = nn.Conv2d(channels[0], 4 * (1 + classes), 3, padding=1)

    @property
    def questions(self) -> dict[str, Sequence[str]]:
        """Choices of each question, by its name."""
        return {name: choices for name, choices in self.config.questions}

    def forward(self, pixels: torch.Tensor) -> Reading:
        """Read pictures (B, 3, H, W) in [-1, 1]."""
        config = self.config
        if pixels.shape[-2:] != (config.size, config.size):
            pixels = F.interpolate(pixels, (config.size, config.size), mode="bilinear", antialias=True)
        levels = [self.stem(pixels)]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        cells = self.norm(levels[-1].flatten(2).transpose(1, 2))  # (B, cells, D)
        keys = self.key(cells + self.places)
        weights = (self.asked @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5).softmax(-1)  # (B, questions, cells)
        found = weights @ self.value(cells + self.places)  # (B, questions, D)
        answers = {
            name: head(vector) for name, head, vector in zip(self.questions, self.heads, found.unbind(1), strict=True)
        }
        x = levels[-1]
        for layer, skip in zip(self.up, reversed(levels[:-1])):
            x = skip + F.interpolate(layer(x), scale_factor=2.0, mode="nearest")
        dense = F.pixel_shuffle(self.dense(x), 2)  # (B, 1 + classes, S, S)
        return Reading(answers, config.far * torch.sigmoid(dense[:, :1].float()), dense[:, 1:], cells.mean(1))
