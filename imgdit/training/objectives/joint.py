"""Images and text in one model: passes of both in turn (Dual Diffusion, arXiv 2501.00289), or both noisy at once."""

from __future__ import annotations

import torch

from imgdit import compat
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler, mix, velocity
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.image_texts import both_predictions
from imgdit.training.masked_text_loss import Weight, antithetic_times, mask_tokens, masked_text_loss
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.objectives.masked_text import masked_text
from imgdit.training.text_rows import ImageTexts


def joint(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch | ImageTexts,
    generator: torch.Generator | None,
    *,
    text_weight: float = 0.2,
    together: bool = False,
    weight: Weight = "rate",
    mask_token_id: int | None = None,
    distribution: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    text_dropout: float = 0.1,
) -> ObjectiveOutput:
    """The losses of images and of text, by what a batch holds.

    A batch of frames is a pass of `flow_matching` under clean text. A batch of texts about images is a pass of
    `masked_text` about clean images, or with `together` of both at once: the image noisy, the text masked, each at a
    time of its own.

    Args:
        model: an `MMDiT` with a text head, wrapped for distributed training or not.
        scheduler, distribution, mean, std, text_dropout: see `flow_matching`.
        batch: of either kind; the data gives them in turn.
        generator: source of every draw.
        text_weight: of the text's loss beside the images'; 0.2 in Dual Diffusion's training.
        together: whether texts are about noisy images.
        weight, mask_token_id: see `masked_text`. Masking rates are antithetic.

    Raises:
        ValueError: as those.
    """
    if isinstance(batch, Batch):
        return flow_matching(
            model, scheduler, batch, generator, distribution=distribution, mean=mean, std=std,
            text_dropout=text_dropout,
        )  # fmt: skip
    if not together:
        output = masked_text(
            model, scheduler, batch, generator, weight=weight, antithetic=True, mask_token_id=mask_token_id
        )  # fmt: skip
        return output._replace(loss=text_weight * output.loss)
    texts, device = batch.texts, batch.tokens.device
    rows = len(texts.ids)
    mask = getattr(compat.unwrapped(model).config, "mask_token_id", None) if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError("the model's configuration names no mask token; give mask_token_id")
    times = antithetic_times(rows, generator, device)
    noised = mask_tokens(texts.ids, mask, maskable=texts.counted, times=times, generator=generator)
    tokens = batch.tokens.repeat_interleave(rows // len(batch.tokens), dim=0)
    sigmas = scheduler.sample_sigmas(
        rows, 1, distribution=distribution, mean=mean, std=std, num_tokens=tokens.shape[1],  # type: ignore[arg-type]
        generator=generator, device=device,
    )  # fmt: skip
    where = device if generator is None else generator.device
    noise = torch.randn(tokens.shape, generator=generator, device=where, dtype=tokens.dtype).to(device)
    noisy = mix(tokens, noise, sigmas, (tokens.shape[1],))
    sample, logits = both_predictions(model, batch, noisy, sigmas[:, 0], noised.ids, noised.rate)
    of_image = (sample.float() - velocity(tokens, noise).float()).square().mean()
    lengths = texts.counted.sum(1) if weight == "rate_and_length" else None
    of_text = masked_text_loss(logits, texts.ids, noised, weight=weight, lengths=lengths)
    metrics = {"image": of_image.detach(), "text": of_text.detach()}
    return ObjectiveOutput(of_image + text_weight * of_text, metrics)
