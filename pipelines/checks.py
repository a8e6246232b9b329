"""What every pipeline refuses before it computes anything: texts, counts, sizes and options that do not fit.

B prompts, T text tokens, J text features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

from imgdit.adapters.pairing import Samples
from imgdit.naming import shown
from imgdit.pipelines.options import SamplingOptions
from imgdit.schedulers.schedule import check_few_steps, check_schedule


class Texts(NamedTuple):
    """The texts of a call, by the names of its arguments."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    """(B, T, J)."""
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    """(B, P)."""
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    prompt_embeds_mask: torch.Tensor | None = None
    """(B, T), true on real tokens."""
    negative_prompt_embeds_mask: torch.Tensor | None = None

    @property
    def has_negative(self) -> bool:
        """Whether the call says what to steer away from; an empty text says it too."""
        return self.negative_prompt is not None or self.negative_prompt_embeds is not None


def check_call(pipe: Any, texts: Texts, options: SamplingOptions, called: str = "images") -> Samples:
    """Refuse texts and options that do not fit the pipeline or each other; the samples of the call.

    Args:
        pipe: with a scheduler and a transformer of ours.
        called: what the pipeline makes of a prompt.
    """
    config = pipe.transformer.config
    samples = Samples.of_prompts(check_texts(texts, *text_features(config)), options.num_images_per_prompt)
    check_guidance(texts, options, config.guidance_embeds)
    known = pipe._callback_tensor_inputs
    unknown = [name for name in options.callback_tensors if name not in known]
    if unknown:
        raise ValueError(f"callbacks may ask for {known}, got {unknown}")
    check_schedule(pipe.scheduler, options.num_inference_steps, options.sigmas)
    guided = options.true_cfg_scale if config.guidance_embeds else options.guidance_scale
    check_few_steps(pipe.scheduler, options.num_inference_steps, options.sigmas, guided)
    check_generators(options.generator, samples.count, called)
    return samples


def check_texts(texts: Texts, features: int | None = None, pooled_features: int | None = None) -> int:
    """Refuse texts that do not fit each other or the model; the number of prompts.

    Args:
        texts: of the call.
        features: J of the model; `None`: not checked.
        pooled_features: P of the model; `None`: not checked.
    """
    prompt, negative = texts.prompt, texts.negative_prompt
    if (prompt is None) == (texts.prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds" + ("" if prompt is None else ", not both"))
    for name, text in (("prompt", prompt), ("negative_prompt", negative)):
        if text is None or isinstance(text, str):
            continue
        if not isinstance(text, (list, tuple)) or not all(isinstance(one, str) for one in text):
            raise ValueError(f"{name} must be a string or a list of strings, got {shown(text)}")
        if not text:
            raise ValueError(f"{name} is an empty list; give at least one text")
    if negative is not None and texts.negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    batch = len(prompt) if isinstance(prompt, (list, tuple)) else 1
    if texts.prompt_embeds is not None:
        batch = len(texts.prompt_embeds)
    if isinstance(negative, (list, tuple)):
        check_count("negative prompts", negative, batch)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds, mask = getattr(texts, name), getattr(texts, f"{name}_mask")
        _check_shape(name, embeds, (batch, "tokens", features))
        if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_mask must have the batch and tokens of {name}, got {tuple(mask.shape)}")
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        _check_shape(name, getattr(texts, name), (batch, pooled_features))
    return batch


def check_count(name: str, texts: Sequence[Any], prompts: int) -> None:
    """Refuse a list of texts that is longer or shorter than that of the prompts."""
    if len(texts) != prompts:
        raise ValueError(f"got {len(texts)} {name} for {prompts} prompts; give one, or as many")


def check_guidance(texts: Texts, options: SamplingOptions, distilled: bool) -> None:
    """Refuse guidance that the model has no use for.

    Args:
        distilled: whether the model takes the guidance scale as an input.
    """
    true_cfg_scale = options.true_cfg_scale
    if not distilled and true_cfg_scale != 1.0:
        raise ValueError(
            f"this model is guided by guidance_scale; leave out true_cfg_scale={true_cfg_scale}, which is for models "
            "that take the guidance scale as an input"
        )
    negative = bool(texts.negative_prompt) or texts.negative_prompt_embeds is not None
    if distilled and negative and true_cfg_scale <= 1.0:
        raise ValueError(
            "this model takes the guidance scale as an input and has no use for a negative prompt, unless "
            f"true_cfg_scale is above 1 (two predictions in a step); got true_cfg_scale={true_cfg_scale}"
        )
    if distilled and true_cfg_scale > 1.0 and not texts.has_negative:
        raise ValueError(
            f"true_cfg_scale={true_cfg_scale} steers away from a negative prompt; give negative_prompt, which may be "
            "empty ('')"
        )


def check_size(height: int, width: int, cell: int, max_grid: float) -> None:
    """Refuse sizes that are no whole number of tokens, or more than the model has positions for.

    Args:
        height, width: in pixels.
        cell: pixels per side of a token.
        max_grid: tokens per side.
    """
    sides: dict[str, Any] = {"height": height, "width": width}
    for name, side in sides.items():
        if not isinstance(side, Integral):
            raise ValueError(f"{name} is a whole number of pixels, got {side!r}")
    if height < cell or width < cell or height % cell or width % cell:
        near = f"{max(height // cell, 1) * cell}x{max(width // cell, 1) * cell}"
        raise ValueError(f"height and width must be multiples of {cell} pixels, got {height}x{width}; try {near}")
    if max(height, width) // cell > max_grid:
        raise ValueError(
            f"{height}x{width} pixels are {height // cell}x{width // cell} tokens, the model's positions end at "
            f"{max_grid}"
        )


def check_generators(generator: Any, samples: int, called: str = "images") -> None:
    """Refuse a list of generators that is longer or shorter than the batch.

    Args:
        generator: one `torch.Generator`, a list of them, or `None`.
        samples: how many are drawn.
        called: what they are.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {shown(generator)}")
    if len(generator) != samples:
        raise ValueError(f"got {len(generator)} generators for {samples} {called}; give one, or one for each")


def check_latents(latents: Any, expected: tuple[int, ...], axes: str = "batch, channels, h, w") -> None:
    """Refuse starting noise of another kind, number type, place or shape than a run reads.

    Args:
        latents: what was given; `None` is drawn.
        expected: shape.
        axes: what its numbers count.
    """
    if latents is None:
        return
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents must be a tensor {expected} ({axes}), got {shown(latents)}")
    if tuple(latents.shape) != expected:
        raise ValueError(f"latents must be {expected}, got {tuple(latents.shape)} ({axes})")
    if not latents.is_floating_point():
        raise ValueError(f"latents must be floating-point numbers, such as torch.float32, got {latents.dtype}")
    if latents.is_meta:
        raise ValueError("latents are on the device 'meta' and hold no numbers; give them on a real device")


def text_features(config: Mapping[str, Any]) -> tuple[int, int]:
    """Features of a text token and of the pooled text that a transformer of this configuration reads."""
    if "caption_channels" in config:  # NextDiT, whose pooled text is the mean of the tokens
        return config["caption_channels"], config["caption_channels"]
    return config["joint_attention_dim"], config["pooled_projection_dim"]


def _check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[Any, ...]) -> None:
    """Compare with a shape whose text entries and `None` stand for any number."""
    if tensor is None:
        return
    fits = len(tensor.shape) == len(expected) and all(
        not isinstance(want, int) or got == want for got, want in zip(tensor.shape, expected)
    )
    if not fits:
        axes = ", ".join("features" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must be ({axes}), got {tuple(tensor.shape)}")
