"""A tiny pipeline of ERNIE-Image, and what its transformer gives by a dense attention."""

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles
from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tiny import randomize
from tiny_control import quiet
from tiny_families import FamilyCase, random

BLOCK = r"self_attention\.(to_[qkv]|to_out\.0)|mlp\.(gate_proj|up_proj|linear_fc2)"
TARGETS = rf"x_embedder\.proj|adaLN_modulation\.1|layers\.\d+\.({BLOCK})"
STYLE = TARGETS + r"|text_proj"


def ernie_image():
    torch.manual_seed(0)
    model = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=16, out_channels=16,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.randn(16) * 0.5)
    vae.bn.running_var.copy_(torch.rand(16) + 0.2)
    model = randomize(model, std=0.1).eval()
    return quiet(ErnieImagePipeline(model, vae.eval(), None, None, FlowMatchEulerDiscreteScheduler()))


def prompts(batch):
    """Of 6 and 4 tokens, negative ones of 3 and 5."""
    texts = [random(6 - 2 * (number % 2), 24, seed=10 + number) for number in range(batch)]
    negative = [random(3 + 2 * (number % 2), 24, seed=20 + number) for number in range(batch)]
    return {"prompt_embeds": texts, "negative_prompt_embeds": negative, "guidance_scale": 2.0}


def dense(model, given, conditions=()):
    planes, text, lengths = given["hidden_states"], given["text_bth"], given["text_lens"]
    batch, count = text.shape[:2]
    conditions = [item._replace(tokens=item.tokens.repeat(batch // len(item.tokens), 1, 1)) for item in conditions]
    seen = torch.cat([torch.arange(count) < lengths[:, None], torch.ones(batch, 16, dtype=torch.bool)], dim=1)
    rows = DenseRows([count, 16], conditions, heads=2, key_mask=seen)
    lin = rows.linear

    def vector(time):
        return model.time_embedding(model.time_proj(time))

    made, clean = vector(given["timestep"]), vector(torch.zeros(batch))
    vectors = rows.each([made, made, *[clean] * len(conditions)])
    modulation = lin(model.adaLN_modulation[1], F.silu(vectors)).chunk(6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    words = F.pad(torch.arange(count).float()[:, None], (0, 2))
    grid = F.pad(torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)), (1, 0))
    angle = torch.stack([
        angles(torch.cat([words, *(ids + torch.tensor([float(own), 0, 0]) for ids in (grid, *rows.ids()))]),
               (4, 6, 6), 256.0)
        for own in lengths
    ]).repeat_interleave(2, dim=-1)  # fmt: skip

    tokens, proj = rows.tokens(planes.flatten(2).transpose(1, 2)), model.x_embedder.proj
    base = proj.get_base_layer() if hasattr(proj, "get_base_layer") else proj
    image = F.linear(tokens, base.weight.flatten(1), base.bias)
    for name in getattr(proj, "lora_A", {}):
        owners = [rows.owners[number] for number in rows.segment[rows.frames].tolist()]
        mine = torch.tensor([owner == name for owner in owners])[None, :, None]
        down, up = (one[name].weight.flatten(1) for one in (proj.lora_A, proj.lora_B))
        image = image + mine * proj.scaling[name] * (tokens @ down.T @ up.T)
    x = torch.cat([lin(model.text_proj, text, rows.text), image], dim=1)
    for layer in model.layers:
        attn, mlp, a = layer.self_attention, layer.mlp, layer.adaLN_sa_ln(x) * (1 + scale) + shift
        query, key = (
            rows.split(lin(one, a), norm) for one, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        out = rows.attend(query, key, rows.split(lin(attn.to_v, a)), angle, halves=True)
        x = x + gate * lin(attn.to_out[0], out)
        a = layer.adaLN_mlp_ln(x) * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * lin(mlp.linear_fc2, lin(mlp.up_proj, a) * F.gelu(lin(mlp.gate_proj, a)))
    x = model.final_norm(x[:, rows.image].transpose(0, 1), made).transpose(0, 1)
    return model.final_linear(x).transpose(1, 2).unflatten(2, (4, 4))


CASES = {
    "ERNIE-Image": FamilyCase(
        ernie_image,
        prompts,
        dense,
        TARGETS,
        STYLE,
        hookpoints=("layers.0",),
        compiled=False,
        completes=False,
    )
}
