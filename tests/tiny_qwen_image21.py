"""A tiny pipeline of Qwen-Image 2.1, and what its transformer gives by a dense attention."""

import math

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from tiny import randomize
from tiny_control import image, quiet
from tiny_families import FamilyCase, random

TARGETS = r"img_in|modulation\.1|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.(proj|gate_layer|out))"
STYLE = TARGETS + r"|txt_in\.(in|out)_layer"


class Processor:
    """Of a text encoder that is not there."""

    def __init__(self):
        self.tokenizer = self

    def apply_chat_template(self, messages, **options):
        return [[0]]

    def encode(self, text):
        return [1]


class Pipeline(QwenImage21Pipeline):
    """Whose text encoder gives random features: 5 tokens, of a second prompt 3, and the places of reference images
    between the first two and the rest."""

    def encode_prompt(self, prompt, image=None, **options):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        places = torch.zeros(0, dtype=torch.bool)
        for one in image or ():
            places = torch.cat(
                [places, torch.ones(one.width * one.height // 64, dtype=torch.bool), torch.zeros(1).bool()]
            )
        slots = torch.cat([torch.zeros(2, dtype=torch.bool), places, torch.zeros(3, dtype=torch.bool)])
        text = torch.cat([random(1, len(slots), 24, seed=40 + int(word[1:])) for word in prompts])
        mask = torch.ones(text.shape[:2], dtype=torch.long)
        mask[1::2, -2:] = 0
        return text.to(self.transformer.dtype), mask, slots.expand(len(text), -1)


def qwen_image21():
    torch.manual_seed(0)
    model = QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, is_residual=False,
        temperal_downsample=[False, False], scale_factor_spatial=4, latents_mean=[0.1] * 16, latents_std=[0.8] * 16,
    )  # fmt: skip
    parts = (FlowMatchEulerDiscreteScheduler(), vae.eval(), None, Processor(), randomize(model, std=0.1).eval())
    pipe = quiet(Pipeline(*parts))
    pipe.vae_scale_factor = 4
    return pipe


def prompts(batch):
    return {
        "prompt": [f"w{number}" for number in range(batch)],
        "negative_prompt": [f"w{number + 5}" for number in range(batch)],
        "true_cfg_scale": 2.0,
    }


def references():
    """Of 8x8 tokens each."""
    pictures = [(image(seed, 32).permute(1, 2, 0) * 255).byte().numpy() for seed in (7, 8)]
    return {"image": [Image.fromarray(one) for one in pictures], "output_resolution": 32}


def own_rows(given):
    """Number of the image, or -1 for text, and positions (P + N, 3), of the model's own tokens."""
    numbers, ids, position, shapes = [], [], 0, given["img_shapes"][0]
    slots = given["img_mask"][0].tolist()
    place, image = 0, 0
    while place < len(slots):
        if not slots[place]:
            numbers, ids = [*numbers, -1], [*ids, torch.full((1, 3), float(position))]
            place, position = place + 1, position + 1
            continue
        _, rows, columns = shapes[image]
        grid = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
        grid = grid - torch.tensor([rows - rows // 2, columns - columns // 2])
        ids.append(F.pad(grid, (1, 0), value=float(position)))
        numbers += [image] * (rows * columns)
        place, position, image = place + rows * columns // 4, position + max(rows, columns), image + 1
    return torch.tensor(numbers), torch.cat(ids)


def dense(model, given, conditions=()):
    text, x, mask = given["encoder_hidden_states"], given["hidden_states"], given.get("encoder_hidden_states_mask")
    numbers, ids = own_rows(given)
    own, batch = len(numbers), len(x)
    before = own - 16
    rows = DenseRows([before, 16], conditions, heads=2)
    lin = rows.linear

    seen = rows.bias.clone()
    seen[:before] = -math.inf
    same = (numbers[:, None] == numbers[None]) & (numbers[:, None] >= 0)
    seen[:before, :before].masked_fill_((torch.ones(own, own).tril().bool() | same)[:before, :before], 0.0)
    seen[own:, before:own] = -math.inf  # conditions do not see the image
    valid = torch.ones(batch, len(seen), dtype=torch.bool)
    if mask is not None:
        valid[:, :own][:, numbers < 0] = mask.bool()[:, ~given["img_mask"][0][: mask.shape[1]]]
    rows.bias = seen + torch.zeros(valid.shape).masked_fill(~valid, -math.inf)[:, None, None]

    corner = torch.tensor([ids[-1, 0], *ids[before, 1:]])
    angle = angles(torch.cat([ids, *(one + corner for one in rows.ids())]), (4, 6, 6), 10000.0)
    made, clean = (model.time_text_embed(time, x) for time in (given["timestep"], torch.zeros(batch)))
    vectors = rows.each([clean, made, *[clean] * len(conditions)])
    scale, gate, scale_mlp, gate_mlp = lin(model.modulation[1], F.silu(vectors)).chunk(4, -1)

    joint = torch.zeros(batch, own, 32, dtype=x.dtype)
    joint[:, numbers < 0] = model.txt_in(text)[:, ~given["img_mask"][0][: text.shape[1]]]
    joint[:, numbers >= 0] = getattr(model.img_in, "base_layer", model.img_in)(x)
    riders = lin(model.img_in, rows.tokens(x[:, -16:]), rows.frames)[:, 16:]
    x = torch.cat([joint, riders], dim=1)
    for block in model.transformer_blocks:
        attn, mlp, a = block.attn, block.img_mlp, block.img_norm1(x) * (1 + scale)
        query, key = (
            rows.split(lin(one, a), norm) for one, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        x = x + gate.tanh() * lin(attn.to_out[0], rows.attend(query, key, rows.split(lin(attn.to_v, a)), angle))
        a = block.img_norm2(x) * (1 + scale_mlp)
        x = x + gate_mlp.tanh() * lin(mlp.out, F.silu(lin(mlp.gate_layer, a)) * lin(mlp.proj, a))
    return model.proj_out(model.norm_out(x[:, rows.image], made))


CASES = {
    "Qwen-Image 2.1": FamilyCase(
        qwen_image21,
        prompts,
        dense,
        TARGETS,
        STYLE,
        hookpoints=("transformer_blocks.0",),
        calls=2,
        references=references,
        compiled=False,
        completes=False,
        read=lambda out: out[:, -16:],
    )
}
