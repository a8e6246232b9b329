"""What an `MMDiT` with a text head predicts of masked texts about images."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from imgdit import compat
from imgdit.attention.cache import KVCache
from imgdit.frames import Frame, TextFrame
from imgdit.layout import FrameLayout
from imgdit.training.text_rows import ImageTexts


def text_layout(
    size: tuple[int, int], length: int, adapter: str | None = None, image_adapter: str | None = None
) -> FrameLayout:
    """A clean image that sees only itself, and a text about it that is generated. The image does not depend on the
    text, so its keys and values serve all texts and all steps.

    Args:
        size: rows and columns of the image's tokens.
        length: tokens of the text.
        adapter, image_adapter: LoRA that reads the text, or the image.
    """
    image = Frame(size, sigma=0.0, sees="self", adapter=image_adapter)
    return FrameLayout.build([image, TextFrame(length, sigma=None, adapter=adapter)])


def image_text_logits(
    model: torch.nn.Module,
    batch: ImageTexts,
    ids: torch.Tensor,
    levels: torch.Tensor,
    *,
    adapter: str | None = None,
    image_adapter: str | None = None,
    frozen: bool = False,
    with_images: bool = True,
) -> torch.Tensor:
    """Logits (R, L, V) of masked texts, each about its image.

    Args:
        model: an `MMDiT` with a text head and embeddings for it, wrapped for distributed training or not.
        batch: its images, and the pooled text.
        ids: (R, L) tokens with masks; the rows of `batch.texts`, or several times all of them.
        levels: (R,) probability in [0, 1] with which tokens were masked.
        adapter, image_adapter: see `text_layout`.
        frozen: whether images are read without gradients.
        with_images: whether texts see their images; otherwise each sees only itself, as texts without an image do in
            `ImageTextReader`.

    Raises:
        ValueError: the model has no text head, or no embeddings for it.
    """
    config, images, rows = _config(model), len(batch.tokens), len(ids)
    times, pooled = batch.tokens.new_zeros(rows), batch.pooled
    pooled = None if pooled is None else pooled.to(batch.tokens).expand(rows, -1)
    no_tokens = batch.tokens.new_zeros(rows, 0, batch.tokens.shape[2])
    text = compat.unwrapped(model).text_embedder(ids)
    text_timestep = levels * (1000.0 / config.timestep_scale)
    if not with_images:
        alone = FrameLayout.build([TextFrame(ids.shape[1], sigma=None, adapter=adapter)])
        return model(no_tokens, text, pooled, times, layout=alone, text_timestep=text_timestep).text_logits
    layout, cache = text_layout(batch.size, ids.shape[1], adapter, image_adapter), KVCache()
    nothing = batch.tokens.new_zeros(images, 0, config.joint_attention_dim)
    with torch.no_grad() if frozen else nullcontext():
        model(
            batch.tokens,
            nothing,
            None if pooled is None else pooled[:images],
            times[:images],
            layout=layout.only_frozen(),
            cache=cache,
        )
    cache.freeze()
    texts = len(batch.texts.ids) // images
    numbers = torch.arange(rows, device=ids.device) % len(batch.texts.ids) // texts
    return model(
        no_tokens,
        text,
        pooled,
        times,
        layout=layout.without_frozen(),
        cache=cache.of_samples(numbers),
        text_timestep=text_timestep,
    ).text_logits


def both_predictions(
    model: torch.nn.Module,
    batch: ImageTexts,
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
    ids: torch.Tensor,
    levels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity (R, N, C) of noisy images and logits (R, L, V) of masked texts, which see each other.

    Args:
        model: see `image_text_logits`.
        batch: says how large images are, and the pooled text.
        noisy: (R, N, C) tokens of the image of each text.
        sigmas: (R,) their noise levels in [0, 1].
        ids, levels: see `image_text_logits`.
    """
    config, rows = _config(model), len(ids)
    output = model(
        noisy,
        compat.unwrapped(model).text_embedder(ids),
        None if batch.pooled is None else batch.pooled.to(noisy).expand(rows, -1),
        sigmas * (1000.0 / config.timestep_scale),
        layout=FrameLayout.build([Frame(batch.size), TextFrame(ids.shape[1], sigma=None)]),
        text_timestep=levels * (1000.0 / config.timestep_scale),
    )
    return output.sample, output.text_logits


def _config(model: torch.nn.Module) -> Any:
    config = compat.unwrapped(model).config
    if not config.text_embeds:
        raise ValueError(
            "the model has no embeddings of text that is generated (text_vocab_size, text_embeds); give it a text "
            "head with imgdit.models.text_head.add_text_head"
        )
    return config
