"""Tiny pipelines of FLUX.2 dev and klein, and what their transformer gives by a dense attention."""

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles, modulated
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from tiny import randomize
from tiny_control import image, quiet
from tiny_families import FamilyCase, random

TARGETS = (
    r"x_embedder|(double_stream_modulation_img|single_stream_modulation)\.linear|.*ff\.linear_(in|out)"
    r"|transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
STYLE = TARGETS + r"|double_stream_modulation_txt\.linear|.*add_[qkv]_proj|.*ff_context\.linear_(in|out)"


def flux2(kind=Flux2Pipeline):
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind is Flux2Pipeline,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.randn(16) * 0.5)
    vae.bn.running_var.copy_(torch.rand(16) + 0.2)
    return quiet(kind(FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, randomize(model).eval()))


def reference():
    return Image.fromarray((image(7, 64).permute(1, 2, 0) * 255).byte().numpy())


def dense(model, given, conditions=()):
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    rows = DenseRows([text.shape[1], x.shape[1]], conditions, heads=2)
    lin = rows.linear

    def vector(held):
        time, guidance = given["timestep"] * (0 if held else 1000), given.get("guidance")
        guidance = guidance if guidance is None else torch.full_like(guidance, 1000.0) if held else guidance * 1000
        return model.time_guidance_embed(time, guidance)

    vectors = rows.each([vector(i > 1) for i in range(len(rows.lengths))])  # (B, S, D)
    of_text, of_frames = F.silu(vectors[:, rows.text]), F.silu(vectors[:, rows.frames])
    mod_text = lin(model.double_stream_modulation_txt.linear, of_text, rows.text).chunk(6, -1)
    mod_image = lin(model.double_stream_modulation_img.linear, of_frames, rows.frames).chunk(6, -1)
    mod = lin(model.single_stream_modulation.linear, F.silu(vectors)).chunk(3, -1)
    ids = torch.cat([given["txt_ids"][0].float(), given["img_ids"][0].float(), *rows.ids(4)])
    angle = angles(ids, (4, 4, 4, 4), 2000.0)

    def swiglu(x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value

    x, text = lin(model.x_embedder, rows.tokens(x), rows.frames), model.context_embedder(text)
    for block in model.transformer_blocks:
        attn, a, b = block.attn, modulated(x, *mod_image[:2]), modulated(text, *mod_text[:2])
        of_text = attn.add_q_proj(b), attn.add_k_proj(b), attn.add_v_proj(b)
        of_image = (lin(module, a, rows.frames) for module in (attn.to_q, attn.to_k, attn.to_v))
        norms = (attn.norm_added_q, attn.norm_q), (attn.norm_added_k, attn.norm_k), (None, None)
        joint = (
            torch.cat([rows.split(first, norm_first), rows.split(second, norm_second)], dim=1)
            for first, second, (norm_first, norm_second) in zip(of_text, of_image, norms, strict=True)
        )
        out = rows.attend(*joint, angle)
        text = text + mod_text[2] * attn.to_add_out(out[:, rows.text])
        x = x + mod_image[2] * lin(attn.to_out[0], out[:, rows.frames], rows.frames)
        a, b = modulated(x, *mod_image[3:5]), modulated(text, *mod_text[3:5])
        a = lin(block.ff.linear_out, swiglu(lin(block.ff.linear_in, a, rows.frames)), rows.frames)
        x = x + mod_image[5] * a
        text = text + mod_text[5] * block.ff_context.linear_out(swiglu(block.ff_context.linear_in(b)))
    joint = torch.cat([text, x], 1)
    for block in model.single_transformer_blocks:
        attn = block.attn
        q, k, v, mlp = lin(attn.to_qkv_mlp_proj, modulated(joint, *mod[:2])).split([32, 32, 32, 192], -1)
        out = rows.attend(rows.split(q, attn.norm_q), rows.split(k, attn.norm_k), rows.split(v), angle)
        joint = joint + mod[2] * lin(attn.to_out, torch.cat([out, swiglu(mlp)], -1))
    return model.proj_out(model.norm_out(joint[:, rows.image], vector(False)))


def _case(kind, calls):
    names = ("prompt_embeds", "negative_prompt_embeds")[:calls]
    return FamilyCase(
        pipeline=lambda: flux2(kind),
        prompts=lambda batch: {name: random(batch, 5, 24, seed=seed) for seed, name in enumerate(names)},
        dense=dense,
        targets=TARGETS,
        style=STYLE,
        hookpoints=("transformer_blocks.1", "single_transformer_blocks.0"),
        calls=calls,
        compiled=kind is Flux2Pipeline,
        references=lambda: {"image": [reference()]},
        options={"guidance_scale": 3.0},
    )


CASES = {"FLUX.2 dev": _case(Flux2Pipeline, 1), "FLUX.2 klein": _case(Flux2KleinPipeline, 2)}
