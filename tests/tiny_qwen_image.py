"""Tiny pipelines of Qwen-Image and Qwen-Image-Edit 2511, and what their transformer gives by a dense attention."""

from math import prod
from unittest import mock

import torch
import torch.nn.functional as F
from dense_rows import DenseRows, angles, modulated
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from tiny import randomize, tiny_tokenizer
from tiny_control import image, quiet
from tiny_families import FamilyCase, random
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TARGETS = r"img_in|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.net\.(0\.proj|2)|img_mod\.1)"
STYLE = TARGETS + r"|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|txt_mlp\.net\.(0\.proj|2)|txt_mod\.1)"


def transformer(**changes):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **changes,
    )  # fmt: skip
    return randomize(model).eval()


def autoencoder(**changes):
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.1, 0.9], **changes,
    )  # fmt: skip
    return vae.eval()


def qwen_image(kind=QwenImagePipeline, **changes):
    others = {"processor": None} if "Edit" in kind.__name__ else {}
    return quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer(**changes),
            **others,
        )
    )


def text_encoder():
    text = {
        "vocab_size": 32, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "rope_scaling": {"type": "default", "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def folder(path):
    """The folder of a pipeline with a tiny text encoder."""
    pipe = qwen_image()
    pipe.register_modules(text_encoder=text_encoder(), tokenizer=tiny_tokenizer())
    pipe.save_pretrained(path)
    return path


class EditPlus(QwenImageEditPlusPipeline):
    """Reads its reference images at 32 pixels and not at 1024."""

    def __call__(self, *args, **kwargs):
        with mock.patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32):
            return super().__call__(*args, **kwargs)


def references(count):
    return [Image.fromarray((image(7 + number, 32).permute(1, 2, 0) * 255).byte().numpy()) for number in range(count)]


def prompts(batch):
    """Prompts of 6 tokens, of the last one two masked; negative prompts of 4."""
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[-1, 4:] = 0
    return {
        "prompt_embeds": random(batch, 6, 24),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": random(batch, 4, 24, seed=4),
        "negative_prompt_embeds_mask": torch.ones(batch, 4, dtype=torch.long),
        "true_cfg_scale": 2.0,
    }


def dense(model, given, conditions=()):
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    shapes = given["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    mask = given.get("encoder_hidden_states_mask")
    mask = None if mask is None else F.pad(mask.bool(), (0, x.shape[1]), value=True)
    rows = DenseRows([text.shape[1], *map(prod, shapes)], conditions, heads=2, key_mask=mask)
    lin, layered, clean = rows.linear, model.config.use_layer3d_rope, model.config.zero_cond_t

    def vector(segment):
        held = segment > len(shapes) or (clean and segment > 1)
        return model.time_text_embed(given["timestep"] * (0 if held else 1), x, given.get("additional_t_cond"))

    vectors = F.silu(rows.each([vector(segment) for segment in range(len(rows.lengths))]))  # (B, S, D)
    first = max(max(h // 2, w // 2) for _, h, w in shapes)
    if layered:
        first = max(first, len(shapes) - 1)
    ids = [torch.arange(first, first + text.shape[1])[:, None].expand(-1, 3)]
    for number, (_, h, w) in enumerate(shapes):
        number = -1 if layered and number == len(shapes) - 1 else number
        places = torch.meshgrid(torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2), indexing="ij")
        ids.append(torch.stack([torch.full((h, w), number), *places], dim=-1).flatten(0, 1))
    _, h, w = shapes[0]
    ids += [one + torch.tensor([0.0, h // 2 - h, w // 2 - w]) for one in rows.ids()]
    angle = angles(torch.cat([one.float() for one in ids]), (4, 6, 6), 10000.0)

    x = lin(model.img_in, rows.tokens(x), rows.frames)
    text = model.txt_in(model.txt_norm(text))
    residuals = given.get("controlnet_block_samples")
    for number, block in enumerate(model.transformer_blocks):
        mod = lin(block.img_mod[1], vectors[:, rows.frames], rows.frames).chunk(6, -1)
        mod_text = block.txt_mod[1](vectors[:, rows.text]).chunk(6, -1)
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
        a = lin(block.img_mlp.net[0].proj, modulated(x, *mod[3:5]), rows.frames)
        x = x + mod[5] * lin(block.img_mlp.net[2], F.gelu(a, approximate="tanh"), rows.frames)
        text = text + mod_text[5] * block.txt_mlp(modulated(text, *mod_text[3:5]))
        if residuals is not None:
            added = residuals[number // -(-len(model.transformer_blocks) // len(residuals))]
            x = x + F.pad(added, (0, 0, 0, x.shape[1] - added.shape[1]))
    return model.proj_out(model.norm_out(x[:, : given["hidden_states"].shape[1]], vector(1)))


def _residuals(model, given):
    return {"controlnet_block_samples": [random(1, given["hidden_states"].shape[1], 32)]}


_SHARED = {
    "dense": dense,
    "targets": TARGETS,
    "style": STYLE,
    "hookpoints": ("transformer_blocks.0",),
    "calls": 2,
    "residuals": _residuals,
}
CASES = {
    "Qwen-Image": FamilyCase(pipeline=qwen_image, prompts=prompts, **_SHARED),
    "Qwen-Image-Edit 2511": FamilyCase(
        pipeline=lambda: qwen_image(EditPlus, zero_cond_t=True),
        prompts=lambda batch: {**prompts(1), "num_images_per_prompt": batch},  # it takes one prompt
        references=lambda: {"image": references(2)},
        options={"image": references(1)},
        compiled=False,
        completes=False,
        **_SHARED,
    ),
}
