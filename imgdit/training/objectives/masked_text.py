"""Masked diffusion of text (LLaDA, arXiv 2502.09992), also of text about images (Dual Diffusion, arXiv 2501.00289)."""

from __future__ import annotations

from typing import Any

import torch

from imgdit import compat
from imgdit.models.masked_lm import masked_logits
from imgdit.schedulers.masked_text import draw_uniform
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.image_texts import image_text_logits
from imgdit.training.masked_text_loss import (
    Noised,
    Weight,
    antithetic_times,
    mask_one_token,
    mask_tokens,
    masked_text_loss,
)
from imgdit.training.text_rows import ImageTexts, TextRows


def masked_text(
    model: torch.nn.Module,
    scheduler: Any,
    batch: TextRows | ImageTexts,
    generator: torch.Generator | None,
    *,
    weight: Weight = "rate_and_length",
    complement: bool = False,
    antithetic: bool = False,
    least_answer_rate: float = 0.0,
    one_token_rate: float = 0.0,
    image_dropout: float = 0.0,
    mask_token_id: int | None = None,
    adapter: str | None = None,
    image_adapter: str | None = None,
) -> ObjectiveOutput:
    """LLaDA's fine-tuning loss, or with `weight: rate` its pre-training loss; prompts are never masked.

    Args:
        model: a masked language model of transformers, or for texts about images an `MMDiT` with a text head; wrapped
            for distributed training or not.
        scheduler: not used.
        batch: rows; those without a prompt are pre-training.
        generator: source of rates and masks.
        weight: see `masked_text_loss`.
        complement: use each row twice, the second time with the other tokens masked.
        antithetic: spread the masking rates of a batch evenly, see `antithetic_times`.
        least_answer_rate: least masking rate of rows with a prompt; 1 masks their answers whole, which is enough for
            answers of one word, since generation begins there.
        one_token_rate: probability that a row has one masked token: of an answer the first, of a text without a prompt
            any. An answer that begins with a decision ("no, a blue cube") learns to follow from what it goes on to
            tell; masked at random rates, that is rare. Not with `complement`.
        image_dropout: for texts about images: probability that a batch is predicted without its images, which
            `guidance_scale` of pipelines and texts without an image need.
        mask_token_id: the mask token; `None`: of the model's configuration.
        adapter: for texts about images: LoRA that reads the texts' rows, while nothing else is changed.
        image_adapter: for texts about images: LoRA that reads the images' rows.

    Raises:
        ValueError: no mask token, `one_token_rate` with `complement`, or a model without a text head for texts about
            images.
    """
    about = batch if isinstance(batch, ImageTexts) else None
    rows: TextRows = batch.texts if isinstance(batch, ImageTexts) else batch
    mask = getattr(compat.unwrapped(model).config, "mask_token_id", None) if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError("the model's configuration names no mask token; give mask_token_id")
    if one_token_rate and complement:
        raise ValueError("one_token_rate masks one token of a row, which has no complement; choose one of the two")
    times = antithetic_times(len(rows.ids), generator, rows.ids.device) if antithetic else None
    if least_answer_rate:
        drawn = draw_uniform((len(rows.ids),), rows.ids.device, generator, torch.float32) if times is None else times
        times = torch.where(rows.prompt.any(1), least_answer_rate + (1 - least_answer_rate) * drawn, drawn)
    noised = mask_tokens(
        rows.ids, mask, maskable=rows.counted, complement=complement, times=times, generator=generator
    )
    if one_token_rate:
        noised = _some_of_one_token(rows, noised, mask, one_token_rate, generator)
    copies = 2 if complement else 1
    lengths = rows.counted.sum(1).repeat(copies) if weight == "rate_and_length" else None
    if about is None:
        logits = masked_logits(model, noised.ids)
    else:
        adapters = {"adapter": adapter, "image_adapter": image_adapter}
        frozen = adapter is not None and image_adapter is None
        seen = not image_dropout or float(draw_uniform((), rows.ids.device, generator, torch.float32)) >= image_dropout
        logits = image_text_logits(model, about, noised.ids, noised.rate, frozen=frozen, with_images=seen, **adapters)
    targets = rows.ids.repeat(copies, 1)
    loss = masked_text_loss(logits, targets, noised, weight=weight, lengths=lengths)
    right = (logits.argmax(-1) == targets)[noised.masked]
    return ObjectiveOutput(loss, {"right": right.float().mean() if len(right) else loss.new_zeros(())})


def _some_of_one_token(
    rows: TextRows, noised: Noised, mask: int, probability: float, generator: torch.Generator | None
) -> Noised:
    """The rows, each with this probability with one masked token instead. The repeated last token of a row is padding:
    of it the first may be masked."""
    last = rows.ids[:, -1:]
    padding = (rows.ids == last) & (rows.ids.roll(1, 1) == last)
    padding[:, 0] = False
    one = mask_one_token(rows.ids, mask, rows.counted, rows.prompt.any(1), padding, generator)
    chosen = draw_uniform((len(rows.ids),), rows.ids.device, generator, torch.float32) < probability
    ids, masked = one.ids.where(chosen[:, None], noised.ids), one.masked.where(chosen[:, None], noised.masked)
    return Noised(ids, masked, torch.where(chosen, one.rate, noised.rate))
