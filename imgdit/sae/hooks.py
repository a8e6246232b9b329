"""Reading and changing activations while a pipeline runs.

Hookpoints are module paths within the pipeline; `*` stands for one part of a path. A hook on the denoiser notes what
each call works on (timestep, guidance halves, frames), hooks on the modules hand the image's tokens to a function; of
modules that belong to the text, the text's.
They are diffusers' `ModelHook`s, which `torch.compile`, offloading and step caches respect, and are always removed.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from .. import compat
from .streams import DenoiserCall, Grid, Site, Tokens, bind, describe_call

Function = Callable[[Tokens], torch.Tensor | None]
"""Gets the tokens at a hookpoint, returns others of the same shape, or `None` to leave them."""

_numbers = itertools.count()
_TEXT_PARTS = re.compile(r"context|add_|encoder_hidden|caption|text")


def denoiser_names(pipe: Any) -> list[str]:
    """Components of a pipeline that predict."""
    return [name for name in ("transformer", "unet") if getattr(pipe, name, None) is not None]


def find_hookpoints(pipe: Any, patterns: Iterable[str]) -> list[str]:
    """Hookpoints of a pipeline that match, in the order of the patterns and of the model.

    Args:
        patterns: paths such as "transformer.transformer_blocks.*" or "unet.up_blocks.1.attentions.1".

    Raises:
        ValueError: a pattern matches nothing; names the nearest path.
    """
    names = denoiser_names(pipe)
    if not names:
        raise ValueError(f"{type(pipe).__name__} has no transformer and no unet to read from")
    known = [f"{name}.{path}" for name in names for path, _ in getattr(pipe, name).named_modules() if path]
    found: dict[str, None] = {}
    for pattern in patterns:
        parts = [re.escape(part).replace(r"\*", r"[^.]*") for part in pattern.split(".")]
        matching = [path for path in known if re.fullmatch(r"\.".join(parts), path)]
        if not matching:
            raise ValueError(f"no module is called {_near(pattern, known)}")
        found.update(dict.fromkeys(matching))
    return list(found)


def _near(pattern: str, known: list[str]) -> str:
    """The nearest path; of a model's hundreds, all cannot be listed."""
    close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
    return f"{pattern!r}; the nearest is {close[0]!r}"


def site(pipe: Any, hookpoint: str) -> Site:
    """The module of a hookpoint."""
    (path,) = find_hookpoints(pipe, [hookpoint])
    component, _, inner = path.partition(".")
    module = getattr(pipe, component)
    single = text = False
    for part in inner.split("."):
        text = text or _TEXT_PARTS.search(part) is not None
        module = getattr(module, part)
        single = single or "Single" in type(module).__name__
    return Site(path, module, single, text)


@contextmanager
def hooked(
    pipe: Any,
    functions: Mapping[str, Function],
    *,
    source: Mapping[str, Literal["output", "update"]] | None = None,
    after_call: Callable[[DenoiserCall], None] | None = None,
) -> Iterator[None]:
    """Run functions on activations while the context is open.

    Args:
        functions: by hookpoint.
        source: hookpoints that read a module's update, output minus input, instead of its output.
        after_call: called at the end of each call of the denoiser.

    Raises:
        ValueError: an unknown hookpoint, before anything is hooked.
    """
    sites = [site(pipe, hookpoint) for hookpoint in functions]
    prefix = f"imgdit_sae_{next(_numbers)}"
    placed: list[tuple[torch.nn.Module, str]] = []

    def place(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        placed.append((module, name))

    denoisers = {path: getattr(pipe, path) for path in {s.path.partition(".")[0] for s in sites}}
    with ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(compat.step_cache_set_aside(denoiser))
        try:
            watchers = {path: _CallHook(pipe, denoiser, after_call) for path, denoiser in denoisers.items()}
            for path, denoiser in denoisers.items():
                place(denoiser, watchers[path], prefix)
            for number, (s, function) in enumerate(zip(sites, functions.values())):
                component = s.path.partition(".")[0]
                plane = _plane_of(denoisers[component], s)
                if plane is not None:
                    place(plane[0], plane[1], f"{prefix}_plane_{number}")
                update = (source or {}).get(s.path) == "update"
                hook = _SiteHook(s, watchers[component], function, update, None if plane is None else plane[1])
                place(s.module, hook, f"{prefix}_{number}")
        except BaseException:
            _remove(placed)
            raise
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

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        arguments = bind(self.denoiser, args, kwargs)
        self.call = describe_call(self.pipe, self.denoiser, arguments, self.call_name)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        call, self.call = self.call, None
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


def _plane_of(denoiser: torch.nn.Module, s: Site) -> tuple[torch.nn.Module, _PlaneHook] | None:
    """The attention around a module that knows the plane its tokens come from, and a hook for it."""
    path = s.path.partition(".")[2]
    module: Any = denoiser
    for part in path.split(".")[:-1]:
        module = getattr(module, part)
        if isinstance(module, Transformer2DModel):
            return module, _PlaneHook()
    return None


class _SiteHook(ModelHook):
    """Hands a module's tokens to a function."""

    def __init__(
        self, s: Site, watcher: _CallHook, function: Function, update: bool, plane: _PlaneHook | None
    ) -> None:
        super().__init__()
        self.site, self.watcher, self.function, self.update, self.plane = s, watcher, function, update, plane
        self.input: Any = None

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        if self.update:
            self.input = bind(module, args, kwargs)["hidden_states"]
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        call = self.watcher.call
        if call is None:  # a cache or checkpointing runs the block outside the denoiser's call
            return output
        grid = None if self.plane is None else self.plane.grid
        tokens = self.site.tokens(output, call, grid)
        given = tokens
        if self.update:
            before = self.site.tokens(self.input, call, grid, beside_text=not isinstance(output, torch.Tensor))
            given = tokens._replace(values=tokens.values - before.values)
            self.input = None
        values = self.function(given)
        if values is None:
            return output
        if self.update:
            values = tokens.values + (values - given.values)
        return self.site.replaced(output, call, values)
