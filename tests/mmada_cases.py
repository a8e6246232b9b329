"""Recorded runs of MMaDA, and parts that replay them."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from imgdit.models.magvitv2 import MagViTv2, load_magvitv2
from imgdit.pipelines.mmada import MMaDAPipeline, load_mmada
from imgdit.schedulers.masked_text import TextDraws

FIXTURES = Path(__file__).parent / "parity" / "mmada"
_READ = json.loads((FIXTURES / "cases.json").read_text())
META = _READ["meta"]
CASES = {case["name"]: case for case in _READ["cases"]}


def named(*kinds: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds]


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "cases.safetensors")


def recorded(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and outputs of a case, by their names within it."""
    found = _tensors()
    return tuple(
        {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
        for start in (f"{case}.in.", f"{case}.out.")
    )


def sizes_of(architecture: dict) -> dict:
    """Arguments of `MagViTv2` in the reference's names."""
    found = {"code_bits": architecture["codebook_dim"]}
    for part in ("encoder", "decoder"):
        values = architecture[part]
        found |= {f"{part}_channels": values["ch"], f"{part}_multipliers": values["ch_mult"]}
        found[f"{part}_blocks"] = values["num_res_blocks"]
    return found


SIZES = sizes_of(META["magvit_arch"])


@cache
def image_tokenizer() -> MagViTv2:
    return load_magvitv2(FIXTURES / "magvitv2", sizes=SIZES)


def make_pipe(owner: type = MMaDAPipeline) -> MMaDAPipeline:
    """The recorded folders as a pipeline."""
    loaded = load_mmada(FIXTURES / "lm", FIXTURES / "magvitv2", sizes=SIZES)
    pipe = owner(**loaded.components, image_codes=loaded.config.image_codes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Replay(MMaDAPipeline):
    """Takes recorded draws, and keeps what the model is given."""

    draws: dict[str, torch.Tensor] = {}

    def _draws(self, step):
        if not self.draws:
            return TextDraws()
        # argmax(p / e) is the best of log p + Gumbel noise, whose uniform numbers are exp(-e).
        exponential = self.draws["exponential"][step].double()
        order = self.draws["uniform"][step]
        return TextDraws(gumbel=(-exponential).exp().view(len(order), -1, exponential.shape[-1]), order=order)

    def _draw(self, run):
        self.seen = []
        handle = self.model.register_forward_pre_hook(
            lambda model, args, options: self.seen.append(options["input_ids"].clone()), with_kwargs=True
        )
        try:
            return super()._draw(run)
        finally:
            handle.remove()
