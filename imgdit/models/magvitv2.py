"""MAGVIT-v2 without its temporal part: images to codes of a table without look-up, and back.

The image tokenizer of MMaDA (arXiv 2505.15809) and Show-o, with the names of its published weights (showlab/magvitv2);
the quantizer is that of arXiv 2310.05737, section 3.1.

B images, H x W pixels, h x w codes, C channels, n bits of a code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from imgdit import compat
from imgdit.compat import SafetensorsOnly
from imgdit.io.checkpoints import read_shapes, read_tensors
from imgdit.io.safe_json import read_object
from imgdit.models.masked_lm import model_folder

GROUPS, EPS = 32, 1e-6
"""Of all normalisations."""
COMMITMENT, ENTROPY = 0.1 * 1.25, 0.1
"""Weights of the quantizer's losses, as published."""


@dataclass
class MagViTv2Output(BaseOutput):
    """What `MagViTv2.encode` returns."""

    codes: torch.Tensor
    """(B, h, w) int64."""
    latents: torch.Tensor
    """(B, n, h, w), of which the signs are the codes' bits."""
    quantized: torch.Tensor
    """(B, n, h, w) of -1 and 1."""


class QuantizerLosses(NamedTuple):
    """What latents are trained by besides the images, with the published weights."""

    commitment: torch.Tensor
    """Squared distance to the signs."""
    entropy: torch.Tensor
    """Mean entropy of the bits minus the entropy of the mean bits: certain bits, all of them used."""


class MagViTv2(SafetensorsOnly, ModelMixin, ConfigMixin):
    """Encoder and decoder of images, whose defaults are the published sizes (`load_magvitv2` reads that folder).

    Args:
        encoder_channels, decoder_channels: width that the multipliers are of.
        encoder_multipliers, decoder_multipliers: one per level, the finest first; each level but one halves the side.
        encoder_blocks, decoder_blocks: residual blocks of each level.
        code_bits: n; the table has 2^n codes.
        image_channels: of the images.
    """

    @register_to_config
    def __init__(
        self,
        encoder_channels: int = 128,
        encoder_multipliers: Sequence[int] = (1, 2, 2, 4, 4),
        encoder_blocks: Sequence[int] = (4, 3, 4, 3, 4),
        decoder_channels: int = 128,
        decoder_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_blocks: Sequence[int] = (4, 4, 3, 4, 3),
        code_bits: int = 13,
        image_channels: int = 3,
    ):
        super().__init__()
        encoder = _widths("encoder", encoder_channels, encoder_multipliers, encoder_blocks)
        decoder = _widths("decoder", decoder_channels, decoder_multipliers, decoder_blocks)
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder and decoder need as many levels, got {len(encoder)} and {len(decoder)}")
        self.encoder = Encoder(image_channels, encoder_channels, encoder, encoder_blocks, code_bits)
        self.decoder = Decoder(image_channels, decoder, decoder_blocks, code_bits)
        self.quantize = LookupFreeQuantizer(code_bits)

    @property
    def factor(self) -> int:
        """Pixels of a code's side."""
        return 2 ** (len(self.config.encoder_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        """Codes in the table."""
        return 2**self.config.code_bits

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor) -> MagViTv2Output:
        """Codes of images.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1], whose sides are multiples of `factor`.

        Raises:
            ValueError: other shapes.
        """
        channels = self.config.image_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"images must be (batch, {channels}, height, width), got {tuple(pixel_values.shape)}")
        height, width = pixel_values.shape[2:]
        if not height or not width or height % self.factor or width % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor} pixels, got {height}x{width}")
        latents = self.encoder(pixel_values)
        return MagViTv2Output(self.quantize.codes(latents), latents, self.quantize(latents))

    @apply_forward_hook
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W), about in [-1, 1], of codes (B, h, w).

        Raises:
            ValueError: codes of another shape, or outside the table.
        """
        if codes.ndim != 3 or codes.dtype != torch.long:
            raise ValueError(f"codes must be int64 (batch, rows, columns), got {codes.dtype} {tuple(codes.shape)}")
        return self.decode_latents(self.quantize.signs(codes))

    def decode_latents(self, quantized: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) of signs (B, n, h, w)."""
        return self.decoder(quantized)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images as they are decoded again, with gradients as if nothing had been rounded."""
        latents = self.encoder(pixel_values)
        return self.decoder(latents + (self.quantize(latents) - latents).detach())


class LookupFreeQuantizer(nn.Module):
    """Signs as codes: bit i is whether channel i is above 0, the first channel is the most significant one.

    The buffers are those of the published files.
    """

    embedding: torch.Tensor
    power_vals: torch.Tensor

    def __init__(self, bits: int):
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        self.register_buffer("power_vals", powers)
        table = (torch.arange(2**bits)[:, None] // powers) % 2
        self.register_buffer("embedding", 2.0 * table - 1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """-1 and 1 in place of latents (B, n, h, w); 0 becomes -1."""
        return torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)

    def codes(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, h, w) of latents (B, n, h, w)."""
        return ((latents > 0) * self.power_vals[:, None, None]).sum(1)

    def signs(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, n, h, w) of codes (B, h, w).

        Raises:
            ValueError: codes outside the table.
        """
        size = 2 ** len(self.power_vals)
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
            raise ValueError(
                f"codes must lie in 0..{size - 1}, the table of this image tokenizer, got {int(codes.min())} to "
                f"{int(codes.max())}"
            )
        return self.embedding[codes].movedim(-1, 1)

    def losses(self, latents: torch.Tensor) -> QuantizerLosses:
        """Losses of latents (B, n, h, w) while the tokenizer is trained (arXiv 2310.05737, equation 5)."""
        commitment = COMMITMENT * (self(latents) - latents).square().mean()
        distances = torch.stack([(latents - sign).square() for sign in (-1, 1)])
        bits = (-distances).softmax(0)  # (2, B, n, h, w)
        entropy = _entropy(bits).mean() - _entropy(bits.mean((1, 3, 4))).mean()
        return QuantizerLosses(commitment, ENTROPY * entropy)


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Nats of distributions along the first axis."""
    return -(probabilities * probabilities.clamp(min=1e-30).log()).sum(0)


