"""A tiny pipeline of Krea 2, and what its transformer gives by a dense attention."""

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from tiny import randomize
from tiny_control import quiet
from tiny_families import FamilyCase, random
from tiny_text import VOCABULARY, make_tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

BLOCK = r"(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))"
TARGETS = rf"img_in|time_mod_proj|transformer_blocks\.\d+\.{BLOCK}"
STYLE = TARGETS + rf"|text_fusion\.\w+_blocks\.\d+\.{BLOCK}|text_fusion\.projector|txt_in\.linear_[12]"


def krea2():
    torch.manual_seed(0)
    model = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    # Frozen as under PEFT: the matrix product of a layer of one output rounds differently with gradients.
    model = randomize(model, std=0.1).eval().requires_grad_(False)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, attn_scales=[], temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
    )  # fmt: skip
    return quiet(Krea2Pipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, model))


def folder(path):
    """The folder of a pipeline with a tiny text encoder."""
    pipe = krea2()
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 12,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [2, 2, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    pipe.register_to_config(text_encoder_select_layers=(0, 1, 2))
    pipe.save_pretrained(path)
    return path


def prompts(batch):
    """Of 6 and 4 tokens in one padded length, the padding in the middle."""
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1::2, 3:5] = False
    given = {"guidance_scale": 2.0}
    for number, name in enumerate(("prompt", "negative_prompt")):
        given[f"{name}_embeds"] = random(batch, 6, 3, 24, seed=3 + number)
        given[f"{name}_embeds_mask"] = mask[number : number + batch]
    return given


def dense(model, given, conditions=()):
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    mask = given["encoder_attention_mask"]
    batch, length = text.shape[:2]
    seen = torch.cat([mask, mask.new_ones(batch, x.shape[1])], dim=1)
    rows = DenseRows([length, x.shape[1]], conditions, heads=4, key_mask=seen)
    lin = rows.linear

    time = given["timestep"]
    made, clean = (model.time_embed(one, dtype=x.dtype)[:, 0] for one in (time, torch.zeros_like(time)))
    vectors = rows.each([made, made, *[clean] * len(conditions)])
    shared = lin(model.time_mod_proj, F.gelu(vectors, approximate="tanh")).unflatten(-1, (6, -1))
    angle = angles(torch.cat([given["position_ids"].float(), *rows.ids()]), (4, 6, 6), 1000.0)

    text = model.txt_in(model.text_fusion(text, mask[:, None, None]))
    x = torch.cat([text, lin(model.img_in, rows.tokens(x), rows.frames)], dim=1)
    for block in model.transformer_blocks:
        scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = (shared + block.scale_shift_table).unbind(-2)
        attn, ff, a = block.attn, block.ff, block.norm1(x) * (1 + scale) + shift
        query, key, value = (lin(one, a).unflatten(-1, (-1, 16)) for one in (attn.to_q, attn.to_k, attn.to_v))
        key, value = (one[:, :, [0, 0, 1, 1]] for one in (attn.norm_k(key), value))
        out = rows.attend(attn.norm_q(query), key, value, angle) * torch.sigmoid(lin(attn.to_gate, a))
        x = x + gate * lin(attn.to_out[0], out)
        a = block.norm2(x) * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * lin(ff.down, F.silu(lin(ff.gate, a)) * lin(ff.up, a))
    return model.final_layer(x[:, rows.image], made[:, None])


CASES = {"Krea 2": FamilyCase(krea2, prompts, dense, TARGETS, STYLE, hookpoints=("transformer_blocks.0",), calls=2)}
