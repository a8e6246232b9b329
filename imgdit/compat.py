"""The one place that registers with diffusers and touches its private names.

Importing this module makes diffusers able to save and load components of imgdit (`model_index.json` entries of the
library "imgdit"), also from the Hub and without `trust_remote_code`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers import FasterCacheConfig, ModelMixin, SchedulerMixin, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, faster_cache
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.hooks.group_offloading import GroupOffloadingHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput as ContextParallelInput
from diffusers.models._modeling_parallel import ContextParallelOutput as ContextParallelOutput
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.cache_utils import CacheMixin
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

__all__ = ["DiffusionPipeline", "ModelMixin", "SchedulerMixin"]

_SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]
# The library's classes are found by name on the package `imgdit`, their base classes too: it re-exports both.
pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
    "imgdit", {"ModelMixin": _SAVE_AND_LOAD, "SchedulerMixin": _SAVE_AND_LOAD}
)

# Published folders whose `model_index.json` leaves components out, by pipeline: where those are and what they are.
_UNLISTED = {"OneDiffusionPipeline": {"transformer": ["imgdit", "NextDiT"]}}
# Published folders of pipelines that no library has, by their class: what they are here.
_RENAMED = {"DualDiffSD3Pipeline": {"_class_name": "ImageTextPipeline", "transformer": ["imgdit", "MMDiT"]}}


class SafetensorsOnly:
    """Loads no pickled weights: they can run code. Mixed in before diffusers' class."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained` with `use_safetensors=True`; all other arguments are passed on.

        Raises:
            ValueError: `use_safetensors=False` was asked for.
            OSError: the folder holds no safetensors weights.
        """
        options = _safetensors_only(kwargs)
        try:
            return super().from_pretrained(*args, **options)  # type: ignore[misc]
        except OSError as error:
            folder = Path(str(args[0] if args else ""), options.get("subfolder") or "")
            if not args or not folder.is_dir() or f"{SAFETENSORS_WEIGHTS_NAME} found" not in str(error):
                raise
            raise OSError(f"{error} {_other_weights(folder)}") from error


class OtherWeightNames:
    """Loads folders in which parameters have other names. Mixed in before diffusers' class."""

    @staticmethod
    def _weight_names() -> Mapping[str, str]:
        """What other names begin with, and what ours begin with instead."""
        raise NotImplementedError

    @classmethod
    def _with_our_names(cls, weights: dict[str, torch.Tensor]) -> None:
        names = cls._weight_names()
        for name in list(weights):
            theirs = next((start for start in names if name.startswith(start)), None)
            if theirs is not None:
                weights[names[theirs] + name.removeprefix(theirs)] = weights.pop(name)

    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        """diffusers calls this for weights of a single file."""
        if not state_dict.keys() <= self.state_dict().keys():  # type: ignore[attr-defined]
            self._with_our_names(state_dict)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, files: list[str], source: Any, loaded_keys: list[str], **options: Any
    ) -> Any:
        """Weights in several files are read one by one; those with other names are put together before."""
        if state_dict is None and not set(loaded_keys) <= model.state_dict().keys():
            state_dict = {name: tensor for file in files for name, tensor in load_file(file).items()}
            cls._with_our_names(state_dict)
            loaded_keys = list(state_dict)
        return super()._load_pretrained_model(model, state_dict, files, source, loaded_keys, **options)  # type: ignore[misc]


def _other_weights(folder: Path) -> str:
    """What a model's folder holds instead of its weights."""
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return f"It holds pickled weights ({', '.join(pickled)}), which can run code; convert them to safetensors."
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"Error no file named {WEIGHTS_NAME} found in directory {folder} either" + (
        f"; there are {', '.join(others)}: pass variant=, the part of the name between its dots." if others else "."
    )


