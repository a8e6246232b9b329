"""How fast tokens are masked: noise schedules of block diffusion (BD3-LM, arXiv 2503.09573), and its random times.

At time t in [0, 1] a token is masked with probability p(t) = 1 - α(t), its masking rate. The bound on the likelihood
weights a masked token's cross entropy by p'(t) / p(t) (equation 8 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from imgdit.naming import check_choice
from imgdit.schedulers.masked_text import draw_uniform

TextNoise = Literal["loglinear", "square", "square_root", "log", "cosine"]
EPS = 1e-3
"""Least masking rate of "square" and "cosine", and what the log-linear noise level leaves unmasked at t = 1."""
MOST_SIGMA = -math.log(EPS)
"""Highest noise level a model is told."""


class Masking(NamedTuple):
    """A noise schedule at given times."""

    rate: torch.Tensor
    """p(t), the probability with which a token is masked."""
    weight: torch.Tensor
    """p'(t) / p(t) > 0, of the cross entropy of a masked token."""


def _power(exponent: float) -> Callable[[torch.Tensor], Masking]:
    def masking(t: torch.Tensor) -> Masking:
        rate = (t**exponent).clamp(min=EPS)
        return Masking(rate, exponent * t ** (exponent - 1) / rate)

    return masking


def _logarithm(t: torch.Tensor) -> Masking:
    rate = torch.log1p(t) / math.log(2)
    return Masking(rate, 1 / ((1 + t) * math.log(2)) / rate)


def _cosine(t: torch.Tensor) -> Masking:
    rate = 1 - (1 - EPS) * torch.cos(t * math.pi / 2)
    # The published weight divides by the rate plus EPS.
    return Masking(rate, math.pi / 2 * (1 - EPS) * torch.sin(t * math.pi / 2) / (rate + EPS))


_SCHEDULES: dict[str, Callable[[torch.Tensor], Masking]] = {
    "loglinear": lambda t: Masking(t, 1 / t),
    "square": _power(2),
    "square_root": _power(0.5),
    "log": _logarithm,
    "cosine": _cosine,
}


def masking(times: torch.Tensor, noise: TextNoise = "loglinear") -> Masking:
    """Masking rates and weights at times in (0, 1], of the same shape."""
    check_choice("noise", noise, get_args(TextNoise))
    return _SCHEDULES[noise](times)


def loglinear_masking(times: torch.Tensor) -> Masking:
    """MDLM's own log-linear noise: σ(t) = -ln(1 - (1 - EPS) t), p = 1 - exp(-σ), weight σ' / (exp(σ) - 1)."""
    sigma = loglinear_sigma(times)
    derivative = (1 - EPS) / (1 - (1 - EPS) * times)
    return Masking(1 - torch.exp(-sigma), derivative / torch.expm1(sigma))


def loglinear_sigma(times: torch.Tensor) -> torch.Tensor:
    """Noise levels σ(t) that grow with the logarithm of what stays unmasked."""
    return -torch.log1p(-(1 - EPS) * times)


def importance_times(times: torch.Tensor) -> torch.Tensor:
    """Times in (0, 1) whose log-linear noise levels σ spread evenly over ln(1 - exp(-σ)), from times in [0, 1]; MDLM's
    option `importance_sampling`."""
    low, high = (math.log(-math.expm1(-sigma)) for sigma in (EPS, MOST_SIGMA))
    return torch.exp(times * high + (1 - times) * low) / (1 - EPS)


def sigma_of(rate: torch.Tensor) -> torch.Tensor:
    """Noise level -ln(1 - rate) that a model is told, at most `MOST_SIGMA`."""
    return (-torch.log1p(-rate)).clamp(max=MOST_SIGMA)


def block_times(
    batch: int,
    length: int,
    block_size: int,
    *,
    low: float = EPS,
    high: float = 1.0,
    antithetic: bool = True,
    uniforms: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Random times, one per block.

    Args:
        batch, length, block_size: B rows of L tokens in m blocks; the last block may be short.
        low, high: bounds of the times; 1 and 1 give ones.
        antithetic: spread the times of all blocks of the batch evenly, which makes the loss vary less.
        uniforms: (B, m), in place of drawn ones.

    Returns:
        (B, L), equal within a block; (B, 1) where one block is all.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"expected 0 <= low <= high <= 1, got {low} and {high}")
    blocks = -(-length // block_size)
    if uniforms is None:
        uniforms = draw_uniform((batch, blocks), device, generator, torch.float32)
    if antithetic:
        count = batch * blocks
        places = torch.arange(count, device=uniforms.device).view(batch, blocks)
        uniforms = (uniforms / count + places / count) % 1
    if blocks > 1:
        uniforms = uniforms.repeat_interleave(block_size, 1)[:, :length]
    if low == high == 1:
        return torch.ones_like(uniforms)
    return low + (high - low) * uniforms
