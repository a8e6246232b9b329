"""Where the picture is in what a module returns.

A denoiser's modules return planes (B, C, H, W), token sequences, or tuples of several streams whose order differs by
class: FLUX's blocks return the text first, its attention the image first, its single blocks' attention both in one
sequence. Of the image's tokens, only those of the frame being made are meant; conditions ride before or behind them.

B batch, N image tokens, T text tokens, n tokens of the frames being made, d width.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from .. import compat

Grid = tuple[int, int]


class DenoiserCall(NamedTuple):
    """One call of the denoiser, as every hook of a run needs it."""

    timestep: float
    """The scheduler's timestep, in [0, 1000]."""
    batch: int
    """Samples, both guidance halves counted."""
    conditional: slice | None
    """Rows of the batch that are guided towards the prompt; `None`: there are none in this call."""
    unconditional: slice | None
    """Rows of the batch for the negative prompt."""
    rows: tuple[slice, ...] | None
    """Tokens of the frames being made within the image stream; `None`: the model works on planes."""
    grids: tuple[Grid, ...]
    """Rows and columns of tokens of each of these frames; empty for planes, whose size is their module's."""
    text_length: int
    """Text tokens, T; they lie before the image's in a joint sequence."""


class Tokens(NamedTuple):
    """Activations of the frames being made, or of the text, at one hookpoint."""

    values: torch.Tensor
    """(B, n, d); of a text, its padding too."""
    grids: tuple[Grid, ...]
    """Rows and columns of each frame; none of a text."""
    call: DenoiserCall


def describe_call(
    pipe: Any, denoiser: torch.nn.Module, arguments: dict[str, Any], call_name: str | None
) -> DenoiserCall:
    """What a call of the denoiser works on, from its arguments.

    Args:
        arguments: of `forward`, by name.
        call_name: name the pipeline gave the call by `cache_context`.

    Raises:
        ValueError: the denoiser's arguments do not say where its tokens lie.
    """
    sample = arguments["hidden_states"] if "hidden_states" in arguments else arguments["sample"]
    tensor = sample[0] if isinstance(sample, (list, tuple)) else sample
    batch = tensor.shape[0]
    conditional, unconditional = _guidance_halves(pipe, tensor, call_name)
    text = arguments.get("encoder_hidden_states")
    text_length = text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else 0
    rows, grids = _target(denoiser, tensor, arguments)
    return DenoiserCall(_timestep(denoiser, arguments), batch, conditional, unconditional, rows, grids, text_length)


def bind(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `module.forward` by name."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


def _timestep(denoiser: Any, arguments: dict[str, Any]) -> float:
    """The scheduler's timestep of the frames being made. FLUX's pipelines pass a thousandth of it."""
    timestep, layout = arguments["timestep"], arguments.get("layout")
    scale = getattr(denoiser.config, "timestep_scale", 1000.0 if "img_ids" in arguments else 1.0)
    if not isinstance(timestep, torch.Tensor):
        return float(timestep) * scale
    if timestep.ndim == 2 and layout is not None:
        timestep = timestep[:, [n for n, i in enumerate(layout.live) if not layout.frames[i].held]]
    return float(timestep.flatten()[0]) * scale


def _guidance_halves(pipe: Any, sample: torch.Tensor, call_name: str | None) -> tuple[slice | None, slice | None]:
    """Rows for the prompt and rows for the negative prompt.

    Pipelines that guide in one batch put the same latents in twice; where a pipeline also says whether it guides,
    that is heeded, so that two equal pictures are not taken for two halves.
    """
    batch = sample.shape[0]
    everything = slice(0, batch)
    if call_name in ("uncond", "pred_uncond"):
        return None, everything
    if call_name in ("cond", "pred_cond", "plain") or getattr(pipe, "do_classifier_free_guidance", True) is False:
        return everything, None
    half = batch // 2
    if batch % 2 or not torch.equal(sample[:half], sample[half:]):
        return everything, None
    first, second = slice(0, half), slice(half, batch)
    if type(pipe).__name__ == "DiTPipeline":  # the only one that puts the labels before the null labels
        return first, second
    return second, first


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
        length = _leading(ids[:, 0])  # Kontext's picture to edit has another first coordinate
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
        f"cannot tell the token grid of {type(denoiser).__name__} from hidden_states {tuple(sample.shape)}: it takes "
        "neither a layout nor img_ids nor a latent grid"
    )


