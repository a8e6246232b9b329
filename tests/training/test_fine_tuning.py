"""Adapters and whole models from FLUX and SD3 folders in diffusers' layout, on quantised frozen weights."""

import copy
import json
from importlib.util import find_spec
from statistics import mean

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import tiny_mmdit
from tiny_control import flux as flux_pipeline
from tiny_control import folder_of, image, make, sd3
from tiny_images import write_folder

from imgdit.adapters.condition import Condition
from imgdit.adapters.omni_control import OmniControl
from imgdit.apps.chores.weights import save_adapter
from imgdit.models.quantized import KINDS, Int8Linear, quantize_rows
from imgdit.training import train
from imgdit.training.build import build_model
from imgdit.training.optimizers import BITSANDBYTES, build_optimizer
from imgdit.training.recipe import OptimizerConfig, load_recipe, parse_recipe
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained
from imgdit.training.user_images.encoder import Encoder

TORCHAO = pytest.param("torchao_int8", marks=pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return folder_of(flux_pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder, 6, size=(16, 16))
    return str(folder)


def recipe(folder, source, images, /, **sections):
    """Six images of 4x4 tokens at a time, over and over."""
    values = {
        "run": {"folder": str(folder / "run"), "steps": 30, "batch_size": 1, "log_every": 1, "tracker": "none"},
        "model": {"pretrained": source, "subfolder": "transformer", "gradient_checkpointing": True},
        "data": {"name": "user_images"},
        "optimizer": {"lr": 0.02, "betas": [0.9, 0.95]},
        "ema": {"decay": 0.0},
    }
    arguments = {"path": images, "model": source, "cache": str(folder / "cache")}
    arguments |= {"base": 16, "samples": 6, "ratio": 1.0}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    values["data"]["arguments"] = arguments | values["data"].get("arguments", {})
    return parse_recipe(values, "fine-tuning")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


CONDITION = {
    "adapter": {"rank": 4},
    "data": {"arguments": {"condition": "grey", "preprocessor": "grey", "mode": "independent"}},
    "objective": {"name": "condition_lora", "arguments": {"text_dropout": 0.0, "condition_dropout": 0.0}},
}


def numbers(tensor):
    """A weight's values, which torchao's tensors do not compare by themselves."""
    return tensor.dequantize() if type(tensor) not in (torch.Tensor, torch.nn.Parameter) else tensor


@pytest.mark.parametrize("kind", ["int8", TORCHAO])
def test_a_condition_adapter_on_a_quantised_flux(tmp_path, flux, data, kind):
    """The loss falls; the file loads in plain diffusers and in OmniControl, on the unquantised weights."""
    made = recipe(tmp_path, flux, data, **CONDITION, model={"quantize": kind})
    batches, _ = training_batches(made)
    assert "pipe" not in vars(batches.dataset.row_encoder.encoder)  # text encoders are not in memory any more
    network = build_model(made)
    frozen = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    train(made, model=network, batches=batches)
    assert mean(losses(tmp_path)[-6:]) < 0.9 * mean(losses(tmp_path)[:6])
    now = dict(network.named_parameters())
    assert all(torch.equal(numbers(now[name]), numbers(before)) for name, before in frozen.items())
    file = tmp_path / "grey.safetensors"
    save_adapter(tmp_path / "run", file)

    pipe = DiffusionPipeline.from_pretrained(flux)
    pipe.set_progress_bar_config(disable=True)
    plain = make(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert (make(pipe) - plain).abs().max() > 1e-3
    pipe.unload_lora_weights()
    control = OmniControl(pipe)
    report = control.load(file, adapter_name="grey")
    assert not report.unused and report.info.task == "grey" and report.info.mode == "independent"
    assert torch.equal(make(pipe), plain)
    with control.use([Condition(image(), "grey")]):
        controlled = make(pipe)
    assert (controlled - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "whole"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_loras_and_whole_models(tmp_path, flux, data, family, kind):
    folder = flux if family == "flux" else folder_of(sd3(), tmp_path / "sd3")
    sections = {"adapter": {"rank": 4}, "model": {"quantize": "int8"}} if kind == "lora" else {}
    made = recipe(tmp_path, folder, data, **sections, run={"steps": 20}, optimizer={"lr": 0.01})
    network = build_model(made)
    train(made, model=network, batches=training_batches(made)[0])
    assert mean(losses(tmp_path)[-5:]) < mean(losses(tmp_path)[:5])
    if kind == "lora":
        save_adapter(tmp_path / "run", tmp_path / "style.safetensors")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    before = make(pipe)
    if kind == "lora":
        pipe.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    else:
        load_trained(tmp_path / "run").to_diffusers().save_pretrained(tmp_path / "transformer")
        pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    assert (make(pipe) - before).abs().max() > 1e-3


def test_rounded_rows_are_near_and_their_gradients_exact():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32)
    rounded = Int8Linear(linear)
    x = torch.randn(2, 5, 48, requires_grad=True)
    error = (rounded.weight * rounded.weight_scale[:, None] - linear.weight).abs().amax(1)
    assert (error <= 0.5001 * linear.weight.abs().amax(1) / 127).all()
    dense = torch.nn.functional.linear(x, rounded.weight * rounded.weight_scale[:, None], linear.bias)
    torch.testing.assert_close(rounded(x), dense, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(dense.square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(rounded(x).square().sum(), x)[0], grad, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert rounded(x).dtype == torch.bfloat16
    assert set(rounded.state_dict()) == {"weight", "bias"}  # the scales belong to the base, as the numbers do


def test_a_quantised_model_gives_nearly_the_same():
    model = tiny_mmdit()
    rounded = copy.deepcopy(model)
    quantize_rows(rounded)
    kinds = [type(module) for name, module in rounded.named_modules() if "blocks." in name]
    assert torch.nn.Linear not in kinds and Int8Linear in kinds and type(rounded.x_embedder) is torch.nn.Linear
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 8, 16), (1, 4, 32), (1, 32))]
    options = {"img_ids": torch.zeros(8, 3), "txt_ids": torch.zeros(4, 3)}
    with torch.no_grad():
        a, b = (m(*inputs, torch.tensor([0.5]), **options).sample for m in (model, rounded))
    assert 0 < (a - b).abs().max() < 0.02 * a.abs().max()


def test_half_precision_under_an_adapter(tmp_path, flux, data):
    half = {"mixed_precision": "bf16", "steps": 2}
    made = recipe(tmp_path, flux, data, **CONDITION, run=half, model={"dtype": "bfloat16", "quantize": "int8"})
    network = build_model(made)
    kinds = {p.dtype for p in network.parameters() if p.requires_grad}, {p.dtype for p in network.parameters()}
    assert kinds == ({torch.float32}, {torch.float32, torch.bfloat16, torch.int8})
    train(made, model=network, batches=training_batches(made)[0])
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"quantize": "int8"}}, "are for frozen weights under an adapter; set adapter.rank"),
        ({"adapter": {"rank": 2}, "model": {"dtype": "bfloat16"}}, "goes with run.mixed_precision 'bf16'"),
        ({"adapter": {"rank": 2}, "model": {"quantize": "int4"}}, "model.quantize must be one of"),
        ({"optimizer": {"kind": "adam8"}}, "optimizer.kind must be one of"),
    ],
)
def test_what_does_not_go_together(tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, "somewhere", "data", **sections)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
def test_missing_packages_are_named(tmp_path, flux, data, monkeypatch, kind):
    monkeypatch.setattr("imgdit.models.quantized.find_spec", lambda name: None)
    made = recipe(tmp_path, flux, data, adapter={"rank": 2}, model={"quantize": kind})
    with pytest.raises(
        ImportError, match=rf"{kind}' needs (torchao|bitsandbytes); .*pip install 'imgdit\[quantized\]'"
    ):
        build_model(made)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_optimisers_of_bitsandbytes(kind):
    weight = torch.nn.Parameter(torch.randn(64, 128))
    groups, config = [{"params": [weight], "lr": 0.1, "eps": 1e-8}], OptimizerConfig(kind=kind)
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match=rf"optimizer.kind '{kind}' needs bitsandbytes"):
            build_optimizer(groups, config)
    else:
        assert type(build_optimizer(groups, config)).__name__ == BITSANDBYTES[kind]


def test_the_packaged_recipe_for_flux():
    made = load_recipe("own/flux_condition_lora")
    assert made.model.quantize == "torchao_int8" and made.model.gradient_checkpointing
    assert made.adapter.rank and made.model.dtype == "bfloat16" == {"bf16": "bfloat16"}[made.run.mixed_precision]


def test_encoders_are_loaded_again_when_something_is_new(flux):
    encoder = Encoder(flux)
    first = encoder.text("a red cube")
    encoder.unload()
    encoder.unload()
    assert "pipe" not in vars(encoder) and torch.equal(encoder.text("a red cube").embeddings, first.embeddings)
