"""The hooks by which conditions ride through a diffusers transformer, which keeps its own forward.

The hook of the model makes the plan of the pass (`Step`); the hooks of its edges put the condition tokens behind the
image tokens and take them off again; the hooks of its blocks call MMDiT's block functions with diffusers' own block.
Without a plan each of them calls what it found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from peft.tuners.lora import LoraLayer

from imgdit import compat
from imgdit.adapters.pairing import COPIES, Pairing
from imgdit.adapters.prepare import blocks_of, refuse_processors
from imgdit.adapters.run import Step
from imgdit.frames import Frame
from imgdit.lora.rows import linear, on_rows
from imgdit.models.blocks import double_block, single_block
from imgdit.models.functional import pack, table_positions, unpack

if TYPE_CHECKING:
    from imgdit.adapters.run import ConditionRun

NAME = "imgdit_condition"
_STEP = "condition_step"
"""Key of the plan in the `joint_attention_kwargs` of the blocks."""
_PASS: ContextVar[Step | None] = ContextVar("imgdit_condition_pass", default=None)
"""The plan of the forward pass that goes on in this thread, for the hooks of the edges, which get tensors alone."""


class ConditionHook(ModelHook):
    """What the hooks share."""

    fn_ref: Any

    def __deepcopy__(self, memo: dict) -> ConditionHook:
        raise ValueError(
            "a model with OmniControl's hooks cannot be copied: the copy's hooks would run the original's weights. "
            "Call remove() on the OmniControl first, copy, and make a new one for each model"
        )


class BlockHook(ConditionHook):
    """Runs a block over text, image and conditions by MMDiT's block function."""

    def __init__(self, name: str, block: Any, last: bool):
        """
        Args:
            name: of the block in its model.
            last: whether it is the last of all; after a single-stream one conditions are not read.
        """
        super().__init__()
        self.name = name
        self.parameters = tuple(inspect.signature(type(block).forward).parameters)[1:]
        self.function: Callable = single_block if hasattr(block, "proj_mlp") else double_block
        self.ends_text = getattr(block, "context_pre_only", False)
        self.is_last = last and self.function is single_block

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.parameters, args)), **kwargs}
        step: Step | None = (given.get("joint_attention_kwargs") or {}).get(_STEP)
        if step is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        temb = given["temb"]  # (B, F, D)
        hidden_states, encoder_hidden_states = self.function(
            module,
            given["hidden_states"],
            given["encoder_hidden_states"],
            temb,
            temb[:, :1],
            step.rope,
            step.last if self.is_last else step.plan,
            None if step.cache is None else step.cache.layer(self.name),
        )
        return None if self.ends_text else encoder_hidden_states, hidden_states


class EdgeHook(ConditionHook):
    """A hook that reads the plan of the pass."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        step = _PASS.get()
        if step is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.call(step, module, *args, **kwargs)

    def call(self, step: Step, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's result under a plan."""
        raise NotImplementedError


class TokenHook(EdgeHook):
    """On FLUX's `x_embedder`: embeds the conditions' tokens behind the image's."""

    def call(self, step: Step, module: Any, tokens: torch.Tensor) -> torch.Tensor:
        tokens = _with_riders(step, tokens)
        if isinstance(module, LoraLayer):
            rows = step.plan.adapters("image")
            return self.fn_ref.original_forward(tokens) if rows is None else on_rows(module, tokens, rows)
        return self.fn_ref.original_forward(tokens)


class PatchHook(EdgeHook):
    """On SD3's `pos_embed`: patches, conditions behind them, positions added."""

    def call(self, step: Step, module: Any, latents: torch.Tensor) -> torch.Tensor:
        tokens = _with_riders(step, pack(latents, module.patch_size))
        embedded = linear(module.proj, tokens, step.plan.adapters("image"))
        return embedded + table_positions(module, step.layout).to(embedded)


