"""Roles, initialisation and parameter groups of MMDiT against recorded numbers of `mup` (tests/parity/mup)."""

import json
import math
from pathlib import Path

import pytest
import torch
from parity.mup_cases import assert_trained_alike
from safetensors.torch import load_file
from tiny import rope_config, tiny_mmdit

from imgdit import MMDiT
from imgdit.models import convert
from imgdit.mup import init_weights, mup_table, param_groups

FIXTURES = Path(__file__).parents[1] / "parity" / "mup"
TABLES = json.loads((FIXTURES / "mmdit_params.json").read_text())["cases"]


def build(config, base_width, device="cpu", **mup):
    """MMDiT of an `SD3Transformer2DModel` configuration."""
    config = convert.read_config(MMDiT, {**config, "_class_name": "SD3Transformer2DModel"})
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device(device):
        return MMDiT(**config, mup_base_width=base_width, mup_adaln_init="normal", **mup)


@pytest.mark.parametrize("case", TABLES, ids=lambda case: f"{case['label'][:20]} {case['width']}")
def test_table(case):
    growing = case["head_dim"] != case["base_head_dim"]
    head_dims = {"mup_base_head_dim": case["base_head_dim"]} if growing else {}
    model = build(case["config"], case["base_width"], device="meta", **head_dims)
    rules = {rule.name: rule for rule in mup_table(model)}
    expected = {row["name"]: row for row in case["params"] if row["trainable"]}
    assert rules.keys() == expected.keys()
    for name, row in expected.items():
        rule = rules[name]
        assert list(rule.shape) == row["shape"]
        assert ("hidden" if rule.role == "modulation" else rule.role) == row["role"], name
        assert rule.growth == pytest.approx(row["width_mult"] if row["ninf"] else 1.0), name
        # Factors of the forward pass are folded into learning rate, weight decay, epsilon and initial gain: the
        # readout's, and the attention's, which `mup` leaves to the model's author.
        fold = row["forward_mult"]
        if growing and "norm" in name and name.endswith("q.weight"):
            fold *= math.sqrt(case["base_head_dim"] / case["head_dim"])
        assert rule.fold == pytest.approx(fold, rel=1e-6), name
        assert rule.lr_mult == pytest.approx(row["adam_lr_mult"] * fold, rel=1e-6), name
        assert rule.wd_mult == pytest.approx(row["adam_wd_mult_coupled"] / fold, rel=1e-6), name
        assert rule.eps_mult == pytest.approx(1 / fold, rel=1e-6), name
        if row["init"]["kind"] == "ones":
            assert rule.init_std is None
        else:
            assert rule.init_std == pytest.approx(row["init"]["std"], rel=1e-6), name
    sgd = {n: g for g in param_groups(model, 1.0, 1.0, optimizer_kind="sgd", no_decay=()) for n in g["names"]}
    for name, row in expected.items():
        assert sgd[name]["lr"] == pytest.approx(row["sgd_lr_mult"] * rules[name].fold ** 2, rel=1e-6), name
        decay = row["sgd_wd_mult_coupled"] / rules[name].fold ** 2
        assert sgd[name]["weight_decay"] == pytest.approx(decay, rel=1e-6), name


def test_forward_pass():
    """With the readout's factor folded into its weight, the plain model gives `mup`'s activations and output."""
    case = json.loads((FIXTURES / "mmdit_fwd_w64_b32.json").read_text())
    tensors = load_file(FIXTURES / "mmdit_fwd_w64_b32.safetensors")
    model = build(case["config"], case["base_width"], mup_output_mult=case["output_mult"])
    model.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    fold = next(rule.fold for rule in mup_table(model) if rule.role == "output")
    seen = {}
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"{i}": out[0], f"{i}.context": out[1]}))
    with torch.no_grad():
        model.proj_out.weight.mul_(fold)
        out = model(**{k[3:]: v for k, v in tensors.items() if k.startswith("in.")}).sample
    torch.testing.assert_close(out, tensors["out"], atol=2e-5, rtol=0)
    recorded = {k.removeprefix("act.transformer_blocks."): v for k, v in tensors.items() if "act.transformer" in k}
    assert recorded
    for name, expected in recorded.items():
        torch.testing.assert_close(seen[name], expected, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_four_training_steps():
    """AdamW on `param_groups`, with no factor in the forward pass, is `mup`'s MuAdamW on its MuReadout."""
    case = json.loads((FIXTURES / "mmdit_train_w64_b32.json").read_text())
    tensors = load_file(FIXTURES / "mmdit_train_w64_b32.safetensors")
    model = build(case["config"], case["base_width"], mup_output_mult=case["output_mult"])
    model.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("w0.")}, strict=False)
    readout = case["output_mult"] * case["base_width"] / case["width"]
    with torch.no_grad():
        model.proj_out.weight.mul_(readout)
    groups = param_groups(model, case["lr"], case["weight_decay"], eps=case["eps"], no_decay=())
    optimizer = torch.optim.AdamW(groups, betas=tuple(case["betas"]))
    inputs = {k[3:]: v for k, v in tensors.items() if k.startswith("in.")}
    target = inputs.pop("target")
    for expected in [*case["losses"], case["loss_after"]]:
        out = model(**inputs).sample
        loss = (out - target).square().mean()
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        last = out.detach()
        if expected != case["loss_after"]:
            optimizer.step()
    torch.testing.assert_close(last, tensors["out_after"], atol=1e-4, rtol=0)
    parameters = dict(model.named_parameters())
    for key, expected in tensors.items():
        if key.startswith("w4."):
            name = key[3:]
            got = parameters[name] / (readout if name == "proj_out.weight" else 1)
            assert_trained_alike(got.detach(), expected, name)


@pytest.mark.parametrize("adaln", ["zero", "normal"])
def test_initialisation_follows_the_table(adaln):
    model = MMDiT(**rope_config(num_attention_heads=8, mup_base_width=32, mup_adaln_init=adaln))
    init_weights(model, torch.Generator().manual_seed(0))
    for rule, (name, parameter) in zip(mup_table(model), model.named_parameters()):
        if rule.init_std is None:
            assert parameter.eq(1).all(), name
        elif rule.init_std == 0:
            assert not parameter.any(), name
        else:
            tolerance = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(rule.init_std, rel=tolerance), name
    assert (adaln == "zero") == (not model.transformer_blocks[0].norm1.linear.weight.any())
    again = MMDiT(**rope_config(num_attention_heads=8, mup_base_width=32, mup_adaln_init=adaln))
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_groups_cover_every_trainable_parameter_once():
    model = tiny_mmdit(rope_config(num_attention_heads=4, mup_base_width=32))
    model.proj_out.requires_grad_(False)
    groups = param_groups(model, lr=1e-2, weight_decay=0.1)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    by_role = {group["role"]: group for group in groups}
    assert by_role["hidden"]["lr"] == pytest.approx(5e-3) and by_role["hidden"]["weight_decay"] == pytest.approx(0.2)
    assert by_role["input"]["lr"] == 1e-2 and by_role["vector"]["weight_decay"] == 0.0


def test_an_unclassified_parameter_is_an_error():
    model = tiny_mmdit()
    model.register_parameter("registers", torch.nn.Parameter(torch.zeros(4, 32)))
    with pytest.raises(ValueError, match="no μP role matches the parameter 'registers'"):
        model.mup_table()
