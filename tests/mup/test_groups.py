"""Parameter groups: what they train, and that wrappers and copies keep them."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from tiny import randomize, rope_config, sincos_config, tiny_mmdit
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from imgdit import MMDiT, NextDiT
from imgdit.mup import check_rates, configure, init_weights, mup_table, param_groups

MUP = {"num_attention_heads": 4, "mup_base_width": 16, "mup_output_mult": 2.0, "mup_adaln_init": "normal"}


def described(model):
    return [{k: v for k, v in group.items() if k != "params"} for group in param_groups(model, 1e-2, 0.1)]


def latents():
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 4, 4, 4), "encoder_hidden_states": (2, 3, 32), "pooled_projections": (2, 32)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**values, "timestep": torch.tensor([100.0, 700.0])}, torch.randn(2, 4, 4, 4, generator=generator)


def trained(model, groups, steps=3):
    """The model after AdamW on one batch; its last prediction."""
    inputs, target = latents()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for _ in range(steps):
        (model(**inputs).sample - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(**inputs).sample.detach()


def with_factors(model, parts):
    """Multiply the outputs of modules in the forward pass."""
    for module, factor in parts:
        module.register_forward_hook(lambda _, __, out, factor=factor: out * factor)
    return model


def test_folded_factors_train_as_factors_of_the_forward_pass():
    """Attention and branches, with and without QK-norm: same predictions after three steps of AdamW with decay."""
    for qk_norm in ("rms_norm", None):
        config = sincos_config(num_attention_heads=2, attention_head_dim=32, qk_norm=qk_norm)
        settings = {"mup_adaln_init": "normal", "mup_base_head_dim": 8, "mup_base_depth": 1}
        folded = MMDiT(**config, **settings)
        folded.init_weights(torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        with torch.no_grad():
            folded.proj_out.weight.normal_()  # else only the readout learns at first
        plain = MMDiT(**config, mup_adaln_init="normal")
        rules = {rule.name: rule for rule in mup_table(folded)}
        own = dict(folded.named_parameters())
        plain.load_state_dict({n: own[n] / rules[n].fold if n in own else t for n, t in folded.state_dict().items()})
        parts = []
        for block in plain.transformer_blocks:
            queries = ("norm_q", "norm_added_q") if qk_norm else ("to_q", "add_q_proj")
            parts += [(getattr(block.attn, name), 0.5) for name in queries]
            ends = [block.attn.to_out[0], block.ff.net[2]]
            if not block.context_pre_only:
                ends += [block.attn.to_add_out, block.ff_context.net[2]]
            parts += [(end, 0.5) for end in ends]
        expected_groups = param_groups(plain, 1e-2, 0.1, no_decay=())
        eps = {n: rule.eps_mult * rule.fold for n, rule in rules.items()}  # CompleteP's, beyond the folding
        expected_groups = [
            {**group, "params": [p], "eps": 1e-8 * eps[name]}
            for group in expected_groups
            for name, p in zip(group["names"], group["params"])
        ]
        expected = trained(with_factors(plain, parts), expected_groups)
        got = trained(folded, param_groups(folded, 1e-2, 0.1, no_decay=()))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_folded_factors_of_nextdit_train_as_factors_of_the_forward_pass():
    """Queries and branches, as above; `mup_output_mult` at the readout."""
    config = {"hidden_size": 48, "num_heads": 2, "num_kv_heads": 1, "depth": 2, "in_channels": 4, "multiple_of": 8}
    config |= {"caption_channels": 32, "mup_adaln_init": "normal"}
    folded = NextDiT(**config, mup_base_width=24, mup_base_head_dim=12, mup_base_depth=1, mup_output_mult=3.0)
    folded.init_weights(torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        for part in (folded.final_layer.linear.weight, *(layer.attention.gate for layer in folded.layers)):
            part.normal_()
    rules = {rule.name: rule for rule in mup_table(folded)}
    plain = NextDiT(**config, mup_base_width=24)
    plain.load_state_dict({name: p / rules[name].fold for name, p in folded.state_dict().items()})
    groups = [
        {**group, "params": [p], "eps": 1e-8 * rules[name].eps_mult * rules[name].fold}
        for group in param_groups(plain, 1e-2, 0.1, no_decay=())
        for name, p in zip(group["names"], group["params"])
    ]
    for group in groups:  # the readout's factor is in the forward pass, so its rate is the base's
        if group["role"] == "output":
            group["lr"], group["weight_decay"] = 1e-2, 0.1
    parts = [(layer.attention.q_norm, 0.5**0.5) for layer in plain.layers]
    parts += [(norm, 0.5) for layer in plain.layers for norm in (layer.attention_norm2, layer.ffn_norm2)]
    readout = plain.final_layer.linear
    weight = rules["final_layer.linear.weight"].fold
    readout.forward = lambda x: torch.nn.functional.linear(x, readout.weight * weight, readout.bias)
    expected = trained(with_factors(plain, parts), groups)
    got = trained(folded, param_groups(folded, 1e-2, 0.1, no_decay=()))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_mup_changes_no_forward_pass_of_nextdit():
    config = {"hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "depth": 1, "in_channels": 4, "multiple_of": 8}
    config |= {"caption_channels": 32}
    plain, scaled = randomize(NextDiT(**config)), NextDiT(**config, mup_base_width=24, mup_output_mult=2.0)
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(**latents()[0]).sample, scaled(**latents()[0]).sample)
    assert [rule.name for rule in scaled.mup_table()] == [name for name, _ in plain.named_parameters()]


def test_copies_and_wrappers_keep_everything():
    model = tiny_mmdit(rope_config(**MUP))
    expected = described(model)
    assert described(copy.deepcopy(model)) == expected
    assert described(torch.compile(model)) == expected
    model.enable_gradient_checkpointing()
    assert described(model) == expected
    with torch.device("meta"):
        empty = MMDiT(**rope_config(**MUP))
    assert described(empty) == expected
    empty.load_state_dict(model.state_dict(), assign=True)
    assert described(empty) == expected
    model.half()
    assert described(model) == expected


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointed(model):
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda part: "Block" in type(part).__name__
    )
    return model


def fsdp1(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def fsdp1_of_blocks(model):
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = fsdp1(block, use_orig_params=True)
    return fsdp1(model, use_orig_params=True)


def compiled_blocks(model):
    for i, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[i] = torch.compile(block)
    return model


WRAPPERS = {
    "checkpoints": checkpointed,
    "a checkpoint": checkpoint_wrapper,
    "fsdp1": fsdp1_of_blocks,
    "fsdp1 over checkpoints": lambda model: fsdp1_of_blocks(checkpointed(model)),
    "ddp": DistributedDataParallel,
    "data parallel": torch.nn.DataParallel,
    "ddp, compiled": lambda model: torch.compile(DistributedDataParallel(model)),
    "compiled blocks": compiled_blocks,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:.*deprecated:FutureWarning")
def test_parts_and_wholes_may_be_wrapped(wrapper, one_rank):
    """By role, in the model's order, over the same parameters."""
    model, whole = (tiny_mmdit(rope_config(**MUP)) for _ in range(2))
    wrapped = WRAPPERS[wrapper](model)
    assert described(wrapped) == described(whole)
    assert [rule.name for rule in mup_table(wrapped)] == [name for name, _ in whole.named_parameters()]
    assert {id(p) for group in param_groups(wrapped, 1e-2) for p in group["params"]} == set(
        map(id, wrapped.parameters())
    )


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:.*deprecated:FutureWarning")
def test_flat_parameters_of_fsdp1_are_refused(one_rank):
    with pytest.raises(ValueError, match="wrap the model with use_orig_params=True"):
        param_groups(fsdp1(tiny_mmdit(rope_config(**MUP))), 1e-2)
    model = tiny_mmdit(rope_config(**MUP))
    shard = model.context_embedder.weight.detach().flatten()[:10]  # what a rank of several holds of it
    model.context_embedder.weight = torch.nn.Parameter(shard)
    with pytest.raises(ValueError, match=r"context_embedder.weight is a flat shard \(10,\) of FSDP1"):
        init_weights(model)


