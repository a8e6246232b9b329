"""What a call of the denoiser works on: its timestep, its guidance parts, and where its image tokens lie.

Decided by what is known of a class of denoisers, never by the names of arguments alone: a model that is not known is
refused, because one that packs its tokens or counts its timesteps in another way would be read wrongly without a word.

B batch, P images, N image tokens.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch

from imgdit import compat
from imgdit.family import Family, Grid, MeasuredPlaces, find_family, known_classes


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
    """Tokens of the frames being generated within the image stream; `None`: the model works on planes."""
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
    family = find_family(denoiser)
    if family is None:
        raise ValueError(
            f"cannot tell the token grid and the timesteps of {type(denoiser).__name__}: it is none of the models "
            f"whose activations can be read, {', '.join(known_classes())}; "
            "imgdit.family.register_family makes it known"
        )
    return family


def describe_call(
    pipe: Any,
    denoiser: torch.nn.Module,
    arguments: dict[str, Any],
    call_name: str | None,
    measured: MeasuredPlaces | None = None,
    *,
    second: bool = False,
) -> DenoiserCall:
    """What a call of the denoiser works on, from its arguments.

    Args:
        arguments: of `forward`, by name.
        call_name: name the pipeline gave the call by `cache_context`.
        measured: of earlier calls.
        second: whether the call has the latents and the timestep of the one before.

    Raises:
        ValueError: an unknown denoiser, or arguments that do not say where its tokens lie.
    """
    family = family_of(denoiser)
    latents = family.latents(arguments)
    if second and call_name is None and family.guides_by_second_call:
        call_name = "uncond"
    conditional, unconditional, parts = _guidance_parts(pipe, family, latents, arguments, call_name)
    places = (measured or MeasuredPlaces()).of(family, denoiser, arguments)
    return DenoiserCall(
        family.timestep(denoiser, arguments),
        latents.shape[0],
        conditional,
        unconditional,
        None if places is None else tuple(rows for rows, _ in places),
        tuple(grid for _, grid in places or ()),
        family.text_length(denoiser, arguments),
        parts,
    )


def bind(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `module.forward` by name."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


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
    guided = (call_name or "").startswith("guided")  # by our pipelines, so that nothing has to be compared
    if batch % 2 or not (guided or torch.equal(sample[:half], sample[half:])):
        return everything, None, 1
    first, second = slice(0, half), slice(half, batch)
    return (first, second, 2) if family.prompt_first else (second, first, 2)
