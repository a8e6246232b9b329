"""NextDiT against recorded numbers of OneDiffusion's reference."""

import pytest
import torch
from onediffusion_fixtures import TINY, assert_near, case, named, tensors

from imgdit import Frame, FrameLayout, MultiFrameFlowMatchScheduler, NextDiT
from imgdit.models.functional import pack
from imgdit.training.batches import Batch, Text
from imgdit.training.objectives.flow_matching import flow_matching


def procedural_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights that the fixtures' README describes instead of storing."""
    state = {}
    for n, key in enumerate(sorted(shapes)):
        j = torch.arange(torch.Size(shapes[key]).numel(), dtype=torch.int64)
        x = (j * 2654435761 + n * 40503 + 12345) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 2246822519) & 0xFFFFFFFF
        x = x ^ (x >> 13)
        u = x.double() / 2**31 - 1
        if len(shapes[key]) == 1:
            u = 1 + 0.1 * u if key.endswith("weight") else 0.1 * u
        else:
            u = u * (3 / shapes[key][1]) ** 0.5
        state[key] = u.float().view(shapes[key])
    return state


def load(it, **config) -> NextDiT:
    options = it["options"]
    if options.get("weights") != "procedural":
        return NextDiT.from_pretrained(TINY / "transformer", **config)
    state = procedural_weights(it["state_dict_shapes"])
    for key, values in it["procedural_check"].items():
        assert torch.allclose(state[key].flatten()[:3], torch.tensor(values), atol=1e-6), key
    model = NextDiT(**options["config"], **config).eval()
    model.load_state_dict(state)
    return model


def run(it, model, given):
    scaling = {name: it["options"][name] for name in ("scale_factor", "scale_watershed") if name in it["options"]}
    with torch.no_grad():
        return model(
            given["samples"].to(model.dtype),
            given["encoder_hidden_states"].to(model.dtype),
            timestep=given["timesteps"],
            encoder_attention_mask=given["encoder_attention_mask"],
            **scaling,
        ).sample


@pytest.mark.parametrize("name", [name for name in named("transformer") if not name.endswith("bf16")])
def test_forward_is_the_recorded_one(name):
    it = case(name)
    given, want = tensors(it, "inputs"), tensors(it, "outputs")
    model = load(it, attention_softcap=it["options"]["attention_logit_softcap"])
    probes = record(model) if "probe" in name else {}
    assert_near(run(it, model, given), want["sample"], 5e-5, "sample")
    if "sample_without_softcap" in want:
        plain = run(it, load(it), given)  # "auto" has no cap in float32
        assert_near(plain, want["sample_without_softcap"], 5e-5, "sample_without_softcap")
        assert (plain - want["sample"]).abs().max() > 1e-2
    for key in want:
        if key in probes:
            # One level for the whole sample: recorded for each token, computed for each frame.
            got = probes[key][:, :1].expand_as(want[key]) if key == "t_embedder" else probes[key]
            assert_near(got, want[key], 5e-5, key)
    if probes:
        assert set(want) - {"sample"} == set(probes)


def record(model) -> dict[str, torch.Tensor]:
    """Values of one forward pass by the fixtures' names."""
    probes: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: probes.__setitem__(name, output)

    for name in ("x_embedder", "t_embedder", "y_embedder", "final_layer"):
        getattr(model, name).register_forward_hook(keep(name))
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(keep(f"layer{i}"))
        layer.attention.register_forward_hook(keep(f"layer{i}_attention"))
    return probes


@pytest.mark.parametrize("name", [name for name in named("transformer") if name.endswith("bf16")])
def test_half_precision_caps_logits_as_the_reference_does(name):
    it = case(name)
    given, want = tensors(it, "inputs"), tensors(it, "outputs")["sample"]
    model = load(it).to(torch.bfloat16)
    error = (run(it, model, given).float() - want).abs()
    assert error.mean() <= 0.05 * want.std() and error.max() <= 0.35 * want.std()
    uncapped = load(it, attention_softcap=None).to(torch.bfloat16)
    assert (run(it, uncapped, given).float() - want).abs().mean() > 1.5 * error.mean()


