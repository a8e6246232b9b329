"""Weights kept in another dtype than the model computes in: float8 by layerwise casting, packed 8 and 4 bits."""

import copy

import pytest
import torch
import torch.nn as nn
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from tiny import randomize, rope_config, sincos_config, tiny_mmdit

from imgdit import NextDiT
from imgdit.models.nextdit import TextMemory


def next_dit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "multiple_of": 16}
    return randomize(NextDiT(in_channels=4, caption_channels=32, **sizes)).eval()


def ask_next_dit(model, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(1, 5, 32, generator=generator).to(dtype)
    plain = model(x, text, timestep=torch.tensor([950.0])).sample
    kept = model(x, TextMemory(text), timestep=torch.tensor([950.0])).sample
    assert torch.equal(plain, kept)
    return plain


def ask_mmdit(model, dtype):
    generator = torch.Generator().manual_seed(1)
    config = model.config
    size = (1, 16, config.in_channels) if config.pos_embed_type == "rope" else (1, config.in_channels, 8, 8)
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)} if config.pos_embed_type == "rope" else {}
    x, text, pooled = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (size, (1, 5, config.joint_attention_dim), (1, config.pooled_projection_dim))
    )
    return model(x, text, pooled, torch.tensor([0.95 * 1000 / config.timestep_scale]), **ids).sample


MODELS = {
    "NextDiT": (next_dit, ask_next_dit, ["wq", "wk", "wv", "wo", "t_embedder.mlp.0"]),
    "MMDiT like FLUX": (lambda: tiny_mmdit(rope_config()), ask_mmdit, ["to_q", "to_k", "to_out.0", "linear_1"]),
    "MMDiT like SD3": (lambda: tiny_mmdit(sincos_config()), ask_mmdit, ["to_q", "to_k", "to_out.0", "linear_1"]),
}
everywhere = pytest.mark.parametrize("name", MODELS)


@everywhere
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting_rounds_the_weights_and_nothing_else(name, compute):
    build, ask, _ = MODELS[name]
    model = build().to(compute)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        plain = ask(model, compute)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    cast = [n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(cast) > 10
    with torch.no_grad():
        for parameter in (rounded.get_parameter(n) for n in cast):
            parameter.copy_(parameter.to(torch.float8_e4m3fn).to(compute))
        got, expected = ask(model, compute), ask(rounded, compute)
    assert got.dtype == compute
    assert all(model.get_parameter(n).dtype == torch.float8_e4m3fn for n in cast)
    tolerance = 1e-5 if compute == torch.float32 else 5e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert not torch.equal(got, plain)


@everywhere
def test_layerwise_casting_of_a_model_with_a_lora(name):
    """By the model's method, which leaves adapters alone, and by the function, which casts them too."""
    build, ask, targets = MODELS[name]
    for cast_adapters in (False, True):
        model = build()
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        with torch.no_grad():
            plain = ask(model, torch.float32)
            if cast_adapters:
                skipped = tuple(model._skip_layerwise_casting_patterns)
                apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skipped)
            else:
                model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
            got = ask(model, torch.float32)
        assert 0 < (got - plain).norm() / plain.norm() < 0.3


def test_layerwise_casting_trains(name="NextDiT"):
    build, ask, _ = MODELS[name]
    model = build()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    ask(model, torch.float32).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Packed(nn.Module):
    """A layer whose weight is kept in bytes, as quantised layers keep theirs."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale + 128).round().byte(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) * self.scale.to(x.dtype), self.bias)


def exchanged(model, make):
    """The model with every linear layer exchanged, as diffusers' quantisers do it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


@everywhere
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_packed_weights(name, compute):
    build, ask, _ = MODELS[name]
    model = build()
    with torch.no_grad():
        plain = ask(model, torch.float32)
        got = ask(exchanged(copy.deepcopy(model), Packed).to(compute), compute)
    assert got.dtype == compute
    assert 0 < (got.float() - plain).norm() / plain.norm() < 0.1


@everywhere
def test_four_bits_of_bitsandbytes(name):
    bnb = pytest.importorskip("bitsandbytes", minversion="0.48")
    build, ask, _ = MODELS[name]

    def four_bits(linear):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        return made.to("cpu")

    model = build()
    with torch.no_grad():
        plain = ask(model, torch.float32)
        got = ask(exchanged(copy.deepcopy(model), four_bits), torch.float32)
    assert 0 < (got - plain).norm() / plain.norm() < 0.6
