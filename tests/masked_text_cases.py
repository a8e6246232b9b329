"""Recorded runs of LLaDA, Fast-dLLM, Dream and DiffEmbed, and parts that replay them."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from imgdit.models.masked_lm import load_masked_lm
from imgdit.pipelines.masked_text import Block, MaskedTextPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler, TextDraws

FIXTURES = Path(__file__).parent / "parity" / "llada"
FILES = ("cases", "dream_cases")
CASES = {
    case["id"]: case | {"file": name}
    for name in FILES
    for case in json.loads((FIXTURES / f"{name}.json").read_text())["cases"]
}


def named(*kinds: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds]


@cache
def _tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def recorded(case: str) -> dict[str, torch.Tensor]:
    """Tensors of a case, by their names within it."""
    found = _tensors(CASES[case]["file"])
    return {key.removeprefix(f"{case}/"): value for key, value in found.items() if key.startswith(f"{case}/")}


@cache
def _model(name: str):
    return load_masked_lm(FIXTURES / name)


def model_of(case: str):
    """The case's model, with the rows of its head that the case replaces."""
    model = _model(CASES[case].get("checkpoint", "dream"))
    patch = CASES.get(f"{case}.head")
    if patch is None:
        return model
    model = load_masked_lm(FIXTURES / patch["checkpoint"])
    with torch.no_grad():
        model.lm_head.weight[patch["rows"]] = recorded(f"{case}.head")["rows"]
    return model


class Replay(MaskedTextPipeline):
    """Takes recorded draws, records grids, and does on request what published samplers do otherwise.

    `draws`: tensors whose first axis counts steps and whose last or next axis counts places of the grid.
    """

    draws: dict[str, torch.Tensor] = {}
    holes_compete = False
    steps_bound = False

    def _prepare(self, *args, **kwargs):
        self.block_index = -1
        return super()._prepare(*args, **kwargs)

    def _blocks(self, run):
        blocks = super()._blocks(run)
        if not self.holes_compete:
            return blocks
        run.fillable = run.grid == run.mask_token_id
        return [Block(0, block.stop, block.start) for block in blocks if block.start]

    def _write_block(self, run, block):
        self.block_index, self.block = self.block_index + 1, block
        super()._write_block(run, block)

    def _draws(self, run, step, revealed):
        found = {}
        at = self.block_index * run.options.steps + step
        for name, tensor in self.draws.items():
            if at < len(tensor):
                found[name] = tensor[at][:, self.block.start : self.block.stop]
        return TextDraws(**({"revealed": revealed} | found))


class FewSteps(MaskedTextScheduler):
    """Stops after the steps of a block even where a threshold leaves masks, as the published dual cache does."""

    def max_steps(self, masks):
        return self.num_inference_steps