def _with_riders(step: Step, tokens: torch.Tensor) -> torch.Tensor:
    if step.kept is not None and tokens.shape[1] != step.image_length:
        tokens = tokens[:, step.kept]
    return tokens if step.tokens is None else torch.cat([tokens, step.tokens.to(tokens)], dim=1)


class TimeHook(EdgeHook):
    """On `time_text_embed`: one vector per frame (B, F, D); a condition's is that of noise level 0 and guidance 1."""

    def call(self, step: Step, module: Any, timestep: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        vectors = [self.fn_ref.original_forward(timestep, *rest)]
        if step.riders:
            *guidance, pooled = rest
            one = [torch.full_like(value, 1000.0) for value in guidance]
            vectors += [self.fn_ref.original_forward(torch.zeros_like(timestep), *one, pooled)] * step.riders
        return torch.stack(vectors, dim=1)


class OutputHook(EdgeHook):
    """On `norm_out`: the image tokens go on alone, those that were left out as zeros."""

    def call(self, step: Step, module: Any, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        out = self.fn_ref.original_forward(hidden_states[:, : step.image_length], temb[:, 0])
        if step.kept is None or step.full_length == step.image_length:
            return out
        full = out.new_zeros(out.shape[0], step.full_length, out.shape[2])
        full[:, step.kept] = out
        return full


class ModelInputHook(ConditionHook):
    """On the transformer: plans each pass, guides by a second one, fills in the tokens that were given."""

    def __init__(self, control: Any, model: Any):
        super().__init__()
        self.control = control
        self.signature = inspect.signature(type(model).forward)
        self._measured: tuple[torch.Tensor, tuple[int, int]] | None = None

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.control.run
        if run is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        given = self.signature.bind(module, *args, **kwargs).arguments
        given.pop("self")
        run = run.at(self._grid(module, given))
        refuse_processors(module)
        active = run.active(lambda: self.control.progress(given["timestep"]))
        if not active and not self._step_cache(module):
            return self.fn_ref.original_forward(**given)
        scale = run.image_guidance_scale
        if scale != 1.0 and self._step_cache(module):
            raise ValueError(
                "image guidance runs the model twice in a step, which a step cache takes for two steps; call "
                "disable_cache() or use image_guidance_scale=1"
            )
        out = self._pass(module, run, dict(given), active, empty=False)
        if scale != 1.0:
            black = self._pass(module, run, dict(given), active, empty=True)
            out = _combine(out, black, lambda a, b: b + scale * (a - b))
        return out

    def _step_cache(self, module: Any) -> bool:
        """Whether the model is under a cache of blocks or of attentions, which compares one step's tokens with
        another's."""
        return any(compat.has_step_cache(part) for _, block in blocks_of(module) for part in (block, block.attn))

    def _pass(
        self, module: Any, run: ConditionRun, given: dict[str, Any], active: tuple[int, ...], *, empty: bool
    ) -> Any:
        kwargs = dict(given.get("joint_attention_kwargs") or {})
        if any(name.startswith("ip_") for name in kwargs):
            raise ValueError(
                "IP-Adapter images cannot be combined with conditions: its attention would be left out. Run the "
                "pipeline without ip_adapter_image, or outside of use()"
            )
        rotary = self.control.rotary
        hidden = given["hidden_states"]
        patch = 1 if rotary else module.config.patch_size
        image, ids = self._image(run, given, patch)
        texts = (given["pooled_projections"], given["encoder_hidden_states"])
        guided = getattr(self.control.pipe, "do_classifier_free_guidance", None)  # told by its last call
        pairing = Pairing(hidden.shape[0], run.samples, hidden, texts, (1,) if rotary else COPIES, guided)
        arranged = run.arrange(
            image,
            given["encoder_hidden_states"].shape[1],
            pairing,
            given["pooled_projections"],
            active,
            step_cache=self._step_cache(module),
            empty=empty,
        )
        if rotary:
            step = run.step(arranged, ids, module.config.axes_dims_rope, module.pos_embed.theta)
        else:
            step = run.step(arranged, None, (), 0.0)
        for name in ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states"):
            if given.get(name) is not None:
                given[name] = [_pad(sample, step) for sample in given[name]]
        step.full_length = hidden.shape[1] if rotary else image.size[0] * image.size[1]
        given["joint_attention_kwargs"] = {**kwargs, _STEP: step}
        token = _PASS.set(step)
        try:
            out = self.fn_ref.original_forward(**given)
        finally:
            _PASS.reset(token)
        if step.cache is not None and step.cache.mode == "write":
            step.cache.mode = "read"
        if step.kept is not None and step.full_length != step.image_length:
            out = _fill(out, hidden, given["timestep"], run, pairing, patch, rotary)
        return out

    def _grid(self, module: Any, given: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of tokens of the image that is generated; reference images beside it do not count."""
        hidden = given["hidden_states"]
        if hidden.ndim == 4:
            return hidden.shape[2] // module.config.patch_size, hidden.shape[3] // module.config.patch_size
        ids = given["img_ids"]
        measured = self._measured
        if measured is None or measured[0] is not ids:  # a pipeline passes the same in every step
            flat = ids[0] if ids.ndim == 3 else ids
            rows, columns = flat[flat[:, 0] == flat[0, 0], 1:].amax(0).round().long().tolist()
            self._measured = measured = (ids, (rows + 1, columns + 1))
        return measured[1]

    def _image(
        self, run: ConditionRun, given: dict[str, Any], patch: int
    ) -> tuple[Frame, tuple[torch.Tensor, torch.Tensor] | None]:
        """The frame of the image tokens, and the positions of text and image for a rotary model."""
        hidden, region = given["hidden_states"], run.region
        if hidden.ndim == 4:
            return Frame((hidden.shape[2] // patch, hidden.shape[3] // patch), mask=region), None
        text_ids, ids = (x[0] if x.ndim == 3 else x for x in (given["txt_ids"], given["img_ids"]))
        if region is None:
            return Frame((1, hidden.shape[1])), (text_ids, ids)
        if region.numel() != ids.shape[0]:
            raise ValueError(
                f"the mask of a complement condition covers {region.shape[0]}x{region.shape[1]} tokens, the picture "
                f"has {ids.shape[0]}; give the condition the picture's size (and no reference image to the pipeline)"
            )
        return Frame((region.shape[0], region.shape[1]), mask=region), (text_ids, run.kept_ids(ids))


def _combine(a: Any, b: Any, function: Callable) -> Any:
    """A function of two results of a transformer: tuples, or output objects."""
    if isinstance(a, tuple):
        return (function(a[0], b[0]), *a[1:])
    return type(a)(sample=function(a.sample, b.sample))


def _pad(sample: torch.Tensor, step: Step) -> torch.Tensor:
    """A ControlNet's residuals: the image tokens that are computed, zeros for the conditions."""
    if step.kept is not None and sample.shape[1] != step.image_length:
        sample = sample[:, step.kept]
    riders = sum(step.layout.lengths[1:])
    return torch.cat([sample, sample.new_zeros(sample.shape[0], riders, sample.shape[2])], dim=1)


def _fill(
    out: Any,
    hidden: torch.Tensor,
    timestep: torch.Tensor,
    run: ConditionRun,
    pairing: Pairing,
    patch: int,
    rotary: bool,
) -> Any:
    """Give known tokens the velocity that ends at what is known: v = (x - x_0) / sigma, as x = x_0 + sigma v."""
    sigma = timestep.float() / (1.0 if rotary else 1000.0)
    known = run.known(pairing).to(hidden.device)  # (B, N, C)
    region = run.region.to(hidden.device)  # type: ignore[union-attr]
    if rotary:
        made = region.flatten()[None, :, None]
    else:
        known = unpack(known, patch, tuple(region.shape))
        made = region.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[None, None]
    sigma = sigma.view(-1, *[1] * (hidden.ndim - 1))
    velocity = ((hidden.float() - known.float()) / sigma).to(hidden.dtype)
    return _combine(out, out, lambda sample, _: torch.where(made, sample, velocity))
