"""A tiny pipeline of FLUX.3, and what its transformer gives by a dense attention."""

import math

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles, modulated
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux3AutoBlocks, Flux3Transformer2DModel
from tiny import randomize
from tiny_control import quiet
from tiny_families import FamilyCase, random

from imgdit.families.flux3 import FAMILY

TARGETS = "|".join(FAMILY.lora.targets)
GRID = F.pad(torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 0.5, (1, 1))
"""Positions (16, 4) of 4x4 tokens."""


def behind(number):
    return GRID - torch.tensor([0.0, 0.0, 0.0, 1.0 + number])


def flux3(**changes):
    torch.manual_seed(0)
    model = Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4), **changes,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    pipe = Flux3AutoBlocks().init_pipeline()
    parts = {"transformer": randomize(model).eval().requires_grad_(False), "vae": vae.eval()}
    pipe.update_components(**parts, scheduler=FlowMatchEulerDiscreteScheduler())
    return quiet(pipe)


def arguments(references=0, timestep=0.6):
    """Of a call of the transformer with so many reference images."""
    given = {
        "hidden_states": random(1, 16, 16),
        "encoder_hidden_states": random(1, 5, 24, seed=4),
        "timestep": torch.tensor([timestep]),
        "img_ids": GRID,
        "txt_ids": torch.zeros(5, 4),
        "return_dict": False,
    }
    if references:
        given["image_cond_hidden_states"] = random(1, 16 * references, 16, seed=5)
        given["image_cond_ids"] = torch.cat([behind(number) for number in range(references)])
    return given


@torch.no_grad()
def dense(model, given, conditions, strengths=()):
    """What the transformer gives, by one attention with an explicit bias for each stream.

    Args:
        conditions: encoded, of indices 0, 1, … and at the image's places.
        strengths: of the references in the call.
    """
    text, x, references = given["encoder_hidden_states"], given["hidden_states"], given.get("image_cond_hidden_states")
    own = [] if references is None else [16] * (references.shape[1] // 16)
    rows = DenseRows([5, 16, *own], conditions, heads=2)
    for number, strength in enumerate(strengths, start=2):
        mine = rows.segment == number
        rows.bias = rows.bias + math.log(strength) * (mine[:, None] != mine[None, :])
    stream = DenseRows([0, 0, *own], conditions, heads=2)
    stream.bias, tail = rows.bias[21:, 21:], torch.zeros(1, 0, 16) if references is None else references
    ids = [behind(int(item.frame.index)) for item in conditions]
    ids = torch.cat([given["txt_ids"], GRID, *([given["image_cond_ids"]] if own else []), *ids])
    angle = angles(ids, (4, 4, 4, 4), 10000.0)

    def vector(time):
        return F.silu(model.timestep_embedder(model.time_proj(time * 1000)))[:, None]

    clean, noisy = vector(torch.zeros(1)), vector(given["timestep"])
    parts = {"txt": (clean, 5), "image": (noisy, 16), "image_cond": (clean, len(ids) - 21)}
    early, joint = (
        {
            name: heads[name](vector.expand(-1, count, -1)).chunk(3, -1)
            for name, (vector, count) in parts.items()
        }
        for heads in (model.early_stream_modulations, model.single_stream_modulations)
    )  # fmt: skip

    def block(module, x, mod, rows, angle):
        shift, scale, gate = mod
        normed, attn, lin = modulated(x, shift, scale), module.attn, rows.linear
        query, key = (
            rows.split(lin(one, normed), norm) for one, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        out = lin(attn.to_out[0], rows.attend(query, key, rows.split(lin(attn.to_v, normed)), angle))
        a, b = lin(module.ff.linear_in, normed).chunk(2, -1)
        return x + gate * (out + lin(module.ff.linear_out, F.silu(a) * b))

    embedded = {
        "txt": model.context_embedder(text),
        "image": model.x_embedders["image"](x),
        "image_cond": stream.linear(model.x_embedders["image_cond"], stream.tokens(tail)),
    }
    streams = (
        ("txt", model.txt_mode_blocks, None, slice(0, 5)),
        ("image", model.mode_blocks["image"], None, slice(5, 21)),
        ("image_cond", model.mode_blocks["image_cond"], stream, slice(21, None)),
    )
    for name, modules, of, place in streams:
        for module in modules:
            if of is None:
                turn = torch.cos(angle[place]), torch.sin(angle[place])
                turn = tuple(one.repeat_interleave(2, dim=-1) for one in turn)
                embedded[name] = module(embedded[name], torch.cat(early[name], -1), turn)
            else:
                embedded[name] = block(module, embedded[name], early[name], of, angle[place])
    x = torch.cat(list(embedded.values()), dim=1)
    mod = tuple(torch.cat(one, dim=1) for one in zip(*joint.values(), strict=True))
    for module in model.single_transformer_blocks:
        x = block(module, x, mod, rows, angle)
    time = model.timestep_embedder(model.time_proj(given["timestep"] * 1000))[:, None].expand(-1, 16, -1)
    return model.proj_out(model.norm_out(x[:, 5:21], time))


CASES = {
    "FLUX.3": FamilyCase(
        flux3,
        prompts=lambda batch: arguments(),  # tests call the transformer: the modular pipeline has no text encoder
        dense=dense,
        targets=TARGETS,
        style=TARGETS,
        hookpoints=("single_transformer_blocks.0",),
        calls=2,
        completes=False,
    )
}
