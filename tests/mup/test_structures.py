"""The declared structure of every model class, against what grows between two widths on the meta device."""

import diffusers
import pytest
import torch
from tiny import rope_config, sincos_config

from imgdit import MMDiT, NextDiT
from imgdit.families import MODULES
from imgdit.family import family_named
from imgdit.mup import Structure, configure, init_weights, mup_table, param_groups

DIT = {"attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "in_channels": 4, "out_channels": 8}


def sd3(heads, **changes):
    shared = {"joint_attention_dim": 40, "pooled_projection_dim": 24, "pos_embed_max_size": 8, "qk_norm": "rms_norm"}
    config = {**DIT, **shared, "dual_attention_layers": (0,), "caption_projection_dim": heads * 16, **changes}
    return diffusers.SD3Transformer2DModel(num_attention_heads=heads, **config)


def flux(heads, **changes):
    config = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 40, "pooled_projection_dim": 24}
    config |= {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True, **changes}
    return diffusers.FluxTransformer2DModel(num_attention_heads=heads, **config)


def flux2(heads, **changes):
    config = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 40, "timestep_guidance_channels": 24}
    config |= {"in_channels": 16, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4), **changes}
    return diffusers.Flux2Transformer2DModel(num_attention_heads=heads, **config)


def z_image(heads, **changes):
    config = {"dim": heads * 16, "n_heads": heads, "n_kv_heads": heads, "axes_dims": [4, 6, 6], **changes}
    config = {
        "n_layers": 2,
        "n_refiner_layers": 1,
        "in_channels": 4,
        "cap_feat_dim": 24,
        "siglip_feat_dim": 20,
    } | config
    return diffusers.ZImageTransformer2DModel(**config)


def krea2(heads, **changes):
    text = {"text_hidden_dim": 24, "num_text_layers": 3, "text_num_attention_heads": 2, "text_intermediate_size": 32}
    text |= {"text_num_key_value_heads": 2, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "timestep_embed_dim": 24}
    config |= {"num_key_value_heads": heads // 3, "axes_dims_rope": (4, 6, 6), **changes}
    config = {"intermediate_size": 2 * heads * config["attention_head_dim"], **config}
    return diffusers.Krea2Transformer2DModel(num_attention_heads=heads, **config, **text)


def qwen_image(heads, **changes):
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "joint_attention_dim": 40}
    config |= {"axes_dims_rope": (4, 6, 6), "use_additional_t_cond": True, **changes}
    return diffusers.QwenImageTransformer2DModel(num_attention_heads=heads, **config)


def chroma(heads, **changes):
    config = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 40, "in_channels": 16}
    config |= {"approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 1}
    config |= {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), **changes}
    return diffusers.ChromaTransformer2DModel(num_attention_heads=heads, **config)


def longcat_image(heads, **changes):
    config = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 40, "in_channels": 16}
    config |= {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), **changes}
    return diffusers.LongCatImageTransformer2DModel(num_attention_heads=heads, **config)


def qwen_image21(heads, **changes):
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "context_in_dim": 40}
    config |= {"axes_dims_rope": (4, 6, 6), **changes}
    return diffusers.QwenImage21Transformer2DModel(num_attention_heads=heads, **config)


def flux3(heads, **changes):
    config = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 40, "timestep_channels": 24}
    config |= {"in_channels": 16, "cond_in_channels": 16, "attention_head_dim": 16, "flow_map": True}
    return diffusers.Flux3Transformer2DModel(
        num_attention_heads=heads, **{**config, "axes_dims_rope": (4, 4, 4, 4), **changes}
    )


def ideogram4(heads, **changes):
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "adaln_dim": 24, "llm_features_dim": 40}
    config |= {"mrope_section": (4, 2, 2), **changes}
    config = {"intermediate_size": 2 * heads * config["attention_head_dim"], **config}
    return diffusers.Ideogram4Transformer2DModel(num_attention_heads=heads, **config)


def ernie_image(heads, **changes):
    config = {"hidden_size": heads * 16, "num_layers": 2, "in_channels": 16, "out_channels": 16, "text_in_dim": 40}
    config |= {"rope_axes_dim": (4, 6, 6), **changes}
    config = {"ffn_hidden_size": 2 * config["hidden_size"], **config}
    return diffusers.ErnieImageTransformer2DModel(num_attention_heads=heads, **config)


def dit(heads, **changes):
    return diffusers.DiTTransformer2DModel(num_attention_heads=heads, num_embeds_ada_norm=10, **DIT, **changes)


def pixart(heads, **changes):
    config = {**DIT, "caption_channels": 24, "use_additional_conditions": True, **changes}
    width = heads * config["attention_head_dim"]
    return diffusers.PixArtTransformer2DModel(num_attention_heads=heads, cross_attention_dim=width, **config)


def nextdit(heads, **changes):
    config = {"in_channels": 4, "depth": 2, "caption_channels": 20, "multiple_of": 4, "num_kv_heads": heads, **changes}
    return NextDiT(**{"hidden_size": heads * 12, "num_heads": heads, **config})


