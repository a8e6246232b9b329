"""Two noise levels in one image, and a teacher that sees the cleaner one (Self-Flow, arXiv 2603.06507)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler, mix
from imgdit.training.batches import Batch, ObjectiveOutput, live_frames
from imgdit.training.objectives.alignment import aligned, block_output, head_of, noisy_frames, target_rows, with_head
from imgdit.training.objectives.flow_matching import draw_levels, flow_matching
from imgdit.training.objectives.frames import check_batch, drop_text, noise_of, predict_velocity, training_fractions


@with_head(lambda model: None)
def self_flow(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    teacher: Callable[[], AbstractContextManager] | None = None,
    weight: float = 0.8,
    masked: float = 0.25,
    depths: tuple[float, float] = (0.3, 0.7),
    mean: float = 0.0,
    std: float = 1.0,
    clean: float = 0.0,
    text_dropout: float = 0.1,
) -> ObjectiveOutput:
    """Self-Flow (arXiv 2603.06507). Each target frame has two noise levels t and s from one distribution; the tokens
    of a random mask have s, the others t. The average weights see the same frame with all tokens at min(t, s), and

        loss = velocity loss + weight * (1 - cos(head(h), h'))

    with h the features of an early block of the model and h' those of a late block of the teacher, whose gradient is
    not followed. The mask is drawn once per batch, whose samples share a layout; in the paper once per sample.

    While the model does not train, the loss is that of `flow_matching` alone, with one level per frame.

    Args:
        model: built by the recipe, with its head.
        scheduler, batch, generator, mean, std, clean, text_dropout: see `flow_matching`. A frame whose level is set,
            or that is clean, has that one level.
        teacher: context in which the model has the teacher's weights; the training loop gives that of the running
            average. `None`: the model's own weights.
        weight: γ.
        masked: fraction of tokens with the second level.
        depths: of the model's and the teacher's block, as fractions of the blocks.

    Raises:
        ValueError: as `flow_matching`, or a model without the head.
    """
    check_batch(batch)
    if not model.training:
        return flow_matching(model, scheduler, batch, generator)
    if not 0.0 < masked < 1.0:
        raise ValueError(f"masked is a fraction of tokens in (0, 1), got {masked}")
    dropout, fraction = training_fractions(model, text_dropout=text_dropout, clean=clean)
    first = second = batch.sigmas
    if first is None:
        first = draw_levels(scheduler, batch, generator, "logit_normal", mean, std, clean=fraction)
        second = draw_levels(scheduler, batch, generator, "logit_normal", mean, std)
        second = second.where(first > 0.0, first)
    assert second is not None
    split = split_frames(batch.layout, masked, generator)
    order = split.order.to(batch.tokens.device)
    text = drop_text(batch, dropout, generator)
    noise = noise_of(batch, generator)[:, order]
    two = dataclasses.replace(
        batch,
        tokens=batch.tokens[:, order],
        layout=split.layout,
        text=text,
        counts=None if batch.counts is None else batch.counts[:, split.frames],
        sigmas=torch.where(split.masked.to(first.device), second[:, split.frames], first[:, split.frames]),
        noise=noise,
    )
    cleaner = torch.minimum(first, second)[:, split.frames]
    with (teacher or nullcontext)(), torch.no_grad(), block_output(model, depths[1]) as found:
        noisy = mix(two.tokens, noise, cleaner, split.layout.lengths)
        predict_velocity(model, noisy, text, cleaner, split.layout, 1.0)
        taught = target_rows(found[0], split.layout).float()
    with block_output(model, depths[0]) as found:
        output = flow_matching(model, scheduler, two, generator, text_dropout=0.0)
    learned = head_of(model)(target_rows(found[0], split.layout)).float()
    errors = 1.0 - F.cosine_similarity(learned, taught, dim=-1)  # (B, n)
    output = output._replace(metrics={})  # of half frames
    return aligned(output, errors, split.layout, noisy_frames(two), weight)


class SplitFrames(NamedTuple):
    """A layout whose target frames are two frames each, with complementary masks."""

    layout: FrameLayout
    order: torch.Tensor
    """(N,): where each of its tokens was before."""
    frames: list[int]
    """Of each of its frames: which one it was before."""
    masked: torch.Tensor
    """Boolean (frames,): those of the masked tokens."""


def split_frames(layout: FrameLayout, masked: float, generator: torch.Generator | None) -> SplitFrames:
    """Split each target frame into the tokens of a random mask and the others.

    Args:
        layout: of one scene.
        masked: fraction of tokens in the mask; at least one token is in it, and one is not.
        generator: source of the masks.

    Raises:
        ValueError: a target frame of one token.
    """
    parts: list[tuple[Frame, torch.Tensor, bool]] = []
    came_from: list[int] = []
    where = generator.device if generator is not None else None
    for number, (frame, rows) in enumerate(zip(live_frames(layout), layout.rows, strict=True)):
        own = torch.arange(rows.start, rows.stop)
        if not frame.predicted:
            parts.append((frame, own, False))
            came_from.append(number)
            continue
        if frame.length < 2:
            raise ValueError(f"a frame of one token cannot have two noise levels, got size={frame.size}")
        count = min(max(round(masked * frame.length), 1), frame.length - 1)
        chosen = torch.zeros(frame.length, dtype=torch.bool)
        chosen[torch.randperm(frame.length, generator=generator, device=where)[:count].cpu()] = True
        present = torch.ones(frame.size, dtype=torch.bool) if frame.mask is None else frame.mask
        for part, second in ((~chosen, False), (chosen, True)):
            mask = torch.zeros(frame.size, dtype=torch.bool)
            mask[present] = part
            parts.append((dataclasses.replace(frame, mask=mask), own[part], second))
            came_from.append(number)
    frames, order, is_masked = zip(*parts, strict=True)
    texts: list[Any] = list(layout.texts)
    built = FrameLayout.build([*texts, *frames], main_adapters=layout.main_adapters)
    return SplitFrames(built, torch.cat(list(order)), came_from, torch.tensor(is_masked))
