"""What `NextDiT` saves against the arithmetic of OneDiffusion's reference, done the reference's way with our weights.

The work is the one recorded for the reference: width 528, 8 blocks, two frames of 256 tokens, both halves of guidance,
300 text tokens of which 60 are real.

B batch, N image tokens, L text tokens, D width, H heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from imgdit.attention.cache import KVCache
from imgdit.benchmarks.speed.timing import Comparison, compare
from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.models.functional import apply_rope, rope_table
from imgdit.models.nextdit import ROPE_THETA, NextDiT, NextDiTAttention, TextMemory

SIDE, FRAMES, TEXT, REAL_TEXT = 16, 2, 300, 60
GIVEN = 0.04
"""Noise level of the conditioning frame."""


def medium_model(seed: int = 0) -> NextDiT:
    """40 million random parameters in the published model's proportions, with gates that let everything through."""
    torch.manual_seed(seed)
    model = NextDiT(
        input_size=(1, 2 * SIDE, 2 * SIDE),
        hidden_size=528,
        depth=8,
        num_heads=8,
        num_kv_heads=2,
        attention_softcap=None,
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def per_token_forward(
    model: NextDiT,
    tokens: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor,
    timestep: torch.Tensor,
    rope: torch.Tensor,
    visible: torch.Tensor,
    sees_text: torch.Tensor,
) -> torch.Tensor:
    """The reference's forward pass in float32: time and modulation per token, masks everywhere, the whole text anew.

    Args:
        tokens: (B, N, C*p*p), features in the order of the weights.
        text: (B, L, J), padding and all.
        mask: (B, L), true on real tokens.
        timestep: (B, N).
        rope: (N, d/2) rotations.
        visible: boolean (N, N); all true in the reference.
        sees_text: (N,), 1 where a row asks the text; all ones in the reference.

    Returns:
        (B, N, C*p*p).
    """
    weight = mask[..., None].to(text)
    pooled = (text * weight).sum(1) / (weight.sum(1) + 1e-8)
    condition = model.t_embedder(timestep, text.dtype) + model.y_embedder(pooled)[:, None]  # (B, N, E)
    x = model.x_embedder(tokens)
    block: Any
    for block in model.layers:
        scale, gate, scale_mlp, gate_mlp = block.adaLN_modulation(condition).chunk(4, dim=-1)  # (B, N, D)
        attended = _attention(
            block.attention,
            _rms_norm(block.attention_norm1, x) * (1 + scale),
            _rms_norm(block.attention_y_norm, text),
            rope,
            visible,
            mask,
            sees_text,
        )
        x = x + gate.tanh() * _rms_norm(block.attention_norm2, attended)
        ff, normed = block.feed_forward, _rms_norm(block.ffn_norm1, x) * (1 + scale_mlp)
        x = x + gate_mlp.tanh() * _rms_norm(block.ffn_norm2, ff.w2(F.silu(ff.w1(normed)) * ff.w3(normed)))
    final = model.final_layer
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + final.adaLN_modulation(condition))
    return final.linear(normed)


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """In steps: the reference's torch (2.3) has no fused one."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _attention(
    attn: NextDiTAttention,
    x: torch.Tensor,
    text: torch.Tensor,
    rope: torch.Tensor,
    visible: torch.Tensor,
    mask: torch.Tensor,
    sees_text: torch.Tensor,
) -> torch.Tensor:
    batch, rows = x.shape[:2]
    heads, repeats = attn.heads, attn.heads // attn.kv_heads
    query = apply_rope(attn.split(attn.q_norm(attn.wq(x))), rope)
    key = apply_rope(attn.split(attn.k_norm(attn.wk(x))), rope)
    value = attn.split(attn.wv(x))
    key, value = (y.repeat_interleave(repeats, dim=2).transpose(1, 2) for y in (key, value))
    query = query.transpose(1, 2)  # (B, H, N, d)
    seen = visible.expand(batch, heads, rows, rows)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    key, value = attn.split(attn.ky_norm(attn.wk_y(text))), attn.split(attn.wv_y(text))
    key, value = (y.repeat(1, 1, repeats, 1).transpose(1, 2) for y in (key, value))
    read = mask[:, None, None].expand(batch, heads, rows, -1)
    from_text = F.scaled_dot_product_attention(query, key, value, attn_mask=read)
    out = out + from_text * attn.gate.tanh()[:, None, None] * sees_text[:, None]
    return attn.wo(out.transpose(1, 2).flatten(2))


def any_comparisons(*, rounds: int = 9, model: NextDiT | None = None) -> Iterator[Comparison]:
    """One step of a two-frame scene, the second frame clean: all frames seeing each other, and the clean one seeing
    only itself and read from a cache. Differences are relative to the largest value, if that is more than 1."""
    model = model or medium_model()
    generator = torch.Generator().manual_seed(0)
    text_features = model.config.caption_channels
    tokens = torch.randn(2, FRAMES * SIDE * SIDE, model.token_channels, generator=generator)
    text = torch.randn(2, TEXT, text_features, generator=generator)
    mask = (torch.arange(TEXT) < REAL_TEXT).expand(2, -1)
    timestep = torch.full((2,), 500.0)
    generated = SIDE * SIDE

    def ours(x: torch.Tensor, text: TextMemory, layout: FrameLayout, cache: KVCache | None) -> torch.Tensor:
        return model(x, text, None, timestep, layout=layout, cache=cache).sample

    def theirs(inputs: dict[str, Any]) -> torch.Tensor:
        return _channels_first(model, per_token_forward(model, **inputs)[:, :generated])

    channels_last = tokens.unflatten(-1, (model.config.in_channels, -1)).transpose(-1, -2).flatten(-2)

    for sees, work in (("all", "both frames see all"), ("self", "the conditioning frame sees itself, from a cache")):
        frames = [Frame((SIDE, SIDE), index=0), Frame((SIDE, SIDE), sigma=GIVEN, index=1, sees=sees)]  # type: ignore[arg-type]
        layout = FrameLayout.build(frames, TEXT)
        rope = rope_table(layout.ids(), (model.config.hidden_size // model.config.num_heads // 3,) * 3, ROPE_THETA)
        levels = torch.tensor([500.0, 1000 * GIVEN]).repeat_interleave(generated).expand(2, -1)
        dense = layout.dense_mask()
        reference: dict[str, Any] = {
            "tokens": channels_last,
            "text": text,
            "mask": mask,
            "timestep": levels,
            "rope": rope,
            "visible": dense[TEXT:, TEXT:],
            "sees_text": dense[TEXT:, 0].float(),
        }
        memory, cache = TextMemory(text, mask), KVCache() if layout.frozen else None
        with torch.no_grad():  # the first step of a run
            model(tokens, memory, None, timestep, layout=layout, cache=cache)
        if cache is not None:
            cache.freeze()
        rest = layout.without_frozen()
        live = tokens[:, : rest.image_length]
        row = compare(
            f"a guided step of 2 x {generated} tokens, {work}",
            "the reference's way",
            partial(ours, live, memory, rest, cache),
            partial(theirs, reference),
            rounds=rounds,
        )
        with torch.no_grad():
            largest = theirs(reference).abs().max().item()
        yield row._replace(difference=row.difference / max(1.0, largest))


def _channels_first(model: NextDiT, patches: torch.Tensor) -> torch.Tensor:
    return patches.unflatten(-1, (-1, model.config.in_channels)).transpose(-1, -2).flatten(-2)
