"""Block diffusion: text in blocks, each a masked diffusion that sees the blocks before it.

BD3-LM, arXiv 2503.09573; with one block for everything it is MDLM (arXiv 2406.07524) or SEDD (arXiv 2310.16834), with
blocks of one token and a causal mask an autoregressive model.

B rows, L tokens, S tokens that are computed, K cached tokens, V vocabulary, D width, C features of the noise level,
H heads, d features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from imgdit import compat
from imgdit.attention.grouped import grouped_attention
from imgdit.compat import SafetensorsOnly
from imgdit.io.checkpoints import read_tensors
from imgdit.io.safe_json import read_object
from imgdit.layout import RowGroup
from imgdit.models.functional import gated_add, modulate
from imgdit.models.masked_lm import model_folder
from imgdit.naming import check_choice

Parameterization = Literal["subs", "score", "autoregressive"]
NEVER = -1e6
"""Logarithm of a probability of 0, as published."""
FREQUENCIES = 256
"""Sines and cosines of a noise level."""
PERIOD = 10000.0
"""Longest period of these, and base of the rotations."""
MOST_CALLS = 64
"""Groups of rows up to which each is an attention call of its own; more of them cost more than one dense mask."""


@dataclass
class BD3LMOutput(BaseOutput):
    """What `BD3LM` returns."""

    logits: torch.Tensor
    """(B, S, V), for the tokens at their own places; "autoregressive": for the next ones."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """(B, S, D): the embeddings, then what each block returns."""


class BlockCache:
    """Keys and values of finished blocks, exact because they see no later block.

    Args:
        longest: tokens that are kept, the latest ones; `None`: all.
    """

    def __init__(self, longest: int | None = None):
        self.longest = longest
        self.seen = 0
        """Tokens that were ever stored, the position of the next one."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rotated keys and values (B, K, H, d) of a layer, `None` before anything is stored."""
        return self._layers.get(layer)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append a block's (B, S, H, d)."""
        before = self._layers.get(layer)
        joined = [
            new if old is None else torch.cat([old, new], 1) for old, new in zip(before or (None, None), (key, value))
        ]
        first = 0 if self.longest is None else max(0, joined[0].shape[1] - self.longest)
        self._layers[layer] = (joined[0][:, first:], joined[1][:, first:])


def block_groups(length: int, block_size: int, noisy: bool = False) -> tuple[RowGroup, ...]:
    """Who sees whom: a block of tokens sees itself and the blocks before it.

    Args:
        length: tokens L; the last block may be short.
        noisy: for the 2 L rows [noisy | clean] of training, where a noisy block sees itself and the clean blocks
            before it (arXiv 2503.09573, section 4.1).
    """
    blocks = [slice(first, min(first + block_size, length)) for first in range(0, length, block_size)]
    at = length if noisy else 0
    clean = [RowGroup((slice(at + b.start, at + b.stop),), (slice(at, at + b.stop),)) for b in blocks]
    if not noisy:
        return tuple(clean)
    before = [(slice(length, length + b.start),) if b.start else () for b in blocks]
    return (*(RowGroup((b,), (b, *seen)) for b, seen in zip(blocks, before)), *clean)


def dense_mask(groups: Sequence[RowGroup], rows: int) -> torch.Tensor:
    """Boolean (rows, rows): row looks at column."""
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for group in groups:
        for asking in group.queries:
            for seen in group.keys:
                mask[asking, seen] = True
    return mask


@remembered
def _visibility(length: int, block_size: int, noisy: bool) -> tuple[tuple[RowGroup, ...], torch.Tensor | None]:
    """The groups, and the mask in their place where they are many."""
    groups = block_groups(length, block_size, noisy)
    rows = 2 * length if noisy else length
    return groups, dense_mask(groups, rows)[None, None] if len(groups) > MOST_CALLS else None


