"""Reading and changing activations while a pipeline runs.

Hookpoints are module paths within the pipeline; `*` stands for one part of a path. A hook on the denoiser notes what
each call works on (timestep, guidance halves, frames), hooks on the modules hand the image's tokens to a function; of
modules that belong to the text, the text's. While a text about an image is generated, the image's tokens are those of
the image that is read.
They are diffusers' `ModelHook`s, which offloading and step caches respect, and are always removed. Modules that
`torch.compile` compiled and that hold a hookpoint run uncompiled meanwhile.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from imgdit import compat
from imgdit.family import TEXT_PARTS, Grid, MeasuredPlaces, find_family
from imgdit.naming import nearest_of_many
from imgdit.sae.calls import DenoiserCall, bind, describe_call, family_of
from imgdit.sae.config import Reads
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.streams import Site, Tokens

Function = Callable[[Tokens], torch.Tensor | None]
"""Gets the tokens at a hookpoint, returns others of the same shape, or `None` to leave them."""

_numbers = itertools.count()
_COMPILED = re.compile(r"\._orig_mod\b")


def denoiser_names(pipe: Any) -> list[str]:
    """Components of a pipeline that predict; `model` is a language model."""
    return [name for name in ("transformer", "unet", "model") if getattr(pipe, name, None) is not None]


def find_hookpoints(pipe: Any, patterns: Iterable[str]) -> list[str]:
    """Hookpoints of a pipeline that match, in the order of the patterns and of the model.

    Args:
        patterns: paths such as "transformer.transformer_blocks.*" or "unet.up_blocks.1.attentions.1".

    Raises:
        ValueError: a pattern matches nothing; names the nearest path.
    """
    names = denoiser_names(pipe)
    if not names:
        raise ValueError(f"{type(pipe).__name__} has no transformer, unet or language model to read from")
    paths = [f"{name}.{path}" for name in names for path, _ in getattr(pipe, name).named_modules() if path]
    known = list(dict.fromkeys(_COMPILED.sub("", path) for path in paths))
    found: dict[str, None] = {}
    for pattern in patterns:
        parts = [re.escape(part).replace(r"\*", r"[^.]*") for part in pattern.split(".")]
        matching = [path for path in known if re.fullmatch(r"\.".join(parts), path)]
        if not matching:
            raise ValueError(f"no module is called {nearest_of_many(pattern, known)}")
        found.update(dict.fromkeys(matching))
    return list(found)


def denoiser_of(pipe: Any, hookpoint: str) -> torch.nn.Module:
    """The component that a hookpoint lies in, without `torch.compile`'s wrapper.

    Raises:
        ValueError: there is no such hookpoint.
    """
    (path,) = find_hookpoints(pipe, [hookpoint])
    return compat.unwrapped(getattr(pipe, path.partition(".")[0]))


def site(pipe: Any, hookpoint: str) -> Site:
    """The module of a hookpoint."""
    (path,) = find_hookpoints(pipe, [hookpoint])
    *around, module = _modules(pipe, path)
    owners = [compat.unwrapped(owner) for owner in around]
    module = compat.unwrapped(module)
    family, parts = find_family(owners[0]), path.split(".")[1:]
    text, joint = (TEXT_PARTS, None) if family is None else (family.text_parts, family.joint_parts)
    places = {} if family is None else family.image_places
    first = None if family is None else family.sequence_first
    in_attention = any(isinstance(owner, (Attention, AttentionModuleMixin)) for owner in owners)
    return Site(
        path,
        module,
        single_stream=joint is not None and any(re.search(joint, part) for part in parts),
        text=any(re.search(text, part) for part in parts),
        in_attention=in_attention,
        image_first=family is not None and family.image_first,
        sequence_first=first is not None
        and any(re.search(first, part) for part in parts)
        and not (in_attention or isinstance(module, (Attention, AttentionModuleMixin))),
        image_place=next((places[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in places), None),
    )


def check_width(pipe: Any, hookpoint: str, sae: SparseAutoencoder) -> None:
    """Refuse an SAE of another width than the weights of its module.

    Raises:
        ValueError: no weight has it, or there is no such hookpoint.
    """
    module = site(pipe, hookpoint).module
    shapes = [parameter.shape for parameter in module.parameters() if parameter.ndim]
    width = sae.config.d_in
    if shapes and width not in {size for shape in shapes for size in (shape[0], shape[-1])}:
        raise ValueError(
            f"the SAE reads activations of width {width}, no weight of {hookpoint} ({type(module).__name__}) has that "
            "size; it is for another model"
        )


def hookpoint_of(pipe: Any, sae: SparseAutoencoder, hookpoint: str | None = None) -> str:
    """Where an SAE reads: a given hookpoint, or its own.

    Raises:
        ValueError: neither, no such hookpoint, or an SAE of another width than its module.
    """
    place = hookpoint or sae.config.hookpoint
    if place is None:
        raise ValueError("the SAE names no hookpoint; give one")
    check_width(pipe, place, sae)
    return place


def _modules(pipe: Any, path: str) -> list[Any]:
    """The modules from the component to the hookpoint, with `torch.compile`'s wrappers."""
    component, *parts = path.split(".")
    found = [getattr(pipe, component)]
    for part in parts:
        found.append(getattr(compat.unwrapped(found[-1]), part))
    return found


