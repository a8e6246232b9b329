"""Published diffusion language models as stock transformers models.

LLaDA, LLaDA-1.5, iLLaDA and the language parts of MMaDA and LLaDA-V are Llama without the causal mask; Dream is Qwen2
without it. `load_masked_lm` reads their folders without remote code: it writes the configuration anew (transformers'
masks honour `is_causal: false`) and renames weights while transformers loads them. What it returns is an ordinary
`LlamaForCausalLM` or `Qwen2ForCausalLM`: `save_pretrained` writes a folder that plain transformers loads.

LLaDA: arXiv 2502.09992; Dream: arXiv 2508.15487; MMaDA: arXiv 2505.15809; LLaDA-V: arXiv 2505.16933.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import LlamaForCausalLM, PreTrainedModel

from imgdit import compat
from imgdit.io.text import read_text
from imgdit.naming import nearest

LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    # Two different layers are called ff_out: the head, and the end of each block's feed-forward part.
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    **{
        rf"^model\.transformer\.blocks\.(\d+)\.{name}\.": rf"model.layers.\1.self_attn.{name}."
        for name in ("q_proj", "k_proj", "v_proj")
    },
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",  # SiLU acts on this one
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
"""LLaDA's names -> Llama's."""

LLADA_MASK = 126336
"""`<|mdm_mask|>` of LLaDA's tokenizer, which LLaDA-V's configuration does not repeat."""

_FIXED = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "block_group_size": (1,),
}
"""Settings of LLaDA's configuration that change the computation, and their values in every published checkpoint."""
_NEEDED = ("n_layers", "n_heads", "max_sequence_length", "rms_norm_eps", "rope_theta")
"""Of LLaDA's configuration, beside `d_model`."""
_SPECIAL = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
_OWN_CLASSES = {
    "llada_moe": "load it by AutoModelForCausalLM with its remote code, and give it to MaskedTextPipeline",
    "llada2_moe": "its attention is causal over blocks of 32 tokens from the first on, which MaskedTextPipeline does "
    "not do: load it by AutoModelForCausalLM with its remote code, and give it to diffusers.LLaDA2Pipeline",
}
"""Mixtures of experts that are read by a class of their own where transformers has it, and what to do where not."""


