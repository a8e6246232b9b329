"""Masked diffusion of answers about images (LLaDA-V, arXiv 2505.16933; LaViDa, arXiv 2505.16839)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from imgdit import compat
from imgdit.models.image_rows import JoinedRows, join_rows
from imgdit.models.masked_lm import real_positions
from imgdit.models.masked_text_passes import sees_earlier_turns, sees_prefix
from imgdit.naming import check_choice
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.masked_text_loss import Noised, Weight, logit_normal_times, mask_tokens, masked_text_loss
from imgdit.training.vision_language import VisionRows

Attention = Literal["full", "prefix", "dialogue"]
Times = Literal["uniform", "logit_normal"]


def vision_language(
    model: torch.nn.Module,
    scheduler: Any,
    batch: VisionRows,
    generator: torch.Generator | None,
    *,
    weight: Weight = "none",
    complement: bool = True,
    attention: Attention = "full",
    times: Times = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> ObjectiveOutput:
    """Cross entropy of masked targets. The defaults are LaViDa's; LLaDA-V has weight "rate_and_length" without
    complement.

    Args:
        model: an `imgdit.models.vision_language.VisionLanguageModel`, wrapped for distributed training or not.
        scheduler: not used.
        batch: rows.
        generator: source of rates and masks.
        weight: see `masked_text_loss`.
        complement: use each row twice, the second time with the other targets masked.
        attention: "full"; "prefix": what is before the first target sees itself only; "dialogue": a place sees its
            own and earlier turns.
        times: from which rates are drawn; "logit_normal" with `logit_mean` and `logit_std`.
    """
    check_choice("times", times, get_args(Times))
    joined, targets, turns = join_batch(model, batch)
    drawn = None
    if times == "logit_normal":
        drawn = logit_normal_times(len(joined.ids), logit_mean, logit_std, generator).to(joined.ids.device)
    noised = mask_tokens(
        joined.ids, compat.unwrapped(model).config.mask_token_id, maskable=targets, complement=complement,
        smallest=weight == "none", times=drawn, generator=generator,
    )  # fmt: skip
    logits = noised_logits(model, batch, joined, noised, visible(joined, targets, turns, attention))
    copies = len(noised.ids) // len(joined.ids)
    lengths = targets.sum(1).repeat(copies) if weight == "rate_and_length" else None
    wanted = joined.ids.repeat(copies, 1)
    loss = masked_text_loss(logits, wanted, noised, weight=weight, lengths=lengths)
    right = (logits.argmax(-1) == wanted)[noised.masked]
    return ObjectiveOutput(loss, {"right": right.float().mean() if len(right) else loss.new_zeros(())})


def join_batch(model: torch.nn.Module, batch: VisionRows) -> tuple[JoinedRows, torch.Tensor, torch.Tensor]:
    """The rows with a place for each vector of their images, boolean (B, L) targets, and (B, L) turns."""
    device = batch.ids.device
    lengths = iter(compat.unwrapped(model).projector.lengths(batch.counts, batch.shown))
    counts = [[next(lengths) for _ in range(images)] for images in batch.images]
    joined = join_rows(batch.ids.tolist(), counts, int(compat.unwrapped(model).config.eos_token_id))
    joined = JoinedRows(*(part.to(device) for part in joined))
    targets = batch.targets.gather(1, joined.source) & joined.real
    return joined, targets, batch.turns.gather(1, joined.source)


def visible(
    joined: JoinedRows, targets: torch.Tensor, turns: torch.Tensor, attention: Attention
) -> torch.Tensor | None:
    """What places see, see `VisionLanguageModel.forward`; `None`: everything."""
    check_choice("attention", attention, get_args(Attention))
    if attention == "full":
        return None if joined.real.all() else joined.real.long()
    if attention == "prefix":
        seen = sees_prefix(targets.long().argmax(1), targets.shape[1])
    else:
        seen = sees_earlier_turns(turns)
    return seen & (joined.real[:, None, None] | ~joined.real[:, None, :, None])  # padding may see anything


def noised_logits(
    model: torch.nn.Module, batch: VisionRows, joined: JoinedRows, noised: Noised, seen: torch.Tensor | None
) -> torch.Tensor:
    """Logits (k B, L, V) of rows whose targets are masked in k ways."""
    copies = len(noised.ids) // len(joined.ids)
    repeated = None if seen is None else seen.repeat(copies, *[1] * (seen.ndim - 1))
    places = real_positions(joined.real).repeat(copies, 1)
    return model(noised.ids, joined.images, batch.tiles.split(batch.counts), batch.shown, repeated, places)
