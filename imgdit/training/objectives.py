"""What is learned: small functions `(model, scheduler, batch, generator, **options) -> ObjectiveOutput`.

The generator is the source of every draw. Options are what a recipe's `objective.arguments` sets. As with
`nn.Dropout`, nothing is dropped or made clean while `model.training` is false: the held-out loss is of the whole task.

B batch, F frames, N tokens of the frames, n tokens of the frames being made, C channels, T text tokens, J text
features, P pooled features, H x W pixels. sigma is the noise level in [0, 1].
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from ..frames import Frame, FrameLayout
from ..schedulers.flow_match import MultiFrameFlowMatchScheduler, mix, velocity

__all__ = ["autoencoder", "condition_lora", "flow_matching", "read_captions", "read_pictures"]


class _Movable:
    """Moves its tensors together."""

    def to(self, device: Any, **options: Any) -> Any:
        """The same on another device."""
        return self._map(lambda value: value.to(device, **options))

    def pin_memory(self) -> Any:
        """The same in page-locked memory, from where a GPU reads faster."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, change: Any) -> Any:
        moved = {}
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                moved[f.name] = change(value)
            elif isinstance(value, _Movable):
                moved[f.name] = value._map(change)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Text(_Movable):
    """Encoded text."""

    embeddings: torch.Tensor
    """(B, T, J)."""
    pooled: torch.Tensor
    """(B, P)."""
    mask: torch.Tensor | None = None
    """Boolean (B, T), true on real tokens; `None`: all are."""

    def rows(self, rows: slice) -> Text:
        """Some of the samples' text."""
        return self._map(lambda value: value[rows])


@dataclass(frozen=True, eq=False)
class Batch(_Movable):
    """Frames with their text. All samples share one layout."""

    tokens: torch.Tensor
    """(B, N, C) clean tokens of all frames, in the layout's order."""
    layout: FrameLayout
    """The frames. One held at a noise level (`Frame.sigma`) is given: it is never predicted."""
    text: Text
    """The samples' text."""
    empty: Text | None = None
    """The empty text, with B = 1: what a dropped text becomes."""
    empty_tokens: torch.Tensor | None = None
    """(N, C): what the tokens of a dropped condition become (a black picture's latents in OminiControl); `None`:
    zeros. Only rows of held frames are read."""
    counts: torch.Tensor | None = None
    """Boolean (B, F): frames whose prediction is part of the loss; `None`: all that are being made. A sample without
    any contributes 0."""
    sigmas: torch.Tensor | None = None
    """(B, F) noise levels to use instead of drawing them."""
    noise: torch.Tensor | None = None
    """(B, N, C) noise to use instead of drawing it."""

    def at(self, sigma: float) -> Batch:
        """The batch with every made frame at one noise level and the held frames at theirs."""
        levels = [sigma if frame.sigma is None else frame.sigma for frame in _live(self.layout)]
        return dataclasses.replace(self, sigmas=self.tokens.new_tensor(levels).expand(len(self.tokens), -1))


@dataclass(frozen=True, eq=False)
class Pictures(_Movable):
    """Pictures for an autoencoder."""

    pixels: torch.Tensor
    """(B, 3, H, W) in [-1, 1]."""
    weight: torch.Tensor | None = field(default=None)
    """(B, 1, H, W) weight of each pixel in the reconstruction, 1 on average; `None`: 1."""


@dataclass(frozen=True, eq=False)
class Sentences(_Movable):
    """Sentences with questions about them."""

    input_ids: torch.Tensor
    """(B, T)."""
    mask: torch.Tensor
    """Boolean (B, T), true on real tokens."""
    answers: torch.Tensor
    """(B, Q) number of the right answer of each question."""


@dataclass(frozen=True, eq=False)
class Readings(_Movable):
    """Pictures with what is to be read in them."""

    pixels: torch.Tensor
    """(B, 3, H, W) in [-1, 1]."""
    answers: torch.Tensor
    """(B, Q) number of the right answer of each question."""
    depth: torch.Tensor
    """(B, 1, H, W) z-depth."""
    classes: torch.Tensor
    """(B, H, W) segmentation."""
    shows: torch.Tensor
    """Boolean (B,): whether depth and segmentation can be read."""


