"""How long things take, as ratios of one run: the machine's speed drifts, a ratio of interleaved runs does not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..frames import Frame, FrameLayout
from ..models.mmdit import MMDiT

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


def _timed(call: Callable[[], Any], device: torch.device) -> float:
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
            seconds = {call: _timed(call, device) for call in order}
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
    """Floating-point operations per second of a square matrix product: what the machine can do at best."""
    device = torch.device(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(_timed(lambda: torch.mm(a, b), device) for _ in range(rounds))


def forward_comparisons(
    *, rounds: int = 9, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Comparison]:
    """MMDiT against diffusers' models with the same weights, and modulation per frame against per token."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    options: dict[str, Any] = {"rounds": rounds, "device": device}
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    torch.manual_seed(0)
    shared = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": 512}
    text = {
        "encoder_hidden_states": torch.randn(1, TEXT, 512, **to),
        "pooled_projections": torch.randn(1, 256, **to),
    }

    flux = FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
        **shared,
    )
    flux = flux.to(**to).eval()
    ours = MMDiT.from_diffusers(flux)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 64, **to),
        "timestep": torch.rand(1, **to),
        "img_ids": Frame((SIDE, SIDE)).ids().to(device),
        "txt_ids": torch.zeros(TEXT, 3, device=device),
        **text,
    }
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
        **shared,
    )
    sd3 = sd3.to(**to).eval()
    ours_sd3 = MMDiT.from_diffusers(sd3)
    grid = {
        "hidden_states": torch.randn(1, 16, 2 * SIDE, 2 * SIDE, **to),
        "timestep": torch.rand(1, **to) * 1000,
        **text,
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
    half = (SIDE // 2, SIDE)
    frames = [Frame(half), Frame(half, offset=(SIDE // 2, 0))]
    tokens = [Frame((1, 1), offset=(row, column)) for row in range(SIDE) for column in range(SIDE)]
    rest = {name: value for name, value in inputs.items() if not name.endswith("_ids")}
    calls = []
    for parts in (frames, tokens):
        levels = torch.tensor([[0.2, 0.7]], device=options["device"], dtype=inputs["timestep"].dtype)
        timestep = levels.repeat_interleave(len(parts) // 2, dim=1)
        arguments = {**rest, "timestep": timestep, "layout": FrameLayout.build(parts, TEXT)}
        calls.append(lambda arguments=arguments: model(**arguments).sample)
    return compare("two frames, modulation per frame", "modulation per token", calls[0], calls[1], **options)
