"""MMDiT against diffusers' live classes, with equal weights in float32."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from tiny import randomize

from imgdit import Frame, FrameLayout, MMDiT
from imgdit.models.blocks import BlockPlan, double_block, single_block
from imgdit.models.functional import rope_table
from imgdit.mup import configure, mup_settings, param_groups
from imgdit.pipelines.text_to_image import pack

FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
}
# configuration changes, batch, rows and columns of tokens, text tokens
FLUX_CASES = {
    "plain": ({}, 1, (4, 4), 5),
    "guidance": ({"guidance_embeds": True}, 2, (4, 4), 5),
    "double only": ({"num_single_layers": 0}, 1, (4, 4), 3),
    "single only": ({"num_layers": 0, "num_single_layers": 2}, 1, (4, 4), 3),
    "deep": ({"num_layers": 3, "num_single_layers": 5}, 1, (3, 4), 4),
    "tall, batch 3": ({}, 3, (7, 2), 6),
    "wide heads": ({"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}, 2, (2, 5), 1),
    "unequal axes": ({"attention_head_dim": 24, "axes_dims_rope": (2, 6, 16), "num_attention_heads": 3}, 1, (5, 5), 7),
    "other output": ({"out_channels": 8, "num_attention_heads": 1}, 2, (4, 3), 5),
}
SD3_CASES = {
    "plain": ({}, 1, (4, 4), 5),
    "qk-norm": ({"qk_norm": "rms_norm"}, 2, (4, 4), 5),
    "dual attention": ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, 2, (4, 4), 5),
    "dual attention in the last block": ({"dual_attention_layers": (0, 2)}, 1, (4, 4), 5),
    "tall, batch 3": ({}, 3, (6, 2), 6),
    "one block": ({"num_layers": 1}, 2, (3, 5), 2),
    "deep, wide heads": ({"num_layers": 5, "attention_head_dim": 32, "caption_projection_dim": 64}, 1, (2, 6), 3),
    "patch 4": ({"patch_size": 4, "sample_size": 32, "in_channels": 3, "out_channels": 3}, 1, (3, 2), 4),
}


def flux_inputs(config, batch, size, text):
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, size[0] * size[1], config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "timestep": torch.rand(batch),
        "img_ids": Frame(size).ids(),
        "txt_ids": torch.zeros(text, 3),
        **({"guidance": torch.rand(batch) * 5} if config.get("guidance_embeds") else {}),
    }


def sd3_inputs(config, batch, size, text):
    torch.manual_seed(3)
    rows, columns = (side * config["patch_size"] for side in size)
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], rows, columns),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "timestep": torch.rand(batch) * 1000,
    }


def case(family, name):
    changes, *shape = (FLUX_CASES if family == "flux" else SD3_CASES)[name]
    config = {**(FLUX if family == "flux" else SD3), **changes}
    if family == "sd3":
        config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    torch.manual_seed(0)
    theirs = randomize((FluxTransformer2DModel if family == "flux" else SD3Transformer2DModel)(**config)).eval()
    return theirs, (flux_inputs if family == "flux" else sd3_inputs)(config, *shape)


def plain(config):
    """A configuration as its file would hold it."""
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))


CASES = [("flux", name) for name in FLUX_CASES] + [("sd3", name) for name in SD3_CASES]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_forward_and_all_gradients(family, name):
    theirs, inputs = case(family, name)
    ours = MMDiT.from_diffusers(theirs)
    expected, got = theirs(**inputs).sample, ours(**inputs).sample
    assert (got - expected).abs().max() <= 1e-5

    weight = torch.randn_like(expected)
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == dict(ours.named_parameters()).keys()
    expected = torch.autograd.grad((expected * weight).sum(), parameters.values(), allow_unused=True)
    got = torch.autograd.grad((got * weight).sum(), list(ours.parameters()), allow_unused=True)
    by_name = dict(zip((n for n, _ in ours.named_parameters()), got))
    largest = max(g.norm() for g in expected if g is not None)
    for key, gradient in zip(parameters, expected):
        if gradient is None:
            assert by_name[key] is None, key
            continue
        # A key's bias has no exact gradient without a norm on it: what both compute there is rounding.
        scale = max(gradient.norm(), 1e-3 * largest)
        assert (by_name[key] - gradient).norm() <= 1e-4 * scale, key


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_from_diffusers_shares_and_to_diffusers_returns(family):
    theirs, inputs = case(family, "plain")
    ours = MMDiT.from_diffusers(theirs)
    mine = dict(ours.named_parameters())
    assert all(mine[name] is parameter for name, parameter in theirs.named_parameters())
    back = ours.to_diffusers()
    assert type(back) is type(theirs)
    assert plain(back.config) == plain(theirs.config)
    with torch.no_grad():
        assert torch.equal(back(**inputs).sample, theirs(**inputs).sample)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_reads_a_diffusers_folder(family, tmp_path):
    theirs, inputs = case(family, "plain")
    theirs.save_pretrained(tmp_path / "transformer")
    ours = MMDiT.from_pretrained(tmp_path, subfolder="transformer")
    with torch.no_grad():
        assert (ours(**inputs).sample - theirs(**inputs).sample).abs().max() <= 1e-5
    ours.save_pretrained(tmp_path / "ours")
    again = MMDiT.from_pretrained(tmp_path / "ours")
    assert plain(again.config) == plain(ours.config)
    with torch.no_grad():
        assert (again(**inputs).sample - theirs(**inputs).sample).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_settings_of_mup_stay_with_the_weights(family, tmp_path):
    """As `MMDiT` or as diffusers' class, copied, shared or from a folder: the same rates of training."""
    theirs, _ = case(family, "plain")
    configure(theirs, base_width=16, output_mult=2.0, wd_exponent=0.5, base_head_dim=8, base_depth=2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MMDiT.from_diffusers(theirs)
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "theirs")
    models = {
        "from_diffusers": ours,
        "a diffusers folder": MMDiT.from_pretrained(tmp_path / "theirs"),
        "our folder": MMDiT.from_pretrained(tmp_path / "ours"),
        "to_diffusers": ours.to_diffusers(),
        "from_diffusers of a loaded one": MMDiT.from_diffusers(again),
    }

    def rates(model):
        return {
            name: (group["role"], group["lr"], group["weight_decay"], group["eps"])
            for group in param_groups(model, 1e-2, 0.1)
            for name in group["names"]
        }

    assert len({rate[1] for rate in rates(theirs).values()}) > 2
    for name, model in models.items():
        assert mup_settings(model.config) == mup_settings(theirs.config), name
        assert rates(model) == rates(theirs), name


