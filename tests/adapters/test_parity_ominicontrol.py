"""All recorded cases through a stock `FluxPipeline` with `OmniControl`, and through `FluxOmniControlPipeline`."""

import pytest
import torch
from parity.ominicontrol_cases import (
    CASES,
    check,
    control,
    forward_conditions,
    inputs,
    live_forward,
    lora,
    named,
    options,
    pipeline,
    position,
    tensors,
    transformer_arguments,
    use_recorded_tokens,
)

from imgdit import Condition, FluxOmniControlPipeline

FORWARD = named("base_forward", "transformer_forward", "condition_scale", "training_step")


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    check(live_forward(CASES[name]), CASES[name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", named("training_step"))
def test_training_gradients(name, checkpointing):
    case = CASES[name]
    made = control(case)
    made.transformer.requires_grad_(False)
    (adapter,) = case["active_adapters"]
    parameters = {n: p.requires_grad_() for n, p in made.transformer.named_parameters() if f".{adapter}." in n}
    if checkpointing:
        made.transformer.train().enable_gradient_checkpointing()
    with made.use(forward_conditions(case), **options(case)):
        use_recorded_tokens(made, case)
        out = made.transformer(**transformer_arguments(made, case)).sample
        x = inputs(case)
        loss = (out - (x["x1"] - x["x0"])).square().mean()
        loss.backward()
    torch.testing.assert_close(loss.detach(), tensors()[case["expected"]["loss"]].squeeze(), atol=1e-5, rtol=0)
    grads = {name.replace(f".{adapter}", ""): parameter.grad for name, parameter in parameters.items()}
    assert grads.keys() == case["grads"].keys()
    for name, key in case["grads"].items():
        got = torch.zeros_like(tensors()[key]) if grads[name] is None else grads[name]
        torch.testing.assert_close(got, tensors()[key], atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def generate_conditions(case):
    return [
        Condition(
            tensors()[item["image"]].numpy(),
            adapter=item["adapter"],
            position=position(item),
            scale=item["position_scale"],
            mask=None if item["latent_mask"] is None else tensors()[item["latent_mask"]].T,  # recorded as [x, y]
            complement=item["is_complement"],
        )
        for item in case["conditions"]
    ]


def call_arguments(case):
    given = case["options"]
    arguments = {name: tensors()[key] for name, key in case["inputs"].items()}
    arguments |= {
        name: given[name] for name in ("height", "width", "num_inference_steps", "guidance_scale", "output_type")
    }
    if "generator_seed" in given:
        arguments["generator"] = torch.Generator().manual_seed(given["generator_seed"])
    return arguments


def use_arguments(case):
    given = case["options"]
    arguments = {
        "main_adapter": given.get("main_adapter") or (),
        "mode": "independent" if given.get("kv_cache") else "joint",
        "image_guidance_scale": given.get("image_guidance_scale", 1.0),
    }
    if "latent_mask" in given:
        arguments["region"] = tensors()[given["latent_mask"]].T
    return arguments


def replay_global_rng(pipe, case):
    """The reference draws the start noise and then each condition's latents from the global state."""
    if "global_seed" not in case["options"]:
        return None
    channels = pipe.vae.config.latent_channels
    pipe.vae.encoder.conv_out.bias.data[channels:] = case["options"]["vae_logvar_bias"]
    generator = torch.Generator().manual_seed(case["options"]["global_seed"])
    torch.randn(1, channels, case["options"]["height"] // 8, case["options"]["width"] // 8, generator=generator)
    return generator


@pytest.mark.parametrize("name", named("generate"))
def test_generation_through_a_stock_pipeline(name):
    case = CASES[name]
    made = control(case)
    arguments, seen = call_arguments(case), []
    generator = replay_global_rng(made.pipe, case)
    with made.use(generate_conditions(case), **use_arguments(case), generator=generator):
        region = made.run.region
        if region is not None:
            arguments["latents"] = arguments["latents"][:, region.flatten()]
        got = made.pipe(
            **arguments, callback_on_step_end=lambda p, i, t, x: seen.append(x["latents"]) or {}, return_dict=False
        )[0]
        if region is not None:
            sampled, got = got, made.run.known()
            got[:, region.flatten()] = sampled
    check(got, case)
    check(torch.stack(seen), case, "latents_per_step")


@pytest.mark.parametrize("name", named("generate"))
def test_generation_through_the_pipeline_class(name):
    case = CASES[name]
    pipe = pipeline(case, FluxOmniControlPipeline)
    for adapter in case["active_adapters"]:
        pipe.load_control(lora(case, adapter), adapter_name=adapter)
    generator = replay_global_rng(pipe, case)
    got = pipe(
        **call_arguments(case),
        conditions=generate_conditions(case),
        **use_arguments(case),
        condition_generator=generator,
    ).images
    check(got, case)


def test_scale_then_delta_is_what_a_condition_does():
    """The reference's trainer scales first and then shifts, its inference does it the other way round."""
    case = CASES["quirk_delta_then_scale"]
    made = control(case)
    (item,) = case["conditions"]
    condition = Condition(
        tensors()[item["image"]].numpy(), "canny", position=tuple(item["position_delta"]), scale=item["position_scale"]
    )
    with made.use([condition], main_adapter=()):
        got = made.pipe(**call_arguments(case), return_dict=False)[0]
    check(got, case, "alternative_scale_then_delta")
