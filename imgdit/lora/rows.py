"""LoRA on rows: an adapter that acts on the tokens of one frame or text and on no others.

The adapters are ordinary PEFT layers (so files, `set_adapters` and quantised bases stay what they are). One base GEMM
runs over all tokens, then each adapter adds its product on its own slice: `y[:, a:b] += scale * B(A(x[:, a:b]))`.
Nothing is toggled, so no product is computed with scale 0 and two threads cannot disturb each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.hooks import ModelHook
from diffusers.utils import scale_lora_layers
from peft.tuners.lora import LoraLayer

from imgdit import compat
from imgdit.layout import FrameLayout


class AdapterRows(NamedTuple):
    """Which adapter acts on which rows of a tensor (B, rows, ...)."""

    rows: tuple[tuple[slice, str | None], ...]
    """Slices with the name of the adapter that owns them; `None`: the main rows."""
    claimed: frozenset[str]
    """Adapters that own rows somewhere in the run."""
    main: tuple[str, ...] | None
    """Adapters of the main rows; `None`: every active adapter that nobody claims."""
    everywhere: tuple[str, ...] = ()
    """Adapters of all rows."""


class LoraPlan(NamedTuple):
    """`AdapterRows` of every tensor a block works on: tokens of a stream, or one modulation vector per segment."""

    text: AdapterRows
    """Text tokens."""
    image: AdapterRows
    """Tokens of the frames."""
    joint: AdapterRows
    """Text tokens, then the frames' (single-stream blocks)."""
    text_vectors: AdapterRows
    """One row per text."""
    image_vectors: AdapterRows
    """One row per frame."""
    joint_vectors: AdapterRows
    """One row per text, then one per frame."""
    predicted: AdapterRows
    """Tokens of the frames being generated (the model's output)."""
    predicted_vectors: AdapterRows
    """One row per frame being generated."""


def main_rows(length: int) -> AdapterRows:
    """All rows of a tensor belong to nobody: every active adapter acts on them."""
    return AdapterRows(((slice(0, length), None),), frozenset(), None)


def lora_plan(layout: FrameLayout) -> LoraPlan | None:
    """Adapter rows of a layout, kept on it. `None` where no frame has an adapter: PEFT's own forward is right."""
    return layout.kept("adapter rows", lambda: _lora_plan(layout)) if layout.has_adapters else None


def _lora_plan(layout: FrameLayout) -> LoraPlan:
    texts = [(n, layout.texts[i].adapter) for i, n in zip(layout.live_texts, layout.text_lengths)]
    live = [layout.frames[i] for i in layout.live]
    frames = [(n, None if frame.everywhere else frame.adapter) for frame, n in zip(live, layout.lengths)]
    predicted = [rows for frame, rows in zip(live, frames) if frame.predicted]

    def rows(segments: Sequence[tuple[int, str | None]]) -> AdapterRows:
        slices: list[tuple[slice, str | None]] = []
        start = 0
        for length, adapter in segments:
            stop = start + length
            if slices and slices[-1][1] == adapter:
                slices[-1] = (slice(slices[-1][0].start, stop), adapter)
            else:
                slices.append((slice(start, stop), adapter))
            start = stop
        return AdapterRows(tuple(slices), layout.claimed, layout.main_adapters, layout.everywhere)

    def vectors(segments: Sequence[tuple[int, str | None]]) -> AdapterRows:
        return rows([(1, adapter) for _, adapter in segments])

    return LoraPlan(
        text=rows(texts),
        image=rows(frames),
        joint=rows(texts + frames),
        text_vectors=vectors(texts),
        image_vectors=vectors(frames),
        joint_vectors=vectors(texts + frames),
        predicted=rows(predicted),
        predicted_vectors=vectors(predicted),
    )


def linear(module: nn.Module, x: torch.Tensor, rows: AdapterRows | None, *, shared: bool = False) -> torch.Tensor:
    """`module(x)`, with every LoRA adapter on its own rows only.

    Args:
        module: a linear layer, or a convolution without overlap taken as one on patches, wrapped by PEFT or not.
        x: (B, rows, features).
        rows: who owns which rows; `None`: the module as it is.
        shared: the adapters of the main rows act on all rows. OminiControl switches adapters in a fixed list of
            modules; outside of it a style LoRA acts on every token, the conditions' too.

    Raises:
        ValueError: an adapter is merged into the base, or is of a kind (DoRA and the like) that cannot act on rows.
    """
    if not isinstance(module, LoraLayer):
        return _call(module, x)
    if rows is None:
        return _call(module, x)
    return compat.called(module, partial(on_rows, module, rows=rows, shared=shared), x)


