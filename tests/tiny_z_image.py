"""A tiny pipeline of Z-Image, and what its transformer gives by a dense attention."""

import torch
from dense_rows import DenseRows, angles
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny import randomize, tiny_vae
from tiny_control import quiet
from tiny_families import FamilyCase, random
from tiny_text import VOCABULARY, make_tokenizer
from transformers import Qwen3Config, Qwen3Model

BLOCK = r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
TARGETS = rf"all_x_embedder\.2-1|(noise_refiner|layers)\.\d+\.{BLOCK}"
STYLE = TARGETS + rf"|context_refiner\.\d+\.{BLOCK}|cap_embedder\.1"
LENGTHS = (40, 5, 33, 7)
"""Of captions: different multiples of 32 with the padding."""


def z_image(kind=ZImagePipeline):
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    return quiet(kind(FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None, randomize(model, std=0.1).eval()))


def folder(path):
    """The folder of a pipeline with a tiny text encoder."""
    pipe = z_image()
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    tokenizer = make_tokenizer(template=True)
    tokenizer.pad_token = "<eos>"
    pipe.register_modules(text_encoder=Qwen3Model(config).eval(), tokenizer=tokenizer)
    pipe.save_pretrained(path)
    return path


def captions(count, first=0):
    return [random(LENGTHS[(first + i) % 4], 24, seed=first + i) for i in range(count)]


def prompts(batch):
    """Captions of unequal lengths, also within a batch of one with its negative."""
    return {"prompt_embeds": captions(batch), "negative_prompt_embeds": captions(batch, 1), "guidance_scale": 2.0}


def padded(x):
    """Rows to whole 32."""
    return torch.cat([x, x[-1:].expand(-len(x) % 32, -1)])


def block(module, x, rows, angle, vectors):
    """A transformer block on (1, S, D)."""
    lin, attn = rows.linear, module.attention
    gates = (1.0, 1.0)
    scales = (1.0, 1.0)
    if module.modulation:
        scale, gate, scale_mlp, gate_mlp = lin(module.adaLN_modulation[0], vectors).chunk(4, -1)
        scales, gates = (1 + scale, 1 + scale_mlp), (gate.tanh(), gate_mlp.tanh())
    a = module.attention_norm1(x) * scales[0]
    query, key = (rows.split(lin(one, a), norm) for one, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)))
    out = lin(attn.to_out[0], rows.attend(query, key, rows.split(lin(attn.to_v, a)), angle))
    x = x + gates[0] * module.attention_norm2(out)
    ff, a = module.feed_forward, module.ffn_norm1(x) * scales[1]
    return x + gates[1] * module.ffn_norm2(lin(ff.w2, torch.nn.functional.silu(lin(ff.w1, a)) * lin(ff.w3, a)))


def sample(model, latents, time, caption, conditions, residuals):
    """(C, 1, h, w) of one sample alone, so that no padding of the batch is in its sequence."""
    channels, _, height, width = latents.shape
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 4, 5, 0).reshape(-1, 4 * channels)
    count, tokens, text = len(patches), padded(patches), padded(caption)
    rows = DenseRows([len(text), len(tokens)], conditions, heads=2)
    of_image = DenseRows([0, len(tokens)], conditions, heads=2)
    of_text = DenseRows([len(text), 0], heads=2)

    grid = torch.cartesian_prod(torch.arange(height // 2), torch.arange(width // 2))
    image = torch.cat([torch.full((count, 1), len(text) + 1), grid], dim=1).float()
    image = torch.cat([image, torch.zeros(len(tokens) - count, 3)])
    words = torch.stack([torch.arange(len(text)) + 1.0, *torch.zeros(2, len(text))], dim=1)
    riders = [ids + torch.tensor([len(text) + 1.0, 0, 0]) for ids in rows.ids()]
    angle = angles(torch.cat([words, image, *riders]), (4, 6, 6), 256.0)
    made, clean = (model.t_embedder(one * 1000.0) for one in (time[None], torch.ones(1)))
    vectors = rows.each([made, made, *[clean] * len(conditions)])

    x = of_image.linear(model.all_x_embedder["2-1"], of_image.tokens(tokens[None]))
    x[:, count : len(tokens)] = model.x_pad_token
    for module in model.noise_refiner:
        x = block(module, x, of_image, angle[len(text) :], vectors[:, len(text) :])
    words = model.cap_embedder(text[None])
    words[:, len(caption) :] = model.cap_pad_token
    for module in model.context_refiner:
        words = block(module, words, of_text, angle[: len(text)], None)
    x = torch.cat([words, x], dim=1)
    for number, module in enumerate(model.layers):
        x = block(module, x, rows, angle, vectors)
        if number in residuals:
            x[:, rows.image] += residuals[number][: len(tokens)]
            x[:, rows.text] += residuals[number][len(tokens) : len(tokens) + len(text)]
    out = model.all_final_layer["2-1"](x[:, rows.image], c=made)[0, :count]
    out = out.view(height // 2, width // 2, 2, 2, channels).permute(4, 0, 2, 1, 3)
    return out.reshape(channels, 1, height, width)


def dense(model, given, conditions=()):
    residuals = given.get("controlnet_block_samples") or {}
    return torch.stack([
        sample(
            model, latents, given["t"][i], given["cap_feats"][i],
            [item._replace(tokens=item.tokens[i % len(item.tokens)][None]) for item in conditions],
            {number: one[i] for number, one in residuals.items()},
        )
        for i, latents in enumerate(given["x"])
    ])  # fmt: skip


def residuals(model, given):
    text = max(-(-len(caption) // 32) * 32 for caption in given["cap_feats"])
    return {"controlnet_block_samples": {0: random(len(given["x"]), 32 + text, 32, seed=8)}}


CASES = {
    "Z-Image": FamilyCase(
        z_image,
        prompts,
        dense,
        TARGETS,
        STYLE,
        hookpoints=("noise_refiner.1", "layers.0"),
        compiled=False,  # in five forms, which takes ten seconds
        completes=False,
        residuals=residuals,
    )
}