class ObjectiveOutput(NamedTuple):
    """What a step learns from and what it writes down."""

    loss: torch.Tensor
    """Scalar with gradient: the mean over samples of each sample's own mean, so that batches add up."""
    metrics: dict[str, torch.Tensor]
    """Detached scalars."""


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
) -> ObjectiveOutput:
    """Multi-frame flow matching (OneDiffusion, arXiv 2411.16318): a noise level per frame, squared error of the
    velocity on every frame that has noise.

    Args:
        model: MMDiT, wrapped for distributed training or not.
        scheduler: draws and mixes.
        batch: frames.
        generator: source of noise levels, noise and dropout.
        distribution, mean, std, shared: see `MultiFrameFlowMatchScheduler.sample_sigmas`.
        clean: share of frames at level 0, as if given; they do not count, and one frame of a sample keeps its noise.
        text_dropout: share of samples whose text becomes the empty one.
        condition_dropout: share of samples whose given frames (held by the layout, or clean by draw) become pure
            noise at level 1, which says nothing about them: the unconditional branch of guidance.
        guidance: input of guidance-distilled models.

    Raises:
        ValueError: a packed layout, dropout without the empty text, or shapes that do not fit.
    """
    layout = batch.layout
    _check(batch)
    text_dropout, condition_dropout, clean = _training(
        model, text_dropout=text_dropout, condition_dropout=condition_dropout, clean=clean
    )
    size, device = len(batch.tokens), batch.tokens.device
    made = [n for n, frame in enumerate(_live(layout)) if not frame.held]
    sigmas = batch.sigmas
    if sigmas is None:
        drawn = scheduler.sample_sigmas(
            size,
            len(made),
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
        sigmas = sigmas.to(drawn.dtype).index_copy(1, torch.tensor(made, device=device), drawn)
    noise = _noise(batch, generator)
    text = _drop_text(batch, text_dropout, generator)
    given = sigmas == 0.0
    given[:, [n for n in range(len(layout.live)) if n not in made]] = True
    if condition_dropout:
        dropped = _chosen(size, condition_dropout, generator, device)
        sigmas = sigmas.masked_fill(given & dropped[:, None], 1.0)
    predicted = _predict(model, mix(batch.tokens, noise, sigmas, layout.lengths), text, sigmas, layout, guidance)
    # A clean frame's velocity is not in its tokens: noise - data, and the noise is not there.
    weights = (sigmas > 0.0)[:, made]
    if batch.counts is not None:
        weights = weights & batch.counts[:, made]
    return _velocity_loss(predicted, batch, noise, weights)


def condition_lora(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    distribution: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    text_dropout: float = 0.1,
    condition_dropout: float = 0.1,
    guidance: float = 1.0,
) -> ObjectiveOutput:
    """Condition tokens read by their own LoRA (OminiControl, arXiv 2411.15098): the target has noise, the conditions
    are held clean, and only the target is learned.

    The layout says which frame is read by which adapter (`Frame(..., sigma=0.0, adapter="canny")`).

    Args:
        model, scheduler, batch, generator, distribution, mean, std, guidance: see `flow_matching`.
        text_dropout: share of samples whose text becomes the empty one.
        condition_dropout: share of samples whose conditions become `batch.empty_tokens`; still held clean.

    Raises:
        ValueError: no condition with an adapter in the layout, or as `flow_matching`.
    """
    layout = batch.layout
    _check(batch)
    if not any(frame.held and frame.adapter is not None for frame in layout.frames):
        raise ValueError(
            "condition_lora needs a layout with a held frame that an adapter reads, "
            f'such as Frame(size, sigma=0.0, adapter="canny"); got {[(f.sigma, f.adapter) for f in layout.frames]}'
        )
    (dropout,) = _training(model, condition_dropout=condition_dropout)
    if dropout:
        device = batch.tokens.device
        dropped = _chosen(len(batch.tokens), dropout, generator, device)
        held = torch.ones(layout.image_length, dtype=torch.bool, device=device)
        for rows in layout.predicted:
            held[rows] = False
        empty = batch.tokens.new_zeros(1) if batch.empty_tokens is None else batch.empty_tokens
        tokens = torch.where((dropped[:, None] & held)[..., None], empty, batch.tokens)
        batch = dataclasses.replace(batch, tokens=tokens)
    return flow_matching(
        model,
        scheduler,
        batch,
        generator,
        distribution=distribution,
        mean=mean,
        std=std,
        shared=True,
        text_dropout=text_dropout,
        guidance=guidance,
    )


def autoencoder(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler | None,
    batch: Pictures,
    generator: torch.Generator | None,
    *,
    square_weight: float = 1.0,
    gradient_weight: float = 0.5,
    kl_weight: float = 1e-6,
    latent_noise: float = 0.1,
) -> ObjectiveOutput:
    """Reconstruction of pictures: absolute and squared error of pixels, absolute error of their differences at three
    scales, and the divergence of the latent distribution from a normal one.

    The differences make edges sharp without a perceptual network, which could not be had offline.

    Args:
        model: `AutoencoderKL`, or `AutoencoderDC`, whose latent z counts as a normal distribution N(z, latent_noise²);
            wrapped for distributed training or not.
        scheduler: not used.
        batch: pictures.
        generator: source of the latent's draw; in evaluation the mode is decoded.
        square_weight: of the squared error.
        gradient_weight: of the differences.
        kl_weight: of the divergence, per latent value.
        latent_noise: standard deviation of an `AutoencoderDC`'s latent, so that the decoder bears what a sampler gets
            slightly wrong.
    """
    latent, reconstruction = _reconstruct(model, batch.pixels, generator, latent_noise)
    weight = 1.0 if batch.weight is None else batch.weight
    error = reconstruction - batch.pixels
    pixel = (weight * error.abs()).mean()
    square = (weight * error.square()).mean()
    edges = _difference_error(reconstruction, batch.pixels)
    kl = latent.kl().mean() / latent.mean[0].numel()
    loss = pixel + square_weight * square + gradient_weight * edges + kl_weight * kl
    return ObjectiveOutput(
        loss, {"pixel": pixel.detach(), "square": square.detach(), "edges": edges.detach(), "kl": kl.detach()}
    )


def read_captions(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler | None,
    batch: Sentences,
    generator: torch.Generator | None,
) -> ObjectiveOutput:
    """Cross-entropy of a `CaptionReader`'s answers, the mean over its questions.

    Args:
        model: reader, wrapped for distributed training or not.
        scheduler, generator: not used.
        batch: sentences.
    """
    logits = model(batch.input_ids, batch.mask)
    pairs = list(zip(logits, batch.answers.unbind(1), strict=True))
    loss = torch.stack([F.cross_entropy(guess.float(), answer) for guess, answer in pairs]).mean()
    right = torch.stack([guess.argmax(1) == answer for guess, answer in pairs])  # (Q, B)
    return ObjectiveOutput(loss, {"right": right.float().mean(), "all_right": right.all(0).float().mean()})


def read_pictures(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler | None,
    batch: Readings,
    generator: torch.Generator | None,
    *,
    depth_weight: float = 5.0,
) -> ObjectiveOutput:
    """Cross-entropy of a `SceneProbe`'s answers (their mean) and of its segmentation, and its depth's relative error.

    Args:
        model: probe, wrapped for distributed training or not.
        scheduler, generator: not used.
        batch: pictures.
        depth_weight: of the depth's error.
    """
    reading = model(batch.pixels)
    pairs = list(zip(reading.answers.values(), batch.answers.unbind(1), strict=True))
    answers = torch.stack([F.cross_entropy(guess.float(), answer) for guess, answer in pairs]).mean()
    right = torch.stack([guess.argmax(1) == answer for guess, answer in pairs])  # (Q, B)
    depth, truth = reading.depth[batch.shows], batch.depth[batch.shows]
    relative = ((depth - truth).abs() / truth).mean()
    segmentation = F.cross_entropy(reading.segmentation[batch.shows].float(), batch.classes[batch.shows])
    metrics = {
        "answers": answers.detach(),
        "right": right.float().mean(),
        "all_right": right.all(0).float().mean(),
        "abs_rel": relative.detach(),
        "segmentation": segmentation.detach(),
    }
    return ObjectiveOutput(answers + segmentation + depth_weight * relative, metrics)


def _check(batch: Batch) -> None:
    layout = batch.layout
    if layout.is_packed:
        raise ValueError(
            f"a batch has one layout for all its samples, got a packed one of {layout.num_texts} scenes; "
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


def _training(model: torch.nn.Module, **shares: float) -> list[float]:
    """The shares while training, zeros in evaluation."""
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is a share in [0, 1], got {share}")
    return [share if model.training else 0.0 for share in shares.values()]


def _live(layout: FrameLayout) -> list[Frame]:
    return [layout.frames[i] for i in layout.live]


def _noise(batch: Batch, generator: torch.Generator | None) -> torch.Tensor:
    """(B, N, C)."""
    if batch.noise is not None:
        return batch.noise
    return randn_tensor(batch.tokens.shape, generator=generator, device=batch.tokens.device, dtype=batch.tokens.dtype)


def _chosen(size: int, share: float, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Boolean (size,), each true with probability `share`."""
    where = generator.device if generator is not None else device
    return (torch.rand(size, generator=generator, device=where) < share).to(device)


def _drop_text(batch: Batch, share: float, generator: torch.Generator | None) -> Text:
    if share == 0.0:
        return batch.text
    text, empty = batch.text, batch.empty
    if empty is None:
        raise ValueError(f"text_dropout={share} needs the empty text; give Batch(empty=...) or set text_dropout: 0.0")
    dropped = _chosen(len(text.embeddings), share, generator, text.embeddings.device)
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


def _predict(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    text: Text,
    sigmas: torch.Tensor,
    layout: FrameLayout,
    guidance: float,
) -> torch.Tensor:
    """Velocity (B, n, C) of the frames being made, each frame at its own level."""
    config = extract_model_from_parallel(model).config
    return model(
        noisy,
        text.embeddings,
        text.pooled,
        sigmas * (1000.0 / config.timestep_scale),
        guidance=sigmas.new_full((len(sigmas),), guidance) if config.guidance_embeds else None,
        encoder_attention_mask=text.mask,
        layout=layout,
    ).sample


def _velocity_loss(
    predicted: torch.Tensor, batch: Batch, noise: torch.Tensor, weights: torch.Tensor
) -> ObjectiveOutput:
    """Mean over samples of each one's mean over its counted tokens; `weights` is boolean (B, frames being made)."""
    layout = batch.layout
    target = torch.cat([velocity(batch.tokens[:, rows], noise[:, rows]) for rows in layout.predicted], dim=1)
    errors = (predicted.float() - target.float()).square().mean(-1)  # (B, n)
    lengths = errors.new_tensor(layout.predicted_lengths)
    sums = torch.stack([part.sum(1) for part in errors.split(layout.predicted_lengths, dim=1)], dim=1)  # (B, made)
    counted = weights * lengths
    # A frame that does not count is left out by selection: 0 times an infinite error would still be NaN.
    loss = (sums.where(weights, 0.0).sum(1) / counted.sum(1).clamp(min=1.0)).mean()
    metrics = {}
    if len(lengths) > 1:
        per_frame = sums.where(weights, 0.0).sum(0) / counted.sum(0).clamp(min=1.0)
        metrics = {f"frame_{n}": value for n, value in enumerate(per_frame.detach())}
    return ObjectiveOutput(loss, metrics)


def _reconstruct(
    model: torch.nn.Module, pixels: torch.Tensor, generator: torch.Generator | None, latent_noise: float
) -> tuple[DiagonalGaussianDistribution, torch.Tensor]:
    """Latent distribution and reconstruction (B, 3, H, W).

    `forward` keeps the latent to itself, and calling `encode` and `decode` would go past the wrappers (DDP's
    gradients, autocast) that sit on `forward`. So the latent is read, and an `AutoencoderDC`'s drawn, on the way.
    """
    core = extract_model_from_parallel(model)
    own_draw = isinstance(core, AutoencoderDC)
    seen: list[torch.Tensor] = []

    def read(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        if not own_draw or not model.training:
            return output
        noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output + latent_noise * noise

    last = core.encoder if getattr(core, "quant_conv", None) is None else core.quant_conv
    handle = last.register_forward_hook(read)
    try:
        options = {} if own_draw else {"sample_posterior": model.training, "generator": generator}
        reconstruction = model(pixels, **options).sample
    finally:
        handle.remove()
    moments = seen[0].float()
    if own_draw:
        log_variance = torch.full_like(moments, 2 * math.log(max(latent_noise, 1e-6)))
        moments = torch.cat([moments, log_variance], dim=1)
    return DiagonalGaussianDistribution(moments), reconstruction.float()


def _difference_error(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Absolute error of the differences of neighbouring pixels, at full, half and quarter size."""
    error = made.new_zeros(())
    for scale in range(3):
        if scale:
            made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
        for dim in (-1, -2):
            error = error + (made.diff(dim=dim) - real.diff(dim=dim)).abs().mean()
    return error / 6
