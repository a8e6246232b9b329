"""A large MMDiT on a GPU: forward passes and training steps with conditions, by attention backends and compilers.

Everything but the clock and the kernels runs on a CPU too, with `TINY`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from imgdit import compat
from imgdit.attention.cache import KVCache
from imgdit.benchmarks.speed.conditions import TARGETS
from imgdit.benchmarks.speed.timing import compare, flops_of, gemm_peak
from imgdit.frames import Frame
from imgdit.kernels import prefer_onednn
from imgdit.layout import FrameLayout
from imgdit.lora.files import activate
from imgdit.models.mmdit import MMDiT

Variant = Literal["eager", "compiled", "CUDA graphs"]


class Size(NamedTuple):
    """What is measured."""

    heads: int
    head_dim: int
    axes: tuple[int, int, int]
    double: int
    single: int
    side: int
    """Rows and columns of tokens of the image, and of each condition."""
    text: int


LARGE = Size(heads=16, head_dim=128, axes=(16, 56, 56), double=5, single=10, side=64, text=512)
"""1.4 B parameters, 1024 x 1024 pixels."""
TINY = Size(heads=2, head_dim=16, axes=(4, 6, 6), double=1, single=1, side=4, text=8)


class LargeRow(NamedTuple):
    """One line of the table."""

    work: str
    variant: Variant
    backend: str
    """Of attention."""
    seconds: float
    """Median."""
    against: str
    ratio: float
    """Median of the pairwise ratios to `against`, which runs eagerly on the native backend."""
    low: float
    high: float
    flops: float
    """Floating-point operations per second."""
    fraction: float
    """`flops` over those of a square product in the same run and dtype."""
    graph_breaks: int = 0
    recompiled: int = 0
    """Graphs compiled anew when prompt, LoRA scale and noise level changed."""


class _Work(NamedTuple):
    name: str
    call: Callable[[], torch.Tensor]
    change: Callable[[], None]
    """Gives the next call another prompt, noise level and LoRA scale."""


def large_costs(
    size: Size = LARGE,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    backends: Sequence[str] = ("native", "flash", "xformers"),
    variants: Sequence[Variant] = ("eager", "compiled", "CUDA graphs"),
    compiler: str = "inductor",
    rounds: int = 9,
) -> Iterator[LargeRow]:
    """0, 1 and 2 conditions, joint and from a cache, forward and training, for every backend and variant.

    Args:
        backends: diffusers' names of attention backends; one that the machine lacks raises diffusers' own error.
        variants: "compiled" is `compile_repeated_blocks(fullgraph=True)`, which refuses graph breaks; "CUDA graphs"
            the same with `mode="reduce-overhead"`.
        compiler: backend of `torch.compile`.
    """
    torch.manual_seed(0)
    plain = model_of(size).to(device, dtype).eval()
    diffusers: Any = plain.to_diffusers()
    peak = gemm_peak(size=8192 if torch.device(device).type == "cuda" else 256, device=device, dtype=dtype)
    for variant in variants:
        model = model_of(size).to(device, dtype).eval()
        model.load_state_dict(plain.state_dict())
        works = list(_works(model, size, device, dtype))
        flops = {work.name: flops_of(work.call) for work in works}  # before attention is somebody else's kernel
        if variant != "eager":
            torch.compiler.reset()
            options = {"mode": "reduce-overhead"} if variant == "CUDA graphs" else {}
            model.compile_repeated_blocks(fullgraph=True, backend=compiler, **options)
        for backend in backends:
            model.set_attention_backend(backend)
            for work in works:
                compat.graph_counters().clear()
                work.call()
                compiled = compat.graph_counters()["stats"]["unique_graphs"]
                work.change()
                work.call()
                new = compat.graph_counters()["stats"]["unique_graphs"] - compiled
                other, against = _baseline(plain, diffusers, size, work.name, device, dtype)
                row = compare(work.name, against, work.call, other, rounds=rounds, device=device)
                speed = flops[work.name] / row.ours
                breaks = sum(compat.graph_counters()["graph_break"].values())
                yield LargeRow(
                    work.name, variant, backend, row.ours, against, row.ratio, row.low, row.high, speed, speed / peak,
                    breaks, new,
                )  # fmt: skip


def model_of(size: Size) -> MMDiT:
    """Of random weights."""
    return MMDiT(
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=size.heads * size.head_dim,
        pooled_projection_dim=64,
        axes_dims_rope=size.axes,
        context_pre_only=False,
    )


def _inputs(model: MMDiT, size: Size, device: Any, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    to = {"device": device, "dtype": dtype}
    return {
        "hidden_states": torch.randn(1, tokens, model.token_channels, **to),
        "encoder_hidden_states": torch.randn(1, size.text, model.config.joint_attention_dim, **to),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, **to),
        "timestep": torch.full((1,), 0.5, **to),
    }


def _works(model: MMDiT, size: Size, device: Any, dtype: torch.dtype) -> Iterator[_Work]:
    """Every work, on the model with an adapter of the conditions."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, "condition")
    model.to(device, dtype)
    activate(model, [])
    prefer_onednn(model)
    prepare_model_for_compiled_hotswap(model)  # scales as tensors: a number would be compiled in
    for conditions in (0, 1, 2):
        for sees in ("joint", "self") if conditions else ("joint",):
            frames = [Frame((size.side, size.side))]
            frames += [
                Frame((size.side, size.side), sigma=0.0, adapter="condition", sees=sees, index=float(i + 1))
                for i in range(conditions)
            ]
            layout = FrameLayout.build(frames, size.text)
            inputs = _inputs(model, size, device, dtype, layout.image_length)
            name = f"{conditions} condition(s), {'joint' if sees == 'joint' else 'cached'}"
            if sees == "self":
                cache = KVCache()
                with torch.no_grad():
                    model(**inputs, layout=layout, cache=cache)
                cache.freeze()
                layout = layout.without_frozen()
                inputs |= {"hidden_states": inputs["hidden_states"][:, : layout.image_length], "cache": cache}
            inputs["layout"] = layout
            yield _forward(model, inputs, f"forward, {name}")
            if sees == "joint":
                yield _training(model, inputs, f"training step, {name}")


