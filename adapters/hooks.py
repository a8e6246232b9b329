"""The hooks by which condition tokens go through a transformer that keeps its own forward.

The hook of the model makes the plan of the pass (`Step`); the hooks of its edges add the condition tokens behind the
image tokens and take them off again; the hooks of its blocks compute diffusers' own block by the family's function.
What differs between classes of transformers is in their `Family`. Without a plan each hook calls what it found.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from peft.tuners.lora import LoraLayer

from imgdit import compat
from imgdit.adapters.pairing import COPIES, Pairing
from imgdit.adapters.prepare import blocks_of, refuse_processors
from imgdit.adapters.references import SeenReferences
from imgdit.attention.cache import KVCache, LayerCache
from imgdit.families.step import Step
from imgdit.family import Block, Call, Conditions, Edge, Family, MeasuredPlaces
from imgdit.frames import Frame
from imgdit.lora.rows import AdapterRows, on_rows, scaled_adapters
from imgdit.models.functional import unpack

if TYPE_CHECKING:
    from imgdit.adapters.run import Arranged, ConditionRun, Progress, ReferenceKeys

NAME = "imgdit_condition"
_STEP = "condition_step"
"""Key of the plan in the dictionary that blocks get."""
_PASS: ContextVar[Step | None] = ContextVar("imgdit_condition_pass", default=None)
"""The plan of the forward pass that goes on in this thread, for the hooks of the edges, which get tensors alone."""
_PLANNED: ContextVar[Step | None] = ContextVar("imgdit_condition_planned", default=None)
"""The same, and also while it is prepared, for the hooks of layers that are called then."""


class Passing:
    """The plan of the pass that goes on, for blocks that get no dictionary, and the stores of keys and values of all
    blocks. One object per transformer."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.blocks: list[BlockHook] = []
        self._lock = threading.RLock()
        self._held = 0
        self._last: Step | None = None

    @property
    def current(self) -> Step | None:
        """The plan for a block that runs now. A model that calls PyTorch's `checkpoint` itself runs its blocks again
        in the backward pass without holding a plan: they find that of the last forward pass with gradients."""
        return self._last if self._held == 0 and compat.in_backward() else self.step

    @contextmanager
    def hold(self, step: Step | None) -> Iterator[None]:
        """Let the blocks find a plan, or `None`; passes of other threads wait."""
        with self._lock:
            before, self.step = self.step, step
            self._held += 1
            try:
                yield
            finally:
                self.step = before
                self._held -= 1
                if not compat.in_backward():
                    self._last = step if torch.is_grad_enabled() else None

    @contextmanager
    def stores(self, cache: KVCache | None) -> Iterator[None]:
        """Hand its part of a cache to each block; passes of other threads that have a cache wait.

        A block that looked itself up by its name would be compiled anew for each name.
        """
        if cache is None:
            yield
            return
        with self._lock:
            for block in self.blocks:
                block.store = cache.layer(block.name)
            try:
                yield
            finally:
                for block in self.blocks:
                    block.store = None


class ConditionHook(ModelHook):
    """What the hooks share."""

    fn_ref: Any

    def __deepcopy__(self, memo: dict) -> ConditionHook:
        raise ValueError(
            "a model with OmniControl's hooks cannot be copied: the copy's hooks would run the original's weights. "
            "Call remove() on the OmniControl first, copy, and make a new one for each model"
        )


class BlockHook(ConditionHook):
    """Runs a block over text, image and conditions by its family's function."""

    def __init__(self, block: Block, argument: str | None, passing: Passing):
        """
        Args:
            argument: the block's argument that holds the plan; `None`: `passing` does.
        """
        super().__init__()
        self.name = block.name
        self.parameters = tuple(inspect.signature(type(block.module).forward).parameters)[1:]
        self.function: Callable = block.function
        self.is_last = block.ends_conditions
        self.argument = argument
        self.passing = passing
        self.store: LayerCache | None = None
        """Keys and values of the conditions, in a pass that has a cache."""
        passing.blocks.append(self)

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.parameters, args)), **kwargs}
        step: Step | None = (
            self.passing.current if self.argument is None else (arguments.get(self.argument) or {}).get(_STEP)
        )
        if step is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        plan = step.last if self.is_last else step.plan
        return self.function(module, arguments, step, plan, None if step.cache is None else self.store)


