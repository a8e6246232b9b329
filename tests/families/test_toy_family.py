"""A transformer class of one's own gets conditions, activation hooks and μP by one registered family."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from tiny import randomize, tiny_vae
from tiny_control import image, lora_file
from torch.nn import Linear, ModuleList
from torch.utils.checkpoint import checkpoint

from imgdit import Condition, OmniControl
from imgdit.families import MODULES
from imgdit.families.step import embed_tokens, one_image, packed_tokens, read_image, single_text_first
from imgdit.family import Block, Call, Conditions, Family, find_family, known_classes, register_family
from imgdit.frames import Frame
from imgdit.models.functional import apply_rope, rope_table
from imgdit.mup import Structure, mup_table
from imgdit.sae.hooks import hooked


class Toy2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, num_layers=2, num_attention_heads=2, attention_head_dim=8):
        super().__init__()
        self.img_in, self.time_in, self.readout = Linear(16, 16), Linear(1, 16), Linear(16, 16)
        self.layers = ModuleList(FluxSingleTransformerBlock(16, 2, 8) for _ in range(num_layers))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x, text, vector = self.img_in(hidden_states), encoder_hidden_states, self.time_in(timestep[:, None])
        for layer in self.layers:
            text, x = layer(x, text, vector)
        return (self.readout(x),)


def call(model, given):
    x, text = given["hidden_states"], given["encoder_hidden_states"]
    return Call((Frame((4, 4)),), text.shape[1], x.shape[1], x, (text,), text.new_empty(len(text), 0))


def vector(model, given, frame):
    return model.time_in((given["timestep"] if frame.sigma is None else torch.zeros_like(given["timestep"]))[:, None])


ROLES = (("*_in.weight", "input"), ("readout.weight", "output"), ("*.norm_?.weight", "head"), ("*.weight", "hidden"))
FAMILY = Family(
    classes=("Toy2DModel",),
    places=lambda model, given: one_image((4, 4)),
    tokens=packed_tokens(patch=lambda model, vae: 2, channels=lambda model: 16),
    conditions=Conditions(
        call=call,
        vector=vector,
        blocks=lambda model: [Block(f"layers.{i}", m, single_text_first) for i, m in enumerate(model.layers)],
        edges=lambda model: {"img_in": embed_tokens, "readout": read_image},
    ),
    mup=Structure((*ROLES, ("*", "vector")), (("*.norm_q.*",),), ("*.proj_out.*",), ("layers.*",)),
)


class ToyPipeline(DiffusionPipeline):
    def __init__(self, vae, transformer):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer)


def toy_pipeline(tmp_path, kind=Toy2DModel):
    register_family(FAMILY)
    torch.manual_seed(0)
    pipe = ToyPipeline(tiny_vae(), randomize(kind()).eval())
    return pipe, lora_file(tmp_path / "edges.safetensors", pipe.transformer, r"img_in|layers.*(norm|attn|proj).*")


def make(pipe, tokens=5):
    image, text = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).split([1, 1])
    return pipe.transformer(image, text[:, :tokens], torch.tensor([0.5]))[0]


@torch.no_grad()
def test_a_registered_class_has_conditions_hooks_and_mup(tmp_path):
    pipe, file = toy_pipeline(tmp_path)
    plain, control = make(pipe), OmniControl(pipe)
    control.load(file)
    for mode in ("joint", "independent"):
        with control.use(Condition(image(), "edges"), mode=mode):
            one = make(pipe)
            torch.testing.assert_close(make(pipe), one)  # independent: keys and values from the cache
        assert one.shape == plain.shape and (one - plain).abs().max() > 1e-3 and torch.equal(make(pipe), plain)
    control.remove()
    seen = []
    with hooked(pipe, {"transformer.layers.0": seen.append}):
        assert torch.equal(make(pipe), plain)
    assert seen[0].values.shape == (1, 16, 16) and seen[0].grids == ((4, 4),)
    with hooked(pipe, {"transformer.layers.0": lambda tokens: tokens.values * 2}):
        assert (make(pipe) - plain).abs().max() > 1e-3
    assert torch.equal(make(pipe), plain)
    assert {rule.role for rule in mup_table(pipe.transformer)} >= {"input", "hidden", "output", "vector"}


class Third2DModel(Toy2DModel):
    pass


def test_a_file_and_a_line_add_a_family_to_the_library(tmp_path, monkeypatch):
    """A module of `imgdit.families` with `FAMILY`, and its line in the table there."""
    module = SimpleNamespace(FAMILY=replace(FAMILY, classes=("Third2DModel",)))
    monkeypatch.setattr("imgdit.family._REGISTERED", {})
    monkeypatch.setitem(MODULES, "Third2DModel", "third")
    monkeypatch.setitem(sys.modules, "imgdit.families.third", module)
    assert find_family(Third2DModel) is module.FAMILY
    assert "Third2DModel" in known_classes("conditions") and "Third2DModel" in known_classes("mup")
    torch.manual_seed(0)
    pipe = ToyPipeline(tiny_vae(), randomize(Third2DModel()).eval())
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "edges.safetensors", pipe.transformer, r"img_in|layers.*(norm|attn|proj).*"))
    with torch.no_grad():
        plain = make(pipe)
        with control.use(Condition(image(), "edges")):
            assert (make(pipe) - plain).abs().max() > 1e-3


# Blocks that get no dictionary find the plan in an object of the transformer.


class Checkpointed(Toy2DModel):
    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x, text, vector = self.img_in(hidden_states), encoder_hidden_states, self.time_in(timestep[:, None])
        for layer in self.layers:
            text, x = checkpoint(layer, x, text, vector, use_reentrant=False)
        return (self.readout(x),)


def test_gradients_under_checkpointing_are_those_without(tmp_path):
    found = []
    for kind in (Toy2DModel, Checkpointed):
        pipe, file = toy_pipeline(tmp_path, kind)
        control = OmniControl(pipe)
        control.load(file)
        weights = [p.requires_grad_() for name, p in pipe.transformer.named_parameters() if "lora_" in name]
        with control.use(Condition(image(), "edges")):
            found.append(torch.autograd.grad(make(pipe).square().sum(), weights))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(bool(gradient.any()) for gradient in found[0]) > len(found[0]) / 2  # the last block reads few


def test_threads_take_turns(tmp_path):
    pipe, file = toy_pipeline(tmp_path)
    control = OmniControl(pipe)
    control.load(file)
    run = torch.no_grad()(make)
    with control.use(Condition(image(), "edges")), ThreadPoolExecutor(4) as pool:
        expected = run(pipe)
        assert all(torch.equal(one, expected) for one in pool.map(run, [pipe] * 8))


# What other families need of the plan: padded text, several frames of the model's own, shared modulation.


class Other2DModel(Toy2DModel):
    pass


def output(tmp_path, mode="joint", tokens=5, **changes):
    """Image tokens under a condition, by the toy's family with other conditions."""
    pipe, file = toy_pipeline(tmp_path, Other2DModel)
    register_family(replace(FAMILY, classes=("Other2DModel",), conditions=replace(FAMILY.conditions, **changes)))
    control = OmniControl(pipe)
    control.load(file)
    with torch.no_grad(), control.use(Condition(image(), "edges"), mode=mode):
        make(pipe, tokens)
        return make(pipe, tokens)  # independent: from the cache


