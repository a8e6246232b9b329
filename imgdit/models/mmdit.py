"""MMDiT: FLUX.1 and SD3/SD3.5 as one multi-modal diffusion transformer, plus frames.

Numerically it is diffusers' `FluxTransformer2DModel` (with `pos_embed_type="rope"`) or `SD3Transformer2DModel` (with
`"sincos"`), with their parameter names. On top of them, the image stream may consist of several frames, each with its
own noise level, adapter and view of the others (`imgdit.frames`).

The block mathematics are plain functions, `double_block` and `single_block`, over submodule names that diffusers' FLUX
and SD3 blocks share with ours: a hook can call them with diffusers' own block.

B batch, N image tokens, T text tokens, S = T + N, D width, H heads, F frames, X texts (one per scene), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.tensor_parallel import PackedRowwiseParallel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    PatchEmbed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from diffusers.utils import apply_lora_scale

from .. import compat
from ..attention import KVCache, LayerCache, PackedRows, grouped_attention, packed_backend
from ..frames import Frame, FrameLayout, RowGroup
from ..lora import AdapterRows, LoraPlan, feed_forward, linear, lora_plan
from ..mup import MupMixin
from . import convert
from .validation import check_config, check_inputs

# Pure functions


def rope_table(ids: torch.Tensor, axes_dims: Sequence[int], theta: float) -> torch.Tensor:
    """Rotations (N, sum(axes_dims) / 2) complex64 of positions; FLUX's rule, angles in float64.

    Args:
        ids: (N, axes) positions.
        axes_dims: features of a head that turn with each axis.
        theta: base of the geometric row of frequencies.
    """
    dtype = torch.float32 if ids.device.type in ("mps", "npu") else torch.float64
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim)
        angles.append(ids[:, axis].to(dtype)[:, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.complex(angle.cos().float(), angle.sin().float())


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of features (B, S, H, d) by the rotations (S, d/2) of `rope_table`."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, S, H, d/2, 2)
    if torch.compiler.is_compiling():  # inductor generates no code for complex numbers
        cos, sin = torch.view_as_real(rope)[:, None].unbind(-1)  # (S, 1, d/2)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # eager: one pass; the real form costs 40 times as much on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rope[:, None])
    return turned.flatten(-2).to(x.dtype)


def sincos_positions(rows: torch.Tensor, columns: torch.Tensor, dim: int) -> torch.Tensor:
    """SD3's sine-cosine embedding (N, dim) of coordinates (N,): the column in the first half, the row in the second."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [coordinate.double()[:, None] * frequency for coordinate in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def multiply_add(base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """`base + x * factor`, each either tokens (B, N, D) or one vector per frame (B, F, D) broadcast over its tokens.

    The vectors are never expanded to tokens: one frame broadcasts, equal frames fold into an axis, others go by slice.
    """
    if len(lengths) == 1:
        return torch.addcmul(base, x, factor)
    if len(set(lengths)) == 1 and lengths[0] > 1:
        shaped = [
            y[:, :, None] if y.shape[1] == len(lengths) else y.unflatten(1, (len(lengths), lengths[0]))
            for y in (base, x, factor)
        ]
        return torch.addcmul(*shaped).flatten(1, 2)
    parts = zip(*(_per_frame(y, lengths) for y in (base, x, factor)), strict=True)
    return torch.cat([torch.addcmul(*part) for part in parts], dim=1)


def _per_frame(x: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return x.split(1, dim=1) if x.shape[1] == len(lengths) != sum(lengths) else x.split(list(lengths), dim=1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """adaLN: `x * (1 + scale) + shift` with one vector per frame (DiT, arXiv 2212.09748, section 3.2)."""
    return multiply_add(shift, x, 1 + scale, lengths)


def gated_add(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """`x + gate * update` with one gate per frame."""
    return multiply_add(x, update, gate, lengths)


# The blocks


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

    def adapters(self, tensor: str) -> AdapterRows | None:
        """Adapter rows of one of `LoraPlan`'s tensors."""
        return None if self.lora is None else getattr(self.lora, tensor)