@contextmanager
def hooked(
    pipe: Any,
    functions: Mapping[str, Function],
    *,
    source: Mapping[str, Reads] | None = None,
    after_call: Callable[[DenoiserCall], None] | None = None,
) -> Iterator[None]:
    """Run functions on activations while the context is open.

    Args:
        functions: by hookpoint.
        source: of hookpoints that read something else than a module's output: "update", output minus input; "input",
            where the function is given both (`Tokens.inputs`) and returns another output.
        after_call: called at the end of each call of the denoiser.

    Raises:
        ValueError: an unknown hookpoint or denoiser, before anything is hooked; a hookpoint that the first call of the
            denoiser did not come to; a module whose output holds no tokens.
    """
    sites = [site(pipe, hookpoint) for hookpoint in functions]
    prefix = f"imgdit_sae_{next(_numbers)}"
    placed: list[tuple[torch.nn.Module, str]] = []

    def place(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
        compat.add_hook(module, hook, name)
        placed.append((module, name))

    watchers = {s.path.partition(".")[0]: _CallHook(pipe, denoiser_of(pipe, s.path), after_call) for s in sites}
    for watcher in watchers.values():
        family_of(watcher.denoiser)
    with ExitStack() as caches:
        for watcher in watchers.values():
            caches.enter_context(compat.step_cache_set_aside(watcher.denoiser))
        try:
            for watcher in watchers.values():
                place(watcher.denoiser, watcher, prefix)
            for number, (s, function) in enumerate(zip(sites, functions.values())):
                watcher = watchers[s.path.partition(".")[0]]
                plane = _plane_of(pipe, s)
                if plane is not None:
                    place(plane[0], plane[1], f"{prefix}_plane_{number}")
                reads = (source or {}).get(s.path, "output")
                hook = _SiteHook(s, watcher, function, reads, None if plane is None else plane[1])
                place(s.module, hook, f"{prefix}_{number}")
                watcher.waiting[s.path] = s.module
        except BaseException:
            _remove(placed)
            raise
    compiled = {id(module): module for s in sites for module in _modules(pipe, s.path)}
    with compat.uncompiled(compiled.values()):
        try:
            yield
        finally:
            _remove(placed)


def _remove(placed: list[tuple[torch.nn.Module, str]]) -> None:
    for module, name in reversed(placed):
        compat.remove_hook(module, name)


class _CallHook(compat.CallNameHook):
    """Notes what the current call of a denoiser works on."""

    def __init__(
        self, pipe: Any, denoiser: torch.nn.Module, after_call: Callable[[DenoiserCall], None] | None
    ) -> None:
        super().__init__()
        self.pipe, self.denoiser, self.after_call = pipe, denoiser, after_call
        self.call: DenoiserCall | None = None
        self.measured = MeasuredPlaces()
        self.last: tuple | None = None
        """Latents and timestep of the last call; `None` where the next one is the first with its own."""
        self.waiting: dict[str, torch.nn.Module] = {}
        """Hookpoints that were not called yet."""

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        arguments = bind(self.denoiser, args, kwargs)
        inputs = tuple(arguments.get(name) for name in ("hidden_states", "x", "timestep", "t"))
        second = self.last is not None and all(a is b for a, b in zip(self.last, inputs))
        self.last = None if second else inputs
        self.call = describe_call(self.pipe, self.denoiser, arguments, self.call_name, self.measured, second=second)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        call, self.call = self.call, None
        for path, site_module in self.waiting.items():
            raise ValueError(
                f"{type(self.denoiser).__name__} does not call {path} ({type(site_module).__name__}), so nothing can "
                "be read or changed there; hook the module around it, or one of its parts"
            )
        if self.after_call is not None and call is not None:
            self.after_call(call)
        return output


class _PlaneHook(ModelHook):
    """Notes the size of the plane that a UNet's attention turns into a token sequence."""

    grid: Grid | None = None

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        plane = bind(module, args, kwargs)["hidden_states"]
        self.grid = (plane.shape[2], plane.shape[3])
        return args, kwargs


def _plane_of(pipe: Any, s: Site) -> tuple[torch.nn.Module, _PlaneHook] | None:
    """The attention around a module that knows the plane its tokens come from, and a hook for it."""
    denoiser, *inside, _ = map(compat.unwrapped, _modules(pipe, s.path))
    classes = family_of(denoiser).plane_parts
    for module in inside:
        if any(cls.__name__ in classes for cls in type(module).__mro__):
            return module, _PlaneHook()
    return None


def _first_input(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`hidden_states` of a call, or its first argument where none is called so."""
    arguments = bind(module, args, kwargs)
    return arguments["hidden_states"] if "hidden_states" in arguments else list(arguments.values())[1]


class _SiteHook(ModelHook):
    """Hands a module's tokens to a function."""

    def __init__(
        self, s: Site, watcher: _CallHook, function: Function, reads: Reads, plane: _PlaneHook | None
    ) -> None:
        super().__init__()
        self.site, self.watcher, self.function, self.reads, self.plane = s, watcher, function, reads, plane
        self.input: Any = None

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        if self.reads != "output":
            self.input = _first_input(module, args, kwargs)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        call = self.watcher.call
        if call is None:  # a cache or checkpointing runs the block outside the denoiser's call
            return output
        self.watcher.waiting.pop(self.site.path, None)
        if call.rows == () and not self.site.text:  # the call reads its image from a cache
            self.input = None
            return output
        grid = None if self.plane is None else self.plane.grid
        tokens = self.site.tokens(output, call, grid)
        if self.reads == "output":
            values = self.function(tokens)
            return output if values is None else self.site.replaced(output, call, values)
        before = self.site.tokens(self.input, call, grid, beside_text=self.site.apart(output))
        self.input = None
        if self.reads == "input":
            values = self.function(tokens._replace(inputs=before.values))
            return output if values is None else self.site.replaced(output, call, values)
        # The difference of two numbers in half precision is rounded once, when it is added to the input again.
        exact = torch.promote_types(tokens.values.dtype, torch.float32)
        after = tokens.values.to(exact)
        change = after - before.values.to(exact)
        values = self.function(tokens._replace(values=change))
        return output if values is None else self.site.replaced(output, call, after + (values - change))