def masked_call(model, given):
    mask = torch.ones(1, 21, dtype=torch.bool)
    mask[:, 3:5] = False
    return call(model, given)._replace(key_mask=mask)


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_padded_text_is_not_seen(tmp_path, mode):
    padded = output(tmp_path, mode, call=masked_call)
    torch.testing.assert_close(padded, output(tmp_path, mode, tokens=3))
    assert (padded - output(tmp_path, mode)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_a_model_may_have_frames_of_its_own(tmp_path, mode):
    def frames(*found):
        return output(tmp_path, mode, call=lambda model, given: call(model, given)._replace(frames=found))

    one = output(tmp_path, mode)
    torch.testing.assert_close(frames(Frame((2, 4)), Frame((2, 4))), one)
    held = frames(Frame((2, 4)), Frame((2, 4), sigma=0.0))
    assert held.shape == one.shape and (held - one).abs().max() > 1e-3


def test_modulation_may_be_shared(tmp_path):
    doubled = output(tmp_path, shared=lambda model, vectors, plan: 2 * vectors)
    expected = output(tmp_path, vector=lambda model, given, frame: 2 * vector(model, given, frame))
    torch.testing.assert_close(doubled, expected)
    assert (doubled - output(tmp_path)).abs().max() > 1e-3


def test_rotations_may_differ_by_sample():
    x = torch.randn(2, 3, 2, 8)
    tables = [rope_table(torch.rand(3, 1) * 9, [8], 100.0) for _ in range(2)]
    each = torch.cat([apply_rope(row[None], table) for row, table in zip(x, tables, strict=True)])
    assert torch.equal(apply_rope(x, torch.stack(tables)), each)
