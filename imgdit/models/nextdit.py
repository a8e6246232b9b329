"""NextDiT: the backbone of OneDiffusion (arXiv 2411.16318), with the names of its published weights.

Frames attend to one another in full; the text is a memory that they ask through a second, gated attention. There is no
frame type and no mask: a frame is known by its position and its noise level.

B batch, F frames, N tokens of all frames, n tokens of the generated frames, L text tokens, J text features, D width,
E features of the condition vector, H heads, K key/value heads, d features of a head, C latent channels, p patch side.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale

from imgdit import compat
from imgdit.attention.cache import KVCache, LayerCache
from imgdit.attention.grouped import grouped_attention
from imgdit.attention.softcap import softcap_attention
from imgdit.compat import Adapters, SafetensorsOnly, StepCaches
from imgdit.frames import Frame
from imgdit.layout import FrameLayout, RowGroup, on_device, ranked, take_rows
from imgdit.models.functional import apply_rope, gated_add, multiply_add, pack, rope_table, unpack
from imgdit.models.nextdit_validation import check_config, check_tokens, read_config
from imgdit.models.validation import check_cache
from imgdit.mup import MupMixin

ROPE_THETA = 10000.0
SOFTCAP = 30.0
"""Cap of the image attention's logits in half precision, in which the reference trains and samples."""