def _leading(values: torch.Tensor) -> int:
    """How many of the first entries are equal."""
    other = (values != values[0]).nonzero()
    return int(other[0]) if len(other) else len(values)


# A module's output


class Site(NamedTuple):
    """A module that is read or changed."""

    path: str
    """Its hookpoint: component and module path, as in "transformer.transformer_blocks.3"."""
    module: torch.nn.Module
    single_stream: bool
    """Whether it works on text and image as one sequence, text first."""
    text: bool = False
    """Whether it works on the text alone."""

    def tokens(
        self, output: Any, call: DenoiserCall, plane: Grid | None = None, *, beside_text: bool | None = None
    ) -> Tokens:
        """Tokens of the frames being made, or of the text, in what the module returned.

        Args:
            plane: grid of the token sequence inside a model that works on planes.
            beside_text: whether the image stream lies apart from the text; `None`: it does in a tuple, and in
                modules that know no text.
        """
        tensor = self._tensor(output)
        if self.text:
            if tensor.shape[0] != call.batch:
                raise ValueError(f"{self.path} has {tensor.shape[0]} texts for a batch of {call.batch}")
            return Tokens(tensor, (), call)
        if tensor.ndim == 4:
            return Tokens(tensor.flatten(2).transpose(1, 2), ((tensor.shape[2], tensor.shape[3]),), call)
        parts = [
            tensor[:, rows]
            for rows in self._rows(tensor, call, self._apart(output) if beside_text is None else beside_text)
        ]
        grids = call.grids or (() if plane is None else (plane,))
        return Tokens(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), grids, call)

    def replaced(self, output: Any, call: DenoiserCall, values: torch.Tensor) -> Any:
        """The output with other tokens (B, n, d) of the frames being made, or of the text."""
        tensor = self._tensor(output)
        values = values.to(tensor.dtype)
        if self.text:
            return self._rebuilt(output, values)
        if tensor.ndim == 4:
            return self._rebuilt(output, values.transpose(1, 2).reshape(tensor.shape))
        rows = self._rows(tensor, call, self._apart(output))
        if rows == (slice(0, tensor.shape[1]),):
            return self._rebuilt(output, values)
        changed, start = tensor.clone(), 0
        for part in rows:
            length = part.stop - part.start
            changed[:, part] = values[:, start : start + length]
            start += length
        return self._rebuilt(output, changed)

    def _place(self, output: Any) -> int | None:
        """Index of the image stream in a tuple; `None` for a bare tensor."""
        if isinstance(output, torch.Tensor):
            return None
        streams = compat.block_streams(type(self.module))
        if streams is not None:
            return streams[0]
        if isinstance(self.module, (Attention, AttentionModuleMixin, Transformer2DModel)):
            return 0
        raise ValueError(
            f"{self.path}: {type(self.module).__name__} returns {type(output).__name__} and is not known to say which "
            "part is the image; register it with imgdit.compat.register_block"
        )

    def _tensor(self, output: Any) -> torch.Tensor:
        place = self._place(output)
        tensor = output if place is None else output[place]
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4):
            raise ValueError(
                f"{self.path}: {type(self.module).__name__} returns no tokens (B, N, d) and no plane (B, C, H, W)"
            )
        return tensor

    def _rebuilt(self, output: Any, tensor: torch.Tensor) -> Any:
        place = self._place(output)
        if place is None:
            return tensor
        if not isinstance(output, (tuple, list)):  # a ModelOutput, which has its image first
            return type(output)(**{**output, next(iter(output)): tensor})
        return type(output)((*output[:place], tensor, *output[place + 1 :]))

    def _apart(self, output: Any) -> bool:
        return not (self.single_stream and isinstance(output, torch.Tensor))

    def _rows(self, tensor: torch.Tensor, call: DenoiserCall, apart: bool) -> tuple[slice, ...]:
        """Rows of the frames being made in the token sequence."""
        if call.rows is None:
            return (slice(0, tensor.shape[1]),)
        start = 0 if apart else call.text_length
        end = start + call.rows[-1].stop
        if tensor.shape[1] < end:
            raise ValueError(
                f"{self.path}: {type(self.module).__name__} returned {tensor.shape[1]} tokens, the frames being made "
                f"end at {end}; is it a module of the text stream?"
            )
        return tuple(slice(start + rows.start, start + rows.stop) for rows in call.rows)