def load_masked_lm(
    source: str | Path,
    *,
    subfolder: str | None = None,
    mask_token_id: int | None = None,
    revision: str | None = None,
    token: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """A published diffusion language model as a bidirectional `LlamaForCausalLM` or `Qwen2ForCausalLM`.

    Args:
        source: folder or Hub repository of LLaDA, iLLaDA, Dream, LLaDA-V's language part, MMaDA's backbone, or of what
            `save_pretrained` of this function's result wrote. Pickled weights are refused.
        subfolder: of `source`.
        mask_token_id: the mask token, where `config.json` names none (LLaDA-V) or another is meant.
        revision, token: of the Hub.
        options: of `from_pretrained`: dtype, device_map, quantization_config, attn_implementation and others.

    Returns:
        The model in evaluation mode. `config.mask_token_id` is the mask token, `config.is_causal` is false, and
        `config.logit_shift` says whether a place is predicted by the output of the place before it (Dream).

    Raises:
        ValueError: no such folder, a model of another kind, or settings that Llama does not have.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

    folder = model_folder(source, subfolder, revision, token)
    values = _read_config(folder)
    if mask_token_id is not None:
        values["mask_token_id"] = mask_token_id
    if values.get("model_type") in _OWN_CLASSES and values["model_type"] in CONFIG_MAPPING:
        own = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
        if mask_token_id is not None:
            own.config.mask_token_id = mask_token_id
        return own.eval()
    config, renames = masked_lm_config(values, str(folder))
    owner: Any = Qwen2ForCausalLM if config.model_type == "qwen2" else LlamaForCausalLM
    if values.get("model_type") == "llava_llada":  # the tower and the projector are read by those who need them
        owner = _without(owner, r"^model\.(vision_tower|mm_projector|image_newline)")
    model, report = owner.from_pretrained(
        folder, config=config, key_mapping=renames or None, use_safetensors=True, output_loading_info=True, **options
    )
    lacking = sorted([*report["missing_keys"], *(str(entry) for entry in report["mismatched_keys"])])
    if lacking:  # transformers draws these at random and goes on
        raise ValueError(
            f"{folder} lacks {len(lacking)} of the weights that its config.json describes, first {lacking[0]}; is it "
            "the whole folder of one model?"
        )
    compat.forget_renames(model)
    return model.eval()


def masked_lm_config(values: Mapping[str, Any], source: str) -> tuple[Any, dict[str, str]]:
    """transformers' configuration of a published model, and how its weights are renamed.

    Args:
        values: its `config.json`.
        source: for messages.

    Raises:
        ValueError: a model of another kind, or without a mask token.
    """
    from transformers import LlamaConfig, Qwen2Config

    kind = str(values.get("model_type", ""))
    if kind in _OWN_CLASSES:
        raise ValueError(
            f"{source} is a {kind} model, a mixture of experts for which this transformers has no class; "
            f"{_OWN_CLASSES[kind]}"
        )
    special = {name: values[name] for name in _SPECIAL if values.get(name) is not None}
    if special.get("pad_token_id") == special.get("eos_token_id"):
        # transformers gives the padding token's embedding no gradient, but end tokens that pad an answer are learnt.
        special.pop("pad_token_id", None)
    size = values.get("embedding_size") or values.get("vocab_size") or 0
    if "mask_token_id" not in special and kind == "llava_llada" and size > LLADA_MASK:
        special["mask_token_id"] = LLADA_MASK
    if "mask_token_id" not in special:
        raise ValueError(
            f"{source}: config.json names no mask_token_id (model_type {kind!r}). Give mask_token_id=…, or use a "
            "masked diffusion model"
        )
    if not 0 <= special["mask_token_id"] < size:
        raise ValueError(f"{source}: mask_token_id is {special['mask_token_id']}, the vocabulary has {size} entries")
    if "d_model" in values:
        return _llada_config(values, special, source), dict(LLADA_KEYS)
    if "num_hidden_layers" not in values:
        raise ValueError(
            f"{source}: config.json has neither d_model (LLaDA) nor num_hidden_layers (Llama, Dream); got model_type "
            f"{nearest(kind, ('llada', 'Dream', 'llama', 'qwen2', 'llava_llada', 'mmada'))}"
        )
    qwen = kind in ("Dream", "qwen2")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "tie_word_embeddings", "attention_dropout", "attention_bias", "mlp_bias", "head_dim",
    )  # fmt: skip
    taken = {name: values[name] for name in names if values.get(name) is not None}
    rope = values.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": float(values.get("rope_theta", 10000.0)),
    }
    if values.get("rope_scaling") and not values.get("rope_parameters"):
        raise ValueError(f"{source}: scaled rotations are not known for these models, got {values['rope_scaling']}")
    make: Any = Qwen2Config if qwen else LlamaConfig
    shift = bool(values.get("logit_shift", kind == "Dream"))
    return make(**taken, rope_parameters=rope, use_cache=False, is_causal=False, logit_shift=shift, **special), {}


def _llada_config(values: Mapping[str, Any], special: Mapping[str, int], source: str) -> Any:
    """The Llama (with q/k/v biases: Qwen2) configuration of LLaDA's fields."""
    from transformers import LlamaConfig, Qwen2Config

    lacking = [name for name in _NEEDED if values.get(name) is None]
    if lacking:
        raise ValueError(f"{source}: config.json lacks {', '.join(lacking)}, which LLaDA's has; is it damaged?")
    for name, expected in _FIXED.items():
        if name in values and values[name] not in expected:
            raise ValueError(
                f"{source}: {name} is {values[name]!r}; the published LLaDA checkpoints have {expected[0]!r}, and a "
                "Llama model computes nothing else"
            )
    heads = values["n_heads"]
    key_heads = 1 if values.get("multi_query_attention") else values.get("n_kv_heads") or heads
    make: Any = Qwen2Config if values.get("include_qkv_bias") else LlamaConfig
    return make(
        vocab_size=values.get("embedding_size") or values["vocab_size"],
        hidden_size=values["d_model"],
        intermediate_size=values.get("mlp_hidden_size") or values["mlp_ratio"] * values["d_model"],
        num_hidden_layers=values["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=values["max_sequence_length"],
        rms_norm_eps=values["rms_norm_eps"],
        tie_word_embeddings=bool(values.get("weight_tying")),
        rope_parameters={"rope_type": "default", "rope_theta": float(values["rope_theta"])},
        use_cache=False,
        is_causal=False,
        **special,
    )


def _without(owner: Any, pattern: str) -> Any:
    """The class with weights that a wider model keeps beside its language part left out."""

    class LanguagePart(owner):
        _keys_to_ignore_on_load_unexpected = (pattern,)

    LanguagePart.__name__ = owner.__name__  # `save_pretrained` writes it as the architecture
    return LanguagePart


def model_folder(source: str | Path, subfolder: str | None, revision: str | None, token: Any) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            found = snapshot_download(
                str(source), revision=revision, token=token, allow_patterns=["*.json", "*.safetensors"]
            )
        except Exception as error:
            raise ValueError(
                f"there is no folder {str(source)!r} here, and the Hub gives none of that name: {error}"
            ) from error
        folder = Path(found)
    folder = folder / (subfolder or "")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected the folder of a language model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no .safetensors file; pickled weights are not read")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(folder / "config.json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged, expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'} must hold an object, got {type(values).__name__}")
    return values


def new_masked_lm(
    vocab_size: int,
    mask_token_id: int,
    eos_token_id: int,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    max_length: int = 128,
) -> LlamaForCausalLM:
    """A bidirectional Llama with new weights, to be trained as a masked language model.

    Args:
        max_length: positions, in tokens.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads, max_position_embeddings=max_length,
        use_cache=False, is_causal=False,
        mask_token_id=mask_token_id, eos_token_id=eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def predicting_places(model: Any, attention_mask: torch.Tensor) -> torch.Tensor:
    """Places (B, L) of the outputs that predict the tokens of all places.

    Dream and Fast-dLLM v2 (`config.logit_shift`) predict a token at the real one before it, and the first at its own.

    Args:
        attention_mask: (B, L), 1 on real tokens.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand(attention_mask.shape)
    if not getattr(compat.unwrapped(model).config, "logit_shift", False):
        return places
    latest = places.masked_fill(~attention_mask.bool(), -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    return torch.where(before < 0, places, before)


def masked_logits(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (B, L, V) for the tokens at their own places.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 1 on real tokens; positions count these only, so that padding changes nothing.
    """
    options = {} if attention_mask is None else {"position_ids": real_positions(attention_mask)}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
    if not getattr(compat.unwrapped(model).config, "logit_shift", False):
        return logits
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return rows_of(logits, predicting_places(model, real))


def rows_of(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The outputs (B, n, V) at places (B, n) of all (B, L, V)."""
    return logits[torch.arange(len(logits), device=logits.device)[:, None], places]


def real_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) that count real tokens only, from 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
