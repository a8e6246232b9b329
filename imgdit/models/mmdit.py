"""MMDiT: FLUX.1 and SD3/SD3.5 as one multi-modal diffusion transformer, plus frames.

Numerically it is diffusers' `FluxTransformer2DModel` (with `pos_embed_type="rope"`) or `SD3Transformer2DModel` (with
`"sincos"`), with their parameter names. On top of them, the image stream may consist of several frames, each with its
own noise level, adapter and view of the others (`imgdit.frames`), and a text head makes the text stream a prediction
too (Dual Diffusion, arXiv 2501.00289).

B batch, N image tokens, T text tokens, J text features, P pooled features, D width, C channels, F frames, X texts (one
per scene of a packed batch, otherwise 1), V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.tensor_parallel import PackedRowwiseParallel
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    PatchEmbed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.utils import apply_lora_scale

from imgdit import compat
from imgdit.attention.cache import KVCache
from imgdit.attention.packed import PackedRows
from imgdit.compat import Adapters, OtherWeightNames, SafetensorsOnly, StepCaches
from imgdit.frames import Frame, TextFrame
from imgdit.layout import FrameLayout, take_rows
from imgdit.lora.rows import LoraPlan, linear, lora_plan, main_rows
from imgdit.models import convert
from imgdit.models.blocks import (
    BlockPlan,
    MMDiTBlock,
    MMDiTSingleBlock,
    Modulation,
    TimestepVector,
    adaptive_norm,
    block_plans,
)
from imgdit.models.functional import rope_table, table_positions
from imgdit.models.validation import check_config, check_inputs, check_text_level
from imgdit.mup import MupMixin

_ONE_FRAME = FrameLayout.build([Frame((1, 1))], 1)
_ONE_FRAME_AND_TEXT = FrameLayout.build([TextFrame(1, sigma=None), Frame((1, 1))])
_Pair = tuple[torch.Tensor, torch.Tensor]
"""Of the frames, and of the texts."""
_HEAD = ("text_vocab_size", "text_rope_axis", "text_embeds", "null_image_tokens")
"""Settings of the text head."""


@dataclass
class MMDiTOutput(Transformer2DModelOutput):
    """What `MMDiT` predicts."""

    sample: torch.Tensor | None = None
    """(B, n, C) or (B, C, h, w), see `MMDiT.forward`; `None`: no frame is generated."""
    text_logits: torch.Tensor | None = None
    """(B, t, V) for the t tokens of the texts that are generated, all of them without a layout; `None`: there is none,
    or the model has no text head."""


class MMDiT(
    SafetensorsOnly, OtherWeightNames, ModelMixin, ConfigMixin, Adapters, StepCaches, AttentionMixin, MupMixin
):
    """Multi-modal diffusion transformer over frames.

    Args:
        patch_size: latent cells per token side. 1 with rotary positions (the caller packs the latents, as for FLUX).
        in_channels: channels of a token (rotary), or of the latent grid (sin-cos).
        out_channels: the same of the prediction; `None`: `in_channels`.
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks after them.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: features of a text token.
        pooled_projection_dim: features of the pooled text; `None`: there is none, and the timestep alone modulates.
        guidance_embeds: whether the guidance scale is an input (guidance-distilled models).
        pos_embed_type: "rope" (FLUX: rotary, ids per token) or "sincos" (SD3: added to the patches).
        axes_dims_rope: head features turned by frame, row and column; their sum is `attention_head_dim`.
        rope_theta: base of the rotary frequencies.
        sample_size: side of the training latents in cells; images are of this size unless asked for otherwise.
        pos_embed_max_size: side of the sin-cos table in patches.
        qk_norm: "rms_norm" on queries and keys, or `None`.
        dual_attention_layers: double-stream blocks with a second attention over the image alone (SD3.5-medium).
        context_pre_only: whether the last double-stream block ends the text stream; `None`: if no single-stream
            block or text head follows, so that no parameter is left without a gradient.
        mlp_ratio: width of the MLPs over the model's.
        timestep_scale: what the `timestep` given to `forward` is multiplied by to lie in [0, 1000]: 1000 if callers
            pass sigma as FLUX's pipeline does, 1 if they pass the scheduler's timestep as SD3's does.
        text_vocab_size: tokens that the text head predicts, V; `None`: there is no head.
        text_rope_axis: rotary axis along which the tokens of a text that is generated lie, at 0, 1, …; `None`: they
            all lie at 0 as those of a prompt, and a text encoder without absolute positions makes all masks equal.
        text_embeds: whether the tokens of a text that is generated have embeddings of their own, `text_embedder`;
            otherwise a text encoder reads them, masks and all (Dual Diffusion).
        null_image_tokens: learned tokens that stand for an image where there is none; 0: there always is one.
        mup_base_width: width at which learning rates were tuned (μP); `None`: standard parametrisation.
        mup_output_mult: factor of the readout (μP).
        mup_adaln_init: "zero" (adaLN-zero) or "normal" (as the μP paper's DiT).
        mup_wd_exponent, mup_base_head_dim, mup_base_depth: see `imgdit.mup.MupSettings`.
    """

    text_frames: Any = None
    """What `imgdit.pipelines.text_frames` loaded, for all pipelines of this model."""
    _supports_gradient_checkpointing = True
    _no_split_modules = ["MMDiTBlock", "MMDiTSingleBlock"]
    _repeated_blocks = ["MMDiTBlock", "MMDiTSingleBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _skip_keys = ["cache", "layout"]
    _weight_names = staticmethod(convert.our_names)
    _attention_pattern = r"(single_)?transformer_blocks\.\d+\.attn"
    # Every token-wise input is split along its tokens; the text too, so both lengths must divide by the ranks.
    _cp_plan = {
        "": {
            "hidden_states": compat.ContextParallelInput(split_dim=1, expected_dims=3, split_output=False),
            "encoder_hidden_states": compat.ContextParallelInput(split_dim=1, expected_dims=3, split_output=False),
            "img_ids": compat.ContextParallelInput(split_dim=0, expected_dims=2, split_output=False),
            "txt_ids": compat.ContextParallelInput(split_dim=0, expected_dims=2, split_output=False),
        },
        "proj_out": compat.ContextParallelOutput(gather_dim=1, expected_dims=3),
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
        pooled_projection_dim: int | None = 768,
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
        text_vocab_size: int | None = None,
        text_rope_axis: int | None = None,
        text_embeds: bool = False,
        null_image_tokens: int = 0,
        mup_base_width: int | None = None,
        mup_output_mult: float = 1.0,
        mup_adaln_init: str = "zero",
        mup_wd_exponent: float = 1.0,
        mup_base_head_dim: int | None = None,
        mup_base_depth: int | None = None,
    ):
        super().__init__()
        check_config(self.config)
        dim = self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        ends_text = context_pre_only
        if ends_text is None:
            ends_text = num_single_layers == 0 and text_vocab_size is None

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
        if pooled_projection_dim is None:
            self.time_text_embed: nn.Module = TimestepVector(dim)
        else:
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
        if text_vocab_size is not None:
            self._add_text_head(text_vocab_size, null_image_tokens)
        self.gradient_checkpointing = False

    def _add_text_head(self, vocab_size: int, null_image_tokens: int) -> None:
        self.text_norm_out = nn.LayerNorm(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.text_proj_out = nn.Linear(self.inner_dim, vocab_size)
        if self.config.text_embeds:
            self.text_embedder = nn.Embedding(vocab_size, self.config.joint_attention_dim)
        gathered = compat.ContextParallelOutput(gather_dim=1, expected_dims=3)
        self._cp_plan = {**self._cp_plan, "text_proj_out": gathered}
        if null_image_tokens:
            self.null_image_embd = nn.Parameter(torch.randn(1, null_image_tokens, self.inner_dim) * 0.02)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor | None,
        timestep: torch.Tensor,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        layout: FrameLayout | None = None,
        cache: KVCache | None = None,
        text_timestep: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MMDiTOutput | tuple[torch.Tensor, ...]:
        """Predict the velocity noise - data of every frame that is being generated, and the tokens of the text.

        Args:
            hidden_states: (B, N, C) tokens of the frames in the layout's order; or one latent grid (B, C, h, w) for a
                model with sin-cos positions and no layout. Batch 1 for a packed layout. `None`: no image, for models
                with `null_image_tokens`.
            encoder_hidden_states: (B, T, J) text.
            pooled_projections: (B, P) pooled text; (X, P), one per scene, for a packed layout; `None` for a model
                without it.
            timestep: (B,) (or (X,)) noise level of the frames being generated, in [0, 1000] after `timestep_scale`;
                or (B, F), one per frame, which overrides the layout's own levels too.
            img_ids, txt_ids: (N, 3) and (T, 3) positions; for rotary models without a layout.
            guidance: as `timestep`, for models with `guidance_embeds`.
            joint_attention_kwargs: {"scale": LoRA scale}; for inference (see `set_adapters` for training).
            encoder_attention_mask: (B, T), true on real text tokens. `None`: all are.
            layout: the frames; `None`: one frame.
            cache: keys and values of frozen frames, written or read.
            text_timestep: (B,), or one per scene for a packed layout: noise level of the texts that are generated,
                their fraction of masks, in [0, 1000] after `timestep_scale`. `None`: they have the level of the images
                (Dual Diffusion). Without a layout the text is one that is generated if this is given, else a prompt.

        Returns:
            `sample`: (B, n, C) for the n tokens of the frames being generated, or (B, C, h, w) for a latent grid.
            `text_logits`: see `MMDiTOutput`. Without `return_dict` a tuple of those there are.

        Raises:
            ValueError: a shape, length or option that does not fit, with what was expected.
        """
        check_inputs(
            self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
            joint_attention_kwargs, encoder_attention_mask, layout, cache,
        )  # fmt: skip
        check_text_level(self, text_timestep, layout, encoder_hidden_states)
        has_image = hidden_states is not None
        if hidden_states is None:
            hidden_states = self.null_image_embd.expand(len(encoder_hidden_states), -1, -1)
            grid, lora = None, None
        else:
            grid = (hidden_states.shape[2], hidden_states.shape[3]) if hidden_states.ndim == 4 else None
            lora = None if layout is None else lora_plan(layout)
            hidden_states = self._embed(hidden_states, layout, lora)  # (B, N, D)
        inputs = (timestep, pooled_projections) if guidance is None else (timestep, guidance, pooled_projections)
        condition = partial(self._condition, layout, text_timestep, hidden_states.dtype)
        temb, context_temb = compat.called(self.time_text_embed, condition, *inputs)
        encoder_hidden_states = linear(self.context_embedder, encoder_hidden_states, lora and lora.text, shared=True)
        text_length = encoder_hidden_states.shape[1]
        rope = self._rope(layout, img_ids, txt_ids, text_length, text_timestep is not None, hidden_states)
        plan, last = self._plans(layout, hidden_states, text_length, encoder_attention_mask, cache)

        for blocks in ("transformer_blocks", "single_transformer_blocks"):
            for i, block in enumerate(getattr(self, blocks)):
                layer = None if cache is None else cache.layer(f"{blocks}.{i}")
                if blocks == "single_transformer_blocks" and i == self.config.num_single_layers - 1:
                    plan = last
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    block = compat.checkpointed(self, block)
                hidden_states, encoder_hidden_states = block(
                    hidden_states, encoder_hidden_states, temb, context_temb, rope, plan, layer
                )
        sample = logits = None
        if has_image and (layout is None or layout.predicted):
            sample = self._read_out(hidden_states, temb, layout, lora, grid)
        if self.config.text_vocab_size is not None and (layout is None or layout.predicted_texts):
            normed = self.text_norm_out(encoder_hidden_states)
            logits = linear(self.text_proj_out, normed, lora and lora.text, shared=True)  # (B, T, V)
            logits = logits if layout is None else take_rows(logits, layout.predicted_texts)
        output = MMDiTOutput(sample, logits)
        return output if return_dict else output.to_tuple()

    def _embed(self, hidden_states: torch.Tensor, layout: FrameLayout | None, lora: LoraPlan | None) -> torch.Tensor:
        """Tokens or a latent grid to (B, N, D), positions added where they are not rotary."""
        if self.config.pos_embed_type == "rope":
            return linear(self.x_embedder, hidden_states, lora and lora.image)
        if hidden_states.ndim == 4:
            return self.pos_embed(hidden_states).contiguous()
        assert layout is not None  # check_inputs
        tokens = linear(self.pos_embed.proj, hidden_states, lora.image if lora else main_rows(hidden_states.shape[1]))
        return tokens + table_positions(self.pos_embed, layout).to(tokens)

    def _condition(
        self,
        layout: FrameLayout | None,
        text_timestep: torch.Tensor | None,
        dtype: torch.dtype,
        timestep: torch.Tensor,
        *inputs: Any,
    ) -> _Pair:
        """Conditioning vectors of the frames (B, F, D) and of the texts (B, X, D): `time_text_embed` of frames. One
        tensor twice where they are equal.

        Args:
            dtype: of the image tokens, in which a model without pooled text embeds timesteps.
            inputs: the pooled text; before it the guidance, for models with `guidance_embeds`.
        """
        *guidances, pooled = inputs
        embed: Any = self.time_text_embed
        scale = self.config.timestep_scale
        dtype = dtype if pooled is None else pooled.dtype
        if layout is None:
            layout = _ONE_FRAME if text_timestep is None else _ONE_FRAME_AND_TEXT

        def vectors(
            embedder: nn.Module,
            values: torch.Tensor,
            own_values: list,
            scale: float,
            of_text: torch.Tensor | None = None,
        ) -> _Pair:
            frames, texts = layout.segment_levels(values, own_values, of_text)  # (B, F), (B, X)

            def embedding(levels: torch.Tensor) -> torch.Tensor:
                waves = embed.time_proj((levels * scale).flatten())
                return embedder(waves.to(dtype)).unflatten(0, levels.shape)

            of_frames = embedding(frames)
            return of_frames, of_frames if texts is frames else embedding(texts)

        own_values = [None if s.sigma is None else s.sigma * 1000 / scale for s in layout.segments]
        pair = vectors(embed.timestep_embedder, timestep, own_values, scale, text_timestep)
        if guidances:
            guidance = [s.guidance for s in layout.segments]
            pair = _sums(pair, vectors(embed.guidance_embedder, guidances[0], guidance, 1000.0))
        if pooled is None:
            return pair
        pooled_emb = embed.text_embedder(pooled)  # (B or X, D)
        if layout.is_packed:
            frames, texts = layout.scenes_of_live(pooled.device), layout.scenes_of_texts(pooled.device)
            return _sums(pair, (pooled_emb[frames], pooled_emb[texts]))
        return _sums(pair, (pooled_emb[:, None],) * 2)

    def _rope(
        self,
        layout: FrameLayout | None,
        img_ids: torch.Tensor | None,
        txt_ids: torch.Tensor | None,
        text_length: int,
        text_is_generated: bool,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor | None:
        """Rotary table of the joint sequence; `None` for a model with sin-cos positions."""
        if self.config.pos_embed_type != "rope":
            return None
        axes, theta, device = self.config.axes_dims_rope, self.config.rope_theta, hidden_states.device
        along = self.config.text_rope_axis

        def table(image: torch.Tensor) -> torch.Tensor:
            text = txt_ids
            if text is None:
                text = torch.zeros(text_length, len(axes), device=device)
                if along is not None and layout is not None:
                    text[:, along] = layout.text_positions(device)
                elif along is not None and text_is_generated:
                    text[:, along] = torch.arange(text_length, device=device)
            return rope_table(torch.cat([text, image]).float(), axes, theta)

        if layout is None:  # without an image, tokens that stand for it lie at 0
            return table(torch.zeros(hidden_states.shape[1], len(axes), device=device) if img_ids is None else img_ids)
        if txt_ids is not None:
            return table(layout.ids(device))
        return layout.kept(("rope", tuple(axes), theta, along, device), lambda: table(layout.ids(device)))

    def _plans(
        self,
        layout: FrameLayout | None,
        hidden_states: torch.Tensor,
        text_length: int,
        encoder_attention_mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> tuple[BlockPlan, BlockPlan]:
        """What the blocks need to know, and the last single-stream one."""
        key_mask = None
        if encoder_attention_mask is not None:
            image = encoder_attention_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            key_mask = torch.cat([encoder_attention_mask.bool(), image], dim=1)  # (B, S)
        if layout is None:
            return (BlockPlan((text_length,), (hidden_states.shape[1],), key_mask=key_mask),) * 2
        writes = cache is not None and cache.mode == "write"
        plan, last = block_plans(layout, hidden_states.device, writes=writes)
        common: dict[str, Any] = {} if key_mask is None else {"key_mask": key_mask}
        if layout.is_packed and hidden_states.is_cuda:  # grouped_attention decides which kernel takes them
            common["packed"], common["image_packed"] = layout.kept(
                ("packed", hidden_states.device), lambda: self._packed(layout, hidden_states.device)
            )
        return (plan._replace(**common), last._replace(**common)) if common else (plan, last)

    def _packed(self, layout: FrameLayout, device: torch.device) -> tuple[PackedRows, PackedRows | None]:
        """The joint sequence of a packed batch, and its image stream, each as one attention call."""
        joint = PackedRows.build(layout.groups, layout.text_length + layout.image_length, device)
        if not self.config.dual_attention_layers:
            return joint, None
        return joint, PackedRows.build(layout.image_groups, layout.image_length, device)

    def _read_out(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        layout: FrameLayout | None,
        lora: LoraPlan | None,
        grid: tuple[int, int] | None,
    ) -> torch.Tensor:
        """Prediction of the frames being generated: tokens, or a latent grid if one came in."""
        lengths: tuple[int, ...] = (hidden_states.shape[1],)
        if layout is not None:
            lengths = layout.predicted_lengths
            if len(lengths) < len(layout.live):
                hidden_states = take_rows(hidden_states, layout.predicted)
                temb = take_rows(temb, layout.predicted_frames)
        how = Modulation(lengths, lora and lora.predicted_vectors, shared=True)
        normed = adaptive_norm(self.norm_out, hidden_states, temb, how)
        out = linear(self.proj_out, normed, lora and lora.predicted, shared=True)
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

    def to_json_string(self) -> str:
        """The configuration; without a text head, as versions wrote it that have none and refuse unknown keys."""
        config = json.loads(super().to_json_string())
        if self.config.text_vocab_size is None:
            config = {key: value for key, value in config.items() if key not in _HEAD}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def token_channels(self) -> int:
        """Channels of a token as `forward` takes it."""
        return self.config.in_channels * (1 if self.config.pos_embed_type == "rope" else self.config.patch_size**2)

    @property
    def max_grid(self) -> float:
        """Rows or columns of tokens a frame may have."""
        return math.inf if self.config.pos_embed_type == "rope" else self.config.pos_embed_max_size


def _sums(a: _Pair, b: _Pair) -> _Pair:
    """Sums of two pairs; one tensor twice stays one."""
    of_frames = a[0] + b[0]
    return of_frames, of_frames if a[0] is a[1] and b[0] is b[1] else a[1] + b[1]
