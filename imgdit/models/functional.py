"""Pure functions of the transformers: latents as tokens, rotary and sin-cos positions, modulation per frame.

B batch, N tokens, D width, F frames, S rows, H heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imgdit.layout import FrameLayout

PATCH = 2
"""Latent cells per side of a token, as in FLUX."""


def pack(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Latents (B, C, h, w) to tokens (B, h/p * w/p, C*p*p), features ordered (C, row, column) as FLUX has them."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: torch.Tensor, patch: int, size: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, rows * columns, C*p*p) to latents (B, C, rows*p, columns*p); the inverse of `pack`."""
    rows, columns = size
    cells = tokens.reshape(tokens.shape[0], rows, columns, -1, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, rows * patch, columns * patch)


def rope_table(ids: torch.Tensor, axes_dims: Sequence[int], theta: float) -> torch.Tensor:
    """Rotations (N, sum(axes_dims) / 2) complex64 of positions; FLUX's rule, angles in float64.

    Args:
        ids: (N, axes) positions.
        axes_dims: features of a head that turn with each axis.
        theta: base of the geometric row of frequencies.
    """
    dtype = torch.float32 if ids.device.type in ("mps", "npu") else torch.float64
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim)
        angles.append(ids[:, axis].to(dtype)[:, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.complex(angle.cos().float(), angle.sin().float())


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of features (B, S, H, d) by the rotations of `rope_table`: (S, d/2), or (B, S, d/2) for
    each sample its own."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, S, H, d/2, 2)
    rope = rope.unsqueeze(-2)  # ([B,] S, 1, d/2)
    if torch.compiler.is_compiling():  # inductor generates no code for complex numbers
        cos, sin = torch.view_as_real(rope).unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # eager: one pass; the real form costs 40 times as much on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rope)
    return turned.flatten(-2).to(x.dtype)


def apply_rope_to_halves(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn features (B, S, H, d) of which i and i + d/2 are a pair. Each feature has its own angle, which models that
    repeat their angles otherwise than their pairs need.

    Args:
        rope: (S, d) or (B, S, d) complex64, cos + i sin of each feature's angle.
    """
    cos, sin = torch.view_as_real(rope.unsqueeze(-2)).unbind(-1)  # ([B,] S, 1, d)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.addcmul(x.float() * cos, turned, sin).to(x.dtype)


def sincos_positions(rows: torch.Tensor, columns: torch.Tensor, dim: int) -> torch.Tensor:
    """SD3's sine-cosine embedding (N, dim) of coordinates (N,): the column in the first half, then the row."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [coordinate.double()[:, None] * frequency for coordinate in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def table_positions(pos_embed: Any, layout: FrameLayout) -> torch.Tensor:
    """Sin-cos positions (N, dim) of a layout: the made frame of a scene sits in the table's middle, as in SD3.

    Args:
        pos_embed: diffusers' `PatchEmbed` with its table `pos_embed` (1, side * side, dim). Places between the table's
            or outside of it are computed.
    """
    table, side, base = pos_embed.pos_embed, pos_embed.pos_embed_max_size, pos_embed.base_size
    device, dim = table.device, table.shape[-1]
    where = layout.kept(("table places", side, base, dim, device), lambda: _places(layout, side, base, dim, device))
    return where if where.is_floating_point() else table[0, where]


def _places(layout: FrameLayout, side: int, base: int, dim: int, device: torch.device) -> torch.Tensor:
    """Numbers (N,) of a layout's tokens in the table; their positions (N, dim) where these lie beside it."""
    places = []
    for i in layout.live:
        scene = [f for f, s in zip(layout.frames, layout.scenes) if s == layout.scenes[i]]
        target = next((f for f in scene if f.predicted), scene[0])
        middle = torch.tensor([(side - n) // 2 for n in target.size])
        places.append(layout.frames[i].ids()[:, 1:] + middle)
    place = torch.cat(places)  # (N, 2) rows and columns of the table
    if bool(((place.frac() == 0) & (place >= 0) & (place < side)).all()):
        return (place[:, 0] * side + place[:, 1]).long().to(device)
    rows, columns = (place * base / side).unbind(1)
    return sincos_positions(rows, columns, dim).to(device)


def multiply_add(
    base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, lengths: Sequence[int], *, per_frame: bool = False
) -> torch.Tensor:
    """`base + x * factor` of tokens x (B, N, D) and a factor per frame (B, F, D), broadcast over the frame's tokens.

    The vectors are never expanded to tokens: one frame broadcasts, equal frames fold into an axis, others go by slice.

    Args:
        base: (B, N, D); (B, F, D) if `per_frame`.
        lengths: tokens of each frame.
    """
    if len(lengths) < 2 or max(lengths) == 1:  # a vector for everything, or each token's own
        return torch.addcmul(base, x, factor)
    frames = len(lengths)
    if len(set(lengths)) == 1:
        tokens = (frames, lengths[0])
        base = base[:, :, None] if per_frame else base.unflatten(1, tokens)
        return torch.addcmul(base, x.unflatten(1, tokens), factor[:, :, None]).flatten(1, 2)
    bases = base.split(1 if per_frame else list(lengths), dim=1)
    parts = zip(bases, x.split(list(lengths), dim=1), factor.split(1, dim=1), strict=True)
    return torch.cat([torch.addcmul(*part) for part in parts], dim=1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """adaLN: `x * (1 + scale) + shift` with one vector per frame (DiT, arXiv 2212.09748, section 3.2)."""
    return multiply_add(shift, x, 1 + scale, lengths, per_frame=True)


def gated_add(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """`x + gate * update` with one gate per frame."""
    return multiply_add(x, update, gate, lengths)


def in_range(x: torch.Tensor) -> torch.Tensor:
    """Tokens in float16's range, to which diffusers' blocks clip them."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
