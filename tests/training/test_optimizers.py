"""Muon on matrices and AdamW on the rest, as one optimiser of a recipe."""

import pytest
import torch
from peft import LoraConfig
from tiny import rope_config, tiny_mmdit
from training.toy import batch, recipe, toy_train

from imgdit.mup import check_rates, mup_table
from imgdit.training.coordinate_check import coordinate_check
from imgdit.training.memory import load_of, memory_plan
from imgdit.training.optimizers import MuonAdamW, build_optimizer, optimizer_groups
from imgdit.training.recipe import OptimizerConfig

MUON = {"kind": "muon", "lr": 0.002, "muon_lr": 0.01, "weight_decay": 0.1}
SMALL = rope_config(num_layers=1, num_single_layers=1)
MATRICES = ("hidden", "modulation")


def grown():
    """A model of twice the base width."""
    return tiny_mmdit({**SMALL, "mup_base_width": 16})


def with_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_each_part_is_torch_s_own():
    """Two steps with a changed rate equal those of `torch.optim.Muon` and `torch.optim.AdamW` side by side."""
    ours, theirs = grown(), grown()
    config = OptimizerConfig(**MUON)
    optimizer = build_optimizer(optimizer_groups(ours, config), config)
    assert isinstance(optimizer, MuonAdamW)
    groups = optimizer_groups(theirs, config)
    muon = [group for group in groups if group.get("use_muon")]
    apart = [
        torch.optim.Muon(muon, lr=1.0, momentum=0.95),
        torch.optim.AdamW([group for group in groups if group not in muon], lr=1.0, betas=(0.9, 0.99)),
    ]
    for seed, factor in ((0, 1.0), (1, 0.5)):
        for model, parts in ((ours, [optimizer]), (theirs, apart)):
            with_gradients(model, seed)
            for part in parts:
                for group in part.param_groups:
                    group["lr"] *= factor
                part.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_rates_by_width():
    """Muon's rate stays at twice the width where Adam's halves; both shrink a matrix by lr * weight_decay per step."""
    groups = optimizer_groups(grown(), OptimizerConfig(**MUON))
    check_rates(torch.optim.SGD([{**group, "params": list(group["params"])} for group in groups], lr=1.0))
    for group in groups:
        if group["role"] in MATRICES:
            assert group["use_muon"] and group["lr"] == pytest.approx(0.01)
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.002 * 0.1)
        else:
            assert not group.get("use_muon")
    adam = {g["role"]: g["lr"] for g in optimizer_groups(grown(), OptimizerConfig(lr=0.002))}
    assert adam["hidden"] == pytest.approx(0.001) and adam["input"] == pytest.approx(0.002)


@pytest.mark.parametrize(("exponent", "decay"), [(1.0, 0.2), (0.5, 0.1 * 2**0.5), (0.0, 0.1)])
def test_weight_decay_of_a_wider_model(exponent, decay):
    """At twice the base width; the rate is half (arXiv 2510.15262: decay in proportion to the root of the width)."""
    model = tiny_mmdit({**SMALL, "mup_base_width": 16, "mup_wd_exponent": exponent})
    groups = optimizer_groups(model, OptimizerConfig(weight_decay=0.1))
    (hidden,) = {g["weight_decay"] for g in groups if g["role"] == "hidden"}
    assert hidden == pytest.approx(decay)


def test_stop_and_go_on_equals_one_run(tmp_path):
    """Moments of both parts and the schedule's rates are in the checkpoint."""
    changes = {"optimizer": MUON, "schedule": {"warmup": 2}, "run": {"steps": 4}}
    whole, _ = toy_train(recipe(tmp_path / "whole", **changes))
    half = recipe(tmp_path / "half", **changes)
    toy_train(half, stop_at=2)
    resumed, result = toy_train(half, resume=True)
    assert result.step == 4
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    adam, _ = toy_train(recipe(tmp_path / "adam", schedule={"warmup": 2}, optimizer={"lr": 0.002}))
    assert not torch.equal(adam.state_dict()["proj_out.weight"], whole.state_dict()["proj_out.weight"])


def test_memory(tmp_path):
    """Four bytes of each matrix's parameter, eight of the others'."""
    found = memory_plan(recipe(tmp_path, model={"arguments": SMALL}, optimizer={"kind": "muon"}), load_of(batch()))
    sizes = [(rule.role in MATRICES, torch.Size(rule.shape).numel()) for rule in mup_table(tiny_mmdit(SMALL))]
    assert found.optimizer == sum(size * (4 if matrix else 8) for matrix, size in sizes)


def test_what_muon_is_not_for():
    config = OptimizerConfig(kind="muon")
    with pytest.raises(ValueError, match=r"'muon' needs a model whose hidden matrices .*got Linear"):
        optimizer_groups(torch.nn.Linear(2, 2), config)
    model = tiny_mmdit(SMALL).requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"'muon' needs .*got an adapter"):
        optimizer_groups(model, config)
    with pytest.raises(ValueError, match="muon_lr must be positive, got 0"):
        OptimizerConfig(muon_lr=0.0)


def test_activations_do_not_grow_with_the_width(tmp_path):
    """The coordinate check: at widths 32 and 128 activations after three steps keep their size under Muon and μP."""
    model = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model |= {"in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6]}
    model |= {"mup_adaln_init": "normal", "mup_base_width": 32}
    made = recipe(
        tmp_path, model={"arguments": model}, data={"name": "toy"}, run={"batch_size": 16},
        optimizer={"kind": "muon", "lr": 0.01, "muon_lr": 0.1},
    )  # fmt: skip
    checks = coordinate_check(made, [32, 128], steps=4, seeds=2)
    assert not checks["mup"].beyond(0.2)
    assert "output" in {slope.module for slope in checks["standard"].beyond(0.2)}
