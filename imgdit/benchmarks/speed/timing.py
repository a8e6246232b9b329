"""How long things take, as ratios of one run: the machine's speed drifts, a ratio of interleaved runs does not."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from imgdit import compat
from imgdit.frames import Frame
from imgdit.kernels import onednn_is_faster, prefer_onednn
from imgdit.layout import FrameLayout
from imgdit.models.mmdit import MMDiT

# The sizes of the comparison: a medium FLUX and SD3, 256 image and 64 text tokens.
WIDTH, HEADS, HEAD_DIM, TEXT, SIDE = 768, 12, 64, 64, 16


class Comparison(NamedTuple):
    """One row of a benchmark: ours against something else, in the same run."""

    work: str
    against: str
    ours: float
    """Median seconds of ours (process time on a CPU, device time on a GPU)."""
    other: float
    """Median seconds of the other."""
    ratio: float
    """Median of the pairwise ratios ours / other."""
    low: float
    """Smallest ratio."""
    high: float
    """Largest ratio."""
    difference: float
    """Largest absolute difference of the two results."""


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: process time on a CPU, device time on a GPU."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000


def compare(
    work: str,
    against: str,
    ours: Callable[[], torch.Tensor],
    other: Callable[[], torch.Tensor],
    *,
    rounds: int = 9,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Time two calls in turn, after one warm-up each; every second round starts with the other one."""
    device = torch.device(device)
    with torch.no_grad():
        difference = (ours() - other()).abs().max().item()
        pairs = []
        for i in range(rounds):
            order = (ours, other) if i % 2 == 0 else (other, ours)
            seconds = {call: timed(call, device) for call in order}
            pairs.append((seconds[ours], seconds[other]))
    ratios = [a / b for a, b in pairs]
    return Comparison(
        work,
        against,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        difference,
    )


def gemm_peak(*, size: int = 2048, rounds: int = 5, device: torch.device | str = "cpu", dtype: Any = None) -> float:
    """Floating-point operations per second of a square matrix product by `torch.mm`."""
    return gemm_peaks(size=size, rounds=rounds, device=device, dtype=dtype)["torch.mm"]


