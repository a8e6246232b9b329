"""Tiny pipelines of Chroma and LongCat-Image, whose blocks are FLUX.1's, and what they give by a dense attention."""

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles, modulated
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from tiny import randomize, tiny_vae
from tiny_control import quiet
from tiny_families import FamilyCase, random

TARGETS = (
    r"x_embedder|.*attn\.to_[qkv]|.*attn\.to_out\.0|.*ff\.net\.(0\.proj|2)|.*proj_mlp|single_.*proj_out"
    r"|.*norm1?\.linear"
)
STYLE = TARGETS + r"|.*attn\.(add_[qkv]_proj|to_add_out)|.*ff_context\.net\.(0\.proj|2)|.*norm1_context\.linear"
SIZES = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def chroma():
    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        in_channels=16, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2, **SIZES
    )
    return quiet(ChromaPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None, randomize(model).eval()))


class LongCat(LongCatImagePipeline):
    """Has prompts of 6 tokens, and of 4 for an empty one; the stock class takes no embeddings alone."""

    def _encode_prompt(self, prompt):
        length = 6 if prompt[0] else 4
        return random(len(prompt), length, 24, seed=length).to(self.transformer.dtype)


def longcat_image():
    torch.manual_seed(0)
    model = randomize(LongCatImageTransformer2DModel(in_channels=64, **SIZES)).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=16, norm_num_groups=2, shift_factor=0.1,
        scaling_factor=0.5,
    ).eval()  # fmt: skip
    return quiet(LongCat(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, model))


