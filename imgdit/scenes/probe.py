"""A small network that says what an image of a scene shows: for measuring what a model generated.

B batch, S pixels per side, N coarsest cells, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config

from imgdit.compat import ModelMixin


class Reading(NamedTuple):
    """What the probe sees in images."""

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


def _head(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(channels), nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
    )


class SceneProbe(ModelMixin, ConfigMixin):
    """A convolutional encoder whose coarsest cells see each other and are asked the questions, and a decoder for depth
    and segmentation.

    Every pixel knows where it is. Each class has a smooth surface of a quarter of the image's side, told by its
    inverse depth, which on a plane is linear in the pixel's place; the segmentation says whose surface a pixel shows.

    Args:
        questions: names with their choices, in the order of the heads; a list, because JSON keeps no other order.
        classes: of the segmentation.
        channels: features at a half, a quarter, an eighth and a sixteenth of the image's side.
        layers: transformer layers over the coarsest cells.
        size: pixels per side the images are resized to.
        far: the largest depth there is, in world units.
    """

    @register_to_config
    def __init__(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        classes: int = 9,
        channels: tuple[int, ...] = (16, 32, 64, 96),
        layers: int = 2,
        size: int = 128,
        far: float = 10.0,
    ):
        super().__init__()
        self.stem = nn.Conv2d(5, channels[0], 5, stride=2, padding=2)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), _Block(b), _Block(b)) for a, b in pairwise(channels)
        )
        width, side = channels[-1], size // 2 ** len(channels)
        self.places = nn.Parameter(torch.randn(side * side, width) * 0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.mix = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
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
        self.masks = _head(channels[0], 4 * classes)
        self.surfaces = _head(channels[1], classes)

    @property
    def questions(self) -> dict[str, Sequence[str]]:
        """Choices of each question, by its name."""
        return {name: choices for name, choices in self.config.questions}

    def forward(self, pixels: torch.Tensor) -> Reading:
        """Read images (B, 3, H, W) in [-1, 1]."""
        config = self.config
        if pixels.shape[-2:] != (config.size, config.size):
            pixels = F.interpolate(pixels, (config.size, config.size), mode="bilinear", antialias=True)
        line = torch.linspace(-1.0, 1.0, config.size).to(pixels)
        where = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(pixels), -1, -1, -1)
        levels = [self.stem(torch.cat([pixels, where], dim=1))]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        mixed = self.mix(levels[-1].flatten(2).transpose(1, 2) + self.places)  # (B, N, D)
        cells = self.norm(mixed)
        asked = self.asked @ self.key(cells).transpose(1, 2) / cells.shape[-1] ** 0.5  # (B, questions, N)
        found = asked.softmax(-1) @ self.value(cells)  # (B, questions, D)
        answers = {
            name: head(vector) for name, head, vector in zip(self.questions, self.heads, found.unbind(1), strict=True)
        }
        levels[-1] = mixed.transpose(1, 2).reshape(levels[-1].shape)
        x = levels[-1]
        for layer, skip in zip(self.up, reversed(levels[:-1])):
            coarse, x = x, skip + F.interpolate(layer(x), scale_factor=2.0, mode="nearest")
        segmentation = F.pixel_shuffle(self.masks(x), 2)  # (B, classes, S, S)
        surfaces = F.interpolate(self.surfaces(coarse).float(), segmentation.shape[-2:], mode="bilinear")
        inverse = (segmentation.float().softmax(1) * F.softplus(surfaces)).sum(1, keepdim=True)
        return Reading(answers, 1 / (1 / config.far + inverse), segmentation, cells.mean(1))
