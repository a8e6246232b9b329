"""What a call of the denoiser works on: its timestep, its guidance parts, and where its image tokens lie.

Decided by what is known of a class of denoisers, never by the names of arguments alone: a model that is not known is
refused, because one that packs its tokens or counts its timesteps in another way would be read wrongly without a word.

B batch, P images, N image tokens.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch

from imgdit import compat

Grid = tuple[int, int]


class Family(NamedTuple):
    """What is known of a class of denoisers."""

    timestep_scale: float | None = 1.0
    """What a pipeline's `timestep` argument is multiplied by to lie in [0, 1000]; `None`: the configuration's
    `timestep_scale`."""
    guides_in_batch: bool = True
    """Whether pipelines put the negative prompt into the same batch; FLUX's call once more instead."""


KNOWN = {
    "UNet2DModel": Family(),
    "UNet2DConditionModel": Family(),
    "Transformer2DModel": Family(),
    "DiTTransformer2DModel": Family(),
    "PixArtTransformer2DModel": Family(),
    "SanaTransformer2DModel": Family(None),
    "HunyuanDiT2DModel": Family(),
    "SD3Transformer2DModel": Family(),
    "FluxTransformer2DModel": Family(1000.0, guides_in_batch=False),
    "Flux2Transformer2DModel": Family(1000.0, guides_in_batch=False),
    "MMDiT": Family(None),
    "NextDiT": Family(None),
}
"""By the name of the class, or of one it derives from."""


class DenoiserCall(NamedTuple):
    """One call of the denoiser, as every hook of a run needs it."""

    timestep: float
    """The scheduler's timestep, in [0, 1000]."""
    batch: int
    """Samples, all guidance parts counted."""
    conditional: slice | None
    """Rows of the batch that are guided towards the prompt, one per image; `None`: there are none in this call."""
    unconditional: slice | None
    """Rows of the batch for the negative prompt."""
    rows: tuple[slice, ...] | None
    """Tokens of the frames being made within the image stream; `None`: the model works on planes."""
    grids: tuple[Grid, ...]
    """Rows and columns of tokens of each of these frames; empty for planes, whose size is their module's."""
    text_length: int
    """Text tokens, T; they lie before the image's in a joint sequence."""
    parts: int | None = None
    """Rows per image; `None`: two where there are rows of both kinds, otherwise one."""

    @property
    def images(self) -> int:
        """Images in the batch, P; the parts lie one after the other."""
        return self.batch // (self.parts or (1 if None in (self.conditional, self.unconditional) else 2))


def family_of(denoiser: torch.nn.Module) -> Family:
    """What is known of a denoiser.

    Raises:
        ValueError: nothing is.
    """
    for owner in type(denoiser).__mro__:
        if owner.__name__ in KNOWN:
            return KNOWN[owner.__name__]
    raise ValueError(
        f"cannot tell the token grid and the timesteps of {type(denoiser).__name__}: it is none of the models whose "
        f"activations can be read, {', '.join(KNOWN)}"
    )


def describe_call(
    pipe: Any, denoiser: torch.nn.Module, arguments: dict[str, Any], call_name: str | None
) -> DenoiserCall:
    """What a call of the denoiser works on, from its arguments.

    Args:
        arguments: of `forward`, by name.
        call_name: name the pipeline gave the call by `cache_context`.

    Raises:
        ValueError: an unknown denoiser, or arguments that do not say where its tokens lie.
    """
    family = family_of(denoiser)
    sample = arguments["hidden_states"] if "hidden_states" in arguments else arguments["sample"]
    tensor = sample[0] if isinstance(sample, (list, tuple)) else sample
    conditional, unconditional, parts = _guidance_parts(pipe, family, tensor, arguments, call_name)
    text = arguments.get("encoder_hidden_states")
    text_length = text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else 0
    rows, grids = _target(denoiser, tensor, arguments)
    timestep = _timestep(denoiser, family, arguments)
    return DenoiserCall(timestep, tensor.shape[0], conditional, unconditional, rows, grids, text_length, parts)


