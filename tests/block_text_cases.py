"""Recorded runs of BD3-LM, MDLM, SEDD and the autoregressive baseline, and parts that replay them."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from imgdit.models.bd3lm import load_bd3lm
from imgdit.pipelines.block_text import BlockTextPipeline

FIXTURES = Path(__file__).parent / "parity" / "block_diffusion"
CASES = {case["id"]: case for case in json.loads((FIXTURES / "cases.json").read_text())["cases"]}
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def named(*kinds: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds]


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "cases.safetensors")


def recorded(case: str) -> dict[str, torch.Tensor]:
    """Tensors of a case, by their names within it."""
    return {key.removeprefix(f"{case}/"): value for key, value in _tensors().items() if key.startswith(f"{case}/")}


def model_of(case: str):
    """The case's model, of which training does not drop anything out."""
    model = load_bd3lm(FIXTURES / CASES[case]["checkpoint"])
    for block in model.blocks:
        block.dropout = 0.0
    return model


class Replay(BlockTextPipeline):
    """Takes recorded draws. `zero_at_last`: at time 0 masks become token 0, as in the published code."""

    draws: dict[str, torch.Tensor] = {}
    zero_at_last = False

    def _token_uniforms(self, run, shape, rows):
        return self.draws["gumbel_uniform"][run.calls]

    def _hitting_times(self, run, rows):
        return self.draws["hitting_uniform"][run.calls]

    def _hitting_places(self, run, number):
        return self.draws["hitting_index"][run.calls]

    def _tokens(self, run, weights, rows):
        tokens = super()._tokens(run, weights, rows)
        last = bool((weights[..., self.model.mask_token_id] == 0).all())
        return torch.zeros_like(tokens) if self.zero_at_last and last else tokens