CLASSES = {
    "MMDiT": lambda heads: MMDiT(**rope_config(num_attention_heads=heads, guidance_embeds=True)),
    "MMDiT, sincos": lambda heads: MMDiT(**sincos_config(num_attention_heads=heads, dual_attention_layers=(0,))),
    "SD3": sd3,
    "Flux": flux,
    "Flux2": flux2,
    "ZImage": z_image,
    "Krea2": krea2,
    "QwenImage": qwen_image,
    "Chroma": chroma,
    "LongCatImage": longcat_image,
    "QwenImage21": qwen_image21,
    "Flux3": flux3,
    "Ideogram4": ideogram4,
    "ErnieImage": ernie_image,
    "DiT": dit,
    "PixArt": pixart,
    "NextDiT": nextdit,
}


def on_meta(build, *arguments, **changes):
    with torch.device("meta"):
        return build(*arguments, **changes)


@pytest.mark.parametrize("name", CLASSES)
def test_a_role_is_what_grows(name):
    narrow, wide = (on_meta(CLASSES[name], heads) for heads in (3, 6))
    for rule, a, b in zip(mup_table(wide), narrow.parameters(), wide.parameters(), strict=True):
        expected = {
            (True, True): ("hidden", "modulation"),
            (True, False): ("input",),
            (False, True): ("output", "input"),  # tables (rows, width) are inputs
            (True,): ("vector",),
            (False,): ("finite",),
            (False, False): ("finite",),
        }[tuple(x != y for x, y in zip(a.shape, b.shape))[:2]]
        assert rule.role in expected, rule.name
        if rule.role == "input" and len(rule.shape) == 2 and a.shape[0] == b.shape[0]:
            assert any(part in rule.name for part in ("table", "pad_token", "embed"))


@pytest.mark.parametrize("name", CLASSES)
def test_growing_heads(name):
    """The gains of single heads become vectors; the queries hold the attention's factor."""
    base = 12 if name == "NextDiT" else 16
    narrow, wide = (on_meta(BY_HEAD_DIM[name], head_dim) for head_dim in (base, 2 * base))
    configure(wide, base_width=3 * base, base_head_dim=base)
    queries = set()
    for rule, a, b in zip(mup_table(wide), narrow.parameters(), wide.parameters(), strict=True):
        grows = tuple(x != y for x, y in zip(a.shape, b.shape))
        if not rule.name.endswith(".gate"):  # one entry per head
            assert (rule.role == "finite") == (not any(grows)), rule.name
        assert rule.growth == (2.0 if any(grows) else 1.0), rule.name
        if rule.fold == pytest.approx(0.5**0.5):
            queries.add(rule.name.rsplit(".", 2)[-2])
            assert rule.lr_mult == pytest.approx(rule.fold / (2 if rule.role == "hidden" else 1))
    expected = {"DiT": {"to_q"}, "PixArt": {"to_q"}, "NextDiT": {"q_norm"}}
    single = ("ZImage", "Krea2", "QwenImage21", "Flux3", "Ideogram4", "ErnieImage")
    assert queries == ({"norm_q"} if name in single else expected.get(name, {"norm_q", "norm_added_q"}))