def _safetensors_only(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` that keep it from reading pickles."""
    if options.get("use_safetensors") is False:
        raise ValueError("got use_safetensors=False, but pickled weights can run code; convert them to safetensors")
    return {**options, "use_safetensors": True}


class DiffusionPipeline(SafetensorsOnly, diffusers.DiffusionPipeline):
    """Loads any pipeline of imgdit or of diffusers, by the class that its `model_index.json` names.

    diffusers looks that class up in the root package of the loading class, and only if it is called like this one.
    Pipelines of diffusers are therefore loaded by its own class.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained` with `use_safetensors=True`; all other arguments are passed on.

        Raises:
            ValueError: `use_safetensors=False` was asked for, or neither imgdit nor diffusers has the class.
            OSError: the folder holds no safetensors weights.
        """
        if cls is DiffusionPipeline and _is_of_diffusers(cls, pretrained_model_name_or_path, kwargs):
            return diffusers.DiffusionPipeline.from_pretrained(
                pretrained_model_name_or_path, **_safetensors_only(kwargs)
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: Any, **kwargs: Any) -> Any:
        """diffusers' `download`, of any pipeline of imgdit or of diffusers."""
        if cls is DiffusionPipeline and _is_of_diffusers(cls, pretrained_model_name, kwargs):
            return diffusers.DiffusionPipeline.download(pretrained_model_name, **kwargs)
        return super().download(pretrained_model_name, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """A configuration file's contents, components that it leaves out added; the loader then treats them alike."""
        config = super()._dict_from_json_file(json_file)
        name = str(config.get("_class_name"))
        return _UNLISTED.get(name, {}) | config | _RENAMED.get(name, {})


_HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "token")


def _is_of_diffusers(cls: type[DiffusionPipeline], source: Any, options: Mapping[str, Any]) -> bool:
    """Whether the class that a pipeline folder names is diffusers', or code of the folder's own.

    Raises:
        ValueError: neither package has the class.
    """
    if options.get("custom_pipeline") is not None:
        return True
    name = cls.load_config(source, **{key: options[key] for key in _HUB_OPTIONS if key in options})["_class_name"]
    own = [own for own in import_module("imgdit").__all__ if own.endswith("Pipeline")]
    if name in own:
        return False
    if isinstance(name, str) and not hasattr(diffusers, name):
        raise ValueError(
            f"{str(source)!r} is a folder of {name!r}, which neither diffusers {diffusers.__version__} nor imgdit "
            f"({', '.join(own)}) has"
        )
    return True


def register_block(block: type, *, hidden_states: int, encoder_hidden_states: int | None) -> None:
    """Tell diffusers' step caches and layer skipping where a block's streams stand in its returned tuple."""
    TransformerBlockRegistry.register(
        block,
        TransformerBlockMetadata(
            return_hidden_states_index=hidden_states, return_encoder_hidden_states_index=encoder_hidden_states
        ),
    )


def register_attention_processor(processor: type, skip: Any) -> None:
    """Tell diffusers what a skipped attention returns: `skip(attn, hidden_states, encoder_hidden_states, …)`."""
    AttentionProcessorRegistry.register(processor, AttentionProcessorMetadata(skip_processor_output_fn=skip))


def block_streams(block: type) -> tuple[int, int | None] | None:
    """Places of the image and the text stream in what a block returns; `None` for a class diffusers does not list."""
    try:
        metadata = TransformerBlockRegistry.get(block)
    except ValueError:
        return None
    return metadata.return_hidden_states_index, metadata.return_encoder_hidden_states_index


class StepCaches(CacheMixin):
    """diffusers' step caches, none of which is enabled to do nothing. Mixed in instead of `CacheMixin`."""

    _attention_pattern: str
    """Regular expression of the attentions' names in the model."""

    def enable_cache(self, config: Any) -> None:
        """diffusers' `enable_cache`. Caches of attentions look for the names of diffusers' models, and for ours.

        Raises:
            ValueError: the cache found no block and no attention of this model, so no step would be faster.
        """
        if isinstance(config, TaylorSeerCacheConfig) and not (config.cache_identifiers or config.use_lite_mode):
            config = dataclasses.replace(config, cache_identifiers=[self._attention_pattern])
        before = self._parts_with_hooks()
        super().enable_cache(config)
        if isinstance(config, FasterCacheConfig):
            self._add_faster_cache(config)
        if self._parts_with_hooks() == before:
            self.disable_cache()
            raise ValueError(
                f"{type(config).__name__} found nothing in {type(self).__name__} whose results it could keep, so no "
                "step would be faster. FirstBlockCacheConfig and MagCacheConfig find its blocks; its attentions are "
                f"those that {self._attention_pattern!r} names"
            )

    def _add_faster_cache(self, config: FasterCacheConfig) -> None:
        model: Any = self
        ours = dataclasses.replace(config, spatial_attention_block_identifiers=(self._attention_pattern,))
        for name, part in model.named_modules():
            if re.fullmatch(self._attention_pattern, name) and not has_step_cache(part):
                faster_cache._apply_faster_cache_on_attention_class(name, part, ours)

    def _parts_with_hooks(self) -> set[tuple[int, str]]:
        model: Any = self
        parts = [part for part in model.modules() if part is not model and hasattr(part, "_diffusers_hook")]
        return {(id(part), name) for part in parts for name in part._diffusers_hook.hooks}


@contextmanager
def several_adapters() -> Iterator[None]:
    """Keeps back PEFT's warning that a model already has an adapter: several are what our models and pipelines are
    for, and PEFT has no argument that says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


class Adapters(PeftAdapterMixin):
    """diffusers' adapters of a model, of which it may have several. Mixed in instead of `PeftAdapterMixin`."""

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `load_lora_adapter`."""
        with several_adapters():
            return super().load_lora_adapter(*args, **kwargs)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' `add_adapter`."""
        with several_adapters():
            super().add_adapter(*args, **kwargs)


class CallNameHook(ModelHook):
    """A hook on a denoiser that knows the name its pipeline gave the call by `cache_context`, such as "uncond"."""

    _is_stateful = True  # diffusers tells the name to stateful hooks only

    def __init__(self) -> None:
        super().__init__()
        self._state = StateManager(BaseState)

    @property
    def call_name(self) -> str | None:
        return None if self._state._context is None else self._state._context.name

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._state.reset()
        return module


@contextmanager
def step_cache_set_aside(model: torch.nn.Module) -> Iterator[None]:
    """The model without its step cache, which is enabled anew afterwards.

    Hooks registered meanwhile lie under the cache's own: registered above, a change would be applied again to what a
    cached step takes from an earlier one.
    """
    config = getattr(model, "_cache_config", None)
    if config is None:
        yield
        return
    cached: Any = model
    cached.disable_cache()
    try:
        yield
    finally:
        cached.enable_cache(config)


def register_pipeline(pipeline: type) -> None:
    """Make diffusers' `DiffusionPipeline`, `AutoPipelineForText2Image` and, if its calls take an `image`,
    `AutoPipelineForImage2Image` know a pipeline of imgdit.

    The first looks the class that a folder names up among diffusers' names, the others in tables of their own.
    """
    setattr(diffusers, pipeline.__name__, pipeline)
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[pipeline.__name__] = pipeline
    if "strength" in inspect.signature(pipeline.__call__).parameters:
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[pipeline.__name__] = pipeline


def add_hook(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook on top of those that a module has, but below accelerate's offloading.

    A pipeline under `enable_model_cpu_offload` takes accelerate's hooks off after every call and puts them on again,
    and what lay above them would be lost.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if not hasattr(module, "_old_forward"):
        registry.register_hook(hook, name)
        return
    _register_at(registry, module, "_old_forward", hook, name)


def is_offloaded_whole(module: Any) -> bool:
    """Whether accelerate moves a module to its device by moving another one away (`enable_model_cpu_offload`)."""
    return isinstance(getattr(module, "_hf_hook", None), CpuOffload)


def insert_hook(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook below those that a module has already, as if it had come first.

    A hook that computes the module's result itself must lie below the caches and offloading around it; diffusers puts
    every new hook on top.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    *_, (holder, attribute, _) = _calls(module)
    _register_at(registry, holder, attribute, hook, name)


def remove_hook(module: torch.nn.Module, name: str) -> None:
    """Take a hook out from among others. (diffusers' own way disconnects a hook above that has a `new_forward`, and
    accelerate's.)"""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None or name not in registry.hooks:
        return
    index = registry._hook_order.index(name)
    for holder, attribute, reference in _calls(module):
        if reference is registry._fn_refs[index]:
            setattr(holder, attribute, getattr(reference, _inner(reference)))
            break
    registry.hooks.pop(name).deinitalize_hook(module)
    del registry._fn_refs[index], registry._hook_order[index]
    if not registry.hooks:  # as if it had never been there: deepcopy and pickle see a plain module again
        del module._diffusers_hook
        if getattr(module.forward, "__func__", None) is type(module).forward:
            del module.forward


def _register_at(registry: Any, holder: Any, attribute: str, hook: ModelHook, name: str) -> None:
    """Register a hook around the call that `holder.attribute` holds."""
    module = registry._module_ref
    outer = module.forward
    module.forward = getattr(holder, attribute)
    registry.register_hook(hook, name)
    inner = module.forward
    module.forward = outer
    setattr(holder, attribute, inner)
    # The registry lists its hooks from the inside out. Those that accelerate took off stay in the list.
    place = {id(reference): -depth for depth, (_, _, reference) in enumerate(_calls(module))}
    listed = sorted(zip(registry._fn_refs, registry._hook_order), key=lambda pair: place.get(id(pair[0]), 1))
    registry._fn_refs[:] = [reference for reference, _ in listed]
    registry._hook_order[:] = [listed_name for _, listed_name in listed]


def _calls(module: Any) -> Iterator[tuple[Any, str, Any]]:
    """What holds each of the nested calls of a module, from the outside in: an object, its attribute, and the hook's
    reference; none for accelerate's hook and the module's own `forward`."""
    registry = getattr(module, "_diffusers_hook", None)
    references = [] if registry is None else registry._fn_refs
    holder, attribute = module, "forward"
    offloaded = hasattr(module, "_old_forward")
    while True:
        call = getattr(holder, attribute)
        inside = call.func.__closure__ or () if isinstance(call, functools.partial) else ()
        contents = [cell.cell_contents for cell in inside]
        reference = next((r for r in references if any(r is one for one in contents)), None)
        yield holder, attribute, reference
        if reference is not None:
            holder, attribute = reference, _inner(reference)
        elif offloaded:
            holder, attribute, offloaded = module, "_old_forward", False
        else:
            return


def _inner(reference: Any) -> str:
    """Attribute of a hook's reference that holds the call below it."""
    return "forward" if reference.original_forward is None else "original_forward"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling a module runs more than its class' `forward`: hooks of its own or of all modules, offloading."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return True
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def called(module: torch.nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` as what a call of the module gives: every hook on the module sees the call.

    For a module whose parts we compute in another way than its class does. Without hooks it is the function alone;
    with hooks the function stands in the place of the class' `forward`, in this thread and for this call.

    Raises:
        ValueError: somebody put another `forward` on the module, which would be passed by.
    """
    if not has_hooks(module):
        return function(*args, **kwargs)
    with _INNERMOST_LOCK:
        holder, name = _innermost_place(module)
        innermost = getattr(holder, name)
        if not isinstance(innermost, _Innermost):
            innermost = _Innermost(innermost)
            setattr(holder, name, innermost)
        innermost.calls += 1
    token = _COMPUTED.set(_Computed(innermost, function))
    try:
        return module(*args, **kwargs)
    finally:
        _COMPUTED.reset(token)
        with _INNERMOST_LOCK:
            innermost.calls -= 1
            holder, name = _innermost_place(module)  # a hook may have gone meanwhile
            if not innermost.calls and holder is module and name == "forward":
                module.__dict__.pop("forward", None)
            elif not innermost.calls:
                setattr(holder, name, innermost.forward)


def is_computed(module: torch.nn.Module) -> bool:
    """Whether `called` computes a module in the call that goes on, for a hook on it that would compute it too."""
    computed = _COMPUTED.get()
    if computed is None:
        return False
    holder, name = _innermost_place(module)
    return getattr(holder, name) is computed.place


class _Innermost:
    """Stands where a module's own `forward` stood while `called` runs; for other callers and threads it is that."""

    def __init__(self, forward: Callable) -> None:
        self.forward = forward
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        computed = _COMPUTED.get()
        return (self.forward if computed is None or computed.place is not self else computed.function)(*args, **kwargs)


class _Computed(NamedTuple):
    """What an innermost forward is to compute."""

    place: _Innermost
    function: Callable


_COMPUTED: ContextVar[_Computed | None] = ContextVar("imgdit_computed", default=None)
_INNERMOST_LOCK = threading.Lock()


def _innermost_place(module: torch.nn.Module) -> tuple[Any, str]:
    """Object and attribute that hold the forward under all hooks.

    Raises:
        ValueError: it is not the class'.
    """
    *_, (holder, name, _) = _calls(module)
    forward = getattr(holder, name)
    if isinstance(forward, _Innermost) or getattr(forward, "__func__", None) is type(module).forward:
        return holder, name
    raise ValueError(
        f"the forward of a {type(module).__name__} was replaced by {module.forward!r}, which adapters and conditions "
        "would pass by; change the module's result by register_forward_hook instead"
    )


def onednn_linear() -> Any:
    """oneDNN's product of tokens and a weight as a torch operator; `None` where this PyTorch has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def has_step_cache(block: torch.nn.Module) -> bool:
    """Whether a block is under a cache that compares one step's tokens with another's, as FirstBlockCache does."""
    registry = getattr(block, "_diffusers_hook", None)
    return registry is not None and any(hook._is_stateful for hook in registry.hooks.values())


_WRAPPED = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}
"""Class of a wrapper and its attribute that holds the module."""


def wrapped_model(module: Any) -> Any:
    """The module that torch.compile, DDP, FSDP1, activation checkpointing or PEFT wraps; `None`: it is no wrapper."""
    attribute = next((_WRAPPED[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _WRAPPED), None)
    return None if attribute is None else getattr(module, attribute)


def unwrapped(module: Any) -> Any:
    """The module in the wrappers of torch.compile, DDP, FSDP1, activation checkpointing and PEFT, in any order."""
    while (inner := wrapped_model(module)) is not None:
        module = inner
    return module


def parameters_on_disk(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters that diffusers' group offloading keeps on a disk, and that hold no weights meanwhile."""
    registries: list[Any] = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    groups = [hook.group for hook in hooks if isinstance(hook, GroupOffloadingHook)]
    stored = [group for group in groups if group.offload_to_disk_path is not None]
    return {id(p) for group in stored for module in group.modules for p in module.parameters()} | {
        id(p) for group in stored for p in group.parameters
    }


@contextmanager
def uncompiled(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Modules that run as they are written while the context is open, whether `torch.compile` wrapped them or their
    own `compile()` was called. What was compiled is kept and used again afterwards.

    Args:
        modules: with `torch.compile`'s wrappers, where there are any.
    """
    with ExitStack() as undo:
        for module in modules:
            inner = unwrap_module(module)
            if inner is not module:
                undo.callback(setattr, module, "forward", module.forward)
                module.forward = inner.__call__
            if inner._compiled_call_impl is not None:
                undo.callback(setattr, inner, "_compiled_call_impl", inner._compiled_call_impl)
                inner._compiled_call_impl = None
        yield


def guides(pipe: Any) -> bool | None:
    """Whether the running call of a pipeline guides away from a negative prompt; `None` where nothing says so.

    Most pipelines say so by a property. PixArt's, DiT's and DeepFloyd's keep it in variables of their `__call__`,
    and nowhere else.
    """
    guides = getattr(pipe, "do_classifier_free_guidance", None)
    if guides is not None:
        return bool(guides)
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            names = frame.f_locals
            if "do_classifier_free_guidance" in names:
                return bool(names["do_classifier_free_guidance"])
            if type(pipe).__name__ == "DiTPipeline":
                return bool(names["guidance_scale"] > 1)
        frame = frame.f_back
    return None


def execution_device(pipe: Any) -> torch.device:
    """Where a pipeline computes, however its parts are offloaded."""
    return pipe._execution_device


def offloading(pipe: Any) -> Callable[[], None] | None:
    """What offloads a pipeline's models to the CPU again after diffusers took its hooks off to load a LoRA, which it
    leaves so where loading fails; `None` for a pipeline that is not offloaded."""
    if pipe is None:
        return None
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    hooks = [model._hf_hook for model in models if hasattr(model, "_hf_hook")]
    flat = [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]  # a SequentialHook holds several
    offloads = [hook for hook in flat if isinstance(hook, CpuOffload)]
    name = "enable_model_cpu_offload" if offloads else "enable_sequential_cpu_offload"
    offloads = offloads or [hook for hook in flat if isinstance(hook, AlignDevicesHook)]
    enable = getattr(pipe, name, None)  # modular pipelines leave it to their components manager
    if not offloads or enable is None:
        return None
    device = offloads[0].execution_device

    def again() -> None:
        if not any(hasattr(model, "_hf_hook") for model in models):
            enable(device=device)

    return again


def calling_pipeline(model: Any) -> Any:
    """The pipeline of diffusers in whose call a model runs; `None`: it is called by something else.

    Found on the stack: a model is not told who calls it, several pipelines may hold it, each with a scheduler of its
    own, and they may run in several threads at once.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        mine = isinstance(caller, (diffusers.DiffusionPipeline, diffusers.ModularPipeline)) and getattr(
            caller, "transformer", None
        )
        if mine and unwrapped(mine) is model:
            return caller
        frame = frame.f_back
    return None


def attention_backend_name(backend: Any) -> str:
    """Name of a backend, or of the active one for `None`."""
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    return AttentionBackendName(backend).value


@functools.cache
def has_varlen_attention() -> bool:
    """Whether this PyTorch has `torch.nn.attention.varlen`, which came with 2.10."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def default_processor(attention: Any) -> type | None:
    """The class of processor that an attention has unless another one is set; `None`: diffusers does not tell."""
    return getattr(attention, "_default_processor_cls", None)


def processor_backend(attn: Any) -> Any:
    """The backend that diffusers set on an attention's processor; `None`: the active one."""
    return getattr(attn.processor, "_attention_backend", None)


def dispatch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    backend: Any,
    parallel_config: Any,
    scale: float | None = None,
) -> torch.Tensor:
    """diffusers' attention dispatcher. (B, S, H, D) each; `scale` of the logits, 1 / sqrt(D) by default."""
    return dispatch_attention_fn(
        query, key, value, attn_mask=mask, scale=scale, backend=backend, parallel_config=parallel_config
    )


def checkpointed(model: Any, block: torch.nn.Module) -> Callable[..., Any]:
    """A block of a model under gradient checkpointing, as a function whose activations are computed again."""
    return functools.partial(model._gradient_checkpointing_func, block)


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def checkpointing_in(model: torch.nn.Module, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Let blocks that gradient checkpointing of the present forward pass runs again, in a backward pass, run in a
    context: diffusers' checkpointing of a model, or PyTorch's wrapper around a block.

    Args:
        model: a transformer.
        context: makes a context, one for each run of a block.
    """
    holders: list[tuple[Any, str]] = []
    if torch.is_grad_enabled():
        wrappers = [part for part in model.modules() if type(part).__name__ == "CheckpointWrapper"]
        holders = [(model, "_gradient_checkpointing_func"), *((wrapper, "checkpoint_fn") for wrapper in wrappers)]
    found = [
        (holder, name, getattr(holder, name)) for holder, name in holders if getattr(holder, name, None) is not None
    ]

    def checkpoint(function: Callable, block: Callable, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with context():
                return block(*args, **kwargs)

        return function(run, *args, **kwargs)

    try:
        for holder, name, function in found:
            setattr(holder, name, functools.partial(checkpoint, function))
        yield
    finally:
        for holder, name, function in found:
            setattr(holder, name, function)


def init_keys(cls: type) -> set[str]:
    """Names of a configured class' settings."""
    return cls._get_init_keys(cls) - {"self"}  # type: ignore[attr-defined]


def put_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a module another's parameter or buffer, the object itself."""
    if isinstance(tensor, torch.nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor


def flux_latents(pipe: Any, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """FLUX's tokens (B, N, 64) as latents (B, 16, h, w) of an image of a size in pixels."""
    return pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)


def graph_counters() -> Any:
    """What torch.compile counts: graphs, breaks."""
    from torch._dynamo.utils import counters

    return counters


def forget_renames(model: Any) -> None:
    """Let a transformers model that was loaded under renamed keys be saved under its own: transformers remembers the
    renames and would undo them."""
    if getattr(model, "_weight_conversions", None):
        model._weight_conversions = []


# How diffusers' text schedulers draw tokens, which its classes keep as private static methods.
top_p_logits = diffusers.BlockRefinementScheduler._top_p_filtering
top_k_logits = diffusers.BlockRefinementScheduler._top_k_filtering


def sample_tokens(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (…) drawn from logits (…, V) as `BlockRefinementScheduler` draws them, and their probabilities."""
    return diffusers.BlockRefinementScheduler._sample_from_logits(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, use_multinomial=True
    )


__all__ += [
    "Adapters",
    "CallNameHook",
    "StepCaches",
    "add_hook",
    "attention_backend_name",
    "block_streams",
    "called",
    "calling_pipeline",
    "checkpointed",
    "dispatch_attention",
    "execution_device",
    "flux_latents",
    "forget_renames",
    "graph_counters",
    "guides",
    "has_hooks",
    "has_step_cache",
    "has_varlen_attention",
    "init_keys",
    "insert_hook",
    "is_offloaded_whole",
    "offloading",
    "onednn_linear",
    "parameters_on_disk",
    "processor_backend",
    "put_tensor",
    "register_attention_processor",
    "register_block",
    "register_pipeline",
    "remove_hook",
    "sample_tokens",
    "several_adapters",
    "step_cache_set_aside",
    "top_k_logits",
    "top_p_logits",
    "uncompiled",
    "unwrapped",
    "wrapped_model",
]