def test_to_diffusers_refuses_what_diffusers_has_not():
    model = MMDiT(**{**{k: v for k, v in FLUX.items()}, "mlp_ratio": 2.0})
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel has mlp_ratio=4\.0 built in, this model has 2\.0"):
        model.to_diffusers()


def test_from_diffusers_refuses_a_model_with_adapters():
    from peft import LoraConfig

    theirs, _ = case("flux", "plain")
    theirs.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="unload LoRAs"):
        MMDiT.from_diffusers(theirs)


@pytest.mark.parametrize("name", list(SD3_CASES))
def test_sincos_tokens_equal_the_latent_grid(name):
    """The layout path of a sin-cos model embeds patches by a linear layer and looks positions up per token."""
    theirs, inputs = case("sd3", name)
    ours = MMDiT.from_diffusers(theirs)
    patch = ours.config.patch_size
    size = tuple(side // patch for side in inputs["hidden_states"].shape[-2:])
    layout = FrameLayout.build([Frame(size)], inputs["encoder_hidden_states"].shape[1])
    with torch.no_grad():
        expected = pack(theirs(**inputs).sample, patch)
        inputs["hidden_states"] = pack(inputs["hidden_states"], patch)
        got = ours(**inputs, layout=layout).sample
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("family", "name"), [("flux", "plain"), ("sd3", "plain"), ("sd3", "dual attention")])
def test_block_functions_run_on_diffusers_blocks(family, name):
    """The mathematics need only submodule names, which a hook on diffusers' own models relies on."""
    theirs, _ = case(family, name)
    image, text = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    temb, ids = torch.randn(2, 32), Frame((2, 3)).ids()
    plan = BlockPlan((5,), (6,))
    ours_rope, their_rope = None, {}
    if family == "flux":
        positions = torch.cat([torch.zeros(5, 3), ids])
        ours_rope, their_rope = (
            rope_table(positions, (4, 6, 6), 10000),
            {"image_rotary_emb": theirs.pos_embed(positions)},
        )
    blocks = [(double_block, block) for block in theirs.transformer_blocks]
    blocks += [(single_block, block) for block in getattr(theirs, "single_transformer_blocks", [])]
    with torch.no_grad():
        for function, block in blocks:
            expected_text, expected = block(hidden_states=image, encoder_hidden_states=text, temb=temb, **their_rope)
            got, got_text = function(block, image, text, temb[:, None], temb[:, None], ours_rope, plan)
            assert (got - expected).abs().max() <= 1e-5
            if expected_text is not None:
                assert (got_text - expected_text).abs().max() <= 1e-5