BY_HEAD_DIM = {
    "MMDiT": lambda d: MMDiT(
        **rope_config(num_attention_heads=3, attention_head_dim=d, axes_dims_rope=(d // 2, d // 4, d // 4))
    ),
    "MMDiT, sincos": lambda d: MMDiT(
        **sincos_config(num_attention_heads=3, attention_head_dim=d, dual_attention_layers=(0,))
    ),
    "SD3": lambda d: sd3(3, attention_head_dim=d, caption_projection_dim=3 * d),
    "Flux": lambda d: flux(3, attention_head_dim=d, axes_dims_rope=(d // 2, d // 4, d // 4)),
    "Flux2": lambda d: flux2(3, attention_head_dim=d, axes_dims_rope=(d // 4,) * 4),
    "ZImage": lambda d: z_image(3, dim=3 * d, axes_dims=[d // 2, d // 4, d // 4]),
    **{
        name: lambda d, build=build: build(3, attention_head_dim=d, axes_dims_rope=(d // 2, d // 4, d // 4))
        for name, build in (
            ("Krea2", krea2),
            ("QwenImage", qwen_image),
            ("Chroma", chroma),
            ("LongCatImage", longcat_image),
            ("QwenImage21", qwen_image21),
        )
    },
    "Flux3": lambda d: flux3(3, attention_head_dim=d, axes_dims_rope=(d // 4,) * 4),
    "Ideogram4": lambda d: ideogram4(3, attention_head_dim=d, mrope_section=(d // 4, d // 8, d // 8)),
    "ErnieImage": lambda d: ernie_image(3, hidden_size=3 * d, rope_axes_dim=(d // 2, d // 4, d // 4)),
    "DiT": lambda d: diffusers.DiTTransformer2DModel(num_attention_heads=3, **{**DIT, "attention_head_dim": d}),
    "PixArt": lambda d: pixart(3, attention_head_dim=d),
    "NextDiT": lambda d: nextdit(3, hidden_size=3 * d),
}


@pytest.mark.parametrize("name", CLASSES)
def test_growing_depth(name):
    """Every residual branch holds its factor exactly once."""
    model = on_meta(CLASSES[name], 3)
    blocks = (
        4 if name == "MMDiT" else 3 if name in ("Flux", "Flux2", "Flux3", "ZImage", "Chroma", "LongCatImage") else 2
    )
    configure(model, base_width=36 if name == "NextDiT" else 48, base_depth=1)
    for rule in mup_table(model):
        inside = "block" in rule.name or rule.name.startswith("layers.") or "_refiner." in rule.name
        inside = inside and not rule.name.startswith("text_fusion.")
        ends = ("to_out.", "to_add_out.", "net.2.", "linear_out.", "ff.down.", "img_mlp.out.", "linear_fc2.")
        if name in ("NextDiT", "ZImage", "Ideogram4"):  # whose branches end in a norm
            ends = ("attention_norm2.", "ffn_norm2.")
        branch = inside and (any(end in rule.name for end in ends) or ".proj_out." in rule.name)
        assert rule.fold == pytest.approx(1 / blocks if branch else 1.0), rule.name
        assert rule.eps_mult * rule.fold == pytest.approx(1 / blocks if inside else 1.0), rule.name


def test_conditioning_of_nextdit_stops_growing():
    model = on_meta(nextdit, 128, depth=1, num_kv_heads=32)  # width 1536, conditioning vectors of 1024
    configure(model, base_width=768)
    rules = {rule.name: rule for rule in mup_table(model)}
    assert rules["layers.0.adaLN_modulation.1.weight"].lr_mult == pytest.approx(768 / 1024)
    assert rules["layers.0.attention.wq.weight"].lr_mult == pytest.approx(768 / 1536)


def test_conditioning_of_z_image_stops_growing():
    model = on_meta(z_image, 32)  # width 512, conditioning vectors of 256
    configure(model, base_width=128)
    rules = {rule.name: rule for rule in mup_table(model)}
    assert rules["layers.0.adaLN_modulation.0.weight"].lr_mult == pytest.approx(128 / 256)
    assert rules["t_embedder.mlp.2.weight"].role == "input"
    assert rules["noise_refiner.0.attention.to_q.weight"].lr_mult == pytest.approx(128 / 512)


def test_gains_of_krea2_are_written_less_one():
    model = krea2(3)
    configure(model, base_width=24, base_head_dim=8, base_depth=1)
    init_weights(model)
    block = model.transformer_blocks[0]
    for norm in (block.norm1, block.attn.norm_k, model.final_layer.norm, model.text_fusion.refiner_blocks[0].norm1):
        assert not norm.weight.any()
    torch.testing.assert_close(1 + block.attn.norm_q.weight, torch.full((16,), 0.5**0.5))


@pytest.mark.parametrize("name", CLASSES)
def test_settings_are_saved_copied_and_initialised(name, tmp_path):
    model = CLASSES[name](6)
    configure(model, base_width=24 if name == "NextDiT" else 32, output_mult=2.0, adaln_init="normal", wd_exponent=0.5)
    init_weights(model, torch.Generator().manual_seed(0))
    for rule, parameter in zip(mup_table(model), model.parameters(), strict=True):
        if rule.init_std and parameter.numel() < 16:
            continue  # too few to tell
        std = 0.0 if parameter.numel() < 2 else float(parameter.detach().std())
        assert std == pytest.approx(rule.init_std or 0.0, rel=0.35), rule.name
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert mup_table(loaded) == mup_table(model)
    groups = {group["role"]: group for group in param_groups(loaded, 1e-2, 0.1)}
    assert groups["hidden"]["lr"] == pytest.approx(1e-2 / 3)
    assert groups["hidden"]["weight_decay"] == pytest.approx(0.1 * 3**0.5)
    assert groups["output"]["lr"] == pytest.approx(1e-2 * 2 / 3)


def test_every_table_is_used():
    assert {type(on_meta(build, 3)).__name__ for build in CLASSES.values()} == {
        name for name in MODULES if family_named(name).mup is not None
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_width": 40}, r"multiple of attention_head_dim=16 .*got 40; the nearest is 32"),
        ({"base_width": 8}, r"multiple of attention_head_dim=16 .*got 8; the nearest is 16"),
        ({"base_width": 40, "base_head_dim": 12}, r"multiple of mup_base_head_dim=12 .*got 40; the nearest is 36"),
        ({"base_depth": 0}, r"mup_base_depth must be positive, got 0"),
        ({"adaln_init": "zeros"}, r"mup_adaln_init must be one of 'zero', 'normal', got 'zeros'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(on_meta(flux, 3), **settings)


def test_a_model_of_unknown_structure():
    with pytest.raises(ValueError, match=r"not of Linear; the first unclassified parameter is 'weight'"):
        mup_table(torch.nn.Linear(2, 2))


def test_a_class_may_declare_its_own_structure():
    class Mine(MMDiT):
        _mup_structure = Structure(roles=(("*", "hidden"),), queries=(), branches=(), blocks=())

    assert {rule.role for rule in mup_table(on_meta(Mine, **rope_config()))} == {"hidden"}
