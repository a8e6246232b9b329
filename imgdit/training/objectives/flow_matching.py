"""Multi-frame flow matching (OneDiffusion, arXiv 2411.16318).

B batch, F frames, n tokens of the target frames, C channels. sigma is the noise level in [0, 1].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from imgdit.naming import check_choice
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler, mix
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.objectives.frames import (
    check_batch,
    chosen_rows,
    drop_text,
    generated_frames,
    noise_of,
    predict_velocity,
    training_fractions,
    velocity_loss,
)

Weighting = Literal["velocity", "x0"]


def flow_matching(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    distribution: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    shared: bool = False,
    clean: float = 0.0,
    text_dropout: float = 0.1,
    condition_dropout: float = 0.0,
    guidance: float = 1.0,
    weighting: Weighting = "velocity",
) -> ObjectiveOutput:
    """Multi-frame flow matching (OneDiffusion, arXiv 2411.16318): a noise level per frame, squared error of the
    velocity on every frame that has noise.

    Args:
        model: MMDiT, wrapped for distributed training or not.
        scheduler: draws and mixes.
        batch: frames.
        generator: source of noise levels, noise and dropout.
        distribution, mean, std, shared: see `MultiFrameFlowMatchScheduler.sample_sigmas`.
        clean: fraction of frames at level 0; they do not count, and one frame of a sample keeps its noise.
        text_dropout: fraction of samples whose text becomes the empty one.
        condition_dropout: fraction of samples whose conditioning frames (clean by the layout, or by draw) become pure
            noise at level 1, which says nothing about them: the unconditional branch of guidance.
        guidance: input of guidance-distilled models.
        weighting: "velocity": all noise levels alike; "x0": the error of the clean image that the velocity stands for,
            which is sigma² of it (Dual Diffusion, arXiv 2501.00289).

    Raises:
        ValueError: a packed layout, dropout without the empty text, or shapes that do not fit.
    """
    layout = batch.layout
    check_batch(batch)
    check_choice("weighting", weighting, get_args(Weighting))
    text_dropout, condition_dropout, clean = training_fractions(
        model, text_dropout=text_dropout, condition_dropout=condition_dropout, clean=clean
    )
    size, device = len(batch.tokens), batch.tokens.device
    generated = generated_frames(layout)
    sigmas = batch.sigmas
    if sigmas is None:
        sigmas = draw_levels(scheduler, batch, generator, distribution, mean, std, shared=shared, clean=clean)
    noise = noise_of(batch, generator)
    text = drop_text(batch, text_dropout, generator)
    is_clean = sigmas == 0.0
    is_clean[:, [n for n in range(len(layout.live)) if n not in generated]] = True
    if condition_dropout:
        dropped = chosen_rows(size, condition_dropout, generator, device)
        sigmas = sigmas.masked_fill(is_clean & dropped[:, None], 1.0)
    predicted = predict_velocity(
        model, mix(batch.tokens, noise, sigmas, layout.lengths), text, sigmas, layout, guidance
    )
    # A clean frame's velocity is not in its tokens: noise - data, and the noise is not there.
    weights = (sigmas > 0.0)[:, generated]
    if batch.counts is not None:
        weights = weights & batch.counts[:, generated]
    return velocity_loss(predicted, batch, noise, weights, sigmas[:, generated] if weighting == "x0" else None)


def draw_levels(
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    distribution: str,
    mean: float,
    std: float,
    *,
    shared: bool = False,
    clean: float = 0.0,
) -> torch.Tensor:
    """Noise levels (B, F) of all frames: drawn for those that are generated, the layout's for the others."""
    layout, device = batch.layout, batch.tokens.device
    generated = generated_frames(layout)
    drawn = scheduler.sample_sigmas(
        len(batch.tokens),
        len(generated),
        distribution=distribution,  # type: ignore[arg-type]
        mean=mean,
        std=std,
        shared=shared,
        clean=clean,
        num_tokens=sum(layout.predicted_lengths),
        generator=generator,
        device=device,
    )
    sigmas = batch.at(0.0).sigmas
    assert sigmas is not None
    return sigmas.to(drawn.dtype).index_copy(1, torch.tensor(generated, device=device), drawn)
