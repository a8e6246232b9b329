"""Recorded runs of Dual Diffusion, and parts that replay them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from imgdit import ImageTextPipeline, MMDiT
from imgdit.schedulers.masked_text import TextDraws

FIXTURES = Path(__file__).parent / "parity" / "dual_diffusion"
_READ = json.loads((FIXTURES / "cases.json").read_text())
META: dict[str, Any] = _READ["meta"]
CASES = {case["name"]: case for case in _READ["cases"]}
PIPELINE = FIXTURES / "pipeline"


def named(*kinds: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds]


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "cases.safetensors")


def recorded(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and outputs of a case by their names."""
    found = (CASES[case]["inputs"], CASES[case]["outputs"])
    return tuple({name: _tensors()[value["key"]] for name, value in part.items()} for part in found)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The recording's rule of errors: relative to the largest value, or absolute where that is below 1."""
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=tolerance * scale)


@cache
def transformer() -> MMDiT:
    return MMDiT.from_pretrained(PIPELINE, subfolder="transformer").eval()


@cache
def pipeline() -> ImageTextPipeline:
    pipe = ImageTextPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Replay:
    """A pipeline that takes recorded draws, and what it read: each grid of tokens that a pass was made over."""

    def __init__(self, uniform: torch.Tensor):
        self.pipe, self.uniform, self.states = pipeline(), uniform, []

    def __enter__(self) -> "Replay":
        count = len(self.uniform)
        self.pipe._draws_of = lambda step: TextDraws(gumbel=self.uniform[step]) if step < count else TextDraws()
        self.hook = self.pipe.text_encoder.register_forward_pre_hook(
            lambda module, args: self.states.append(args[0].clone())
        )
        return self

    def __exit__(self, *_: object) -> None:
        del self.pipe._draws_of
        self.hook.remove()