class BD3LM(SafetensorsOnly, ModelMixin, ConfigMixin):
    """The transformer of block diffusion, with the settings of its published folders (`load_bd3lm` reads them).

    Args:
        vocab_size: tokens, the mask token among them.
        block_size: tokens of a block.
        model_length: tokens of a text while it was trained.
        hidden_dim, n_blocks, n_heads: width, layers, attention heads.
        cond_dim: features of the noise level.
        cross_attn: whether noisy blocks see clean ones before them; without it the model sees all L tokens at once.
        causal: whether a token sees only itself and those before it (autoregressive).
        adaln: whether layers are modulated by the noise level.
        time_conditioning: whether they are told it; else it is always 0.
        dropout: while training.
        parameterization: what logits mean: "subs", probabilities of clean tokens; "score", ratios of probabilities
            (SEDD); "autoregressive", of the next token.
        sampling_eps_min, sampling_eps_max: bounds of the masking rate while training.
        mask_token_id: `None`: the last one.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BD3LMBlock"]
    _repeated_blocks = ["BD3LMBlock"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 50258,
        block_size: int = 16,
        model_length: int = 1024,
        hidden_dim: int = 768,
        n_blocks: int = 12,
        n_heads: int = 12,
        cond_dim: int = 128,
        cross_attn: bool = True,
        causal: bool = False,
        adaln: bool = True,
        time_conditioning: bool = False,
        dropout: float = 0.1,
        parameterization: Parameterization = "subs",
        sampling_eps_min: float = 1e-3,
        sampling_eps_max: float = 1.0,
        mask_token_id: int | None = None,
    ):
        super().__init__()
        check_choice("parameterization", parameterization, get_args(Parameterization))
        if hidden_dim % n_heads or (hidden_dim // n_heads) % 2:
            raise ValueError(f"hidden_dim must be an even number per head, got {hidden_dim} and {n_heads} heads")
        if not 1 <= block_size <= model_length or model_length % block_size:
            raise ValueError(f"block_size must divide model_length, got {block_size} and {model_length}")
        if time_conditioning and not adaln:
            raise ValueError("time_conditioning=True tells layers the noise level by adaln, which is false")
        self.vocab_embed = nn.Embedding(vocab_size, hidden_dim)
        self.sigma_map = NoiseLevelEmbedding(cond_dim) if adaln else None
        self.blocks = nn.ModuleList(
            BD3LMBlock(hidden_dim, n_heads, cond_dim if adaln else None, dropout) for _ in range(n_blocks)
        )
        self.output_layer = BD3LMHead(hidden_dim, vocab_size, cond_dim if adaln else None)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starting weights.

        | weight | drawn from |
        |---|---|
        | embedding | normal, deviation 0.02 |
        | attention, feed-forward and noise level layers | uniform ± 1 / sqrt(inputs) |
        | norms | 1 |
        | modulations, head | 0: layers begin as the identity, predictions as uniform |
        """
        nn.init.normal_(self.vocab_embed.weight, std=0.02)
        zero = [self.output_layer.linear]
        zero += [part.adaLN_modulation for part in (*self.blocks, self.output_layer) if part.adaLN_modulation]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def mask_token_id(self) -> int:
        mask_id = self.config.mask_token_id
        return self.config.vocab_size - 1 if mask_id is None else mask_id

    def forward(
        self,
        input_ids: torch.Tensor,
        sigma: torch.Tensor | None = None,
        *,
        clean_ids: torch.Tensor | None = None,
        block_size: int | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: BlockCache | None = None,
        store: bool = False,
        output_hidden_states: bool = False,
    ) -> BD3LMOutput:
        """Logits of tokens.

        Args:
            input_ids: (B, S) tokens; behind a cache that holds some, those of one block.
            sigma: (B,) noise levels -ln(1 - masking rate), of models with `time_conditioning`; `None`: 0.
            clean_ids: (B, S) the same text without noise, whose earlier blocks each noisy block sees: all blocks are
                predicted in one pass.
            block_size: `None`: the model's.
            attention_mask: boolean (B, S), false on padding behind the text.
            cache: keys and values of the blocks before; all of them are seen.
            store: append this call's to the cache, which is right for finished blocks only.
            output_hidden_states: also return what each layer gives.
        """
        if cache is not None and (clean_ids is not None or attention_mask is not None):
            raise ValueError("with a cache, give input_ids of the current block only: no clean_ids, no attention_mask")
        length = input_ids.shape[1]
        groups, mask = self._who_sees_whom(
            length, block_size, clean_ids is not None, cache is not None and cache.seen > 0
        )
        first = 0 if cache is None else cache.seen
        places = torch.arange(first, first + length, device=input_ids.device)
        if clean_ids is not None:
            input_ids, places = torch.cat([input_ids, clean_ids], 1), places.repeat(2)
        if attention_mask is not None:
            attention_mask = attention_mask.bool().repeat(1, 2 if clean_ids is not None else 1)
        hidden = self.vocab_embed(input_ids)  # (B, S, D)
        rotation = rotations(places, self.config.hidden_dim // self.config.n_heads)
        level = self._level(sigma, input_ids, hidden.dtype)  # (B, C)
        states = [hidden]
        for layer, block in enumerate(self.blocks):
            view = _View(groups, mask, attention_mask, rotation, cache, store, layer)
            training = torch.is_grad_enabled() and self.gradient_checkpointing
            hidden = compat.checkpointed(self, block)(hidden, level, view) if training else block(hidden, level, view)
            states.append(hidden)
        if store:
            assert cache is not None, "only a cache can store"
            cache.seen += length
        hidden = hidden[:, :length]  # of the noisy half
        logits = self.output_layer(hidden, level)  # (B, S, V)
        return BD3LMOutput(logits, tuple(state[:, :length] for state in states) if output_hidden_states else None)

    def _who_sees_whom(
        self, length: int, block_size: int | None, noisy: bool, cached: bool
    ) -> tuple[tuple[RowGroup, ...] | None, torch.Tensor | None]:
        if cached:
            return None, None
        if self.config.causal:
            block_size = 1
        elif block_size is None:
            block_size = self.config.block_size if self.config.cross_attn or noisy else length
        return _visibility(length, block_size, noisy)

    def _level(self, sigma: torch.Tensor | None, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        if self.sigma_map is None:
            return None
        if sigma is None or not self.config.time_conditioning:
            sigma = torch.zeros(len(ids), device=ids.device)
        return F.silu(self.sigma_map(sigma, dtype))

    def log_probs(self, logits: torch.Tensor, input_ids: torch.Tensor, sigma: torch.Tensor | None = None) -> Any:
        """Logarithms (B, S, V) of what the model predicts: of probabilities, or of SEDD's scores.

        "subs": the mask token has probability 0, and tokens that are not masked keep theirs (arXiv 2406.07524, 3.2.3).

        Args:
            logits: (B, S, V) for `input_ids` (B, S).
            sigma: (B,) noise levels, of "score".
        """
        logits = logits.float()
        if self.config.parameterization == "score":
            assert sigma is not None, "scores are relative to a noise level"
            scale = torch.expm1(sigma.float()).log() + math.log(logits.shape[-1] - 1)
            return (logits - scale[:, None, None]).scatter(-1, input_ids[..., None], 0.0)
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
        if self.config.parameterization == "autoregressive":
            return logits.masked_fill(is_mask, NEVER).log_softmax(-1)
        found = (logits + NEVER * is_mask).log_softmax(-1)
        certain = torch.full_like(found, NEVER).scatter(-1, input_ids[..., None], 0.0)
        return torch.where((input_ids == self.mask_token_id)[..., None], found, certain)


@dataclass(frozen=True)
class _View:
    """What a layer's attention is told."""

    groups: tuple[RowGroup, ...] | None
    mask: torch.Tensor | None
    real: torch.Tensor | None
    rotation: tuple[torch.Tensor, torch.Tensor]
    cache: BlockCache | None
    store: bool
    layer: int

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key = rotate(query, self.rotation), rotate(key, self.rotation)  # (B, S, H, d)
        if self.cache is not None:
            before = self.cache.read(self.layer)
            if self.store:
                self.cache.store(self.layer, key, value)
            if before is not None:
                key, value = torch.cat([before[0], key], 1), torch.cat([before[1], value], 1)
        if self.mask is None:
            return grouped_attention(query, key, value, self.groups, key_mask=self.real)
        mask = self.mask.to(query.device)
        if self.real is not None:
            mask = mask & self.real[:, None, None, :]
        return compat.dispatch_attention(query, key, value, mask, None, None)


class BD3LMBlock(nn.Module):
    """Attention and feed-forward part of one layer."""

    def __init__(self, width: int, heads: int, cond_dim: int | None, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation: nn.Module | None = None if cond_dim is None else nn.Linear(cond_dim, 6 * width)

    def forward(self, hidden: torch.Tensor, level: torch.Tensor | None, view: _View) -> torch.Tensor:
        parts = (
            None if self.adaLN_modulation is None else self.adaLN_modulation(level)[:, None].chunk(6, -1)
        )  # (B, 1, D) each
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts or (None,) * 6  # (B, 1, D)
        query, key, value = self.attn_qkv(_modulated(self.norm1(hidden), shift, scale)).chunk(3, -1)  # (B, S, D)
        split = [part.unflatten(-1, (self.heads, -1)) for part in (query, key, value)]  # (B, S, H, d)
        hidden = self._add(hidden, gate, self.attn_out(view.attend(*split).flatten(-2)))
        return self._add(hidden, gate_mlp, self.mlp(_modulated(self.norm2(hidden), shift_mlp, scale_mlp)))

    def _add(self, hidden: torch.Tensor, gate: torch.Tensor | None, update: torch.Tensor) -> torch.Tensor:
        update = F.dropout(update, self.dropout, self.training)
        return hidden + update if gate is None else gated_add(hidden, gate, update, (hidden.shape[1],))


class BD3LMHead(nn.Module):
    """Last norm and logits."""

    def __init__(self, width: int, vocab_size: int, cond_dim: int | None):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, bias=False)
        self.linear = nn.Linear(width, vocab_size)
        self.adaLN_modulation: nn.Module | None = None if cond_dim is None else nn.Linear(cond_dim, 2 * width)

    def forward(self, hidden: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        parts = None if self.adaLN_modulation is None else self.adaLN_modulation(level)[:, None].chunk(2, -1)
        return self.linear(_modulated(self.norm_final(hidden), *(parts or (None, None))))


class NoiseLevelEmbedding(nn.Module):
    """Features (B, C) of noise levels (B,)."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = FREQUENCIES // 2
        frequency = torch.exp(-math.log(PERIOD) * torch.arange(half, device=sigma.device) / half)
        angle = sigma.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))


def _modulated(hidden: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    if shift is None or scale is None:
        return hidden
    return modulate(hidden, shift, scale, (hidden.shape[1],))


def rotations(places: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (S, 1, width / 2) of the positions (S,), for a head's two halves."""
    frequency = PERIOD ** -(torch.arange(0, width, 2, device=places.device).float() / width)
    angle = places.float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs that a head's (B, S, H, d) two halves make, by `rotations`."""
    cos, sin = rotation
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


_RENAMED = {"backbone.vocab_embed.embedding": "vocab_embed.weight"}
_BOUNDS = ("sampling_eps_min", "sampling_eps_max")


def load_bd3lm(
    source: str | Path,
    *,
    subfolder: str = "",
    parameterization: Parameterization | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: Any = None,
) -> BD3LM:
    """A published folder of BD3-LM, MDLM, SEDD or their autoregressive baseline, without remote code.

    Args:
        source: folder or Hub repository, or what `save_pretrained` of this function's result wrote.
        parameterization: `None`: read from the configuration: causal models are autoregressive, those that are told
            the noise level predict scores (SEDD), others "subs".
        dtype: of the weights; `None`: as stored.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: no such folder, a model of another kind, pickled weights, or weights that do not fit.
    """
    folder = model_folder(source, subfolder, revision, token)
    values = read_object(folder / "config.json")
    if values.get("_class_name") == "BD3LM":
        return BD3LM.from_pretrained(folder, torch_dtype=dtype)
    if values.get("model_type") != "bd3lm":
        raise ValueError(
            f"{folder} is a model of type {values.get('model_type')!r}, expected 'bd3lm'; LLaDA and Dream are read by "
            "imgdit.models.masked_lm.load_masked_lm"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file)
    # The bounds were chosen while training; the configuration keeps those of its beginning.
    values |= {name: float(tensors.pop(name)) for name in _BOUNDS if name in tensors}
    default = "score" if values.get("time_conditioning") else "subs"
    kind = parameterization or ("autoregressive" if values.get("causal") else default)
    known = {name: values[name] for name in compat.init_keys(BD3LM) if values.get(name) is not None}
    model = BD3LM(**known | {"parameterization": kind})
    tensors.pop("backbone.rotary_emb.inv_freq", None)  # computed
    renamed = {
        _RENAMED.get(name, name.removeprefix("backbone.")): tensor if dtype is None else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights and config.json do not fit: {error}") from error
    return model.eval()