class TextMemory:
    """The text of a run: trimmed to its longest real length once, its keys and values computed by the first forward
    pass and read by the later ones.

    It belongs to one text and one state of the model's weights.
    """

    def __init__(self, embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """
        Args:
            embeddings: (B, L, J).
            mask: (B, L), nonzero on real tokens. `None`: all are.
        """
        if mask is not None:
            if mask.shape != embeddings.shape[:2]:
                raise ValueError(
                    f"the text's mask must be {tuple(embeddings.shape[:2])}, got shape {tuple(mask.shape)}"
                )
            mask = mask.bool()
            if not torch.compiler.is_compiling():
                length = int(mask.any(dim=0).nonzero().max()) + 1
                embeddings, mask = embeddings[:, :length], mask[:, :length]
                mask = None if bool(mask.all()) else mask
        self.embeddings = embeddings
        self.mask = mask
        self._pairs: dict[int, list[torch.Tensor]] = {}

    def pairs(self, layer: int) -> list[torch.Tensor]:
        """Key and value (B, L, K, d) of a block, or an empty list that the block fills."""
        return self._pairs.setdefault(layer, [])


class NextDiTBlockPlan(NamedTuple):
    """What every block of one forward pass needs to know about the frames."""

    lengths: tuple[int, ...]
    """Tokens that share a condition vector, one after another."""
    groups: tuple[RowGroup, ...]
    """Who sees whom among the frames."""
    frozen: tuple[slice, ...]
    """Rows whose keys and values a cache keeps."""
    text_rows: tuple[slice, ...] | None
    """Rows that see the text; `None`: all."""
    text_mask: torch.Tensor | None
    """(B, L), False on padding; `None`: no padding."""
    softcap: float | None
    asking: tuple[slice, ...] | None = None
    """Rows that ask and go on; the others are only seen. Rows of `groups`' queries and of `text_rows` count among
    these. `None`: all rows."""
    vectors: tuple[slice, ...] = ()
    """Condition vectors of the asking rows."""
    asking_lengths: tuple[int, ...] = ()
    """Asking rows that share a condition vector, one after another."""


def nextdit_attention(
    attn: NextDiTAttention,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    image_rotary_emb: torch.Tensor,
    *,
    plan: NextDiTBlockPlan,
    cache: LayerCache | None = None,
    text_pairs: list[torch.Tensor] | None = None,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Attention of the frames over themselves and, by a softmax of its own, over the text.

    Args:
        hidden_states: (B, N, D).
        encoder_hidden_states: (B, L, J), normalised.
        image_rotary_emb: `rope_table` of the frames' tokens.
        cache: keys and values of frozen frames.
        text_pairs: the text's key and value; an empty list is filled. `None`: computed and forgotten.

    Returns:
        (B, N, D), or of the asking rows alone.
    """
    heads, repeats = attn.heads, attn.heads // attn.kv_heads
    asking, turns = hidden_states, image_rotary_emb
    if plan.asking is not None:
        asking, turns = take_rows(hidden_states, plan.asking), take_rows(image_rotary_emb[None], plan.asking)[0]
    query = apply_rope(attn.split(attn.q_norm(attn.wq(asking))), turns)  # (B, N, H, d)
    key = apply_rope(attn.split(attn.k_norm(attn.wk(hidden_states))), image_rotary_emb)  # (B, N, K, d)
    value = attn.split(attn.wv(hidden_states))

    cached = None if cache is None else cache.exchange("attn", key, value, plan.frozen)
    # Image keys serve neighbouring heads (0 0 1 1), the text's every K-th (0 1 0 1): so the weights were trained.
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    if cached is not None:
        cached = (cached[0].repeat_interleave(repeats, dim=2), cached[1].repeat_interleave(repeats, dim=2))
    if plan.softcap is None:
        image = grouped_attention(
            query, key, value, plan.groups, cached=cached, backend=backend, parallel_config=parallel_config
        )
    else:
        image = softcap_attention(query, key, value, plan.softcap, plan.groups, cached=cached)

    if not text_pairs:
        pair = [
            attn.split(attn.ky_norm(attn.wk_y(encoder_hidden_states))),
            attn.split(attn.wv_y(encoder_hidden_states)),
        ]
        if text_pairs is not None:
            text_pairs += pair
    else:
        pair = text_pairs
    text_key, text_value = (x.repeat(1, 1, repeats, 1) for x in pair)
    gate = torch.tanh(attn.gate).view(1, 1, heads, 1)

    def ask_text(rows: torch.Tensor) -> torch.Tensor:
        return grouped_attention(
            rows, text_key, text_value, key_mask=plan.text_mask, backend=backend, parallel_config=parallel_config
        )

    if plan.text_rows is None:
        image = torch.addcmul(image, ask_text(query), gate)
    else:
        image = image.clone()
        for rows in plan.text_rows:
            image[:, rows] += ask_text(query[:, rows]) * gate
    return attn.wo(image.flatten(2))


class NextDiTAttnProcessor:
    """Runs `nextdit_attention` on the backend that diffusers sets here."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: NextDiTAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        image_rotary_emb: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        return nextdit_attention(
            attn,
            hidden_states,
            encoder_hidden_states,
            image_rotary_emb,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
            **kwargs,
        )


class NextDiTAttention(nn.Module, AttentionModuleMixin):
    """Projections of a block's two attentions; the processor does the work."""

    _default_processor_cls = NextDiTAttnProcessor
    _available_processors = [NextDiTAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = False
    processor: Any

    def __init__(self, dim: int, heads: int, kv_heads: int, text_dim: int, *, qk_norm: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        kv_dim = kv_heads * self.head_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, kv_dim, bias=False) for _ in range(2))
        self.wk_y, self.wv_y = (nn.Linear(text_dim, kv_dim, bias=False) for _ in range(2))
        self.wo = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(heads))
        # Over all heads together.
        self.q_norm = nn.LayerNorm(dim, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(kv_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.ky_norm = nn.LayerNorm(kv_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.processor = NextDiTAttnProcessor()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ·, heads * d) to (B, ·, heads, d)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.processor(self, hidden_states, *args, **kwargs)


class NextDiTFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, dim: int, multiple_of: int, multiplier: float | None):
        super().__init__()
        inner = int((multiplier or 1.0) * int(2 * 4 * dim / 3))
        inner = multiple_of * -(-inner // multiple_of)
        self.w1, self.w3 = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, update = F.silu(self.w1(hidden_states)), self.w3(hidden_states)
        # The widest tensors of the model; gradients need both factors, a prediction does not.
        return self.w2(gate * update if torch.is_grad_enabled() else gate.mul_(update))


def _modulation(features: int, dim: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(features, vectors * dim))


def _scaled(x: torch.Tensor, scale: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """`x * (1 + scale)` with one vector per frame."""
    return multiply_add(x, x, scale, lengths)


class NextDiTBlock(nn.Module):
    """Attention, then SwiGLU; each normalised before and after, scaled and gated per frame."""

    def __init__(self, config: Any, features: int):
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        self.attention = NextDiTAttention(
            dim, config.num_heads, config.num_kv_heads or config.num_heads, config.caption_channels,
            qk_norm=config.qk_norm,
        )  # fmt: skip
        self.feed_forward = NextDiTFeedForward(dim, config.multiple_of, config.ffn_dim_multiplier)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            nn.RMSNorm(dim, eps=eps) for _ in range(4)
        )
        self.attention_y_norm = nn.RMSNorm(config.caption_channels, eps=eps)
        self.adaLN_modulation = _modulation(features, dim, 4)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: torch.Tensor,
        plan: NextDiTBlockPlan,
        cache: LayerCache | None = None,
        text_pairs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (B, N, D).
            encoder_hidden_states: (B, L, J).
            temb: (B, F, E) condition vector of each frame.
            image_rotary_emb, plan, cache, text_pairs: see `nextdit_attention`.

        Returns:
            (B, N, D), or the asking rows alone.
        """
        scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(temb).chunk(4, dim=-1)  # (B, F, D)
        text = encoder_hidden_states if text_pairs else self.attention_y_norm(encoder_hidden_states)
        normed = _scaled(self.attention_norm1(hidden_states), scale, plan.lengths)
        attended = self.attention(normed, text, image_rotary_emb, plan=plan, cache=cache, text_pairs=text_pairs)
        lengths = plan.lengths
        if plan.asking is not None:
            hidden_states, lengths = take_rows(hidden_states, plan.asking), plan.asking_lengths
            gate, scale_mlp, gate_mlp = (take_rows(x, plan.vectors) for x in (gate, scale_mlp, gate_mlp))
        hidden_states = gated_add(hidden_states, gate.tanh(), self.attention_norm2(attended), lengths)
        normed = _scaled(self.ffn_norm1(hidden_states), scale_mlp, lengths)
        update = self.ffn_norm2(self.feed_forward(normed))
        return gated_add(hidden_states, gate_mlp.tanh(), update, lengths)


class TimestepEmbedder(nn.Module):
    """Timesteps (…) in [0, 1000] to vectors (…, E)."""

    frequencies = 256

    def __init__(self, features: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """
        Args:
            dtype: in which the model computes. Its weights may be kept in another one (float8, packed bits).
        """
        waves = get_timestep_embedding(
            timestep.flatten(), self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(waves.to(dtype)).unflatten(0, timestep.shape)


class FinalLayer(nn.Module):
    """Tokens (B, n, D) and their frames' vectors (B, F, E) to patches (B, n, p * p * C)."""

    def __init__(self, dim: int, features: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = _modulation(features, dim, 1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
        return self.linear(_scaled(normed, self.adaLN_modulation(temb), lengths))


class NextDiT(SafetensorsOnly, ModelMixin, ConfigMixin, Adapters, StepCaches, AttentionMixin, MupMixin):
    """OneDiffusion's diffusion transformer over frames.

    Args:
        input_size: (frames, rows, columns) of the training latents in cells; images are of this size unless asked
            for otherwise.
        patch_size: (1, p, p) latent cells of a token.
        in_channels: of the latents.
        hidden_size: width; `hidden_size / num_heads` must be a multiple of 6.
        depth: blocks.
        num_heads: of the queries.
        num_kv_heads: of keys and values; `None`: `num_heads`.
        multiple_of: the feed-forward's inner width is rounded up to a multiple of this.
        ffn_dim_multiplier: of the inner width 8/3 * hidden_size.
        norm_eps: of the RMS norms.
        caption_channels: features of a text token.
        qk_norm: LayerNorm on queries and keys.
        norm_type, pred_sigma, guidance_embeds: "rms", `False` and `False` are what there is; the published
            configuration, or MMDiT's, has a choice.
        model_max_length: of the published configuration, where nothing reads it.
        rotary_max_length: rows and columns of tokens end here.
        rotary_max_length_t: frames end here; `None`: at `rotary_max_length`.
        attention_softcap: largest absolute logit of the attention among frames. "auto": 30 in half precision and none
            in float32, as the reference computes; a number: in every dtype; `None`: none.
        timestep_scale: what the `timestep` given to `forward` is multiplied by to lie in [0, 1000].
        mup_base_width: `hidden_size` at which learning rates were tuned (μP), with keys and values grouped in the same
            proportion; `None`: standard parametrisation.
        mup_output_mult: factor of the readout (μP).
        mup_adaln_init: "zero" (adaLN-zero) or "normal" (as the μP paper's DiT).
        mup_wd_exponent, mup_base_head_dim, mup_base_depth: see `imgdit.mup.MupSettings`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["NextDiTBlock"]
    _repeated_blocks = ["NextDiTBlock"]
    _skip_layerwise_casting_patterns = ["norm"]
    _skip_keys = ["cache", "layout"]
    _attention_pattern = r"layers\.\d+\.attention"

    @register_to_config
    def __init__(
        self,
        input_size: tuple[int, int, int] = (1, 96, 96),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 16,
        hidden_size: int = 3840,
        depth: int = 16,
        num_heads: int = 32,
        num_kv_heads: int | None = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        caption_channels: int = 2048,
        qk_norm: bool = True,
        norm_type: str = "rms",
        pred_sigma: bool = False,
        guidance_embeds: bool = False,
        model_max_length: int = 512,
        rotary_max_length: int = 128,
        rotary_max_length_t: int | None = None,
        attention_softcap: float | str | None = "auto",
        timestep_scale: float = 1.0,
        mup_base_width: int | None = None,
        mup_output_mult: float = 1.0,
        mup_adaln_init: str = "zero",
        mup_wd_exponent: float = 1.0,
        mup_base_head_dim: int | None = None,
        mup_base_depth: int | None = None,
    ):
        super().__init__()
        check_config(self.config)
        features = min(hidden_size, 1024)
        self.x_embedder = nn.Linear(self.token_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(features)
        self.y_embedder = nn.Sequential(
            nn.LayerNorm(caption_channels, eps=1e-6), nn.Linear(caption_channels, features)
        )
        blocks = [NextDiTBlock(self.config, features) for _ in range(depth)]
        self.layers = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, features, self.token_channels)
        # adaLN-zero: an untrained model adds nothing and predicts 0.
        for module in (*(block.adaLN_modulation for block in blocks), self.final_layer.linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        self.gradient_checkpointing = False

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | TextMemory,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        layout: FrameLayout | None = None,
        cache: KVCache | None = None,
        scale_factor: float = 1.0,
        scale_watershed: float = 1.0,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity noise - data of every frame that is generated.

        Args:
            hidden_states: (B, N, C*p*p) tokens of the layout's frames, features ordered as `pack` has them; or, with
                no layout, latents (B, F, C, h, w) or (B, C, h, w) of frames that are all being generated.
            encoder_hidden_states: (B, L, J) text, or a `TextMemory` where a run asks the same text in every step.
            pooled_projections: (B, J) mean of the text; `None`: computed.
            timestep: in [0, 1000] after `timestep_scale`: (B,) noise level of the generated frames; (B, F), one per
                frame, or (B, N), one per token, which override the layout's own levels; of the latents' shape
                (B, F, C, h, w), of which a token takes the mean.
            guidance: MMDiT's; refused, this model has no embedding for it.
            joint_attention_kwargs: {"scale": LoRA scale}; for inference.
            encoder_attention_mask: (B, L), nonzero on real text tokens. `None`: all are.
            layout: the frames.
            cache: keys and values of frozen frames, written or read.
            scale_factor: how many times larger than trained the frames are: at a largest timestep below
                `scale_watershed` positions are divided by it, otherwise the base of the rotations is multiplied.

        Returns:
            (B, n, C*p*p) for the n tokens of the frames being generated, or (B, F, C, h, w) for latents.

        Raises:
            ValueError: a shape, length or option that does not fit, with what was expected.
        """
        if timestep is None:
            raise ValueError("forward needs a timestep: the noise level, in [0, 1000]")
        if guidance is not None:
            raise ValueError("this model has no guidance embedding; leave guidance out and guide with two predictions")
        if joint_attention_kwargs:
            raise ValueError(f"joint_attention_kwargs knows only 'scale', got {sorted(joint_attention_kwargs)}")
        if isinstance(encoder_hidden_states, TextMemory):
            memory, keep = encoder_hidden_states, True
        else:
            memory, keep = TextMemory(encoder_hidden_states, encoder_attention_mask), False
        grid = None
        if layout is None:
            hidden_states, timestep, layout, grid = self._of_latents(hidden_states, timestep, memory)
        check_tokens(self, hidden_states, memory.embeddings, pooled_projections, timestep, layout)

        levels = _levels(layout, timestep.float() * self.config.timestep_scale)  # (B, F) or (B, N)
        temb = self.t_embedder(levels, hidden_states.dtype)  # (B, F or N, E)
        temb = temb + self._text_vector(memory, pooled_projections)[:, None]
        rotation = self._rotation(layout, levels, scale_factor, scale_watershed)
        check_cache(layout, cache, hidden_states.shape[0], rotation)
        rope = self._rope(layout, rotation, hidden_states.device)
        plan, last = self._plans(layout, levels, memory, hidden_states.dtype, cache)
        hidden_states = self.x_embedder(self._channels_last(hidden_states))  # (B, N, D)
        for i, module in enumerate(self.layers):
            block: Any = module
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                block = compat.checkpointed(self, module)
            layer = None if cache is None else cache.layer(f"layers.{i}")
            pairs = memory.pairs(i) if keep else None
            if i == len(self.layers) - 1:
                plan = last
            hidden_states = block(hidden_states, memory.embeddings, temb, rope, plan, layer, pairs)
        sample = self._read_out(hidden_states, temb, plan)
        if grid is not None:
            sample = unpack(sample.reshape(-1, layout.lengths[0], self.token_channels), self.patch, grid)
            sample = sample.unflatten(0, (-1, len(layout.frames)))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _of_latents(
        self, latents: torch.Tensor, timestep: torch.Tensor, memory: TextMemory
    ) -> tuple[torch.Tensor, torch.Tensor, FrameLayout, tuple[int, int]]:
        """Tokens, timesteps, layout and token grid of latents (B, F, C, h, w) or (B, C, h, w)."""
        if latents.ndim not in (4, 5) or latents.shape[-3] != self.config.in_channels:
            raise ValueError(
                "without a layout hidden_states are latents (batch, frames, channels, rows, columns), or (batch, "
                f"channels, rows, columns), of {self.config.in_channels} channels; got {tuple(latents.shape)}"
            )
        height, width = latents.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"latents of {height}x{width} cells do not divide into patches of side {self.patch}")
        grid = (height // self.patch, width // self.patch)

        def tokens(x: torch.Tensor) -> torch.Tensor:
            x = x if x.ndim == 5 else x[:, None]
            return pack(x.flatten(0, 1), self.patch).unflatten(0, x.shape[:2]).flatten(1, 2)

        frames = latents.shape[1] if latents.ndim == 5 else 1
        layout = FrameLayout.build([Frame(grid, index=i) for i in range(frames)], memory.embeddings.shape[1])
        if timestep.ndim >= 4:
            if timestep.shape != latents.shape:
                raise ValueError(f"timestep must be (batch,) or {tuple(latents.shape)}, got {tuple(timestep.shape)}")
            timestep = tokens(timestep.float()).mean(dim=-1)  # (B, N)
        return tokens(latents), timestep, layout, grid

    def _channels_last(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (C, row, column) of the library's tokens to (row, column, C), the order of the weights."""
        return tokens.unflatten(-1, (self.config.in_channels, -1)).transpose(-1, -2).flatten(-2)

    def _text_vector(self, memory: TextMemory, pooled: torch.Tensor | None) -> torch.Tensor:
        """(B, E): the mean of the text, embedded."""
        if pooled is None:
            text, mask = memory.embeddings, memory.mask
            if mask is None:
                pooled = text.mean(dim=1)
            else:
                weight = mask[..., None].to(text)
                pooled = (text * weight).sum(1) / (weight.sum(1) + 1e-8)
        return self.y_embedder(pooled)

    def rotation(
        self, layout: FrameLayout, timestep: torch.Tensor, scale_factor: float, scale_watershed: float
    ) -> tuple[float, float]:
        """What positions are divided by and the base of their rotations, in a call of `forward` with these arguments.

        Keys and values of frozen frames are those of one rotation: where a run's changes, its cache begins anew.
        """
        levels = _levels(layout, timestep.float() * self.config.timestep_scale)
        return self._rotation(layout, levels, scale_factor, scale_watershed)

    def _rotation(
        self, layout: FrameLayout, levels: torch.Tensor, factor: float, watershed: float
    ) -> tuple[float, float]:
        if factor == 1.0:
            return 1.0, ROPE_THETA
        if not 0.0 < watershed <= 1000.0:  # on one side of every level, which need not be read from the device
            return (factor, ROPE_THETA) if watershed > 1000.0 else (1.0, ROPE_THETA * factor)
        frozen = [layout.frames[i].sigma for i in range(len(layout.frames)) if i not in layout.live]
        largest = max([float(levels.max()), *(1000.0 * sigma for sigma in frozen if sigma is not None)])
        return (factor, ROPE_THETA) if largest < watershed else (1.0, ROPE_THETA * factor)

    def _rope(self, layout: FrameLayout, rotation: tuple[float, float], device: torch.device) -> torch.Tensor:
        """Rotations of the tokens, computed from their positions."""
        divisor, theta = rotation
        axes = (self.config.hidden_size // self.config.num_heads // 3,) * 3
        return layout.kept(
            ("rope of frames", axes, rotation, device), lambda: rope_table(layout.ids(device) / divisor, axes, theta)
        )

    def _plans(
        self,
        layout: FrameLayout,
        levels: torch.Tensor,
        memory: TextMemory,
        dtype: torch.dtype,
        cache: KVCache | None,
    ) -> tuple[NextDiTBlockPlan, NextDiTBlockPlan]:
        """What the blocks need to know, and the last one."""
        per_frame = levels.shape[1] == len(layout.live)
        writes = cache is not None and cache.mode == "write"
        cap = self.config.attention_softcap
        if cap == "auto":
            cap = None if dtype == torch.float32 else SOFTCAP
        plan, last = layout.kept(
            ("NextDiT's plans", levels.device, per_frame, writes),
            lambda: _frame_plans(layout, levels.device, per_frame=per_frame, writes=writes),
        )
        if memory.mask is None and cap is None:
            return plan, last
        return plan._replace(text_mask=memory.mask, softcap=cap), last._replace(text_mask=memory.mask, softcap=cap)

    def _read_out(self, hidden_states: torch.Tensor, temb: torch.Tensor, plan: NextDiTBlockPlan) -> torch.Tensor:
        """Prediction (B, n, C*p*p) of what the last block gave, in the order of the tokens that came in."""
        lengths = plan.lengths
        if plan.asking is not None:
            temb, lengths = take_rows(temb, plan.vectors), plan.asking_lengths
        patches = self.final_layer(hidden_states, temb, lengths)  # (B, n, p * p * C)
        return patches.unflatten(-1, (-1, self.config.in_channels)).transpose(-1, -2).flatten(-2)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read our configuration, or the published one with what training left in it."""
        return super().extract_init_dict(read_config(cls, config_dict), **kwargs)

    @property
    def patch(self) -> int:
        """Latent cells per side of a token."""
        return self.config.patch_size[1]

    @property
    def token_channels(self) -> int:
        """Channels of a token as `forward` takes it."""
        return self.config.in_channels * math.prod(self.config.patch_size)

    @property
    def max_grid(self) -> int:
        """Rows or columns of tokens a frame may have."""
        return self.config.rotary_max_length

    @property
    def max_frames(self) -> int:
        """Frames a scene may have."""
        return self.config.rotary_max_length_t or self.config.rotary_max_length


def _levels(layout: FrameLayout, timestep: torch.Tensor) -> torch.Tensor:
    """Timesteps (B, F) of the live frames, the layout's own levels filled in; or (B, N) as they are."""
    if timestep.ndim == 2 and timestep.shape[1] == layout.image_length != len(layout.live):
        return timestep
    return layout.expand(timestep, [None if f.sigma is None else f.sigma * 1000 for f in layout.frames])


def _frame_plans(
    layout: FrameLayout, device: torch.device, *, per_frame: bool, writes: bool
) -> tuple[NextDiTBlockPlan, NextDiTBlockPlan]:
    """Plans of the blocks without mask and cap, and of the last one."""
    asks = [0 in layout.sees[layout.num_texts + i] for i in layout.live]
    plan = NextDiTBlockPlan(
        lengths=layout.lengths if per_frame else (1,) * layout.image_length,
        groups=on_device(layout.image_groups, device),
        frozen=layout.frozen_rows(image_only=True) if writes else (),
        text_rows=None if all(asks) else tuple(rows for rows, ask in zip(layout.rows, asks, strict=True) if ask),
        text_mask=None,
        softcap=None,
    )
    return plan, _ending(plan, layout)


def _ending(plan: NextDiTBlockPlan, layout: FrameLayout) -> NextDiTBlockPlan:
    """The plan of the last block: nothing reads what becomes of the clean frames, so only the others ask."""
    predicted = [n for n, i in enumerate(layout.live) if layout.frames[i].predicted]
    if len(predicted) == len(layout.live):
        return plan
    places: list[tuple[slice, slice]] = []  # rows of the frames being generated, before and among themselves
    start = 0
    for n in predicted:
        places.append((layout.rows[n], slice(start, start + layout.lengths[n])))
        start += layout.lengths[n]

    def among(rows: tuple[slice, ...]) -> tuple[slice, ...]:
        return tuple(new for old, new in places if any(r.start <= old.start < r.stop for r in rows))

    groups = (group._replace(queries=among(group.queries)) for group in plan.groups)
    per_frame = len(plan.lengths) == len(layout.live)
    return plan._replace(
        groups=ranked(groups),
        text_rows=None if plan.text_rows is None else among(plan.text_rows),
        asking=layout.predicted,
        vectors=layout.predicted_frames if per_frame else layout.predicted,
        asking_lengths=layout.predicted_lengths if per_frame else (1,) * sum(layout.predicted_lengths),
    )


compat.register_block(NextDiTBlock, hidden_states=0, encoder_hidden_states=None)
