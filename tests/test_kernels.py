"""The faster kernel for float32 matrices: one call on a model, the same products, and the layers stay themselves."""

import copy
import importlib

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from imgdit import kernels
from imgdit.models.quantized import quantize_rows

needs_onednn = pytest.mark.skipif(not kernels.onednn_is_faster(), reason="this processor is left to MKL")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(256, 512).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(1))


def preferring(layer):
    """A copy of the layer that multiplies by oneDNN."""
    other = copy.deepcopy(layer)
    kernels.prefer_onednn(other)
    return other


@needs_onednn
def test_the_same_product_by_another_kernel(layer, x):
    other = preferring(layer)
    for given in (x, x[:, 5:], x.transpose(0, 1)):
        torch.testing.assert_close(other(given), layer(given))
    assert not torch.equal(other(x), layer(x)), "both kernels are one: nothing was chosen"
    with FlopCounterMode(display=False) as counter:
        other(x)
    assert counter.get_total_flops() == 2 * 64 * 256 * 512


@needs_onednn
def test_it_can_be_switched_off_and_taken_back(layer, x, monkeypatch):
    expected = layer(x)
    undo = kernels.prefer_onednn(layer)
    other = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(layer(x), expected)
    kernels.prefer_onednn(layer)()  # another call changes nothing, so it has nothing to take back
    assert torch.equal(layer(x), other)
    undo()
    assert type(layer) is nn.Linear and torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.requires_grad_(True), lambda layer: layer.double(), lambda layer: layer.bfloat16()],
    ids=["training", "double", "half"],
)
def test_everything_else_is_left_to_pytorch(change, layer, x):
    change(layer)
    given = x.to(layer.weight.dtype)
    assert torch.equal(preferring(layer)(given), layer(given))


def test_small_products_and_autocast_too(layer, x):
    other = preferring(layer)
    assert torch.equal(other(x[:, :4]), layer(x[:, :4]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(x), layer(x))


def test_gradients_flow_to_the_input(layer, x):
    given = x.requires_grad_(True)
    preferring(layer)(given).sum().backward()
    torch.testing.assert_close(given.grad[0, 0], layer.weight.sum(0))


def test_compiled_layers_are_left_to_the_compiler(layer, x):
    torch.compiler.reset()
    compiled = torch.compile(preferring(layer), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@needs_onednn
def test_the_layers_stay_what_they_are():
    """Parameters, names, hooks, adapters loaded before and after, and what is made of the model later."""
    model = tiny_mmdit(rope_config())
    config = LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    model.add_adapter(config, "before")
    modules, state = dict(model.named_modules()), model.state_dict()
    undo = kernels.prefer_onednn(model)
    assert dict(model.named_modules()) == modules
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    block = model.transformer_blocks[0]
    assert type(block.attn.to_q.base_layer) is type(block.ff.net[2]) is kernels.OneDNNLinear
    model.add_adapter(config, "after")
    assert set(block.attn.to_q.lora_A) == {"before", "after"}
    model.unload_lora()
    assert type(block.attn.to_q) is kernels.OneDNNLinear
    undo()
    assert nn.Linear in set(map(type, model.modules())) and kernels.OneDNNLinear not in set(map(type, model.modules()))
    kernels.prefer_onednn(model)
    quantize_rows(model)
    assert type(block.ff.net[2]) is not kernels.OneDNNLinear


@needs_onednn
def test_pipelines_choose_it_by_themselves():
    pipe = tiny_pipeline()
    pipe("a red cube", height=16, width=16, num_inference_steps=1, output_type="latent")
    assert type(pipe.transformer.x_embedder) is kernels.OneDNNLinear
    assert isinstance(pipe.transformer.time_text_embed.timestep_embedder.linear_1, nn.Linear)


def test_a_product_of_rows(layer, x):
    rows, out = x.flatten(0, 1), torch.empty(64, 512)
    expected = nn.functional.linear(rows, layer.weight, layer.bias)
    torch.testing.assert_close(kernels.product(rows, layer.weight, layer.bias, out), expected)
    few = kernels.product(rows[:4], layer.weight, layer.bias, out[:4])
    assert few.data_ptr() == out.data_ptr()
    torch.testing.assert_close(few, expected[:4])


def test_hooks_see_the_layer(layer, x):
    """Its own, and those that profilers and activation tools register once for every module."""
    kernels.prefer_onednn(layer)
    plain, seen = layer(x), []
    register = torch.nn.modules.module
    adders = (layer.register_forward_hook, register.register_module_forward_hook)
    for add in (*adders, register.register_module_forward_pre_hook):
        handle = add(lambda module, *rest: seen.append(module))
        try:
            assert torch.equal(layer(x), plain)
        finally:
            handle.remove()
    assert seen == [layer] * 3


def test_the_module_is_loaded_again(layer, x):
    expected = preferring(layer)(x)
    importlib.reload(kernels)
    assert torch.equal(preferring(layer)(x), expected)
