"""The blocks of `MMDiT`: their mathematics as plain functions, and the modules that hold their parameters.

`double_block` and `single_block` use only submodule names that diffusers' FLUX and SD3 blocks share with ours (the
names of the state dict), so a hook can call them with diffusers' own block.

B batch, N image tokens, T text tokens, S = T + N, D width, H heads, d features of a head, F frames, X texts (one per
scene).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.attention.grouped import grouped_attention
from imgdit.attention.packed import PackedRows
from imgdit.layout import FrameLayout, RowGroup, on_device, ranked
from imgdit.lora.rows import AdapterRows, LoraPlan, feed_forward, linear, lora_plan
from imgdit.models.functional import apply_rope, gated_add, in_range, modulate


class BlockPlan(NamedTuple):
    """What every block of one forward pass needs to know about the frames."""

    text_lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]
    groups: tuple[RowGroup, ...] | None = None
    """Who sees whom in the joint sequence; `None`: everything sees everything."""
    image_groups: tuple[RowGroup, ...] | None = None
    """The same for the image stream alone (second attention of SD3.5)."""
    packed: PackedRows | None = None
    image_packed: PackedRows | None = None
    key_mask: torch.Tensor | None = None
    """(B, S), False on padded text."""
    lora: LoraPlan | None = None
    frozen: tuple[slice, ...] = ()
    """Rows whose keys and values a cache keeps."""
    image_frozen: tuple[slice, ...] = ()
    read: int | None = None
    """Segments (texts, then frames), from the first, that anybody reads after the block; the others only give their
    keys and values. `None`: all are read."""

    @property
    def read_rows(self) -> int | None:
        """Rows of the joint sequence that `read` counts."""
        return None if self.read is None else sum((self.text_lengths + self.frame_lengths)[: self.read])

    @property
    def joint_levels(self) -> tuple[tuple[int, ...], int | None]:
        """Where the text has the noise level of the first frame and shares its vector: rows of the joint sequence by
        frame, the text's among the first one's, and how many frames anybody reads after the block."""
        first, *others = self.frame_lengths
        read = None if self.read is None else self.read - len(self.text_lengths)
        return (sum(self.text_lengths) + first, *others), read

    def last(self, layout: FrameLayout) -> BlockPlan:
        """The plan of the last single-stream block: nobody reads what comes after the last generated segment."""
        live = [*(layout.texts[i] for i in layout.live_texts), *(layout.frames[i] for i in layout.live)]
        plan = self._replace(read=max((n for n, s in enumerate(live, start=1) if s.predicted), default=0))
        rows = plan.read_rows
        if layout.is_packed or rows is None or rows == sum(self.text_lengths + self.frame_lengths):
            return self
        clipped = (
            group._replace(queries=tuple(slice(r.start, min(r.stop, rows)) for r in group.queries if r.start < rows))
            for group in self.groups or ()
        )
        return plan._replace(groups=ranked(clipped) or None)

    def adapters(self, tensor: str) -> AdapterRows | None:
        """Adapter rows of one of `LoraPlan`'s tensors."""
        return None if self.lora is None else getattr(self.lora, tensor)


def block_plans(layout: FrameLayout, device: torch.device, *, writes: bool) -> tuple[BlockPlan, BlockPlan]:
    """What the blocks need to know about a layout, and the last single-stream one; kept on the layout.

    Args:
        device: of the tokens.
        writes: whether a cache keeps the frozen frames' keys and values of this pass.
    """

    def build() -> tuple[BlockPlan, BlockPlan]:
        plan = BlockPlan(
            layout.text_lengths,
            layout.lengths,
            on_device(layout.groups, device),
            on_device(layout.image_groups, device),
            lora=lora_plan(layout),
            frozen=layout.frozen_rows() if writes else (),
            image_frozen=layout.frozen_rows(image_only=True) if writes else (),
        )
        return plan, plan.last(layout)

    return layout.kept(("block plans", device, writes), build)