def _changes(model: MMDiT, inputs: dict[str, Any]) -> Callable[[], None]:
    def change() -> None:
        inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
        inputs["timestep"] = inputs["timestep"] / 2
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["condition"].mul_(0.5)

    return change


def _forward(model: MMDiT, inputs: dict[str, Any], name: str) -> _Work:
    def call() -> torch.Tensor:
        with torch.no_grad(), _step():
            return model(**inputs).sample.clone()

    return _Work(name, call, _changes(model, inputs))


def _training(model: MMDiT, inputs: dict[str, Any], name: str) -> _Work:
    """Forward and backward over every weight."""

    def call() -> torch.Tensor:
        model.requires_grad_(True)
        with torch.enable_grad(), _step():
            loss = model(**inputs).sample.float().square().mean()
            loss.backward()
        model.zero_grad()
        return loss.detach()[None]

    return _Work(name, call, _changes(model, inputs))


@contextmanager
def _step() -> Iterator[None]:
    """Results of the last step may be overwritten from here on."""
    torch.compiler.cudagraph_mark_step_begin()
    yield


def _baseline(
    plain: MMDiT, diffusers: Any, size: Size, work: str, device: Any, dtype: torch.dtype
) -> tuple[Callable[[], torch.Tensor], str]:
    """diffusers' model where there is no condition, otherwise ours without one."""
    ours = _inputs(plain, size, device, dtype, size.side**2)
    frame = Frame((size.side, size.side))
    if "0 condition" in work:
        ids = {"img_ids": frame.ids().to(device), "txt_ids": torch.zeros(size.text, 3, device=device)}
        model, inputs, name = diffusers, ours | ids, type(diffusers).__name__
    else:
        layout = FrameLayout.build([frame], size.text)
        model, inputs, name = plain, ours | {"layout": layout}, "no condition"
    return (_training if work.startswith("training") else _forward)(model, inputs, "").call, name
