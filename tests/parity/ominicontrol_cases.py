"""The recorded cases of OminiControl's reference implementation, for every test that replays them.

tests/parity/ominicontrol/README.md says how they were recorded and what the numbers mean.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "ominicontrol"
CASES = {case["id"]: case for case in json.loads((FIXTURES / "cases.json").read_text())["cases"]}
NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def named(*kinds):
    """Cases of these kinds."""
    return [name for name, case in CASES.items() if case["kind"] in kinds]


@lru_cache(maxsize=1)
def tensors():
    return load_file(FIXTURES / "cases.safetensors")


def inputs(case):
    """The case's tensors by their names."""
    return {name: tensors()[key] for name, key in case["inputs"].items()}


def lora(case, adapter):
    return FIXTURES / "loras" / case["pipeline"] / f"{adapter}.safetensors"


def pipeline(case, cls=FluxPipeline):
    """The case's pipeline without text encoders."""
    pipe = cls.from_pretrained(FIXTURES / case["pipeline"], **NO_TEXT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tolerance(case):
    recorded = case.get("tolerance", {"atol": 1e-4, "rtol": 1e-4})
    return {name: recorded[name] for name in ("atol", "rtol")}


def check(got, case, name="out"):
    expected = tensors()[case["expected"][name]]
    torch.testing.assert_close(got, expected, **tolerance(case), msg=lambda m: f"{case['id']}/{name}: {m}")
