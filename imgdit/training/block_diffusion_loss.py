"""Losses of block diffusion: BD3-LM (arXiv 2503.09573), MDLM, SEDD and the autoregressive one.

All are bounds on the negative log-likelihood in nats per token, the autoregressive one and blocks of one masked token
are exact; their exponential bounds the perplexity.

B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from imgdit import compat
from imgdit.models.bd3lm import BD3LM
from imgdit.schedulers.masked_text import draw_uniform
from imgdit.schedulers.text_noise import EPS, TextNoise, block_times, loglinear_masking, masking, sigma_of

MOST_ROUNDS = 1000
"""Rounds after which resampling gives up: a bound that no number of masks of a block meets."""


class BlockDiffusionLoss(NamedTuple):
    """A loss and what it was computed from."""

    loss: torch.Tensor
    """The mean of `nlls` over counted tokens."""
    nlls: torch.Tensor
    """(B, L) nats of each token, 0 where it is not masked or counted; autoregressive: (B, L - 1), from the second."""
    counted: torch.Tensor
    """Boolean, like `nlls`."""
    noisy_ids: torch.Tensor
    """(B, L) tokens with masks."""


def block_diffusion_loss(
    model: torch.nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    block_size: int | None = None,
    noise: TextNoise = "loglinear",
    low: float | None = None,
    high: float | None = None,
    resample: bool = False,
    fixed_counts: bool = False,
    antithetic: bool = True,
    sigma_weight: bool = False,
    keep_first: bool = True,
    prompt_mask: torch.Tensor | None = None,
    times: torch.Tensor | None = None,
    uniforms: list[torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> BlockDiffusionLoss:
    """The loss of texts, by what the model predicts.

    Args:
        model: `BD3LM`, wrapped for distributed training or not. In training mode with its own bounds of the masking
            rate; in evaluation mode the first token is not counted, and the bounds are 0.001 and 1, which make it the
            bound on the likelihood.
        ids: (B, L), beginning with the token that begins every text.
        attention_mask: (B, L), 1 on tokens that are counted.
        block_size: `None`: the model's. 1 with `low` and `high` of 1 gives the exact likelihood.
        noise: how the masking rate grows with time.
        low, high: bounds of the times, in place of the model's. With `low` above 0.5 weights are 1.
        resample: draw the masks of a block again while their fraction is outside the bounds.
        fixed_counts: mask a number of a block's n tokens that is uniform in 1..n, and weight each by n over that
            number, in place of masking each token with a probability: the same bound, which varies less. `noise`,
            `low`, `high` and `resample` are not used.
        antithetic: spread times evenly over the blocks of the batch.
        sigma_weight: MDLM's noise level and weight, in place of those of `noise`.
        keep_first: never mask the first token.
        prompt_mask: boolean (B, L), tokens that are never masked nor counted.
        times, uniforms: in place of drawn ones: (B, L) or (B, 1), and for each round of masks (B, L).
        generator: on the device of `ids`, or on the CPU.
    """
    plain: BD3LM = compat.unwrapped(model)
    counted = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if prompt_mask is not None:
        counted = counted & ~prompt_mask
    if plain.config.parameterization == "autoregressive":
        return _autoregressive_loss(model, ids, counted)
    clipped = model.training and plain.config.cross_attn
    low = (plain.config.sampling_eps_min if clipped else EPS) if low is None else low
    high = (plain.config.sampling_eps_max if clipped else 1.0) if high is None else high
    low, high = (0.0, 1.0) if fixed_counts else (low, high)
    size = plain.config.block_size if block_size is None else block_size
    size = size if plain.config.cross_attn else ids.shape[1]
    if times is None:
        times = block_times(
            len(ids),
            ids.shape[1],
            size,
            low=low,
            high=high,
            antithetic=antithetic,
            generator=generator,
            device=ids.device,
        )
    rate, weight = loglinear_masking(times) if sigma_weight else masking(times, noise)
    kept = torch.zeros_like(ids, dtype=torch.bool) if prompt_mask is None else prompt_mask.clone()
    kept[:, 0] |= keep_first
    if fixed_counts:
        masked, weight = _fixed_counts(times, ~kept, size, generator)
        noisy, rate = ids.masked_fill(masked, plain.mask_token_id), 1 / weight
    else:
        bounds = (low, high) if resample else (EPS, 1.0)
        noisy = _mask(ids, rate, kept, size, bounds, plain.mask_token_id, uniforms, generator)
    sigma = sigma_of(rate[:, 0])  # (B,)
    clean = ids if plain.config.cross_attn else None
    log_probs = plain.log_probs(model(noisy, sigma, clean_ids=clean, block_size=block_size).logits, noisy, sigma)
    if not model.training and keep_first:
        counted = counted.clone()
        counted[:, 0] = False
    if plain.config.parameterization == "score":
        nlls = (weight * torch.expm1(sigma)[:, None]) * score_entropy(
            log_probs, noisy, ids, sigma, plain.mask_token_id
        )
    else:
        weight = torch.ones_like(weight) if low > 0.5 else weight
        nlls = -weight * log_probs.gather(-1, ids[..., None])[..., 0]  # 0 at tokens that are not masked
    return _loss(nlls, counted, noisy)


def _autoregressive_loss(model: torch.nn.Module, ids: torch.Tensor, counted: torch.Tensor) -> BlockDiffusionLoss:
    log_probs = compat.unwrapped(model).log_probs(model(ids[:, :-1]).logits, ids[:, :-1])
    nlls = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    return _loss(nlls, counted[:, 1:], ids)


def _loss(nlls: torch.Tensor, counted: torch.Tensor, noisy_ids: torch.Tensor) -> BlockDiffusionLoss:
    nlls = nlls * counted
    return BlockDiffusionLoss(nlls.sum() / counted.sum().clamp(min=1), nlls, counted, noisy_ids)


def _mask(
    ids: torch.Tensor, rate: torch.Tensor, kept: torch.Tensor, block_size: int, bounds: tuple[float, float],
    mask_token_id: int, uniforms: list[torch.Tensor] | None, generator: torch.Generator | None,
) -> torch.Tensor:  # fmt: skip
    """Masked tokens (B, L); masks of blocks whose fraction of them is out of bounds are drawn again.

    A lower bound of `EPS` and an upper one of 1 are always met.
    """
    length = ids.shape[1]
    masked = torch.zeros_like(ids, dtype=torch.bool)
    again = torch.ones_like(masked)
    for number in range(MOST_ROUNDS):
        drawn = draw_uniform(ids.shape, ids.device, generator, torch.float32) if uniforms is None else uniforms[number]
        masked = torch.where(again, drawn <= rate, masked)
        fraction = _block_fractions(masked, block_size)
        outside = (fraction < bounds[0]) & (bounds[0] > EPS) | (fraction > bounds[1]) & (bounds[1] < 1)
        if not outside.any():
            return ids.masked_fill(masked & ~kept, mask_token_id)
        again = outside.repeat_interleave(block_size, 1)[:, :length]
    raise ValueError(
        f"no masks of blocks of {block_size} tokens have a fraction in {bounds} at the drawn rates; widen the bounds, "
        "or set resample=False"
    )


def _fixed_counts(
    times: torch.Tensor, maskable: torch.Tensor, block_size: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked tokens, boolean (B, L), and the weight (B, L) of each.

    Args:
        times: (B, L) or (B, 1) in [0, 1), equal within a block, which say how many of its tokens are masked.
        maskable: boolean (B, L).
    """
    length = maskable.shape[1]
    order = draw_uniform(maskable.shape, maskable.device, generator, torch.float32).masked_fill(~maskable, 2.0)
    missing = -length % block_size
    inside = functional.pad(maskable, (0, missing)).unflatten(1, (-1, block_size))  # (B, m, block_size)
    order = functional.pad(order, (0, missing), value=2.0).unflatten(1, (-1, block_size))
    number = inside.sum(-1, keepdim=True)
    masks = ((times.expand(-1, length)[:, ::block_size, None] * number).long() + 1).clamp(max=number)  # (B, m, 1)
    masked = (order.argsort(-1).argsort(-1) < masks).flatten(1)[:, :length]
    weight = (number / masks.clamp(min=1)).clamp(min=1).expand_as(order).flatten(1)[:, :length]
    return masked, weight


def _block_fractions(masked: torch.Tensor, block_size: int) -> torch.Tensor:
    """Fraction (B, blocks) of masks in each block, of a short last one too."""
    length = masked.shape[1]
    missing = -length % block_size
    number = functional.pad(masked, (0, missing)).unflatten(1, (-1, block_size)).sum(-1)
    sizes = torch.full((number.shape[1],), block_size, device=masked.device)
    sizes[-1] -= missing
    return number / sizes


def score_entropy(
    log_score: torch.Tensor, noisy: torch.Tensor, ids: torch.Tensor, sigma: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """SEDD's loss (B, L) of masked tokens, 0 at others (arXiv 2310.16834, equation 5, absorbing noise).

    Args:
        log_score: (B, L, V).
        sigma: (B,) noise levels.
    """
    ratio = (1 / torch.expm1(sigma))[:, None]  # (B, 1)
    is_mask = torch.arange(log_score.shape[-1], device=log_score.device) == mask_token_id
    total = log_score.exp().masked_fill(is_mask, 0).sum(-1)
    own = log_score.gather(-1, ids[..., None])[..., 0]
    entropy = total - ratio * own + ratio * (ratio.log() - 1)
    return entropy.masked_fill(noisy != mask_token_id, 0.0)