def gemm_peaks(
    *, size: int = 2048, rounds: int = 5, device: torch.device | str = "cpu", dtype: Any = None
) -> dict[str, float]:
    """The same by each kernel there is: `torch.mm`, and oneDNN where `imgdit.kernels` prefers it."""
    device = torch.device(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    kernels: dict[str, Callable[[], Any]] = {"torch.mm": lambda: torch.mm(a, b)}
    if device.type == "cpu" and a.dtype == torch.float32 and onednn_is_faster():
        linear = compat.onednn_linear()
        kernels["oneDNN"] = lambda: linear(a, b, None, "none", [], "")
    peaks = {}
    for name, kernel in kernels.items():
        kernel()
        peaks[name] = 2 * size**3 / min(timed(kernel, device) for _ in range(rounds))
    return peaks


def medium_flux(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """diffusers' `FluxTransformer2DModel` with 4 double and 8 single blocks of random weights, and its inputs."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    )
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    inputs = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 64, **to),
        "timestep": torch.rand(1, **to),
        "img_ids": Frame((SIDE, SIDE)).ids().to(device),
        "txt_ids": torch.zeros(TEXT, 3, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT, 512, **to),
        "pooled_projections": torch.randn(1, 256, **to),
    }
    return model.to(**to).eval(), inputs


def flops_of(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and attentions of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that a call holds at once, above what there was before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    allocated = most = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most


def forward_comparisons(
    *, rounds: int = 9, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Comparison]:
    """MMDiT against diffusers' models with the same weights, and modulation per frame against per token."""
    from diffusers import SD3Transformer2DModel

    options: dict[str, Any] = {"rounds": rounds, "device": device}
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    flux, inputs = medium_flux(device, dtype)
    ours = MMDiT.from_diffusers(flux)
    prefer_onednn(ours)
    yield compare(
        "MMDiT forward, 4 double + 8 single blocks",
        "FluxTransformer2DModel",
        lambda: ours(**inputs).sample,
        lambda: flux(**inputs).sample,
        **options,
    )
    yield _modulation(ours, inputs, options)

    sd3 = SD3Transformer2DModel(
        sample_size=32,
        num_layers=8,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=256,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=512,
    )
    sd3 = sd3.to(**to).eval()
    ours_sd3 = MMDiT.from_diffusers(sd3)
    prefer_onednn(ours_sd3)
    grid = {
        "hidden_states": torch.randn(1, 16, 2 * SIDE, 2 * SIDE, **to),
        "timestep": torch.rand(1, **to) * 1000,
        "encoder_hidden_states": inputs["encoder_hidden_states"],
        "pooled_projections": inputs["pooled_projections"],
    }
    yield compare(
        "MMDiT forward, 8 double blocks",
        "SD3Transformer2DModel",
        lambda: ours_sd3(**grid).sample,
        lambda: sd3(**grid).sample,
        **options,
    )


def _modulation(model: MMDiT, inputs: dict[str, Any], options: dict[str, Any]) -> Comparison:
    """Two frames at their own noise levels; per token, every token is a frame of its own."""
    tokens = [Frame((1, 1), offset=(row, column)) for row in range(SIDE) for column in range(SIDE)]
    calls = [_frames_call(model, inputs, frames) for frames in (_HALVES, tokens)]
    return compare("two frames, modulation per frame", "modulation per token", calls[0], calls[1], **options)


def mixed_noise_comparison(
    *, rounds: int = 9, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Comparison:
    """Two frames at their own noise levels against one frame of as many tokens. They compute different things."""
    flux, inputs = medium_flux(device, dtype)
    model = MMDiT.from_diffusers(flux)
    prefer_onednn(model)
    two, one = (_frames_call(model, inputs, frames) for frames in (_HALVES, [Frame((SIDE, SIDE))]))
    row = compare(
        "two frames at mixed noise levels", "one frame of as many tokens", two, one, rounds=rounds, device=device
    )
    return row._replace(difference=math.nan)


_HALVES = [Frame((SIDE // 2, SIDE)), Frame((SIDE // 2, SIDE), offset=(SIDE // 2, 0))]


def _frames_call(model: MMDiT, inputs: dict[str, Any], frames: list[Frame]) -> Callable[[], torch.Tensor]:
    """A forward pass over frames of `SIDE` x `SIDE` tokens in all, the first half at level 0.2, the rest at 0.7."""
    rest = {name: value for name, value in inputs.items() if not name.endswith("_ids")}
    levels = torch.tensor([[0.2, 0.7]]).to(inputs["timestep"]).repeat_interleave(max(1, len(frames) // 2), dim=1)
    rest |= {"timestep": levels[:, : len(frames)], "layout": FrameLayout.build(frames, TEXT)}
    return lambda: model(**rest).sample


MIX = (1, 1, 1, 2, 2, 2, 3, 4)
"""Frames of the scenes of a packed batch: half as many as if all had the longest's."""


def packing_comparison(model: MMDiT, *, rounds: int = 9, device: torch.device | str = "cpu") -> Comparison:
    """Scenes of `MIX` frames of 64 tokens, each with 20 of text, in one sequence against a batch as long as the
    longest.

    The padded batch takes no mask, as if attention to padding cost nothing to leave out; so results differ.
    """
    generator = torch.Generator().manual_seed(0)
    prefer_onednn(model)
    text_length, grid, config = 20, (8, 8), model.config
    to = {"device": device, "dtype": model.dtype}

    def call(layout: FrameLayout, batch: int, texts: int) -> Callable[[], torch.Tensor]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(**to)

        inputs = {
            "hidden_states": draw(batch, layout.image_length, model.token_channels),
            "encoder_hidden_states": draw(batch, layout.text_length, config.joint_attention_dim),
            "pooled_projections": draw(texts, config.pooled_projection_dim),
            "timestep": torch.full((texts,), 500.0 / config.timestep_scale, **to),
            "layout": layout,
        }
        return lambda: model(**inputs).sample.sum()

    scenes = [FrameLayout.build([Frame(grid, index=float(i)) for i in range(n)], text_length) for n in MIX]
    packed = call(FrameLayout.pack(scenes), 1, len(MIX))
    padded = call(scenes[-1], len(MIX), len(MIX))
    work = f"{len(MIX)} scenes of {', '.join(map(str, MIX))} frames, packed"
    row = compare(work, "padded to the longest", packed, padded, rounds=rounds, device=device)
    return row._replace(difference=math.nan)