ADAPTERS = {
    "lora": (LoraConfig(r=2, target_modules=["to_q"], lora_bias=True), "lora"),
    "dora": (LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "lora"),
    "loha": (LoHaConfig(r=2, target_modules=["to_q"]), "hada"),
    "lokr": (LoKrConfig(r=2, target_modules=["to_q"]), "lokr"),
    "ia3": (IA3Config(target_modules=["to_q"], feedforward_modules=[]), "ia3"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_models(kind):
    """`get_peft_model`: the adapter's parameters have the base rate; the base's, unfrozen, their own."""
    model, whole = (tiny_mmdit(rope_config(**MUP)) for _ in range(2))
    config, part = ADAPTERS[kind]
    wrapped = get_peft_model(model, config)
    (group,) = param_groups(wrapped, 1e-2)
    assert group["role"] == "adapter" and group["lr"] == 1e-2 and all(part in name for name in group["names"])
    wrapped.requires_grad_(True)
    assert [g for g in described(wrapped) if g["role"] != "adapter"] == described(whole)


def test_layers_that_peft_trains_whole_keep_their_roles():
    model, whole = (tiny_mmdit(rope_config(**MUP)) for _ in range(2))
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["norm_out.linear", "context_embedder"])
    groups = param_groups(get_peft_model(model, config), 1e-2)
    expected = {name: group["lr"] for group in param_groups(whole, 1e-2) for name in group["names"]}
    trained_whole = {name: g["lr"] for g in groups if g["role"] != "adapter" for name in g["names"]}
    assert trained_whole.keys() == {
        f"{module}.{leaf}" for module in ("norm_out.linear", "context_embedder") for leaf in ("weight", "bias")
    }
    assert all(rate == expected[name] for name, rate in trained_whole.items())


def test_fully_sharded(one_rank):
    model, whole = (tiny_mmdit(rope_config(**MUP)) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.transformer_blocks, *model.single_transformer_blocks, model):
        fully_shard(part, mesh=mesh)
    assert isinstance(model.proj_out.weight, DTensor)
    assert described(model) == described(whole)
    for each in (model, whole):
        init_weights(each, torch.Generator().manual_seed(3))
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), parameter), name


