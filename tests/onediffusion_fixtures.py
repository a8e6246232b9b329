"""Recorded numbers of OneDiffusion's reference; tests/parity/onediffusion/README.md has every formula."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "parity" / "onediffusion"
TINY = FIXTURES / "tiny"
CASES: list[dict[str, Any]] = json.loads((FIXTURES / "cases.json").read_text())["cases"]


def named(*kinds: str) -> list[str]:
    """Names of the cases of some kinds."""
    return [case["name"] for case in CASES if case["kind"] in kinds]


def case(name: str) -> dict[str, Any]:
    return next(case for case in CASES if case["name"] == name)


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "cases.safetensors")


def tensors(case: dict[str, Any], side: str) -> dict[str, torch.Tensor]:
    """A case's "inputs" or "outputs" by name."""
    return {name: _tensors()[entry["key"]] for name, entry in case[side].items()}


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str = "") -> None:
    """The fixtures' rule: largest error against the largest value, or against 1 if that is less."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, recorded {tuple(want.shape)}"
    error = (got.double() - want.double()).abs().max().item()
    limit = tolerance * max(1.0, want.double().abs().max().item())
    assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.2e}"