def bind(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `module.forward` by name."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


def _timestep(denoiser: Any, family: Family, arguments: dict[str, Any]) -> float:
    """The scheduler's timestep of the frames being made."""
    timestep, layout = arguments["timestep"], arguments.get("layout")
    scale = denoiser.config.timestep_scale if family.timestep_scale is None else family.timestep_scale
    if not isinstance(timestep, torch.Tensor):
        return float(timestep) * scale
    if timestep.ndim == 2 and layout is not None:
        timestep = timestep[:, [n for n, i in enumerate(layout.live) if not layout.frames[i].held]]
    return float(timestep.flatten()[0]) * scale


def _guidance_parts(
    pipe: Any, family: Family, sample: torch.Tensor, arguments: dict[str, Any], call_name: str | None
) -> tuple[slice | None, slice | None, int]:
    """Rows for the prompt, rows for the negative prompt, and how many rows an image has.

    Pipelines that guide in one batch put the same latents in twice; where a pipeline also says whether it guides,
    that is heeded, so that two equal images are not taken for two halves.
    """
    batch = sample.shape[0]
    everything = slice(0, batch)
    if call_name in ("uncond", "pred_uncond"):
        return None, everything, 1
    guides = compat.guides(pipe)
    if getattr(pipe, "do_perturbed_attention_guidance", False):  # [negative,] prompt, prompt with perturbed attention
        parts = 3 if guides else 2
        each = batch // parts
        return (slice(each, 2 * each), slice(0, each), parts) if guides else (slice(0, each), None, parts)
    named = call_name in ("cond", "pred_cond", "plain") or arguments.get("skip_layers") is not None
    if named or not family.guides_in_batch or guides is False:
        return everything, None, 1
    if "InstructPix2Pix" in type(pipe).__name__:  # prompt and image, image alone, neither
        each = batch // 3
        return slice(0, each), slice(each, batch), 3
    half = batch // 2
    if batch % 2 or not torch.equal(sample[:half], sample[half:]):
        return everything, None, 1
    first, second = slice(0, half), slice(half, batch)
    if type(pipe).__name__ == "DiTPipeline":  # the only one that puts the labels before the null labels
        return first, second, 2
    return second, first, 2


def _target(
    denoiser: Any, sample: torch.Tensor, arguments: dict[str, Any]
) -> tuple[tuple[slice, ...] | None, tuple[Grid, ...]]:
    """Rows and grids of the frames being made."""
    layout, ids = arguments.get("layout"), arguments.get("img_ids")
    if layout is not None:
        made = [(rows, layout.frames[i]) for rows, i in zip(layout.rows, layout.live) if not layout.frames[i].held]
        return tuple(rows for rows, _ in made), tuple(frame.size for _, frame in made)
    if sample.ndim == 3 and ids is not None:
        ids = ids[0] if ids.ndim == 3 else ids
        length = _leading(ids[:, 0])  # Kontext's image to edit has another first coordinate
        columns = _leading(ids[:length, 1])
        if length % columns:
            raise ValueError(f"img_ids describe {length} tokens in rows of {columns}, which is no grid")
        return (slice(0, length),), ((length // columns, columns),)
    if sample.ndim == 4 and getattr(denoiser.config, "patch_size", None) is not None:
        patch = denoiser.config.patch_size
        patch = patch if isinstance(patch, int) else patch[-1]
        grid = (sample.shape[2] // patch, sample.shape[3] // patch)
        return (slice(0, math.prod(grid)),), (grid,)
    if sample.ndim == 4:
        return None, ()
    raise ValueError(
        f"cannot tell the token grid of {type(denoiser).__name__} from hidden_states {tuple(sample.shape)}: it was "
        "given neither a layout nor img_ids nor a latent grid"
    )


def _leading(values: torch.Tensor) -> int:
    """How many of the first entries are equal."""
    other = (values != values[0]).nonzero()
    return int(other[0]) if len(other) else len(values)