def _heads(attn: Any, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    head_dim = attn.inner_dim // attn.heads
    x = x.unflatten(-1, (-1, head_dim))  # (B, ·, H, d); -1 also counts the heads a tensor-parallel rank holds
    return x if norm is None else norm(x)


def _project(
    attn: Any,
    x: torch.Tensor,
    rows: AdapterRows | None,
    shared: bool,
    names: Sequence[str],
    asking: int | None = None,
) -> list:
    """Query, key and value; the query of the first `asking` rows only."""
    if getattr(attn, "fused_projections", False):
        if rows is not None:
            raise ValueError("adapters on frames need separate projections; call unfuse_qkv_projections() first")
        query, key, value = (attn.to_added_qkv if shared else attn.to_qkv)(x).chunk(3, dim=-1)
        return [query[:, :asking], key, value]
    parts = (x[:, :asking], x, x)
    return [linear(getattr(attn, name), part, rows, shared=shared) for name, part in zip(names, parts, strict=True)]


def joint_attention(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    image_rotary_emb: torch.Tensor | None,
    *,
    plan: BlockPlan,
    cache: LayerCache | None = None,
    stream: str = "joint",
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over text and frames; `attn` is any module with FLUX's or SD3's submodule names.

    Args:
        hidden_states: (B, N, D), or (B, S, D) where both streams already are one sequence.
        encoder_hidden_states: (B, T, D) or `None`.
        image_rotary_emb: `rope_table` of the rows attended over, (S, d/2) or (B, S, d/2).
        stream: "joint", or "image" for an attention that sees no text.

    Returns:
        As many streams as were given; the text's is not projected in a block that ends its text stream.
    """
    image_only = stream == "image"
    rows = plan.adapters("image" if encoder_hidden_states is not None or image_only else "joint")
    q, k, v = _project(attn, hidden_states, rows, False, ("to_q", "to_k", "to_v"), plan.read_rows)
    query, key, value = _heads(attn, q, attn.norm_q), _heads(attn, k, attn.norm_k), _heads(attn, v, None)
    if encoder_hidden_states is not None:
        q, k, v = _project(
            attn, encoder_hidden_states, plan.adapters("text"), True, ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        query = torch.cat([_heads(attn, q, attn.norm_added_q), query], dim=1)
        key = torch.cat([_heads(attn, k, attn.norm_added_k), key], dim=1)
        value = torch.cat([_heads(attn, v, None), value], dim=1)
    out = attend_heads(
        query,
        key,
        value,
        image_rotary_emb,
        plan=plan,
        cache=cache,
        stream=stream,
        backend=backend,
        parallel_config=parallel_config,
    )  # (B, S, D)

    if encoder_hidden_states is None:
        return out if not hasattr(attn, "to_out") else attn.to_out[1](linear(attn.to_out[0], out, rows))
    text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
    image = attn.to_out[1](linear(attn.to_out[0], image, rows))
    if getattr(attn, "context_pre_only", False):  # some classes always project it and do not say so
        return image, text
    return image, linear(attn.to_add_out, text, plan.adapters("text"), shared=True)


def attend_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_rotary_emb: torch.Tensor | None,
    *,
    plan: BlockPlan,
    cache: LayerCache | None = None,
    stream: str = "joint",
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """The attention itself, between the projections: rotations, the cache, and who sees whom.

    Args:
        query, key, value: (B, S, H, d), not rotated; there may be fewer queries, of the first rows, and fewer heads of
            keys and values, each for as many heads of queries.
        image_rotary_emb, stream: as in `joint_attention`.

    Returns:
        (B, rows of the queries, D).
    """
    if image_rotary_emb is not None:
        query = apply_rope(query, image_rotary_emb[..., : query.shape[1], :])
        key = apply_rope(key, image_rotary_emb)
    image_only = stream == "image"
    frozen = plan.image_frozen if image_only else plan.frozen
    cached = None if cache is None else cache.exchange("attn2" if image_only else "attn", key, value, frozen)
    times = query.shape[2] // key.shape[2]
    if times > 1:
        key, value = (one.repeat_interleave(times, dim=2) for one in (key, value))
        if cached is not None:
            cached = (cached[0].repeat_interleave(times, dim=2), cached[1].repeat_interleave(times, dim=2))
    out = grouped_attention(
        query,
        key,
        value,
        plan.image_groups if image_only else plan.groups,
        key_mask=None if image_only else plan.key_mask,
        cached=cached,
        packed=plan.image_packed if image_only else plan.packed,
        backend=backend,
        parallel_config=parallel_config,
    )
    return out.flatten(2).to(query.dtype)


def attend(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    image_rotary_emb: torch.Tensor | None,
    **options: Any,
) -> Any:
    """`joint_attention` of a block; `options` are its plan, cache and stream.

    Ours goes through its processor. diffusers' is called with our computation in place of its processor's, by the
    names its blocks use, so hooks and step caches see both.
    """
    if isinstance(attn, MMDiTAttention):
        return attn(hidden_states, encoder_hidden_states, image_rotary_emb, **options)
    inputs = {
        "hidden_states": hidden_states,
        "encoder_hidden_states": encoder_hidden_states,
        "image_rotary_emb": image_rotary_emb,
    }
    compute = partial(_stock_attention, attn, backend=compat.processor_backend(attn), **options)
    return compat.called(attn, compute, **{name: value for name, value in inputs.items() if value is not None})


def _stock_attention(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    image_rotary_emb: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    return joint_attention(attn, hidden_states, encoder_hidden_states, image_rotary_emb, **options)


class Modulation(NamedTuple):
    """What an adaptive norm needs besides its input."""

    lengths: tuple[int, ...]
    """Rows that share a vector, one after another."""
    rows: AdapterRows | None
    """Adapter rows of the vectors."""
    shared: bool = False


def adaptive_norm(norm: Any, x: torch.Tensor, vectors: torch.Tensor, how: Modulation) -> Any:
    """diffusers' adaptive norm with one vector per segment.

    Args:
        norm: `AdaLayerNormZero`, `AdaLayerNormZeroSingle`, `SD35AdaLayerNormZeroX` or `AdaLayerNormContinuous`; or
            without projection, as Chroma has them.
        x: (B, N, D).
        vectors: (B, F, D); (B, F, k, D) for a norm without projection, the k shifts, scales and gates themselves.

    Returns:
        What `norm` returns: modulated tokens, and gates and the MLP's modulation (B, F, D) behind them.
    """
    if isinstance(norm, AdaLayerNormContinuous):
        return compat.called(norm, partial(_continuous, norm, how), x, vectors)
    return compat.called(norm, partial(_zero, norm, how), x, emb=vectors)


def _continuous(norm: Any, how: Modulation, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    emb = linear(norm.linear, norm.silu(vectors).to(x.dtype), how.rows, shared=how.shared)
    scale, shift = emb.chunk(2, dim=-1)  # here the scale comes first
    return modulate(norm.norm(x), shift, scale, how.lengths)


def _zero(norm: Any, how: Modulation, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if emb.ndim == 4:  # (B, F, 6 or 3, D): Chroma's norms have no projection
        count, emb = emb.shape[2], emb.flatten(2)
    else:
        emb = linear(norm.linear, norm.silu(emb), how.rows, shared=how.shared)
        count = {AdaLayerNormZeroSingle: 3, SD35AdaLayerNormZeroX: 9}.get(type(norm), 6)
    shift, scale, *rest = emb.chunk(count, dim=-1)
    normed = norm.norm(x)
    if count == 9:  # shift and scale of a second attention, before its gate
        gate, shift_mlp, scale_mlp, gate_mlp, shift_2, scale_2, gate_2 = rest
        rest = [gate, shift_mlp, scale_mlp, gate_mlp, modulate(normed, shift_2, scale_2, how.lengths), gate_2]
    return modulate(normed, shift, scale, how.lengths), *rest


def double_block(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    context_temb: torch.Tensor,
    image_rotary_emb: torch.Tensor | None,
    plan: BlockPlan,
    cache: LayerCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block with separate weights for text and image (SD3, arXiv 2403.03206, figure 2b).

    Args:
        block: ours, `FluxTransformerBlock` or `JointTransformerBlock`.
        hidden_states: (B, N, D) frames.
        encoder_hidden_states: (B, T, D) text.
        temb: (B, F, D), context_temb: (B, X, D): conditioning vector of each frame and text.

    Returns:
        Both streams, image first.
    """
    frames, texts = plan.frame_lengths, plan.text_lengths
    last = getattr(block, "context_pre_only", False)

    how = Modulation(frames, plan.adapters("image_vectors"))
    image, gate, shift_mlp, scale_mlp, gate_mlp, *second = adaptive_norm(block.norm1, hidden_states, temb, how)
    how = Modulation(texts, plan.adapters("text_vectors"), shared=True)
    normed = adaptive_norm(block.norm1_context, encoder_hidden_states, context_temb, how)
    if last:
        text = normed
    else:
        text, gate_text, shift_text_mlp, scale_text_mlp, gate_text_mlp = normed

    image, text = attend(block.attn, image, text, image_rotary_emb, plan=plan, cache=cache)
    hidden_states = gated_add(hidden_states, gate, image, frames)
    if second:
        image, gate_2 = second
        rope = None if image_rotary_emb is None else image_rotary_emb[..., encoder_hidden_states.shape[1] :, :]
        image = attend(block.attn2, image, None, rope, plan=plan, cache=cache, stream="image")
        hidden_states = gated_add(hidden_states, gate_2, image, frames)
    image = modulate(block.norm2(hidden_states), shift_mlp, scale_mlp, frames)
    image = feed_forward(block.ff, image, plan.adapters("image"))
    hidden_states = gated_add(hidden_states, gate_mlp, image, frames)

    if not last:
        encoder_hidden_states = gated_add(encoder_hidden_states, gate_text, text, texts)
        text = modulate(block.norm2_context(encoder_hidden_states), shift_text_mlp, scale_text_mlp, texts)
        text = feed_forward(block.ff_context, text, plan.adapters("text"))
        encoder_hidden_states = gated_add(encoder_hidden_states, gate_text_mlp, text, texts)
        encoder_hidden_states = in_range(encoder_hidden_states)
    return hidden_states, encoder_hidden_states


def single_block(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    context_temb: torch.Tensor,
    image_rotary_emb: torch.Tensor | None,
    plan: BlockPlan,
    cache: LayerCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block with the same weights for text and image, attention beside the MLP (FLUX.1; ViT-22B's layout).

    Arguments and result as in `double_block`; `block` is ours or `FluxSingleTransformerBlock`.
    """
    lengths = plan.text_lengths + plan.frame_lengths
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, S, D)
    vectors = torch.cat([context_temb, temb], dim=1)  # (B, X + F, D)
    if context_temb is temb and plan.lora is None:  # one text and one frame at one noise level: broadcast it
        vectors, lengths = temb, (joint.shape[1],)
    joint = joint_block(block, joint, vectors, lengths, plan.read, image_rotary_emb, plan, cache)
    encoder_hidden_states, hidden_states = joint.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
    return hidden_states, encoder_hidden_states


def joint_block(
    block: Any,
    joint: torch.Tensor,
    vectors: torch.Tensor,
    lengths: tuple[int, ...],
    count: int | None,
    image_rotary_emb: torch.Tensor | None,
    plan: BlockPlan,
    cache: LayerCache | None = None,
) -> torch.Tensor:
    """`single_block` of text and image in one sequence (B, S, D), with a vector for each of `lengths` rows, of which
    anybody reads the first `count` after the block; `None`: all."""
    normed, gate = adaptive_norm(block.norm, joint, vectors, Modulation(lengths, plan.adapters("joint_vectors")))
    read = normed[:, : plan.read_rows]  # all of them but in the last block
    mlp = block.act_mlp(linear(block.proj_mlp, read, plan.adapters("joint")))  # (B, S, 4D)
    attended = attend(block.attn, normed, None, image_rotary_emb, plan=plan, cache=cache)
    out = linear(block.proj_out, torch.cat([attended, mlp], dim=2), plan.adapters("joint"))
    done = gated_add(joint[:, : plan.read_rows], gate[:, :count], out, lengths[:count])
    return in_range(done if plan.read is None else torch.cat([done, joint[:, plan.read_rows :]], dim=1))


class TimestepVector(nn.Module):
    """Conditioning vector of a model that has no pooled text: the embedding of the timestep, with the names of
    diffusers' `CombinedTimestepTextProjEmbeddings`."""

    def __init__(self, dim: int):
        super().__init__()
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=dim)


class MMDiTAttnProcessor:
    """Runs `joint_attention` for `MMDiTAttention` on the backend that diffusers sets here."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: MMDiTAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        *,
        plan: BlockPlan,
        cache: LayerCache | None = None,
        stream: str = "joint",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return joint_attention(
            attn,
            hidden_states,
            encoder_hidden_states,
            image_rotary_emb,
            plan=plan,
            cache=cache,
            stream=stream,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class MMDiTAttention(nn.Module, AttentionModuleMixin):
    """Projections of one attention, with FLUX's names; the processor does the work."""

    _default_processor_cls = MMDiTAttnProcessor
    _available_processors = [MMDiTAttnProcessor]
    is_cross_attention = False
    processor: Any

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_norm: bool,
        context: bool = False,
        context_pre_only: bool = False,
        project_out: bool = True,
    ):
        super().__init__()
        self.heads = heads
        self.inner_dim = dim
        self.head_dim = dim // heads
        self.use_bias = self.added_proj_bias = True
        self.context_pre_only = context_pre_only
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (self._norm(qk_norm) for _ in range(2))
        if project_out:
            self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        if context:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (self._norm(qk_norm) for _ in range(2))
            if not context_pre_only:
                self.to_add_out = nn.Linear(dim, dim)
        self.processor = MMDiTAttnProcessor()

    def _norm(self, qk_norm: bool) -> nn.Module | None:
        return nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.processor(self, hidden_states, *args, **kwargs)


class MMDiTBlock(nn.Module):
    """Double-stream block; see `double_block`."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, *, qk_norm: bool, dual_attention: bool, context_pre_only: bool
    ):
        super().__init__()
        self.context_pre_only = context_pre_only
        self.norm1 = SD35AdaLayerNormZeroX(dim) if dual_attention else AdaLayerNormZero(dim)
        if context_pre_only:
            self.norm1_context = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        else:
            self.norm1_context = AdaLayerNormZero(dim)
        self.attn = MMDiTAttention(dim, heads, qk_norm=qk_norm, context=True, context_pre_only=context_pre_only)
        self.attn2 = MMDiTAttention(dim, heads, qk_norm=qk_norm) if dual_attention else None
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")
        if not context_pre_only:
            self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.ff_context = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        context_temb: torch.Tensor,
        image_rotary_emb: torch.Tensor | None,
        plan: BlockPlan,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return double_block(
            self, hidden_states, encoder_hidden_states, temb, context_temb, image_rotary_emb, plan, cache
        )


class MMDiTSingleBlock(nn.Module):
    """Single-stream block; see `single_block`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, *, qk_norm: bool):
        super().__init__()
        mlp_dim = int(dim * mlp_ratio)
        self.norm = AdaLayerNormZeroSingle(dim)
        self.proj_mlp = nn.Linear(dim, mlp_dim)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(dim + mlp_dim, dim)
        # Read by PackedRowwiseParallel of `_tp_plan`: two inputs of `proj_out` lie side by side.
        self.proj_out._tp_packed_row_blocks = [dim, mlp_dim]  # type: ignore[assignment]
        self.attn = MMDiTAttention(dim, heads, qk_norm=qk_norm, project_out=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        context_temb: torch.Tensor,
        image_rotary_emb: torch.Tensor | None,
        plan: BlockPlan,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return single_block(
            self, hidden_states, encoder_hidden_states, temb, context_temb, image_rotary_emb, plan, cache
        )


def _skip_attention(
    attn: MMDiTAttention,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


compat.register_block(MMDiTBlock, hidden_states=0, encoder_hidden_states=1)
compat.register_block(MMDiTSingleBlock, hidden_states=0, encoder_hidden_states=1)
compat.register_attention_processor(MMDiTAttnProcessor, _skip_attention)