class Encoder(nn.Module):
    """Images (B, C, H, W) to latents (B, n, h, w)."""

    def __init__(self, channels: int, first: int, widths: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        before = [first, *widths]
        self.down = nn.ModuleList(
            Level(before[n], width, blocks[n], down=n < len(widths) - 1) for n, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Signs (B, n, h, w) to images (B, C, H, W)."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        before = [*widths[1:], widths[-1]]  # levels run from the last to the first
        self.up = nn.ModuleList(Level(before[n], width, blocks[n], up=n > 0) for n, width in enumerate(widths))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(x)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one width, then a change of size."""

    def __init__(self, inputs: int, width: int, blocks: int, *, down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if n else inputs, width) for n in range(blocks))
        self.downsample = Downsample(width) if down else None
        self.upsample = Upsample(width) if up else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Downsample(nn.Module):
    """Half the side, by a convolution that sees one row and column more on the right and below."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side, each value repeated."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = SpatialAttention(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))))))."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return changed + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class SpatialAttention(nn.Module):
    """All places see each other, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))  # (B, 1, h w, C)
        seen = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(seen[:, 0].mT.unflatten(2, x.shape[2:]))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=EPS)


def _widths(part: str, channels: int, multipliers: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Channels of each level."""
    widths = [channels * multiplier for multiplier in multipliers]
    if not widths or len(blocks) != len(widths) or min(blocks) < 1:
        raise ValueError(f"{part} needs blocks for each level, got multipliers {multipliers} and blocks {blocks}")
    if any(width < 1 or width % GROUPS for width in [channels, *widths]):
        raise ValueError(f"channels of the {part} must be multiples of {GROUPS}, got {[channels, *widths]}")
    return widths


def load_magvitv2(
    source: str | Path,
    *,
    sizes: Mapping[str, Any] | None = None,
    subfolder: str = "",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: Any = None,
) -> MagViTv2:
    """A published folder of MAGVIT-v2, or what `save_pretrained` wrote.

    Args:
        source: folder or Hub repository. Pickled weights are refused.
        sizes: arguments of `MagViTv2`, for a folder whose `config.json` has none. Those of showlab/magvitv2 are known.
        dtype: of the weights; `None`: as stored.
        revision, token: of the Hub.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: no such folder, unknown sizes, or weights of other names or shapes.
    """
    folder = model_folder(source, subfolder, revision, token)
    config = read_object(folder / "config.json")
    values = {name: config[name] for name in compat.init_keys(MagViTv2) if name in config} | dict(sizes or {})
    with torch.device("meta"):
        expected = MagViTv2(**values).state_dict()
    stored, places = _stored(folder)
    different = _differences({name: tuple(tensor.shape) for name, tensor in expected.items()}, stored)
    if different:
        file = places.get(different[0][0], folder)
        if not values:
            raise ValueError(
                f"{folder / 'config.json'} says no sizes, and the weights are not those of showlab/magvitv2, whose "
                f"sizes are known: {len(different)} names or shapes differ, first {different[0][1]} in {file}. Give "
                "sizes, a mapping of the arguments of MagViTv2"
            )
        raise ValueError(
            f"{file}: {len(different)} names or shapes are not those of an image tokenizer with sizes {values}, first "
            f"{different[0][1]}"
        )
    model = MagViTv2(**values)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(places.values())):
        tensors |= read_tensors(file)
    if dtype is not None:
        tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _stored(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Shapes of all weights of a folder, and the file that holds each."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = {name: shape for name, (shape, _) in read_shapes(file).items()}
        shapes |= found
        places |= dict.fromkeys(found, file)
    return shapes, places


def _differences(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str]]:
    """Names whose shapes differ, each with a message."""
    found = []
    for name in sorted({*expected, *stored}, key=_in_order):
        if expected.get(name) != stored.get(name):
            shapes = [str(shapes[name]) if name in shapes else "missing" for shapes in (stored, expected)]
            found.append((name, f"{name}: got {shapes[0]}, expected {shapes[1]}"))
    return found


def _in_order(name: str) -> list[Any]:
    """Numbers in names by their value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