def _heads(attn: nn.Module, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    head_dim = attn.inner_dim // attn.heads
    x = x.unflatten(-1, (-1, head_dim))  # (B, ·, H, d); -1 also counts the heads a tensor-parallel rank holds
    return x if norm is None else norm(x)


def _project(attn: nn.Module, x: torch.Tensor, rows: AdapterRows | None, shared: bool, names: Sequence[str]) -> list:
    if getattr(attn, "fused_projections", False):
        if rows is not None:
            raise ValueError("adapters on frames need separate projections; call unfuse_qkv_projections() first")
        return list((attn.to_added_qkv if shared else attn.to_qkv)(x).chunk(3, dim=-1))
    return [linear(getattr(attn, name), x, rows, shared=shared) for name in names]


def joint_attention(
    attn: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    image_rotary_emb: torch.Tensor | None,
    plan: BlockPlan,
    cache: LayerCache | None = None,
    *,
    stream: str = "joint",
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over text and frames; `attn` is any module with FLUX's or SD3's submodule names.

    Args:
        hidden_states: (B, N, D), or (B, S, D) where both streams already are one sequence.
        encoder_hidden_states: (B, T, D) or `None`.
        image_rotary_emb: `rope_table` of the rows attended over.
        stream: "joint", or "image" for an attention that sees no text.

    Returns:
        As many streams as were given; the text's is `None` after a block that ends its text stream.
    """
    two_streams = encoder_hidden_states is not None
    rows = plan.adapters("image" if two_streams or stream == "image" else "joint")
    q, k, v = _project(attn, hidden_states, rows, False, ("to_q", "to_k", "to_v"))
    query, key, value = _heads(attn, q, attn.norm_q), _heads(attn, k, attn.norm_k), _heads(attn, v, None)
    if two_streams:
        q, k, v = _project(
            attn, encoder_hidden_states, plan.adapters("text"), True, ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        query = torch.cat([_heads(attn, q, attn.norm_added_q), query], dim=1)
        key = torch.cat([_heads(attn, k, attn.norm_added_k), key], dim=1)
        value = torch.cat([_heads(attn, v, None), value], dim=1)
    if image_rotary_emb is not None:
        query, key = apply_rope(query, image_rotary_emb), apply_rope(key, image_rotary_emb)

    image_only = stream == "image"
    frozen = plan.image_frozen if image_only else plan.frozen
    cached = None if cache is None else cache.exchange("attn2" if image_only else "attn", key, value, frozen)
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
    out = out.flatten(2).to(query.dtype)  # (B, S, D)

    if not two_streams:
        return out if not hasattr(attn, "to_out") else attn.to_out[1](linear(attn.to_out[0], out, rows))
    text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
    image = attn.to_out[1](linear(attn.to_out[0], image, rows))
    if attn.context_pre_only:
        return image, None
    return image, linear(attn.to_add_out, text, plan.adapters("text"), shared=True)


def _attend(attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Our attention goes through its processor, so hooks and step caches see it; diffusers' is a bag of weights."""
    return attn(*args, **kwargs) if isinstance(attn, MMDiTAttention) else joint_attention(attn, *args, **kwargs)


def double_block(
    block: nn.Module,
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
    dual = getattr(block, "attn2", None) is not None
    last = getattr(block, "context_pre_only", False)

    emb = linear(block.norm1.linear, F.silu(temb), plan.adapters("image_vectors"))  # (B, F, 6D or 9D)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = emb.chunk(9 if dual else 6, dim=-1)
    normed = block.norm1.norm(hidden_states)
    image = modulate(normed, shift, scale, frames)

    emb = linear(block.norm1_context.linear, F.silu(context_temb), plan.adapters("text_vectors"), shared=True)
    if last:  # AdaLayerNormContinuous: the scale comes first
        scale_text, shift_text = emb.chunk(2, dim=-1)
    else:
        shift_text, scale_text, gate_text, shift_text_mlp, scale_text_mlp, gate_text_mlp = emb.chunk(6, dim=-1)
    text = modulate(block.norm1_context.norm(encoder_hidden_states), shift_text, scale_text, texts)

    image, text = _attend(block.attn, image, text, image_rotary_emb, plan, cache)
    hidden_states = gated_add(hidden_states, gate, image, frames)
    if dual:
        shift_2, scale_2, gate_2 = second
        rope = None if image_rotary_emb is None else image_rotary_emb[encoder_hidden_states.shape[1] :]
        image = modulate(normed, shift_2, scale_2, frames)
        image = _attend(block.attn2, image, None, rope, plan, cache, stream="image")
        hidden_states = gated_add(hidden_states, gate_2, image, frames)
    image = modulate(block.norm2(hidden_states), shift_mlp, scale_mlp, frames)
    image = feed_forward(block.ff, image, plan.adapters("image"))
    hidden_states = gated_add(hidden_states, gate_mlp, image, frames)

    if not last:
        encoder_hidden_states = gated_add(encoder_hidden_states, gate_text, text, texts)
        text = modulate(block.norm2_context(encoder_hidden_states), shift_text_mlp, scale_text_mlp, texts)
        text = feed_forward(block.ff_context, text, plan.adapters("text"))
        encoder_hidden_states = gated_add(encoder_hidden_states, gate_text_mlp, text, texts)
        if encoder_hidden_states.dtype == torch.float16:
            encoder_hidden_states = encoder_hidden_states.clip(-65504, 65504)
    return hidden_states, encoder_hidden_states


def single_block(
    block: nn.Module,
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

    emb = linear(block.norm.linear, F.silu(vectors), plan.adapters("joint_vectors"))
    shift, scale, gate = emb.chunk(3, dim=-1)
    normed = modulate(block.norm.norm(joint), shift, scale, lengths)
    mlp = block.act_mlp(linear(block.proj_mlp, normed, plan.adapters("joint")))  # (B, S, 4D)
    attended = _attend(block.attn, normed, None, image_rotary_emb, plan, cache)
    out = linear(block.proj_out, torch.cat([attended, mlp], dim=2), plan.adapters("joint"))
    joint = gated_add(joint, gate, out, lengths)
    if joint.dtype == torch.float16:
        joint = joint.clip(-65504, 65504)
    encoder_hidden_states, hidden_states = joint.split(
        [encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1
    )
    return hidden_states, encoder_hidden_states


# The modules


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
        plan: BlockPlan | None = None,
        cache: LayerCache | None = None,
        stream: str = "joint",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        return joint_attention(
            attn,
            hidden_states,
            encoder_hidden_states,
            image_rotary_emb,
            plan,
            cache,
            stream=stream,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class MMDiTAttention(nn.Module, AttentionModuleMixin):
    """Projections of one attention, with FLUX's names; the processor does the work."""

    _default_processor_cls = MMDiTAttnProcessor
    _available_processors = [MMDiTAttnProcessor]
    is_cross_attention = False

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
        self.set_processor(self._default_processor_cls())

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
        self.proj_out._tp_packed_row_blocks = [dim, mlp_dim]  # read by PackedRowwiseParallel of `_tp_plan`
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


class MMDiT(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin, MupMixin):
    """Multi-modal diffusion transformer over frames.

    Args:
        patch_size: latent cells per token side. 1 with rotary positions (the caller packs the latents, as for FLUX).
        in_channels: channels of a token (rotary), or of the latent grid (sin-cos).
        out_channels: the same of the prediction; `None`: `in_channels`.
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks after them.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: features of a text token.
        pooled_projection_dim: features of the pooled text.
        guidance_embeds: whether the guidance scale is an input (guidance-distilled models).
        pos_embed_type: "rope" (FLUX: rotary, ids per token) or "sincos" (SD3: added to the patches).
        axes_dims_rope: head features turned by frame, row and column; their sum is `attention_head_dim`.
        rope_theta: base of the rotary frequencies.
        sample_size, pos_embed_max_size: side of the training latents and of the sin-cos table, in cells and patches.
        qk_norm: "rms_norm" on queries and keys, or `None`.
        dual_attention_layers: double-stream blocks with a second attention over the image alone (SD3.5-medium).
        context_pre_only: whether the last double-stream block ends the text stream; `None`: if no single-stream
            block follows, so that no parameter is left without a gradient.
        mlp_ratio: width of the MLPs over the model's.
        timestep_scale: what the `timestep` given to `forward` is multiplied by to lie in [0, 1000]: 1000 if callers
            pass sigma as FLUX's pipeline does, 1 if they pass the scheduler's timestep as SD3's does.
        mup_base_width: width at which learning rates were tuned (μP); `None`: standard parametrisation.
        mup_output_mult: factor of the readout (μP).
        mup_adaln_init: "zero" (adaLN-zero) or "normal" (as the μP paper's DiT).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MMDiTBlock", "MMDiTSingleBlock"]
    _repeated_blocks = ["MMDiTBlock", "MMDiTSingleBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _skip_keys = ["cache", "layout"]
    # Every token-wise input is split along its tokens; the text too, so both lengths must divide by the ranks.
    _cp_plan = {
        "": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False),
            "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False),
            "img_ids": ContextParallelInput(split_dim=0, expected_dims=2, split_output=False),
            "txt_ids": ContextParallelInput(split_dim=0, expected_dims=2, split_output=False),
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    # Modulation and QK norms are replicated: they work on the whole width, or after the heads are split.
    _tp_plan = {
        **{
            f"transformer_blocks.*.{name}": "colwise"
            for name in (
                *(f"attn.{p}" for p in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
                *(f"attn2.{p}" for p in ("to_q", "to_k", "to_v")),
                "ff.net.0.proj",
                "ff_context.net.0.proj",
            )
        },
        **{
            f"transformer_blocks.*.{name}": "rowwise"
            for name in ("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2")
        },
        **{
            f"single_transformer_blocks.*.{name}": "colwise"
            for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        },
        "single_transformer_blocks.*.proj_out": PackedRowwiseParallel(),
    }
    # First match wins; a parameter without a match is an error (imgdit.mup.roles).
    _mup_roles = (
        ("x_embedder.weight", "input"),
        ("pos_embed.proj.weight", "input"),
        ("context_embedder.weight", "input"),
        ("time_text_embed.*_embedder.linear_1.weight", "input"),
        ("time_text_embed.*_embedder.linear_2.weight", "hidden"),
        ("proj_out.weight", "output"),
        ("proj_out.bias", "finite"),
        ("*.norm_q.weight", "finite"),
        ("*.norm_k.weight", "finite"),
        ("*.norm_added_q.weight", "finite"),
        ("*.norm_added_k.weight", "finite"),
        ("norm_out.linear.weight", "modulation"),
        ("*.norm*.linear.weight", "modulation"),
        ("transformer_blocks.*.weight", "hidden"),
        ("single_transformer_blocks.*.weight", "hidden"),
        ("*.bias", "vector"),
    )

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        pos_embed_type: str = "rope",
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        rope_theta: float = 10000.0,
        sample_size: int = 128,
        pos_embed_max_size: int = 96,
        qk_norm: str | None = "rms_norm",
        dual_attention_layers: tuple[int, ...] = (),
        context_pre_only: bool | None = None,
        mlp_ratio: float = 4.0,
        timestep_scale: float = 1000.0,
        mup_base_width: int | None = None,
        mup_output_mult: float = 1.0,
        mup_adaln_init: str = "zero",
    ):
        super().__init__()
        check_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.out_channels = out_channels or in_channels
        ends_text = (num_single_layers == 0) if context_pre_only is None else context_pre_only

        if pos_embed_type == "rope":
            self.x_embedder = nn.Linear(in_channels, dim)
        else:
            self.pos_embed = PatchEmbed(
                height=sample_size,
                width=sample_size,
                patch_size=patch_size,
                in_channels=in_channels,
                embed_dim=dim,
                pos_embed_max_size=pos_embed_max_size,
            )
        embeddings = (
            CombinedTimestepGuidanceTextProjEmbeddings if guidance_embeds else CombinedTimestepTextProjEmbeddings
        )
        self.time_text_embed = embeddings(embedding_dim=dim, pooled_projection_dim=pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(
                dim,
                num_attention_heads,
                mlp_ratio,
                qk_norm=qk_norm is not None,
                dual_attention=i in dual_attention_layers,
                context_pre_only=ends_text and i == num_layers - 1,
            )
            for i in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            MMDiTSingleBlock(dim, num_attention_heads, mlp_ratio, qk_norm=qk_norm is not None)
            for _ in range(num_single_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        layout: FrameLayout | None = None,
        cache: KVCache | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity noise - data of every frame that is being made.

        Args:
            hidden_states: (B, N, C) tokens of the frames in the layout's order; or one latent grid (B, C, h, w) for a
                model with sin-cos positions and no layout. Batch 1 for a packed layout.
            encoder_hidden_states: (B, T, J) text.
            pooled_projections: (B, P) pooled text; (X, P), one per scene, for a packed layout.
            timestep: (B,) (or (X,)) noise level of the frames being made, in [0, 1000] after `timestep_scale`;
                or (B, F), one per frame, which overrides the layout's held levels too.
            img_ids, txt_ids: (N, 3) and (T, 3) positions; for rotary models without a layout.
            guidance: as `timestep`, for models with `guidance_embeds`.
            joint_attention_kwargs: {"scale": LoRA scale}; for inference (see `set_adapters` for training).
            encoder_attention_mask: (B, T), true on real text tokens. `None`: all are.
            layout: the frames; `None`: one frame.
            cache: keys and values of frozen frames, written or read.

        Returns:
            (B, n, C) for the n tokens of the frames being made, or (B, C, h, w) for a latent grid.

        Raises:
            ValueError: a shape, length or option that does not fit, with what was expected.
        """
        check_inputs(
            self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
            joint_attention_kwargs, encoder_attention_mask, layout, cache,
        )  # fmt: skip
        grid = hidden_states.shape[-2:] if hidden_states.ndim == 4 else None
        lora = None if layout is None else lora_plan(layout)
        hidden_states = self._embed(hidden_states, layout, lora)  # (B, N, D)
        temb, context_temb = self._condition(hidden_states.dtype, timestep, guidance, pooled_projections, layout)
        encoder_hidden_states = linear(self.context_embedder, encoder_hidden_states, lora and lora.text, shared=True)
        text_length = encoder_hidden_states.shape[1]
        rope = self._rope(layout, img_ids, txt_ids, text_length, hidden_states.device)
        plan = self._plan(layout, hidden_states, text_length, encoder_attention_mask, lora, cache)

        for blocks in ("transformer_blocks", "single_transformer_blocks"):
            for i, block in enumerate(getattr(self, blocks)):
                layer = None if cache is None else cache.layer(f"{blocks}.{i}")
                inputs = (hidden_states, encoder_hidden_states, temb, context_temb, rope, plan, layer)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    hidden_states, encoder_hidden_states = self._gradient_checkpointing_func(block, *inputs)
                else:
                    hidden_states, encoder_hidden_states = block(
                        hidden_states=inputs[0],
                        encoder_hidden_states=inputs[1],
                        temb=temb,
                        context_temb=context_temb,
                        image_rotary_emb=rope,
                        plan=plan,
                        cache=layer,
                    )
        sample = self._read_out(hidden_states, temb, layout, grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(
        self, hidden_states: torch.Tensor, layout: FrameLayout | None, lora: LoraPlan | None
    ) -> torch.Tensor:
        """Tokens or a latent grid to (B, N, D), positions added where they are not rotary."""
        if self.config.pos_embed_type == "rope":
            return linear(self.x_embedder, hidden_states, lora and lora.image)
        if hidden_states.ndim == 4:
            return self.pos_embed(hidden_states).contiguous()
        project = self.pos_embed.proj  # a strided convolution is a linear layer on patches (c, row, column)
        tokens = F.linear(hidden_states, project.weight.flatten(1), project.bias)
        return tokens + self._table_positions(layout).to(tokens)

    def _table_positions(self, layout: FrameLayout) -> torch.Tensor:
        """Sin-cos positions (N, D) of a layout, in the table's frame: the made frame sits in its middle, as in SD3."""
        side = self.config.pos_embed_max_size
        made = next((f for f in layout.frames if not f.held), layout.frames[0])
        rows, columns = ((layout.ids()[:, 1 + i] + (side - made.size[i]) // 2) for i in range(2))
        inside = (rows.frac() == 0) & (columns.frac() == 0) & (torch.minimum(rows, columns) >= 0)
        if bool((inside & (torch.maximum(rows, columns) < side)).all()):
            return self.pos_embed.pos_embed[0, (rows * side + columns).long()]
        step = self.pos_embed.base_size / side
        return sincos_positions(rows * step, columns * step, self.inner_dim)

    def _condition(
        self,
        dtype: torch.dtype,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        pooled: torch.Tensor,
        layout: FrameLayout | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning vectors of the frames (B, F, D) and of the texts (B, X, D).

        The text has the noise level of the run, or of the noisiest frame of its scene where each has its own.
        """
        embed, scale = self.time_text_embed, self.config.timestep_scale
        pooled_emb = embed.text_embedder(pooled)  # (B or X, D)
        layout = layout or _ONE_FRAME
        scene = [layout.scenes[i] for i in layout.live]

        def embedding(embedder: nn.Module, values: torch.Tensor) -> torch.Tensor:
            return embedder(embed.time_proj(values.flatten()).to(pooled.dtype)).unflatten(0, values.shape)

        def vectors(embedder: nn.Module, values: torch.Tensor, scale: float, held: list) -> list[torch.Tensor]:
            values = values.to(dtype) if scale != 1 else values  # as FLUX does, so that bf16 rounds alike
            frames = layout.expand(values, held)  # (B, F)
            if len(scene) == 1 and (values.ndim == 2 or held[layout.live[0]] is None):
                return [embedding(embedder, frames * scale)] * 2  # one text, one frame, one level
            if values.ndim == 1:
                texts = values[None] if layout.is_packed else values[:, None]
            else:
                members = [[f for f, s in enumerate(scene) if s == x] for x in range(layout.num_texts)]
                texts = torch.stack([frames[:, of].amax(1) for of in members], dim=1)
            return [embedding(embedder, frames * scale), embedding(embedder, texts * scale)]

        held = [None if f.sigma is None else f.sigma * 1000 / scale for f in layout.frames]
        temb, context_temb = vectors(embed.timestep_embedder, timestep, scale, held)
        if self.config.guidance_embeds:
            g, context_g = vectors(embed.guidance_embedder, guidance, 1000.0, [f.guidance for f in layout.frames])
            shared = temb is context_temb and g is context_g
            temb = temb + g
            context_temb = temb if shared else context_temb + context_g
        if layout.is_packed:
            return temb + pooled_emb[scene], context_temb + pooled_emb
        shared, temb = temb is context_temb, temb + pooled_emb[:, None]
        return temb, temb if shared else context_temb + pooled_emb[:, None]

    def _rope(
        self,
        layout: FrameLayout | None,
        img_ids: torch.Tensor | None,
        txt_ids: torch.Tensor | None,
        text_length: int,
        device: torch.device,
    ) -> torch.Tensor | None:
        """Rotary table of the joint sequence; `None` for a model with sin-cos positions."""
        if self.config.pos_embed_type != "rope":
            return None
        axes = self.config.axes_dims_rope
        if layout is not None:
            img_ids = layout.ids(device)
        if txt_ids is None:
            txt_ids = torch.zeros(text_length, len(axes), device=device)
        return rope_table(torch.cat([txt_ids, img_ids]).float(), axes, self.config.rope_theta)

    def _plan(
        self,
        layout: FrameLayout | None,
        hidden_states: torch.Tensor,
        text_length: int,
        encoder_attention_mask: torch.Tensor | None,
        lora: LoraPlan | None,
        cache: KVCache | None,
    ) -> BlockPlan:
        """What the blocks need to know, computed once per forward pass."""
        key_mask = None
        if encoder_attention_mask is not None:
            image = encoder_attention_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            key_mask = torch.cat([encoder_attention_mask.bool(), image], dim=1)  # (B, S)
        if layout is None:
            return BlockPlan((text_length,), (hidden_states.shape[1],), key_mask=key_mask)
        packed = image_packed = None
        if layout.is_packed and packed_backend(hidden_states.unflatten(-1, (-1, self.config.attention_head_dim)), None):
            packed = PackedRows.build(layout.groups, layout.text_length + layout.image_length, hidden_states.device)
            if self.config.dual_attention_layers:
                image_packed = PackedRows.build(layout.image_groups, layout.image_length, hidden_states.device)
        writes = cache is not None and cache.mode == "write"
        return BlockPlan(
            layout.text_lengths,
            layout.lengths,
            layout.groups,
            layout.image_groups,
            packed,
            image_packed,
            key_mask,
            lora,
            layout.frozen_rows() if writes else (),
            layout.frozen_rows(image_only=True) if writes else (),
        )

    def _read_out(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        layout: FrameLayout | None,
        grid: tuple[int, int] | None,
    ) -> torch.Tensor:
        """Prediction of the frames being made: tokens, or a latent grid if one came in."""
        lengths: tuple[int, ...] = (hidden_states.shape[1],)
        if layout is not None:
            made = [n for n, i in enumerate(layout.live) if not layout.frames[i].held]
            if len(made) < len(layout.live):
                hidden_states = torch.cat([hidden_states[:, rows] for rows in layout.predicted], dim=1)
                temb = temb[:, made]
                lengths = layout.predicted_lengths
        scale, shift = self.norm_out.linear(F.silu(temb).to(hidden_states.dtype)).chunk(2, dim=-1)
        out = self.proj_out(modulate(self.norm_out.norm(hidden_states), shift, scale, lengths))
        if self.config.pos_embed_type == "rope":
            return out
        patch = self.config.patch_size
        cells = out.unflatten(-1, (patch, patch, self.out_channels))  # (B, n, p, q, C)
        if grid is None:
            return cells.permute(0, 1, 4, 2, 3).flatten(2)  # the order of the tokens that came in: (C, p, q)
        rows, columns = (side // patch for side in grid)
        return cells.unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4).reshape(out.shape[0], -1, *grid)

    # Other forms of the same weights

    @classmethod
    def from_diffusers(cls, model: ModelMixin) -> MMDiT:
        """An `MMDiT` over the very parameters of a `FluxTransformer2DModel` or `SD3Transformer2DModel` (no copy)."""
        return convert.from_diffusers(cls, model)

    def to_diffusers(self) -> ModelMixin:
        """The `FluxTransformer2DModel` or `SD3Transformer2DModel` over this model's parameters (no copy)."""
        return convert.to_diffusers(self)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read our configuration, or that of a diffusers FLUX or SD3 transformer folder."""
        return super().extract_init_dict(convert.read_config(cls, config_dict), **kwargs)

    @property
    def token_channels(self) -> int:
        """Channels of a token as `forward` takes it."""
        return self.config.in_channels * (1 if self.config.pos_embed_type == "rope" else self.config.patch_size**2)

    @property
    def max_grid(self) -> float:
        """Rows or columns of tokens a frame may have."""
        return math.inf if self.config.pos_embed_type == "rope" else self.config.pos_embed_max_size


_ONE_FRAME = FrameLayout.build([Frame((1, 1))], 1)


def _skip_attention(
    attn: MMDiTAttention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *_: Any, **__: Any
) -> Any:
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


compat.register_block(MMDiTBlock, hidden_states=0, encoder_hidden_states=1)
compat.register_block(MMDiTSingleBlock, hidden_states=0, encoder_hidden_states=1)
compat.register_attention_processor(MMDiTAttnProcessor, _skip_attention)