@contextmanager
def acting_on(model: nn.Module, rows: AdapterRows) -> Iterator[None]:
    """Let the LoRA adapters of a model of another library act on some of its tokens while the context is open: of a
    language model, on those of an answer and not on its prompt.

    Args:
        model: all its layers that PEFT wrapped get tensors (B, rows, features) of one sequence.
        rows: who owns which tokens.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    name = f"imgdit_rows_{id(rows)}"
    for layer in layers:
        compat.add_hook(layer, _RowsHook(rows), name)
    try:
        yield
    finally:
        for layer in layers:
            compat.remove_hook(layer, name)


class _RowsHook(ModelHook):
    """Computes a layer with its adapters on their rows."""

    def __init__(self, rows: AdapterRows):
        super().__init__()
        self.rows = rows

    def new_forward(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        return on_rows(module, x, self.rows)


def on_rows(module: LoraLayer, x: torch.Tensor, rows: AdapterRows, *, shared: bool = False) -> torch.Tensor:
    """`linear` of a layer wrapped by PEFT, past the hooks on it: for a hook that computes the layer's result."""
    if module.disable_adapters:
        return _call(module.get_base_layer(), x)
    fused = module.merged_adapters
    if fused:
        refuse_fused(rows.claimed, fused)
    out = _call(module.base_layer, x)
    if compat.has_hooks(module.base_layer):
        out = out.clone()  # the adapters are added in place: a hook that kept it keeps what it saw
    main = (
        tuple(name for name in module.active_adapters if name not in rows.claimed) if rows.main is None else rows.main
    )
    main = (*main, *rows.everywhere)
    for part, owner in rows.rows:
        acting = main if owner is None else (owner, *(main if shared else rows.everywhere))
        for name in dict.fromkeys(acting):  # a condition's adapter may be a main one as well, and acts once
            if name in fused:
                continue
            if name not in module.lora_A:
                continue
            if name in module.lora_variant:
                raise ValueError(f"adapter {name!r} is not a plain LoRA (DoRA or the like) and cannot act on rows")
            down, up = module.lora_A[name], module.lora_B[name]
            delta = _call(up, _call(down, module.lora_dropout[name](x[:, part].to(down.weight.dtype))))
            change = (delta * module.scaling[name]).to(out.dtype)
            if change.shape[1] == out.shape[1]:  # autograd refuses to change the whole of a frozen layer's result
                out = out + change
            else:
                out[:, part] += change
    return out


@contextmanager
def scaled_adapters(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply a model's active adapters by a number, as diffusers does for `scale` among a call's attention
    arguments. Afterwards their weights are what they were, also after 0, where diffusers sets them to 1."""
    if scale == 1.0:
        yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def refuse_disabled(model: nn.Module, names: Collection[str]) -> None:
    """Refuse adapters that are to act on rows of a model while all its adapters are switched off."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.disable_adapters and any(name in layer.lora_A for name in names):
            raise ValueError(
                f"adapter {next(name for name in names if name in layer.lora_A)!r} cannot act: the model's adapters "
                "are disabled (disable_lora). Call enable_lora() first; set_adapters() switches single ones off"
            )


def refuse_fused(claimed: Iterable[str], fused: Sequence[str]) -> None:
    """Refuse a condition's adapter that is part of the base weights."""
    wrong = [name for name in claimed if name in fused]
    if wrong:
        raise ValueError(
            f"adapter {wrong[0]!r} is fused into the base weights and acts on every token, not on its condition's "
            "alone; call unfuse_lora() first, and fuse style adapters only (adapter_names=[…])"
        )


def _call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer on (B, rows, features); features of a patch are ordered (channel, row, column)."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if isinstance(base, nn.Conv2d):  # one image per patch; called as a module, so that offloading sees it
        patches = x.reshape(-1, base.in_channels, *base.kernel_size)
        return layer(patches).reshape(*x.shape[:2], -1)
    return layer(x)


def feed_forward(module: nn.Module, x: torch.Tensor, rows: AdapterRows | None, *, shared: bool = True) -> torch.Tensor:
    """diffusers' `FeedForward` (GELU projection, dropout, projection) with adapters on rows.

    Args:
        shared: of `linear` for the first projection, which OminiControl does not switch.
    """
    if rows is None:
        return module(x)
    return compat.called(module, partial(_feed_forward, module, rows, shared), x)


def _feed_forward(module: nn.Module, rows: AdapterRows, shared: bool, x: torch.Tensor) -> torch.Tensor:
    activation, dropout, project = module.net  # type: ignore[misc]

    def activated(x: torch.Tensor) -> torch.Tensor:
        return activation.gelu(linear(activation.proj, x, rows, shared=shared))

    return linear(project, dropout(compat.called(activation, activated, x)), rows)
