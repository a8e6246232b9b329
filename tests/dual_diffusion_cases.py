"""Recorded runs of Dual Diffusion, and parts that replay them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from imgdit import MMDiT

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