class EdgeHook(ConditionHook):
    """Gives the family's result of a module at the edge of the transformer."""

    def __init__(self, edge: Edge):
        super().__init__()
        self.edge = edge

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        step = _PASS.get()
        if step is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.edge(step, module, self.fn_ref.original_forward, *args, **kwargs)


class LayerHook(ConditionHook):
    """On a layer outside of the blocks, where adapters that act on all tokens are added to those in use. What the
    family computes with adapters on rows has them already."""

    def new_forward(self, module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = _PLANNED.get()
        if step is None or not step.layout.everywhere or compat.is_computed(module):
            return self.fn_ref.original_forward(x, *args, **kwargs)
        layout, rows = step.layout, x if x.ndim == 3 else x[None]
        whole = ((slice(0, rows.shape[1]), None),)
        adapters = AdapterRows(whole, layout.claimed, layout.main_adapters, layout.everywhere)
        return on_rows(module, rows, adapters).reshape(*x.shape[:-1], -1)


class ModelInputHook(ConditionHook):
    """On the transformer: plans each pass, guides by a second one, fills in the tokens that are known."""

    def __init__(self, control: Any, model: Any, family: Family, passing: Passing):
        super().__init__()
        assert family.conditions is not None and family.tokens is not None
        self.control = control
        self.family = family
        self.conditions: Conditions = family.conditions
        self.patch = family.tokens.patch(model, control.pipe.vae)
        self.passing = passing
        self.signature = inspect.signature(type(model).forward)
        self._measured = MeasuredPlaces()

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.control.run
        if run is None:
            return self._plain(module, *args, **kwargs)
        arguments = self._arguments(module, args, kwargs)
        run = run.at(self._grid(module, arguments))
        refuse_processors(module)
        active = run.active(lambda: self._progress(module, arguments))
        seen = self._references(module, arguments, run)
        changed = seen is not None and seen.changes
        if not active and not changed and not (run.conditions and self._step_cache(module)):
            return self._plain(module, **arguments)
        scale = run.image_guidance_scale
        if scale != 1.0 and self._step_cache(module):
            raise ValueError(
                "image guidance runs the model twice in a step, which a step cache takes for two steps; call "
                "disable_cache() or use image_guidance_scale=1"
            )
        with scaled_adapters(module, self._take_lora_scale(arguments)):
            if seen is not None and seen.keeps:
                return self._kept_pass(module, run, arguments, seen)
            out = self._pass(module, run, dict(arguments), active, seen, empty=False)
            if scale != 1.0:
                black = self._pass(module, run, dict(arguments), active, seen, empty=True)
                out = _combine(out, black, lambda a, b: b + scale * (a - b))
        return out

    def _arguments(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call of the model by name."""
        arguments = dict(self.signature.bind(module, *args, **kwargs).arguments)
        arguments.pop("self")
        return arguments

    def _take_lora_scale(self, arguments: dict[str, Any]) -> float:
        """What a call multiplies adapters by, out of its arguments: the model's own forward would apply it too late,
        after what blocks share and the keys of caches."""
        for name in self.signature.parameters:
            if name.endswith("attention_kwargs") and "scale" in (arguments.get(name) or {}):
                arguments[name] = dict(arguments[name])
                return arguments[name].pop("scale")
        return 1.0

    def _progress(self, module: Any, arguments: Mapping[str, Any]) -> Progress:
        dtype = self.family.latents(arguments).dtype  # which pipelines round the timestep to
        return self.control.progress(self.family.timestep(module, arguments), dtype)

    def _plain(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """A pass without conditions."""
        if self.conditions.transport is not None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._hold(module, None, *args, **kwargs)

    def _hold(self, module: Any, step: Step | None, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward while its blocks find a plan, also when gradient checkpointing runs them again."""
        hold = partial(self.passing.hold, step)
        with hold(), compat.checkpointing_in(module, hold):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _step_cache(self, module: Any) -> bool:
        """Whether the model is under a cache of blocks or of attentions, which compares one step's tokens with
        another's."""
        return any(
            compat.has_step_cache(part)
            for block in blocks_of(module)
            for part in (block.module, *(getattr(block.module, name, None) for name in block.attentions))
            if part is not None
        )

    def _references(self, module: Any, arguments: Mapping[str, Any], run: ConditionRun) -> SeenReferences | None:
        """What of the pipeline's own reference images is seen; `None`: what the model sees."""
        settings = run.references
        if settings is None:
            return None
        found = self._measured.references(self.family, module, arguments)
        always = (settings.start, settings.end) == (0.0, 1.0)
        acting = always or settings.acts(*self._progress(module, arguments))
        return settings.seen(found, run.side, acting=acting, keep=self._step_cache(module))

    def _kept_pass(self, module: Any, run: ConditionRun, arguments: dict[str, Any], seen: SeenReferences) -> Any:
        """A pass that writes or reads keys and values of the references. The first that reads them is also computed,
        which gives the error."""
        if self._step_cache(module):
            raise ValueError(
                'references of cached="approximate" leave the sequence, whose steps a step cache compares; call '
                "disable_cache() or leave cached out"
            )
        step, found = self._progress(module, arguments).step, []

        def choose(arranged: Arranged, call: Call) -> ReferenceKeys:
            found.append(run.reference_keys(arranged, call.texts, step))
            return found[-1]

        out = self._pass(module, run, dict(arguments), (), seen, empty=False, choose=choose)
        keys = found[0]
        if keys.written < step and not keys.measured:
            keys.measured = True
            computed = self._pass(module, run, dict(arguments), (), seen, empty=False)
            self.control.note_reference_error(_relative_change(out, computed, len(seen.present)), keys.written, step)
        return out

    def _pass(
        self,
        module: Any,
        run: ConditionRun,
        arguments: dict[str, Any],
        active: tuple[int, ...],
        seen: SeenReferences | None = None,
        *,
        empty: bool,
        choose: Callable[[Arranged, Call], ReferenceKeys] | None = None,
    ) -> Any:
        call = self.conditions.call(module, arguments)
        frames = _completed(call, run) if seen is None or run.region is not None else _with_references(call, seen)
        guided = getattr(self.control.pipe, "do_classifier_free_guidance", None)  # told by its last call
        copies = COPIES if self.family.guides_in_batch else (1,)
        pairing = Pairing(call.latents.shape[0], run.samples, call.latents, call.texts, copies, guided)
        arranged = run.arrange(
            frames,
            call.text_length,
            pairing,
            call.cached_by,
            active,
            step_cache=self._step_cache(module),
            empty=empty,
            hidden=seen is not None and seen.hidden,
        )
        own, present = len(frames), None if seen is None else seen.present
        keys = None if choose is None else choose(arranged, call)
        if keys is not None:
            arranged = keys.arranged(arranged, own - 1)
            if keys.reads:
                own, present = 1, torch.zeros(call.length - frames[0].length, dtype=torch.bool)
        rope = None if self.conditions.rope is None else partial(self.conditions.rope, module, arguments)
        positions = self._measured.positions(self.family, module, arguments)
        kept = None if present is None else run.kept_rows(arranged, call, present)
        step = run.step(arranged, own, rope, positions, call.places, kept=kept, device=call.latents.device)
        step.full_length = call.length
        if keys is not None and not keys.reads:
            step.writes_own(len(frames) - 1)
        timeless = self.conditions.timeless
        if seen is not None and seen.cached and timeless is not None and not active and not torch.is_grad_enabled():
            step.streams = run.streams(arranged, [arguments.get(name) for name in timeless(module)])
        if call.key_mask is not None:
            step.with_key_mask(call.key_mask)
        for name in self.conditions.residual_arguments:
            if arguments.get(name) is not None:
                arguments[name] = _padded(arguments[name], step)
        token = _PLANNED.set(step)
        try:
            self._prepare(module, arguments, step)
            if self.conditions.arguments is not None:
                arguments = self.conditions.arguments(module, arguments, step)
            out = self._run(module, arguments, step)
        finally:
            _PLANNED.reset(token)
        if step.cache is not None:
            step.cache.freeze()
        if run.region is not None and step.full_length != step.image_length:
            out = self._fill(out, call.latents, self._sigma(module, arguments), run, pairing)
        return out

    def _prepare(self, module: Any, arguments: Mapping[str, Any], step: Step) -> None:
        """Compute what the blocks read besides tokens."""
        frames = [step.layout.frames[i] for i in step.layout.live]
        levels = [(frame.sigma, frame.guidance) for frame in frames]
        first = {level: frame for level, frame in reversed(list(zip(levels, frames)))}
        vectors = {level: self.conditions.vector(module, arguments, frame) for level, frame in first.items()}
        step.vectors = torch.stack([vectors[level] for level in levels], dim=1)  # (B, F, D)
        shared = self.conditions.shared
        step.shared = step.vectors if shared is None else shared(module, step.vectors, step.plan)

    def _run(self, module: Any, arguments: dict[str, Any], step: Step) -> Any:
        """The model's own forward under a plan."""
        if self.conditions.transport is not None:
            name = self.conditions.transport[0]
            kwargs = dict(arguments.get(name) or {})
            if any(key.startswith("ip_") for key in kwargs):
                raise ValueError(
                    "IP-Adapter images cannot be combined with conditions: its attention would be left out. Run the "
                    "pipeline without ip_adapter_image, or outside of use()"
                )
            arguments[name] = {**kwargs, _STEP: step}
        token = _PASS.set(step)
        try:
            with self.passing.stores(step.cache):
                if self.conditions.transport is not None:
                    return self.fn_ref.original_forward(**arguments)
                return self._hold(module, step, **arguments)
        finally:
            _PASS.reset(token)

    def _grid(self, module: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of tokens of the image that is generated; reference images beside it do not count."""
        places = self._measured.of(self.family, module, arguments)
        assert places is not None
        return places[0][1]

    def _sigma(self, module: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
        assert self.conditions.sigma is not None, "conditions that complete an image are refused before"
        return self.conditions.sigma(module, arguments)

    def _fill(self, out: Any, latents: torch.Tensor, sigma: torch.Tensor, run: ConditionRun, pairing: Pairing) -> Any:
        """Give known tokens the velocity that ends at what is known: v = (x - x_0) / sigma, as x = x_0 + sigma v."""
        known = run.known(pairing).to(latents.device)  # (B, N, C)
        region = run.region_on(latents.device)
        if self.conditions.spatial:
            known = unpack(known, self.patch, (region.shape[0], region.shape[1]))
            generated = region.repeat_interleave(self.patch, 0).repeat_interleave(self.patch, 1)[None, None]
        else:
            generated = region.flatten()[None, :, None]
        sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
        velocity = ((latents.float() - known.float()) / sigma).to(latents.dtype)
        return _combine(out, out, lambda sample, _: torch.where(generated, sample, velocity))


def model_hooks(model: Any) -> list[ModelInputHook]:
    """The hooks of conditions on a transformer."""
    registry = getattr(model, "_diffusers_hook", None)
    hooks = [] if registry is None else registry.hooks.values()
    return [hook for hook in hooks if isinstance(hook, ModelInputHook)]


def hook_blocks(model: Any, conditions: Conditions, passing: Passing) -> None:
    """Put hooks on the blocks of a transformer, which do nothing without a plan; `unhook` takes them off."""
    argument = None if conditions.transport is None else conditions.transport[1]
    for block in blocks_of(model):
        compat.insert_hook(block.module, BlockHook(block, argument, passing), NAME)


def hook_edges(model: Any, conditions: Conditions, *, everywhere: bool) -> list[Any]:
    """Put hooks on the modules at the edges of a transformer, which are returned.

    Args:
        everywhere: also on layers with adapters that are neither there nor in a block.
    """
    # The modules as they are now: loading a LoRA wraps them.
    hooks: dict[Any, ConditionHook] = {
        compat.unwrapped(model.get_submodule(path)): EdgeHook(edge) for path, edge in conditions.edges(model).items()
    }
    if everywhere:
        hooks |= {layer: LayerHook() for layer in other_layers(model) if layer not in hooks}
    for module, hook in hooks.items():
        compat.insert_hook(module, hook, NAME)
    return list(hooks)


def unhook(modules: Iterable[Any]) -> None:
    """Take the hooks of blocks or edges off."""
    for module in modules:
        compat.remove_hook(module, NAME)


def other_layers(model: Any) -> list[LoraLayer]:
    """Layers with adapters that are in no block."""
    inside = {part for block in blocks_of(model) for part in block.module.modules()}
    return [part for part in model.modules() if isinstance(part, LoraLayer) and part not in inside]


def _completed(call: Call, run: ConditionRun) -> Sequence[Frame]:
    """The frames of a call; where conditions complete the image, it has the tokens that are generated."""
    region = run.region
    if region is None:
        return call.frames
    image, *others = call.frames
    if region.numel() != image.length or others:
        raise ValueError(
            f"the mask of a complement condition covers {region.shape[0]}x{region.shape[1]} tokens, the image "
            f"has {sum(frame.length for frame in call.frames)}; give the condition the image's size (and no "
            "reference image to the pipeline)"
        )
    return (run.completed(image),)


def _with_references(call: Call, seen: SeenReferences) -> Sequence[Frame]:
    """The frames of a call with what is seen of its references."""
    image = call.frames[0]
    if len(call.frames) == 1:  # a family whose references have the image's noise level may give all as one frame
        image = replace(image, size=(1, call.length - len(seen.present)))
    return (image, *seen.frames)


def _combine(a: Any, b: Any, function: Callable) -> Any:
    """A function of two results of a transformer: tuples, or output objects, of a tensor or of a list of samples."""
    if isinstance(a, list):
        return [function(*pair) for pair in zip(a, b, strict=True)]
    if isinstance(a, torch.Tensor):
        return function(a, b)
    if isinstance(a, tuple):
        return (_combine(a[0], b[0], function), *a[1:])
    return type(a)(sample=_combine(a.sample, b.sample, function))


def _relative_change(a: Any, b: Any, others: int) -> float:
    """|a - b| / |b| of two results of a transformer, (B, N, C), without the last tokens, so many."""
    first, second = ((one if isinstance(one, torch.Tensor) else one[0])[:, :-others] for one in (a, b))
    return float((first.float() - second.float()).norm() / second.float().norm())


def _padded(residuals: Any, step: Step) -> Any:
    """A ControlNet's residuals of all blocks for a sequence with conditions."""
    if isinstance(residuals, Mapping):
        return {block: _pad(sample, step) for block, sample in residuals.items()}
    return [_pad(sample, step) for sample in residuals]


def _pad(sample: torch.Tensor, step: Step) -> torch.Tensor:
    """A ControlNet's residuals: the image tokens that are computed, zeros for the conditions."""
    if step.kept is not None and sample.shape[1] != step.image_length:
        sample = sample[:, step.kept]
    return torch.cat([sample, sample.new_zeros(sample.shape[0], step.condition_length, sample.shape[2])], dim=1)
