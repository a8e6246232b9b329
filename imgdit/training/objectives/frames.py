"""What objectives on frames share: checks, dropout, the prediction and its error.

B batch, F frames, N tokens of the frames, n tokens of the target frames, C channels, T text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.utils.torch_utils import randn_tensor

from imgdit.adapters.stock_frames import StockFrames
from imgdit.family import NoisyImages
from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.schedulers.flow_match import velocity
from imgdit.training.batches import Batch, ObjectiveOutput, Text, live_frames


def check_batch(batch: Batch) -> None:
    layout = batch.layout
    if layout.is_packed:
        raise ValueError(
            f"a batch has one layout for all its samples, got a packed one of {layout.num_scenes} scenes; "
            "give scenes of one shape per batch, or one scene per micro-batch"
        )
    if batch.tokens.ndim != 3 or batch.tokens.shape[1] != layout.image_length:
        raise ValueError(
            f"tokens must be (batch, {layout.image_length}, channels) for the layout's frames {layout.lengths}, "
            f"got {tuple(batch.tokens.shape)}"
        )
    levels = (len(batch.tokens), len(layout.live))
    for name in ("counts", "sigmas"):
        value = getattr(batch, name)
        if value is not None and tuple(value.shape) != levels:
            raise ValueError(f"{name} must be {levels}, one per sample and frame, got {tuple(value.shape)}")


def generated_frames(layout: FrameLayout) -> list[int]:
    """Numbers of the frames in the sequence that are generated."""
    return [n for n, frame in enumerate(live_frames(layout)) if frame.predicted]


def training_fractions(model: torch.nn.Module, **fractions: float) -> list[float]:
    """The fractions while training, zeros in evaluation."""
    for name, fraction in fractions.items():
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{name} is a fraction in [0, 1], got {fraction}")
    return [fraction if model.training else 0.0 for fraction in fractions.values()]


def noise_of(batch: Batch, generator: torch.Generator | None) -> torch.Tensor:
    """(B, N, C)."""
    if batch.noise is not None:
        return batch.noise
    return randn_tensor(batch.tokens.shape, generator=generator, device=batch.tokens.device, dtype=batch.tokens.dtype)


def chosen_rows(size: int, fraction: float, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Boolean (size,), each true with probability `fraction`."""
    where = generator.device if generator is not None else device
    return (torch.rand(size, generator=generator, device=where) < fraction).to(device)


def drop_text(batch: Batch, fraction: float, generator: torch.Generator | None) -> Text:
    if fraction == 0.0:
        return batch.text
    text, empty = batch.text, batch.empty
    if empty is None:
        raise ValueError(f"text_dropout={fraction} needs the empty text; pass Batch(empty=...) or text_dropout=0")
    dropped = chosen_rows(len(text.embeddings), fraction, generator, text.embeddings.device)
    mask = None
    if text.mask is not None or empty.mask is not None:
        real, none = (_full(t) if t.mask is None else t.mask for t in (text, empty))
        mask = torch.where(dropped[:, None], none, real)
    return Text(
        embeddings=torch.where(dropped[:, None, None], empty.embeddings, text.embeddings),
        pooled=torch.where(dropped[:, None], empty.pooled, text.pooled),
        mask=mask,
    )


def _full(text: Text) -> torch.Tensor:
    return torch.ones(text.embeddings.shape[:2], dtype=torch.bool, device=text.embeddings.device)


def predict_velocity(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    text: Text,
    sigmas: torch.Tensor,
    layout: FrameLayout,
    guidance: float,
) -> torch.Tensor:
    """Velocity (B, n, C) of the frames being generated, each frame at its own level.

    A transformer that keeps its own forward predicts one image, the first frame; the others are its conditions.
    """
    own = extract_model_from_parallel(model)
    config = own.config
    stock = StockFrames.of(own)
    if stock is not None:
        return stock.velocity(model, *stock_inputs(config, noisy, text, sigmas, layout, guidance))
    return model(
        noisy,
        text.embeddings,
        text.pooled,
        sigmas * (1000.0 / config.timestep_scale),
        guidance=sigmas.new_full((len(sigmas),), guidance) if config.guidance_embeds else None,
        encoder_attention_mask=text.mask,
        layout=layout,
    ).sample


def stock_inputs(
    config: Any, noisy: torch.Tensor, text: Text, sigmas: torch.Tensor, layout: FrameLayout, guidance: float
) -> tuple[NoisyImages, list[tuple[Frame, torch.Tensor]]]:
    """What `StockFrames.velocity` takes: the first frame, and the others as its conditions."""
    image, *conditions = noisy.split(layout.lengths, dim=1)
    images = NoisyImages(
        image,
        layout.frames[0].size,
        sigmas[:, 0],
        text.embeddings,
        text.mask,
        sigmas.new_full((len(sigmas),), guidance) if getattr(config, "guidance_embeds", False) else None,
    )
    return images, list(zip(layout.frames[1:], conditions, strict=True))


def velocity_loss(
    predicted: torch.Tensor,
    batch: Batch,
    noise: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> ObjectiveOutput:
    """Mean over samples of each one's mean over its counted tokens; `weights` is boolean (B, generated frames), and
    `scales` of the same shape are factors of the errors before they are squared."""
    layout = batch.layout
    target = torch.cat([velocity(batch.tokens[:, rows], noise[:, rows]) for rows in layout.predicted], dim=1)
    errors = (predicted.float() - target.float()).square().mean(-1)  # (B, n)
    return token_loss(errors, layout, weights, scales)


def token_loss(
    errors: torch.Tensor, layout: FrameLayout, weights: torch.Tensor, scales: torch.Tensor | None = None
) -> ObjectiveOutput:
    """`velocity_loss` of the errors (B, n) of the target frames' tokens."""
    lengths = errors.new_tensor(layout.predicted_lengths)
    sums = torch.stack([part.sum(1) for part in errors.split(layout.predicted_lengths, dim=1)], dim=1)  # (B, made)
    if scales is not None:
        sums = sums * scales.square()
    counted = weights * lengths
    # A frame that does not count is left out by selection: 0 times an infinite error would still be NaN.
    loss = (sums.where(weights, 0.0).sum(1) / counted.sum(1).clamp(min=1.0)).mean()
    metrics = {}
    if len(lengths) > 1:
        per_frame = sums.where(weights, 0.0).sum(0) / counted.sum(0).clamp(min=1.0)
        metrics = {f"frame_{n}": value for n, value in enumerate(per_frame.detach())}
    return ObjectiveOutput(loss, metrics)
