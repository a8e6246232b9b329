"""Losses and likelihoods of masked diffusion language models, as functions of a prediction.

`predict(ids)` returns logits (B, L, V) for tokens (B, L); `partial(masked_logits, model)` is one. LLaDA, arXiv
2502.09992; LaViDa's complementary masks, arXiv 2505.16839.

B rows, L tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch.nn import functional

from imgdit.naming import check_choice
from imgdit.schedulers.mask_schedule import masked_fraction
from imgdit.schedulers.masked_text import draw_uniform, without_tokens
from imgdit.schedulers.text_noise import block_times, importance_times, loglinear_masking

Predict = Callable[[torch.Tensor], torch.Tensor]
Weight = Literal["none", "rate", "rate_and_length"]
EPS = 1e-3
"""LLaDA's least masking rate."""


class Noised(NamedTuple):
    """Tokens of which some are masked."""

    ids: torch.Tensor
    """(B, L)."""
    masked: torch.Tensor
    """Boolean (B, L)."""
    rate: torch.Tensor
    """(B,), the probability with which a token was masked, or another number by which its loss is divided."""


def mask_tokens(
    ids: torch.Tensor,
    mask_token_id: int,
    *,
    maskable: torch.Tensor | None = None,
    complement: bool = False,
    smallest: bool = False,
    eps: float = EPS,
    times: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Noised:
    """Mask each token with a probability of its row, (1 - eps) t + eps for t in [0, 1].

    Args:
        ids: (B, L).
        maskable: boolean (B, L); `None`: all tokens.
        complement: also return the rows with the other maskable tokens masked, 2 B rows in all: each token is
            masked once.
        smallest: also mask the token of a row's smallest number, if it is maskable, as LaViDa does.
        times: t (B,), in place of uniform ones.
        uniforms: (B, L), in place of drawn ones; a token is masked where its number is below the rate.
        generator: on the device of `ids`, or on the CPU.
    """
    device = ids.device
    source = device if generator is None else generator.device
    if times is None:
        times = torch.rand(len(ids), device=source, generator=generator).to(device)
    if uniforms is None:
        uniforms = torch.rand(ids.shape, device=source, generator=generator).to(device)
    rate = (1 - eps) * times + eps
    masked = uniforms < rate[:, None]
    if smallest:
        masked = masked | (uniforms == uniforms.min(1, keepdim=True).values)
    maskable = torch.ones_like(masked) if maskable is None else maskable
    if complement:
        masked, maskable = torch.cat([masked, ~masked]), maskable.repeat(2, 1)
        ids, rate = ids.repeat(2, 1), torch.cat([rate, (1 - rate).clamp(min=eps)])
    masked = masked & maskable
    return Noised(ids.masked_fill(masked, mask_token_id), masked, rate)


def mask_one_token(
    ids: torch.Tensor,
    mask_token_id: int,
    maskable: torch.Tensor,
    first: torch.Tensor,
    padding: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Noised:
    """Mask one token of each row, so that it is predicted from all the others. A row without a maskable token stays.

    Args:
        ids: (B, L).
        maskable: boolean (B, L).
        first: boolean (B,), rows of which it is the first maskable token; of the others it is any, with the same
            probability for each.
        padding: boolean (B, L), tokens that are not masked where a row has others.
        generator: on the device of `ids`, or on the CPU.
    """
    among = maskable & ~padding
    among = torch.where(among.any(1, keepdim=True), among, maskable)
    drawn = draw_uniform(ids.shape, ids.device, generator, torch.float32)
    order = torch.arange(ids.shape[1], 0, -1, device=ids.device) / ids.shape[1]
    score = torch.where(first[:, None], order, drawn).masked_fill(~among, -1.0)
    masked = torch.zeros_like(maskable).scatter_(1, score.argmax(1, keepdim=True), True) & maskable
    return Noised(ids.masked_fill(masked, mask_token_id), masked, 1 / maskable.sum(1).clamp(min=1).float())


def logit_normal_times(
    count: int, mean: float, std: float, generator: torch.Generator | None = None, normals: torch.Tensor | None = None
) -> torch.Tensor:
    """Times t (count,) in (0, 1), the logistic function of normally distributed numbers.

    Args:
        normals: (count,) of this mean and deviation, in place of drawn ones.
    """
    if normals is None:
        source = None if generator is None else generator.device
        normals = mean + std * torch.randn(count, device=source, generator=generator)
    return normals.sigmoid()


def antithetic_times(rows: int, generator: torch.Generator | None = None, device: Any = None) -> torch.Tensor:
    """Times (rows,) in [0, 1), one in each of as many equal parts, which varies the loss less than drawing each on its
    own (MDLM, arXiv 2406.07524, section 3.3)."""
    source = device if generator is None else generator.device
    first = torch.rand((), device=source, generator=generator).to(device)
    return (first + torch.arange(rows, device=device)) / rows


def mask_codes(
    codes: torch.Tensor,
    mask_token_id: int,
    *,
    schedule: str = "cosine",
    least: float = 0.0,
    times: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Noised:
    """Mask a fixed number of an image's codes, at least one: the fraction that a schedule leaves masked at a time
    uniform in [0, 1] (MaskGIT, arXiv 2202.04200, section 3.1; MMaDA).

    Args:
        codes: (B, N) tokens.
        schedule: see `masked_fraction`.
        least: fraction that is masked at least.
        times: (B,), in place of drawn ones.
        order: uniform numbers (B, N), in place of drawn ones, whose sorting says which codes are masked.
        generator: on the device of `codes`, or on the CPU.
    """
    source = codes.device if generator is None else generator.device
    if times is None:
        times = torch.rand(len(codes), device=source, generator=generator).to(codes.device)
    if order is None:
        order = torch.rand(codes.shape, device=source, generator=generator).to(codes.device)
    rate = masked_fraction(times, schedule).clamp(min=least)
    count = (codes.shape[1] * rate).round().clamp(min=1)
    masked = order.argsort(-1) < count[:, None]
    return Noised(codes.masked_fill(masked, mask_token_id), masked, rate)


def masked_text_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    noised: Noised,
    *,
    weight: Weight = "rate",
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of masked tokens.

    Args:
        logits: (B, L, V) for `noised.ids`.
        targets: (B, L) tokens before masking.
        weight: "rate": each token by 1 / rate, divided by all tokens B L (LLaDA's pre-training, a bound on the
            negative log-likelihood per token); "rate_and_length": each by 1 / (rate · answer length), divided by the
            rows B (LLaDA's fine-tuning); "none": the mean over masked tokens (LaViDa, and the codes of MMaDA).
        lengths: answer lengths (B,) of "rate_and_length".

    Returns:
        A number in nats per token; 0 where nothing is masked.
    """
    check_choice("weight", weight, get_args(Weight))
    if (lengths is None) == (weight == "rate_and_length"):
        raise ValueError(f"lengths are what weight='rate_and_length' divides by, got weight={weight!r}, {lengths=}")
    masked = noised.masked
    rows = torch.arange(len(masked), device=masked.device)[:, None].expand_as(masked)[masked]  # (masked,)
    found = functional.cross_entropy(logits[masked].float(), targets[masked], reduction="none")
    if weight == "none":
        return found.sum() / masked.sum().clamp(min=1)
    found = found / noised.rate[rows]
    if lengths is None:
        return found.sum() / masked.numel()
    return (found / lengths[rows]).sum() / len(masked)


def pretrain_loss(
    predict: Predict,
    ids: torch.Tensor,
    mask_token_id: int,
    *,
    weight: Weight = "rate",
    complement: bool = False,
    times: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """LLaDA's pre-training loss of tokens (B, L); arguments as in `mask_tokens` and `masked_text_loss`."""
    noised = mask_tokens(
        ids, mask_token_id, complement=complement, times=times, uniforms=uniforms, generator=generator
    )
    targets = ids.repeat(2, 1) if complement else ids
    lengths = torch.full((len(targets),), ids.shape[1], device=ids.device) if weight == "rate_and_length" else None
    return masked_text_loss(predict(noised.ids), targets, noised, weight=weight, lengths=lengths)


def sft_loss(
    predict: Predict,
    ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    mask_token_id: int,
    *,
    weight: Weight = "rate_and_length",
    complement: bool = False,
    times: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """LLaDA's fine-tuning loss: the prompt is never masked, and end tokens that pad the answer are part of it.

    Args:
        ids: (B, L), prompt and answer, padded with the end token.
        prompt_lengths: (B,).
    """
    if (prompt_lengths >= ids.shape[1]).any() or (prompt_lengths < 0).any():
        raise ValueError(f"prompts of {prompt_lengths.tolist()} tokens leave no answer in {ids.shape[1]} tokens")
    maskable = torch.arange(ids.shape[1], device=ids.device) >= prompt_lengths[:, None]
    noised = mask_tokens(
        ids, mask_token_id, maskable=maskable, complement=complement, times=times, uniforms=uniforms,
        generator=generator,
    )  # fmt: skip
    copies = 2 if complement else 1
    lengths = maskable.sum(1).repeat(copies) if weight == "rate_and_length" else None
    return masked_text_loss(predict(noised.ids), ids.repeat(copies, 1), noised, weight=weight, lengths=lengths)


def likelihood_bound(
    predict: Predict,
    ids: torch.Tensor,
    mask_token_id: int,
    *,
    maskable: torch.Tensor | None = None,
    antithetic: bool = True,
    importance: bool = False,
    times: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """MDLM's bound on the negative log-likelihood in nats per token (arXiv 2406.07524, equation 10), with log-linear
    noise: a mask at time t weighs 1 / t. It is Dual Diffusion's loss of texts about clean images (arXiv 2501.00289).

    Args:
        predict: of rows (B, L); the mask token is never predicted.
        ids: (B, L).
        maskable: boolean (B, L), tokens that are masked; the sum over them is divided by all tokens B L.
        antithetic: spread the times of the rows evenly.
        importance: draw more small times, see `importance_times`.
        times: (B,) uniform numbers from which times are made, in place of drawn ones.
        uniforms: (B, L), in place of drawn ones; a token is masked where its number is below its probability.
        generator: on the device of `ids`, or on the CPU.
    """
    rows, length = ids.shape
    drawn = None if times is None else times[:, None]
    t = block_times(
        rows, length, length, antithetic=antithetic, uniforms=drawn, generator=generator, device=ids.device
    )[:, 0]  # fmt: skip
    t = importance_times(t) if importance else t
    masking = loglinear_masking(t)
    if uniforms is None:
        uniforms = draw_uniform(ids.shape, ids.device, generator, torch.float32)
    masked = uniforms < masking.rate[:, None]
    masked = masked if maskable is None else masked & maskable
    noised = Noised(ids.masked_fill(masked, mask_token_id), masked, 1 / masking.weight)
    return masked_text_loss(without_tokens(predict(noised.ids), (mask_token_id,)), ids, noised)


@torch.no_grad()
def log_likelihood(
    predict: Predict,
    prompt: torch.Tensor,
    answer: torch.Tensor,
    mask_token_id: int,
    *,
    samples: int = 128,
    batch_size: int = 16,
    guidance_scale: float = 1.0,
    counts: torch.Tensor | None = None,
    permutations: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Estimate of LLaDA's lower bound on the log-likelihood of an answer given a prompt, in nats over all its tokens.

    Each row masks a fixed number of answer tokens, and the numbers of a batch are spread evenly, which varies less
    than masking each token by chance.

    Args:
        predict: of rows (batch, P + A).
        prompt: (P,).
        answer: (A,).
        samples: rows in all; one is enough for a single token. The last batch may be smaller.
        guidance_scale: above 1, of the prediction with the prompt masked; LLaDA's `cfg_scale` plus 1.
        counts: masks of the first row of each batch, in place of drawn ones.
        permutations: of the answer's places (samples, A), in place of drawn ones.
    """
    length = len(answer)
    if not length:
        raise ValueError("the answer is empty; give at least one token")
    if batch_size < 1 or samples < 1:
        raise ValueError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
    text = torch.cat([prompt, answer])
    inside = torch.arange(len(text), device=text.device) >= len(prompt)
    total = torch.zeros((), dtype=torch.float64, device=text.device)
    for batch, done in enumerate(range(0, samples, batch_size)):
        rows = min(batch_size, samples - done)
        whole = text.expand(rows, -1)
        if counts is None:
            source = whole.device if generator is None else generator.device
            first = int(torch.randint(1, length + 1, (), device=source, generator=generator))
        else:
            first = int(counts[batch])
        # Numbers 1..A at even distances on a ring; rounding in float32, half to even, as published.
        spread = torch.linspace(first, first + (rows - 1) * (length / rows), rows).round().long()
        number = ((spread - 1) % length + 1).to(whole.device)
        places = _permutations(rows, length, whole.device, generator) if permutations is None else permutations[
            done : done + rows
        ].to(whole.device)  # fmt: skip
        masked = torch.zeros_like(whole, dtype=torch.bool)
        masked[:, inside] = places < number[:, None]
        noised = Noised(whole.masked_fill(masked, mask_token_id), masked, number / length)
        logits = predict(noised.ids)
        if guidance_scale > 1:
            free = predict(noised.ids.masked_fill(~inside, mask_token_id))
            logits = free + guidance_scale * (logits - free)
        ones = torch.ones(rows, device=whole.device)
        total += rows * masked_text_loss(logits, whole, noised, weight="rate_and_length", lengths=ones)
    return -total / samples


def _permutations(rows: int, length: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    source = device if generator is None else generator.device
    drawn = [torch.randperm(length, device=source, generator=generator) for _ in range(rows)]
    return torch.stack(drawn).to(device)
