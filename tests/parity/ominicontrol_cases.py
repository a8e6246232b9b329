"""The recorded cases of OminiControl's reference implementation, for every test that replays them.

tests/parity/ominicontrol/README.md says how they were recorded and what the numbers mean.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from imgdit import Condition, OmniControl

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


def control(case, cls=FluxPipeline):
    made = OmniControl(pipeline(case, cls))
    for adapter in case.get("active_adapters", []):
        made.load(lora(case, adapter), adapter_name=adapter)
    return made


def position(condition):
    """The reference's delta, which it adds before it scales; ours is added after."""
    delta = condition["position_delta"]
    return "aligned" if delta is None else tuple(x * condition["position_scale"] for x in delta)


def pixels(case, condition):
    """An image of the condition's size: its tokens are replaced by the recorded ones."""
    rows, columns = condition["grid"]
    return torch.zeros(3, rows * 16, columns * 16)


def forward_conditions(case):
    return [
        Condition(
            pixels(case, item),
            adapter=item["adapter"],
            position=position(item),
            scale=item["position_scale"],
            strength=case.get("condition_scale", 1.0),
        )
        for item in case.get("conditions", [])
    ]


def use_recorded_tokens(made, case):
    for i, item in enumerate(case.get("conditions", [])):
        made.run.conditions[i] = made.run.conditions[i]._replace(tokens=tensors()[item["tokens"]])


def is_independent(case):
    """Whether conditions see only themselves in the case's mask (rows and columns: text, image, conditions)."""
    mask = case.get("mask")
    return mask is not None and not any(any(row[:2]) for row in mask[2:])


def transformer_arguments(made, case):
    x = inputs(case)
    arguments = {
        "hidden_states": x["latents"] if "latents" in x else x["x_t"],
        "encoder_hidden_states": x["prompt_embeds"],
        "pooled_projections": x["pooled"],
        "timestep": x["timestep"],
        "img_ids": x["img_ids"],
        "txt_ids": x["txt_ids"],
    }
    if made.transformer.config.guidance_embeds:
        arguments["guidance"] = x["guidance"]
    return arguments


def options(case):
    return {"main_adapter": case.get("main_adapter") or (), "mode": "independent" if is_independent(case) else "joint"}


def live_forward(case):
    """The case's prediction by diffusers' own transformer under `OmniControl`."""
    made = control(case)
    with torch.no_grad(), made.use(forward_conditions(case), **options(case)):
        if made.run:
            use_recorded_tokens(made, case)
        return made.transformer(**transformer_arguments(made, case)).sample
