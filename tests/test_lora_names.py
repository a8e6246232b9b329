"""Every dialect of LoRA files: a fixture of keys each, what they mean, and what becomes of keys that are no LoRA."""

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from tiny import rope_config, sincos_config, tiny_mmdit
from tiny_control import flux, sd3

from imgdit.lora.dialects import LoraKindError, family_of, from_diffusers, sort_names, to_diffusers
from imgdit.lora.fitting import layers_of

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def double(*parts):
    return tuple(f"transformer_blocks.1.{part}" for part in parts)


def single(*parts):
    return tuple(f"single_transformer_blocks.1.{part}" for part in parts)


def attn(*parts):
    return tuple(f"attn.{part}" for part in parts)


# A layer by the name of the model's own repository: diffusers' names of its parts.
FLUX_OWN = {
    "double_blocks.1.img_mod.lin": double("norm1.linear"),
    "double_blocks.1.txt_mod.lin": double("norm1_context.linear"),
    "double_blocks.1.img_attn.qkv": double(*attn(*QKV)),
    "double_blocks.1.txt_attn.qkv": double(*attn(*ADDED)),
    "double_blocks.1.img_attn.proj": double("attn.to_out.0"),
    "double_blocks.1.txt_attn.proj": double("attn.to_add_out"),
    "double_blocks.1.img_mlp.0": double("ff.net.0.proj"),
    "double_blocks.1.img_mlp.2": double("ff.net.2"),
    "double_blocks.1.txt_mlp.0": double("ff_context.net.0.proj"),
    "double_blocks.1.txt_mlp.2": double("ff_context.net.2"),
    "single_blocks.1.modulation.lin": single("norm.linear"),
    "single_blocks.1.linear1": single(*attn(*QKV), "proj_mlp"),
    "single_blocks.1.linear2": single("proj_out"),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
SD3_OWN = {
    "joint_blocks.1.x_block.adaLN_modulation.1": double("norm1.linear"),
    "joint_blocks.1.context_block.adaLN_modulation.1": double("norm1_context.linear"),
    "joint_blocks.2.context_block.adaLN_modulation.1": ("transformer_blocks.2.norm1_context.linear",),
    "joint_blocks.1.x_block.attn.qkv": double(*attn(*QKV)),
    "joint_blocks.1.context_block.attn.qkv": double(*attn(*ADDED)),
    "joint_blocks.0.x_block.attn2.qkv": tuple(f"transformer_blocks.0.attn2.{part}" for part in QKV),
    "joint_blocks.1.x_block.attn.proj": double("attn.to_out.0"),
    "joint_blocks.1.context_block.attn.proj": double("attn.to_add_out"),
    "joint_blocks.0.x_block.attn2.proj": ("transformer_blocks.0.attn2.to_out.0",),
    "joint_blocks.1.x_block.mlp.fc1": double("ff.net.0.proj"),
    "joint_blocks.1.x_block.mlp.fc2": double("ff.net.2"),
    "joint_blocks.1.context_block.mlp.fc1": double("ff_context.net.0.proj"),
    "joint_blocks.1.context_block.mlp.fc2": double("ff_context.net.2"),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
XLABS = {
    "double_blocks.1.processor.qkv_lora1": double(*attn(*QKV)),
    "double_blocks.1.processor.qkv_lora2": double(*attn(*ADDED)),
    "double_blocks.1.processor.proj_lora1": double("attn.to_out.0"),
    "double_blocks.1.processor.proj_lora2": double("attn.to_add_out"),
    "single_blocks.1.processor.qkv_lora": single(*attn(*QKV)),
    "single_blocks.1.processor.proj_lora": single("proj_out"),
}
DIFFUSERS = {name: (name,) for parts in FLUX_OWN.values() for name in parts}
SD3_DIFFUSERS = {name: (name,) for parts in SD3_OWN.values() for name in parts}


def dotted(prefix, down="lora_A", up="lora_B", weight=".weight"):
    return lambda name: (f"{prefix}{name}.{down}{weight}", f"{prefix}{name}.{up}{weight}", f"{prefix}{name}.alpha")


def underscored(prefix):
    def keys(name):
        stem = prefix + name.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"

    return keys


PEFT_ADAPTER = dotted("", weight=".style.weight")
# Model, what its layers are called, how that becomes keys, with an alpha or not, and what the dialect is called.
FILES = {
    "diffusers": ("flux", DIFFUSERS, dotted("transformer."), False, "peft"),
    "diffusers with alphas": ("flux", DIFFUSERS, dotted("transformer."), True, "peft"),
    "save_lora_adapter": ("flux", DIFFUSERS, dotted(""), False, "peft"),
    "a PEFT state dict": ("flux", DIFFUSERS, PEFT_ADAPTER, False, "peft"),
    "PEFT": ("flux", DIFFUSERS, dotted("base_model.model."), False, "peft"),
    "PEFT with the adapter's name": (
        "flux",
        DIFFUSERS,
        dotted("base_model.model.", weight=".x.weight"),
        False,
        "peft",
    ),
    "PEFT on FLUX's own model": ("flux", FLUX_OWN, dotted("base_model.model."), False, "comfyui"),
    "SimpleTuner": ("flux", DIFFUSERS, dotted("transformer.base_model.model."), False, "peft"),
    "DDP and compile": ("flux", DIFFUSERS, dotted("module._orig_mod."), False, "peft"),
    "ComfyUI": ("flux", FLUX_OWN, dotted("diffusion_model."), False, "comfyui"),
    "ComfyUI, diffusers' names": ("flux", DIFFUSERS, dotted("diffusion_model."), True, "comfyui"),
    "ComfyUI, from a checkpoint": ("flux", FLUX_OWN, dotted("model.diffusion_model."), True, "comfyui"),
    "ComfyUI, down and up": ("flux", FLUX_OWN, dotted("diffusion_model.", "lora_down", "lora_up"), True, "comfyui"),
    "FLUX's own names": ("flux", FLUX_OWN, dotted(""), False, "comfyui"),
    "kohya": ("flux", FLUX_OWN, underscored("lora_unet_"), True, "kohya"),
    "kohya, diffusers' names": ("flux", DIFFUSERS, underscored("lora_unet_"), True, "kohya"),
    "LyCORIS": ("flux", DIFFUSERS, underscored("lycoris_"), True, "kohya"),
    "OneTrainer": ("flux", DIFFUSERS, underscored("lora_transformer_"), True, "onetrainer"),
    "XLabs": ("flux", XLABS, dotted("", "down", "up"), False, "xlabs"),
    "XLabs in ComfyUI": ("flux", XLABS, dotted("diffusion_model.", "down", "up"), False, "xlabs"),
    "SD3, diffusers": ("sd3", SD3_DIFFUSERS, dotted("transformer."), False, "peft"),
    "SD3, OneTrainer": ("sd3", SD3_DIFFUSERS, underscored("lora_transformer_"), True, "onetrainer"),
    "SD3, kohya": ("sd3", SD3_OWN, underscored("lora_unet_"), True, "kohya"),
    "SD3, ComfyUI": ("sd3", SD3_OWN, dotted("diffusion_model."), False, "comfyui"),
}
MODELS = {
    "flux": lambda: flux(guidance_embeds=True).transformer,
    "sd3": lambda: sd3().transformer,
    "mmdit": lambda: tiny_mmdit(rope_config(guidance_embeds=True)),
    "mmdit like sd3": lambda: tiny_mmdit(sincos_config()),
}


def shape(layer):
    out, *inner = layer.weight.shape
    return out, inner


def tensors_of(names, keys, with_alpha, layers, rank=2):
    """A file's tensors, and by module the change of the weights that they mean."""
    generator = torch.Generator().manual_seed(0)
    tensors, right = {}, {}
    for own, parts in names.items():
        down_key, up_key, alpha_key = keys(own)
        _, inner = shape(layers[parts[0]])
        rows = [shape(layers[part])[0] for part in parts]
        down = torch.randn(rank, *inner, generator=generator)
        up = torch.randn(sum(rows), rank, *[1] * (len(inner) - 1), generator=generator)
        tensors |= {down_key: down, up_key: up}
        if with_alpha:
            tensors[alpha_key] = torch.tensor(1.0)
        change = up.flatten(1) @ down.flatten(1) * (1 / rank if with_alpha else 1.0)
        for part, piece in zip(parts, change.split(rows)):
            scale_and_shift = part == "norm_out.linear" or (
                "norm1_context" in part and piece.shape[0] == 2 * piece.shape[1]
            )
            right[part] = torch.cat(piece.chunk(2)[::-1]) if scale_and_shift and own != part else piece
    return tensors, right


@pytest.mark.parametrize("name", FILES)
def test_every_dialect_is_read(name):
    family, names, keys, with_alpha, dialect = FILES[name]
    tensors, right = tensors_of(names, keys, with_alpha, layers_of(MODELS[family]()))
    read = to_diffusers(tensors)
    assert read.dialect == dialect and read.unused == ()
    assert read.pairs.keys() == right.keys()
    for module, change in right.items():
        got = read.pairs[module].up.flatten(1) @ read.pairs[module].down.flatten(1)
        torch.testing.assert_close(got, change, msg=module)
    assert len(sort_names(tensors).used) == len(tensors)
    again = to_diffusers(from_diffusers(read.pairs, "peft")).pairs
    assert all(torch.equal(again[module].up, pair.up) for module, pair in read.pairs.items())


@pytest.mark.parametrize(("family", "names"), [("mmdit", DIFFUSERS), ("mmdit like sd3", SD3_DIFFUSERS)])
def test_the_tables_name_every_layer_of_our_own_model(family, names):
    """But for layers that the tables hold under another number or side of the same kind."""

    def kind(name):
        return ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(name.split(".")))

    known = {kind(name).replace("linear_1", "linear_2") for name in names}
    assert {kind(name).replace("linear_1", "linear_2") for name in layers_of(MODELS[family]())} - known == set()


PUBLISHED = {
    "kohya": (FLUX_OWN, underscored("lora_unet_"), True),
    "ComfyUI, down and up": (FLUX_OWN, dotted("diffusion_model.", "lora_down", "lora_up"), True),
    "XLabs": (XLABS, dotted("", "down", "up"), False),
    "OneTrainer": (
        {name: (name,) for name in double(*attn(*QKV, *ADDED), "attn.to_out.0")},
        underscored("lora_transformer_"),
        True,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_converters_agree_at_the_published_size(name):
    """Where diffusers has a converter, on the layers that it does not lose: it leaves the edges of the model without
    a prefix, and the alphas of the last layer out."""
    names, keys, with_alpha = PUBLISHED[name]
    names = {own: parts for own, parts in names.items() if "blocks" in own}
    width = {"mod.lin": (6, 1), "modulation.lin": (3, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "linear2": (1, 5)}
    width |= {"qkv": (3, 1), "linear1": (7, 1), "single_blocks.1.processor.proj_lora": (1, 5)}
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for own in names:
        rows, columns = next((size for end, size in width.items() if end in own), (1, 1))
        down_key, up_key, alpha_key = keys(own)
        tensors[down_key] = torch.randn(2, columns * 3072, generator=generator)
        tensors[up_key] = torch.randn(rows * 3072, 2, generator=generator)
        if with_alpha:
            tensors[alpha_key] = torch.tensor(1.0)
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    ours = to_diffusers(tensors).pairs
    modules = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in theirs}
    assert modules == ours.keys()
    for module in modules:
        down, up = (theirs[f"transformer.{module}.lora_{side}.weight"] for side in "AB")
        vector = torch.randn(down.shape[1], generator=generator)
        torch.testing.assert_close(ours[module].up @ (ours[module].down @ vector), up @ (down @ vector), msg=module)


def pair(module, prefix="transformer.", width=32):
    return {
        f"{prefix}{module}.lora_A.weight": torch.ones(2, width),
        f"{prefix}{module}.lora_B.weight": torch.ones(width, 2),
    }


def test_a_module_of_diffusers_that_is_called_img_in_keeps_its_name():
    """Qwen-Image's and Krea 2's first layer has the name of FLUX's in its own repository."""
    block = pair("transformer_blocks.0.attn.to_q")
    for prefix, others in (("transformer.", {}), ("transformer.", block), ("", block), ("", {})):
        assert "img_in" in to_diffusers(pair("img_in", prefix) | others).pairs
    qwen = pair("img_in", "diffusion_model.") | pair("transformer_blocks.0.attn.to_q", "diffusion_model.")
    assert "img_in" in to_diffusers(qwen).pairs
    assert "x_embedder" in to_diffusers(pair("img_in", "diffusion_model.")).pairs
    own = pair("img_in", "") | pair("double_blocks.0.img_attn.proj", "")
    assert "x_embedder" in to_diffusers(own).pairs


TEXT_ENCODERS = [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight",
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight",
    "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_magnitude_vector",
]


@pytest.mark.parametrize("key", TEXT_ENCODERS)
def test_keys_of_text_encoders_are_set_aside(key):
    names = sort_names([key, *pair("x_embedder")])
    assert names.unused == (key,) and "text encoder" in names.aside[key]
    assert list(names.parts) == ["x_embedder"]


OTHERS = {
    "bundle_emb.word.t5": "learned word",
    "diffusion_model.img_in.diff_b": "whole weights",
    "transformer.norm_out.linear.weight": "whole weights",
    "base_model.model.x_embedder.modules_to_save.weight": "whole weights",
}


@pytest.mark.parametrize("key", OTHERS)
def test_keys_that_are_no_lora_are_set_aside_by_what_they_are(key):
    assert OTHERS[key] in sort_names([key, *pair("x_embedder")]).aside[key]


KINDS = {
    "transformer.x_embedder.lora_magnitude_vector": "DoRA",
    "lora_unet_img_in.dora_scale": "DoRA",
    "lycoris_x_embedder.lokr_w1": "LoKr",
    "lora_unet_img_in.hada_w1_a": "LoHa",
    "transformer.x_embedder.oft_R.weight": "OFT",
    "lora_unet_img_in.lora_mid.weight": "Tucker",
    "transformer.x_embedder.lora_B.bias": "biases",
    "double_blocks.0.img_attn.norm.query_norm.scale": "FLUX Control LoRA.*FluxControlPipeline",
    "transformer.x_embedder.lora_A.second.weight": "the adapters '', 'second' in one file",
}


@pytest.mark.parametrize("key", KINDS)
def test_other_kinds_are_refused_by_their_names(key):
    with pytest.raises(LoraKindError, match=KINDS[key]):
        sort_names([key, *pair("x_embedder")])


def test_a_layer_that_a_file_holds_twice_acts_once():
    """As published files do: diffusers' names and kohya's of the same LoRA."""
    block = pair("transformer_blocks.0.attn.to_q")
    kohya = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 32),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(96, 2),
    }
    read = to_diffusers(block | kohya)
    assert list(read.pairs) == ["transformer_blocks.0.attn.to_q"]
    assert set(read.unused) == kohya.keys() and all("other names" in why for why in read.aside.values())
    twice = to_diffusers(block | pair("transformer_blocks.0.attn.to_q", "base_model.model."))
    assert len(twice.pairs) == 1 and len(twice.aside) == 2


def test_linear_layers_written_as_convolutions_and_loras_of_zeros():
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.ones(2, 32, 1, 1), torch.zeros(96, 2, 1, 1)
    read = to_diffusers({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    assert [tuple(one.up.shape) for one in read.pairs.values()] == [(32, 2)] * 3


def test_families_by_their_names():
    for name, model in (("flux", "FLUX.1"), ("sd3", "SD3"), ("mmdit", "FLUX.1"), ("mmdit like sd3", "SD3")):
        assert family_of(layers_of(MODELS[name]())) == model
    assert family_of(["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q.alpha"]).startswith(
        "Stable"
    )
    assert family_of(["transformer_blocks.0.img_mlp.net.0.proj"]) == "Qwen-Image"
    assert family_of(["transformer_blocks.0.attn.to_q"]) is None
