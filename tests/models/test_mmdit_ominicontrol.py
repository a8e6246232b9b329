"""Frames, row LoRA and attention groups against recorded numbers of OminiControl's reference implementation.

The fixtures' README (tests/parity/ominicontrol/README.md) says how they were recorded.
"""

import json

import pytest
import torch
from diffusers import FluxPipeline
from parity.ominicontrol_cases import CASES, FIXTURES, check, live_forward, named
from parity.ominicontrol_cases import tensors as recorded_tensors

from imgdit import Frame, FrameLayout, KVCache, MMDiT

FORWARD = named("base_forward", "transformer_forward", "training_step")


@pytest.fixture(scope="module")
def tensors():
    return recorded_tensors()


def load(case):
    """The case's model with its adapters, as a person would: a diffusers folder and LoRA files."""
    folder = FIXTURES / case["pipeline"]
    model = MMDiT.from_pretrained(folder, subfolder="transformer")
    for adapter in case.get("active_adapters", []):
        state, alphas = FluxPipeline.lora_state_dict(
            FIXTURES / "loras" / case["pipeline"], weight_name=f"{adapter}.safetensors", return_alphas=True
        )
        model.load_lora_adapter(state, network_alphas=alphas, prefix="transformer", adapter_name=adapter)
    if case.get("active_adapters"):
        model.set_adapters(case["active_adapters"])
    return model


def inputs(case, tensors):
    """Keyword arguments of `MMDiT.forward` for a case."""
    x = {name: tensors[key] for name, key in case["inputs"].items()}
    rows, columns = case["image_grid"]
    frames = [Frame((rows, columns))]
    for condition in case.get("conditions", []):
        frames.append(
            Frame(
                tuple(condition["grid"]),
                sigma=0.0,
                adapter=condition["adapter"],
                guidance=1.0,
                offset=tuple(condition["position_delta"]),
                scale=condition["position_scale"],
            )
        )
    visible = None if case.get("mask") is None else torch.tensor(case["mask"]).bool()
    main = case.get("main_adapter")
    layout = FrameLayout.build(
        frames, case["text_tokens"], visible=visible, main_adapters=() if main is None else (main,)
    )
    tokens = [x["latents"] if "latents" in x else x["x_t"]]
    tokens += [tensors[c["tokens"]] for c in case.get("conditions", [])]
    kwargs = {
        "hidden_states": torch.cat(tokens, dim=1),
        "encoder_hidden_states": x["prompt_embeds"],
        "pooled_projections": x["pooled"],
        "timestep": x["timestep"],
        "layout": layout,
    }
    if json.loads((FIXTURES / case["pipeline"] / "transformer/config.json").read_text())["guidance_embeds"]:
        kwargs["guidance"] = x["guidance"]
    return kwargs


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, tensors):
    """Diffusers' transformer on this processor, and the record, which holds the rounding of another (its embedding of
    the timestep alone is up to 1e-4 from the exact one)."""
    case = CASES[name]
    model = load(case)
    with torch.no_grad():
        out = model(**inputs(case, tensors)).sample
    torch.testing.assert_close(out, live_forward(case), atol=1e-5, rtol=1e-5)
    check(out, case)


@pytest.mark.parametrize("name", [name for name in FORWARD if CASES[name].get("conditions")])
def test_ids_are_the_references(name, tensors):
    layout = inputs(CASES[name], tensors)["layout"]
    expected = torch.cat([tensors[c["ids"]] for c in CASES[name]["conditions"]])
    torch.testing.assert_close(layout.ids()[-len(expected) :], expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["tf_dev_1cond_independent", "tf_dev_2cond_independent"])
def test_cached_conditions_equal_computed_ones(name, tensors):
    case = CASES[name]
    model, kwargs, cache = load(case), inputs(case, tensors), KVCache()
    layout = kwargs["layout"]
    with torch.no_grad():
        computed = model(**kwargs).sample
        other = {**kwargs, "timestep": kwargs["timestep"] * 0.3}
        model(**other, cache=cache)
        cache.freeze()
        kwargs["layout"] = layout.without_frozen()
        kwargs["hidden_states"] = kwargs["hidden_states"][:, : layout.lengths[0]]
        out = model(**kwargs, cache=cache).sample
    torch.testing.assert_close(out, computed, atol=1e-5, rtol=1e-5)
    check(out, case)


def test_training_gradients(tensors):
    case = CASES["train_dev"]
    model = load(case).requires_grad_(False)
    adapter = {n: p.requires_grad_() for n, p in model.named_parameters() if "lora_" in n}
    kwargs = inputs(case, tensors)
    target = tensors[case["inputs"]["x1"]] - tensors[case["inputs"]["x0"]]
    loss = (model(**kwargs).sample - target).square().mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensors[case["expected"]["loss"]].squeeze(), atol=1e-5, rtol=0)
    grads = {name.replace(".canny", ""): parameter.grad for name, parameter in adapter.items()}
    assert grads.keys() == case["grads"].keys()
    for name, key in case["grads"].items():
        got = torch.zeros_like(tensors[key]) if grads[name] is None else grads[name]
        torch.testing.assert_close(got, tensors[key], atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
