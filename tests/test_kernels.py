"""The faster kernel for float32 matrices: the same products, and only where nothing else is asked of a layer."""

import importlib

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from imgdit import kernels

needs_onednn = pytest.mark.skipif(not kernels.onednn_is_faster(), reason="this processor is left to MKL")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(256, 512).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """How often the layer itself was called."""
    counted = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: counted.append(1) or forward(self, x))
    return counted


@needs_onednn
def test_the_same_product_by_another_kernel(layer, x, calls):
    for given in (x, x[:, 5:], x.transpose(0, 1)):
        torch.testing.assert_close(kernels.linear(layer, given), nn.functional.linear(given, layer.weight, layer.bias))
    assert not calls
    with FlopCounterMode(display=False) as counter:
        kernels.linear(layer, x)
    assert counter.get_total_flops() == 2 * 64 * 256 * 512


@needs_onednn
def test_switched_off_it_is_the_layer_bit_for_bit(layer, x, monkeypatch):
    other = kernels.linear(layer, x)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(kernels.linear(layer, x), layer(x))
    assert not torch.equal(other, layer(x)), "both kernels are one: nothing was chosen"


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output + 1)


def offloaded(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1


@pytest.mark.parametrize(
    "change",
    [hooked, offloaded, lambda layer: layer.requires_grad_(True), lambda layer: layer.double()],
    ids=["hook", "offloading", "training", "another dtype"],
)
def test_everything_else_is_left_to_the_layer(change, layer, x, calls):
    change(layer)
    given = x.to(layer.weight.dtype)
    assert torch.equal(kernels.linear(layer, given), layer(given))
    assert len(calls) == 2


def test_half_precision_and_small_products_too(layer, x, calls):
    kernels.linear(layer, x[:, :4])
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(layer, x).dtype == torch.bfloat16
    assert len(calls) == 2


def test_gradients_flow_to_the_input(layer, x):
    given = x.requires_grad_(True)
    kernels.linear(layer, given).sum().backward()
    torch.testing.assert_close(given.grad[0, 0], layer.weight.sum(0))


def test_a_product_of_rows(layer, x):
    rows, out = x.flatten(0, 1), torch.empty(64, 512)
    expected = nn.functional.linear(rows, layer.weight, layer.bias)
    torch.testing.assert_close(kernels.product(rows, layer.weight, layer.bias, out), expected)
    few = kernels.product(rows[:4], layer.weight, layer.bias, out[:4])
    assert few.data_ptr() == out.data_ptr()
    torch.testing.assert_close(few, expected[:4])


def test_hooks_of_all_modules_see_the_layer(layer, x):
    """Profilers and activation tools register them once, for every module."""
    plain, seen = kernels.linear(layer, x), []
    register = torch.nn.modules.module
    for add in (register.register_module_forward_hook, register.register_module_forward_pre_hook):
        handle = add(lambda module, *rest: seen.append(module))
        try:
            torch.testing.assert_close(kernels.linear(layer, x), plain)
        finally:
            handle.remove()
    assert seen == [layer, layer]
    assert torch.equal(kernels.linear(layer, x), plain)


def test_the_module_is_loaded_again(layer, x):
    expected = kernels.linear(layer, x)
    importlib.reload(kernels)
    assert torch.equal(kernels.linear(layer, x), expected)