def _blocks(model, rows, x, text, angle, double, single, residuals=(None, None)):
    """Image rows behind the blocks; `double(i)` and `single(i)` give shifts, scales and gates."""
    lin = rows.linear

    def added(number, kind, blocks):
        samples = residuals[kind]
        if samples is None:
            return 0.0
        sample = samples[number // -(-len(blocks) // len(samples))]
        return F.pad(sample, (0, 0, 0, len(rows.segment) - rows.lengths[0] - sample.shape[1]))

    for number, block in enumerate(model.transformer_blocks):
        mod, mod_text = double(number)
        attn, a, b = block.attn, modulated(x, *mod[:2]), modulated(text, *mod_text[:2])
        of_text = attn.add_q_proj(b), attn.add_k_proj(b), attn.add_v_proj(b)
        of_image = (lin(module, a, rows.frames) for module in (attn.to_q, attn.to_k, attn.to_v))
        norms = (attn.norm_added_q, attn.norm_q), (attn.norm_added_k, attn.norm_k), (None, None)
        joint = (
            torch.cat([rows.split(one, norm_one), rows.split(other, norm_other)], dim=1)
            for one, other, (norm_one, norm_other) in zip(of_text, of_image, norms, strict=True)
        )
        out = rows.attend(*joint, angle)
        text = text + mod_text[2] * attn.to_add_out(out[:, rows.text])
        x = x + mod[2] * lin(attn.to_out[0], out[:, rows.frames], rows.frames)
        a = lin(block.ff.net[0].proj, modulated(x, *mod[3:5]), rows.frames)
        x = x + mod[5] * lin(block.ff.net[2], F.gelu(a, approximate="tanh"), rows.frames)
        text = text + mod_text[5] * block.ff_context(modulated(text, *mod_text[3:5]))
        x = x + added(number, 0, model.transformer_blocks)
    joint = torch.cat([text, x], dim=1)
    for number, block in enumerate(model.single_transformer_blocks):
        shift, scale, gate = single(number)
        attn, normed = block.attn, modulated(joint, shift, scale)
        query = rows.split(lin(attn.to_q, normed), attn.norm_q)
        key = rows.split(lin(attn.to_k, normed), attn.norm_k)
        out = rows.attend(query, key, rows.split(lin(attn.to_v, normed)), angle)
        mlp = F.gelu(lin(block.proj_mlp, normed), approximate="tanh")
        joint = joint + gate * lin(block.proj_out, torch.cat([out, mlp], -1))
        joint[:, rows.frames] += added(number, 1, model.single_transformer_blocks)
    return joint[:, rows.image]


def dense_chroma(model, given, conditions=()):
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    rows = DenseRows([text.shape[1], x.shape[1]], conditions, heads=2, key_mask=given.get("attention_mask"))

    def table(held):
        return model.distilled_guidance_layer(model.time_text_embed(given["timestep"] * (0 if held else 1000)))

    tables = rows.each([table(segment > 1) for segment in range(len(rows.lengths))])  # (B, S, M, D)
    singles, doubles = len(model.single_transformer_blocks), len(model.transformer_blocks)

    def double(number):
        image = 3 * singles + 6 * number
        mod, mod_text = tables[:, rows.frames, image:], tables[:, rows.text, image + 6 * doubles :]
        return mod[:, :, :6].unbind(2), mod_text[:, :, :6].unbind(2)

    def single(number):
        return tables[:, :, 3 * number : 3 * number + 3].unbind(2)

    ids = torch.cat([given["txt_ids"].float(), given["img_ids"].float(), *rows.ids()])
    x, text = rows.linear(model.x_embedder, rows.tokens(x), rows.frames), model.context_embedder(text)
    residuals = given.get("controlnet_block_samples"), given.get("controlnet_single_block_samples")
    x = _blocks(model, rows, x, text, angles(ids, (4, 6, 6), 10000.0), double, single, residuals)
    return model.proj_out(model.norm_out(x, table(False)[:, -2:]))


def dense_longcat(model, given, conditions=()):
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    rows = DenseRows([text.shape[1], x.shape[1]], conditions, heads=2)

    def vector(held):
        return model.time_embed(given["timestep"] * (0 if held else 1000), x.dtype)

    vectors = F.silu(rows.each([vector(segment > 1) for segment in range(len(rows.lengths))]))  # (B, S, D)

    def double(number):
        block = model.transformer_blocks[number]
        mod = rows.linear(block.norm1.linear, vectors[:, rows.frames], rows.frames)
        return mod.chunk(6, -1), block.norm1_context.linear(vectors[:, rows.text]).chunk(6, -1)

    def single(number):
        return rows.linear(model.single_transformer_blocks[number].norm.linear, vectors).chunk(3, -1)

    image = given["img_ids"].float()
    origin = torch.tensor([1.0, image[0, 1], image[0, 2]])
    ids = torch.cat([given["txt_ids"].float(), image, *(one + origin for one in rows.ids())])
    x, text = rows.linear(model.x_embedder, rows.tokens(x), rows.frames), model.context_embedder(text)
    x = _blocks(model, rows, x, text, angles(ids, (4, 6, 6), 10000.0), double, single)
    return model.proj_out(model.norm_out(x, vector(False)))


def chroma_prompts(batch, dtype=torch.float32):
    """Prompts of 6 tokens, of the last one two masked; negative prompts of 4, one masked."""
    masks = torch.ones(batch, 6), torch.ones(batch, 4)
    masks[0][-1, 4:] = 0
    masks[1][:, 3:] = 0
    return {
        "prompt_embeds": random(batch, 6, 24),
        "prompt_attention_mask": masks[0].to(dtype),
        "negative_prompt_embeds": random(batch, 4, 24, seed=4),
        "negative_prompt_attention_mask": masks[1].to(dtype),
        "guidance_scale": 2.0,
    }


def _chroma_residuals(model, given):
    image = given["hidden_states"].shape[1]
    return {
        "controlnet_block_samples": [random(1, image, 32)],
        "controlnet_single_block_samples": [random(1, image, 32, seed=4), random(1, image, 32, seed=5)],
    }


_SHARED = {
    "targets": TARGETS,
    "style": STYLE,
    "hookpoints": ("transformer_blocks.1", "single_transformer_blocks.0"),
    "calls": 2,
    "compiled": False,
}


CASES = {
    "Chroma": FamilyCase(
        pipeline=chroma,
        prompts=chroma_prompts,
        dense=dense_chroma,
        residuals=_chroma_residuals,
        **_SHARED,
    ),
    "LongCat-Image": FamilyCase(
        pipeline=longcat_image,
        prompts=lambda batch: {
            "prompt": ["a"] * batch,
            "negative_prompt": [""] * batch,
            "guidance_scale": 2.0,
            "enable_prompt_rewrite": False,
        },
        dense=dense_longcat,
        **_SHARED,
    ),
}