@pytest.mark.parametrize("name", named("train_step"))
def test_training_step_is_the_recorded_one(name):
    it = case(name)
    given, want = tensors(it, "inputs"), tensors(it, "outputs")
    model = load(it)
    sigma = given["sigma"][:, :, None, None, None]
    prediction = model(
        (1 - sigma) * given["x0"] + sigma * given["noise"],
        given["encoder_hidden_states"],
        timestep=1000 * given["sigma"],
        encoder_attention_mask=given["encoder_attention_mask"],
    ).sample
    errors = (prediction - (given["noise"] - given["x0"])).square()
    errors.mean().backward()
    assert_near(prediction, want["prediction"], 5e-5, "prediction")
    assert_near(errors.mean(), want["loss"], 5e-5, "loss")
    assert_near(errors.mean(dim=(2, 3, 4)), want["loss_per_frame"], 5e-5, "loss_per_frame")
    parameters = dict(model.named_parameters())
    for key in want:
        if key.startswith("grad."):
            assert_near(parameters[key[5:]].grad, want[key], 2e-4, key)
    total = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert_near(total, want["grad_norm_total"], 2e-4, "grad_norm_total")


@pytest.mark.parametrize("name", named("train_step"))
def test_the_librarys_objective_has_the_recorded_loss(name):
    it = case(name)
    given, want = tensors(it, "inputs"), tensors(it, "outputs")

    def tokens(latents):
        return pack(latents.flatten(0, 1), 2).unflatten(0, latents.shape[:2]).flatten(1, 2)

    text, mask = given["encoder_hidden_states"], given["encoder_attention_mask"].bool()
    weight = mask[..., None].float()
    rows, columns = (n // 2 for n in given["x0"].shape[-2:])
    batch = Batch(
        tokens=tokens(given["x0"]),
        layout=FrameLayout.build([Frame((rows, columns), index=i) for i in range(2)], text.shape[1]),
        text=Text(text, (text * weight).sum(1) / weight.sum(1), mask),
        sigmas=given["sigma"],
        noise=tokens(given["noise"]),
    )
    output = flow_matching(load(it), MultiFrameFlowMatchScheduler(), batch, None, text_dropout=0.0)
    assert_near(output.loss, want["loss"], 5e-5, "loss")
    for frame in range(2):
        assert_near(output.metrics[f"frame_{frame}"], want["loss_per_frame"][:, frame].mean(), 5e-5, "frame")


def test_published_configuration_has_the_published_tensors():
    """382 tensors of 2.8 billion parameters, and training's leftovers in the configuration."""
    published = {
        "_class_name": "NextDiT", "_diffusers_version": "0.30.0.dev0", "caption_channels": 2048, "decay": 0.9999,
        "depth": 16, "ffn_dim_multiplier": None, "forward_dtype": "bfloat16", "hidden_size": 3840, "in_channels": 16,
        "input_size": [1, 96, 96], "inv_gamma": 1.0, "min_decay": 0.0, "model_max_length": 512, "multiple_of": 256,
        "norm_eps": 1e-05, "norm_type": "rms", "num_heads": 32, "num_kv_heads": 8, "optimization_step": 1,
        "param_dtype": "float32", "patch_size": [1, 2, 2], "power": 0.6667, "pred_sigma": False, "qk_norm": True,
        "remat_attention": False, "remat_block": True, "remat_mlp": False, "rotary_max_length": 128,
        "rotary_max_length_t": None, "update_after_step": 0, "use_ema_warmup": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = NextDiT.from_config(published)
    state = model.state_dict()
    assert len(state) == 382
    assert sum(x.numel() for x in state.values()) == 2_800_389_184
    assert state["layers.0.feed_forward.w1.weight"].shape == (10240, 3840)