def test_adapters_are_left_alone():
    model = tiny_mmdit(rope_config(**MUP))
    expected = described(model)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"]))
    (group,) = param_groups(model, 1e-2)
    assert group["role"] == "adapter" and group["lr"] == 1e-2 and len(group["params"]) > 4
    before = [p.clone() for p in group["params"]]
    init_weights(model, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, group["params"]))
    model.requires_grad_(True)
    assert [g for g in described(model) if g["role"] != "adapter"] == expected


def test_muon_scales_no_hidden_rate():
    model = tiny_mmdit(rope_config(**MUP))
    groups = param_groups(model, 1e-2, 0.1, optimizer_kind="muon")
    muon = [group for group in groups if group.pop("use_muon", False)]
    assert {group["role"] for group in muon} == {"hidden", "modulation"}
    assert all(group["lr"] == 1e-2 and group["weight_decay"] == 0.1 for group in muon)
    assert all(p.ndim == 2 for group in muon for p in group["params"])
    rest = [group for group in groups if group not in muon]
    adam = {group["role"]: group["lr"] for group in param_groups(model, 1e-2, 0.1)}
    assert {group["role"]: group["lr"] for group in rest} == {
        role: lr for role, lr in adam.items() if role not in ("hidden", "modulation")
    }
    torch.optim.Muon(muon, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)
    with pytest.raises(ValueError, match="optimizer_kind must be one of 'adam', 'muon', 'sgd', got 'adamw'"):
        param_groups(model, 1e-2, optimizer_kind="adamw")


@pytest.mark.parametrize(
    ("schedule", "keeps"),
    [
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), True),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10), True),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-3), False),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10), False),
    ],
)
def test_schedulers_that_set_absolute_rates_are_refused(schedule, keeps):
    optimizer = torch.optim.AdamW(param_groups(tiny_mmdit(rope_config(**MUP)), 1e-2))
    scheduler = schedule(optimizer)
    optimizer.step()
    scheduler.step()
    if keeps:
        check_rates(optimizer)
    else:
        with pytest.raises(ValueError, match=r"lost μP's ratios: .* use one that multiplies"):
            check_rates(optimizer)


def test_rates_of_other_groups_cannot_be_checked():
    with pytest.raises(ValueError, match=r"make the groups with imgdit.mup.param_groups"):
        check_rates(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]))


def test_at_the_base_width_it_is_plain_adamw():
    model, plain = (tiny_mmdit(sincos_config(num_attention_heads=2)) for _ in range(2))
    configure(model, base_width=32)
    got = trained(model, param_groups(model, 1e-2, 0.1, no_decay=()))
    expected = trained(plain, [{"params": list(plain.parameters()), "lr": 1e-2, "weight_decay": 0.1}])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
