"""Blocks of stock transformers, computed per frame: the residual branches of one stream or of two, and their MLPs.

For blocks whose norms have no projections: shift, scale and gate of each frame are computed outside of the norms.
Blocks with the submodules of FLUX.1 and SD3 are in `imgdit.models.blocks`.

B batch, F frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.attention.grouped import grouped_attention
from imgdit.lora.rows import AdapterRows, linear
from imgdit.models.blocks import BlockPlan, attend
from imgdit.models.functional import apply_rope_to_halves, gated_add, modulate


class Stream(NamedTuple):
    """The tokens of a stream in a block with an attention branch and an MLP branch."""

    tokens: torch.Tensor
    """(B, rows, D)."""
    norms: tuple[Callable, Callable]
    """Before the attention and before the MLP."""
    modulation: Sequence[torch.Tensor]
    """Each (B, F, D): shift, scale and gate of the attention branch, then of the MLP branch."""
    feed_forward: Callable[[torch.Tensor], torch.Tensor]
    lengths: tuple[int, ...]
    """Rows of each frame."""
    frames_read: int | None = None
    """Frames, from the first, that anybody reads after the block; the rows of the others stay as they are. `None`: all
    are read."""

    def normed(self) -> torch.Tensor:
        """What the attention works on, (B, rows, D)."""
        shift, scale, *_ = self.modulation
        return modulate(self.norms[0](self.tokens), shift, scale, self.lengths)

    def after(self, attended: torch.Tensor) -> torch.Tensor:
        """The tokens (B, rows, D) after the block.

        Args:
            attended: (B, rows that are read, D) result of the attention.
        """
        lengths = self.lengths[: self.frames_read]
        gate, shift_mlp, scale_mlp, gate_mlp = (one[:, : self.frames_read] for one in self.modulation[2:])
        read = None if self.frames_read is None else sum(lengths)
        done = gated_add(self.tokens[:, :read], gate, attended, lengths)
        normed = modulate(self.norms[1](done), shift_mlp, scale_mlp, lengths)
        done = gated_add(done, gate_mlp, self.feed_forward(normed), lengths)
        return done if read is None else torch.cat([done, self.tokens[:, read:]], dim=1)


def double_stream(
    attn: Any, image: Stream, text: Stream, rope: torch.Tensor | None, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image (B, T, D) and (B, N, D) of a block with separate weights for both, which attend together."""
    attended, attended_t = attend(attn, image.normed(), text.normed(), rope, plan=plan, cache=cache)
    return text.after(attended_t), image.after(attended)


def gated_feed_forward(
    module: Any, names: tuple[str, str, str], x: torch.Tensor, rows: AdapterRows | None
) -> torch.Tensor:
    """SwiGLU, `down(silu(gate(x)) * up(x))`, with adapters on rows.

    Args:
        names: of the layers gate, up and down in the module.
    """
    if rows is None:
        return module(x)
    gate, up, down = (getattr(module, name) for name in names)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return linear(down, F.silu(linear(gate, x, rows)) * linear(up, x, rows), rows)

    return compat.called(module, compute, x)


def fused_feed_forward(module: Any, x: torch.Tensor, rows: AdapterRows | None) -> torch.Tensor:
    """SwiGLU whose gate and value come from one layer (FLUX.2, FLUX.3), with adapters on rows."""
    if rows is None:
        return module(x)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return linear(module.linear_out, module.act_fn(linear(module.linear_in, x, rows)), rows)

    return compat.called(module, compute, x)


def gated_between_norms(
    block: Any,
    x: torch.Tensor,
    modulation: torch.Tensor,
    attend: Callable[[torch.Tensor], torch.Tensor],
    plan: BlockPlan,
    stream: str = "joint",
) -> torch.Tensor:
    """A block whose branches have norms at both ends, are scaled without a shift, and have gates in [-1, 1]: those of
    Z-Image and Ideogram 4.

    Args:
        x: (B, S, D), or (B, N + n, D) of the stream "image".
        modulation: (B, F, 4D) of the frames, the first one's also the text's.
        attend: of the normed tokens.
    """
    scale, gate, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
    none = torch.zeros_like(scale)

    def feed(normed: torch.Tensor) -> torch.Tensor:
        rows = plan.adapters(stream)
        return block.ffn_norm2(gated_feed_forward(block.feed_forward, ("w1", "w3", "w2"), normed, rows))

    tokens = Stream(
        x,
        (block.attention_norm1, block.ffn_norm1),
        (none, scale, gate.tanh(), none, scale_mlp, gate_mlp.tanh()),
        feed,
        *(plan.joint_levels if stream == "joint" else (plan.frame_lengths, plan.read)),
    )
    return tokens.after(block.attention_norm2(attend(tokens.normed())))


def attention_by_halves(
    attn: Any, hidden_states: torch.Tensor, rope: torch.Tensor, *, plan: BlockPlan, cache: LayerCache | None
) -> torch.Tensor:
    """Attention over one sequence (B, S, D) whose heads are turned by `apply_rope_to_halves`: (B, rows that are read,
    D)."""
    rows, asking = plan.adapters("joint"), hidden_states[:, : plan.read_rows]

    def heads(module: Any, x: torch.Tensor) -> torch.Tensor:
        return linear(module, x, rows).unflatten(-1, (-1, attn.head_dim))

    query = apply_rope_to_halves(attn.norm_q(heads(attn.to_q, asking)), rope[..., : asking.shape[1], :])
    key = apply_rope_to_halves(attn.norm_k(heads(attn.to_k, hidden_states)), rope)
    value = heads(attn.to_v, hidden_states)
    attended = grouped_attention(
        query,
        key,
        value,
        plan.groups,
        key_mask=plan.key_mask,
        cached=None if cache is None else cache.exchange("attn", key, value, plan.frozen),
        packed=plan.packed,
        backend=compat.processor_backend(attn),
    )
    return linear(attn.to_out[0], attended.flatten(2).to(query.dtype), rows)
