"""A tiny pipeline of Ideogram 4, and what its transformer gives by a dense attention."""

import torch
import torch.nn.functional as F
from dense_rows import DenseRows
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from tiny import randomize
from tiny_control import quiet
from tiny_families import FamilyCase, random

TARGETS = r"input_proj|adaln_proj|layers\.\d+\.(adaln_modulation|attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
STYLE = TARGETS + r"|llm_cond_proj"
SECTION = (4, 2, 2)
"""Features of a head by axis."""


class Pipeline(Ideogram4Pipeline):
    """Whose text encoder gives random features, of 6 and 4 tokens."""

    def encode_prompt(self, prompt, grid_h, grid_w, max_sequence_length, device):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        lengths = [6 - 2 * (number % 2) for number in range(len(prompts))]
        text = torch.cat([random(1, max_sequence_length, 24, seed=40 + int(word[1:])) for word in prompts])
        text = F.pad(text, (0, 0, 0, grid_h * grid_w))
        return text, *self._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)


def transformer(seed):
    torch.manual_seed(seed)
    model = Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=48,
        adaln_dim=16, llm_features_dim=24, mrope_section=SECTION,
    )  # fmt: skip
    return randomize(model).eval()


def ideogram4():
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.randn(16) * 0.5)
    vae.bn.running_var.copy_(torch.rand(16) + 0.2)
    parts = (FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, transformer(0), transformer(1))
    return quiet(Pipeline(*parts))


def prompts(batch):
    return {
        "prompt": [f"w{number}" for number in range(batch)],
        "max_sequence_length": 7,
        "guidance_scale": 2.0,
        "guidance_schedule": None,
    }


def turns(ids):
    """Angles (B, S, d) of positions (B, S, 3), in the model's float32, which rounds those of large positions."""
    dim = 2 * sum(SECTION)
    frequencies = 1.0 / (5_000_000 ** (torch.arange(0, dim, 2).float() / dim))
    axis = [
        1 if i % 3 == 1 and i < 3 * SECTION[1] else 2 if i % 3 == 2 and i < 3 * SECTION[2] else 0 for i in range(8)
    ]
    return (ids.float()[..., axis] * frequencies).repeat(1, 1, 2)


def dense(model, given, conditions=()):
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    batch, segments, length = len(x), given["segment_ids"], x.shape[1] - 16
    rows = DenseRows([length, 16], conditions, heads=2, key_mask=segments == 1)
    lin = rows.linear

    def vector(time):
        return F.silu(lin(model.adaln_proj, rows.each([model.t_embedding(one) for one in time])))

    made, held = given["timestep"], torch.ones(batch)
    vectors = vector([made, made, *[held] * len(conditions)])
    ids = [given["position_ids"], *((one + 65536)[None].expand(batch, -1, -1) for one in rows.ids())]
    angle = turns(torch.cat(ids, dim=1))

    is_text = (given["indicator"] == 3)[..., None]
    words = lin(model.llm_cond_proj, model.llm_cond_norm(text * is_text)[:, :length], rows.text)
    image = lin(model.input_proj, rows.tokens(x[:, length:]), rows.frames)
    kinds = model.embed_image_indicator(torch.tensor([0, 1]))
    x = torch.cat([words * is_text[:, :length] + kinds[0], image + kinds[1]], dim=1)
    for layer in model.layers:
        attn, ff = layer.attention, layer.feed_forward
        scale, gate, scale_mlp, gate_mlp = lin(layer.adaln_modulation, vectors).chunk(4, -1)
        a = layer.attention_norm1(x) * (1 + scale)
        query, key = (
            rows.split(lin(one, a), norm) for one, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        out = lin(attn.to_out[0], rows.attend(query, key, rows.split(lin(attn.to_v, a)), angle, halves=True))
        x = x + gate.tanh() * layer.attention_norm2(out)
        a = layer.ffn_norm1(x) * (1 + scale_mlp)
        x = x + gate_mlp.tanh() * layer.ffn_norm2(lin(ff.w2, F.silu(lin(ff.w1, a)) * lin(ff.w3, a)))
    return model.final_layer(x[:, rows.image], conditioning=vectors[:, rows.image][:, :1])


CASES = {
    "Ideogram 4": FamilyCase(
        ideogram4,
        prompts,
        dense,
        TARGETS,
        STYLE,
        hookpoints=("layers.0",),
        compiled=False,
        completes=False,
        read=lambda out: out[:, -16:],
    )
}
