"""What conditions cost, against the same model without them: ratios within one run, and the fraction of GEMM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig

from imgdit.adapters.condition import Condition
from imgdit.adapters.omni_control import OmniControl
from imgdit.benchmarks.speed.timing import SIDE, compare, flops_of, gemm_peak, medium_flux
from imgdit.kernels import prefer_onednn
from imgdit.lora.config import OMINICONTROL_TARGETS
from imgdit.lora.files import activate
from imgdit.models.mmdit import MMDiT

TARGETS = "|".join(OMINICONTROL_TARGETS)
"""Modules of OminiControl's published adapters, as the regular expression that PEFT takes."""


class Cost(NamedTuple):
    """One row of the table."""

    work: str
    against: str
    """The same weights without conditions and without LoRA, run by the same kernels."""
    seconds: float
    """Median of one step."""
    other: float
    """The same of `against`."""
    ratio: float
    """Median of the pairwise ratios."""
    low: float
    high: float
    fraction: float
    """Floating-point operations per second over GEMM's peak in the same run."""


def condition_costs(
    *, rounds: int = 9, rank: int = 4, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Cost]:
    """Steps of a medium FLUX (4 double, 8 single blocks, width 768; 256 image and 64 text tokens, 256 a condition)."""
    plain, inputs = medium_flux(device, dtype)
    blocks = MMDiT.from_diffusers(plain)  # conditions run through its block functions
    prefer_onednn(blocks)
    model = copy.deepcopy(plain)
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False), name)
    activate(model, [])
    control = OmniControl(FluxPipeline(FlowMatchEulerDiscreteScheduler(), _vae(), None, None, None, None, model))
    image = torch.rand(3, SIDE * 16, SIDE * 16)
    first, second = Condition(image, "first"), Condition(image, "second", position="subject")

    def row(work: str, call: Callable[[], torch.Tensor], other: Any) -> Cost:
        against = type(other).__name__
        result = compare(work, against, call, lambda: other(**inputs).sample, rounds=rounds, device=device)
        peak = gemm_peak(device=device, dtype=dtype)  # in the row's own minute: the machine's speed drifts
        fraction = flops_of(call) / result.ours / peak
        return Cost(work, against, result.ours, result.other, result.ratio, result.low, result.high, fraction)

    def step() -> torch.Tensor:
        return model(**inputs).sample

    def first_step() -> torch.Tensor:
        assert control.run is not None
        control.run.forget()
        return step()

    yield row("no condition, no LoRA", lambda: plain(**inputs).sample, plain)
    yield row("no condition, 2 LoRA loaded", step, plain)
    uses: list[tuple[str, list[Condition], dict[str, Any], Callable[[], torch.Tensor]]] = [
        ("1 condition, joint", [first], {}, step),
        ("2 conditions, joint", [first, second], {}, step),
        ("1 condition, independent, first step", [first], {"mode": "independent"}, first_step),
        ("1 condition, independent, cached steps", [first], {"mode": "independent"}, step),
        ("2 conditions, independent, cached steps", [first, second], {"mode": "independent"}, step),
    ]
    for work, conditions, options, call in uses:
        with control.use(conditions, **options):
            with torch.no_grad():
                call()
            yield row(work, call, blocks)


def _vae() -> AutoencoderKL:
    """A small autoencoder of FLUX's latent shape; it is not timed."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=2,
        shift_factor=0.0,
    ).eval()
