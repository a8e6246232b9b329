"""Published layouts of sparse autoencoders and transcoders in our names.

Each function takes what a folder's configuration says and the tensors under their published names, and returns our
configuration and the tensors under ours (`imgdit.sae.files`). Encoders (d, L) and decoders (d, L) are transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from imgdit.sae.config import SAEConfig

_SAELENS = ("standard", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder")
_DIFFRACT_NAME = re.compile(r"(transcoder|sae)_(img|txt)_(\d+)")
_DIFFRACT_MODULE = {"img": "ff", "txt": "ff_context"}

Converted = tuple[SAEConfig, dict[str, torch.Tensor]]


def from_unbox(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Converted:
    """sdxl-unbox: the biases have other names, and a block's update is encoded.

    Args:
        values: of `config.json`.
        tensors: of `state_dict.pth`.

    Raises:
        ValueError: a size is missing.
    """
    for name in ("d_model", "n_dirs_local", "k"):
        if name not in values:
            raise ValueError(f"config.json is not sdxl-unbox's: it has no {name!r}")
    config = SAEConfig(values["d_model"], values["n_dirs_local"], values["k"], source="update")
    names = {
        "encoder.weight": "encoder.weight",
        "latent_bias": "encoder.bias",
        "decoder.weight": "W_dec",
        "pre_bias": "b_dec",
    }
    ours = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    if "W_dec" in ours:
        ours["W_dec"] = ours["W_dec"].t().contiguous()
    return config, ours


def from_difffract(name: str, tensors: Mapping[str, torch.Tensor]) -> Converted:
    """DifFRACT's time-conditioned transcoders and SAEs of the MLPs of FLUX and SD3 (arXiv 2606.15796). Both have the
    same weights; their file's name says which it is.

    Args:
        name: of the file without its ending, as in "transcoder_img_6" or "sae_txt_12".
        tensors: its `state_dict`.

    Raises:
        ValueError: another name, or tensors missing or of shapes that do not fit each other.
    """
    found = _DIFFRACT_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is none of DifFRACT's names; expected transcoder_ or sae_, img_ or txt_, a layer")
    kind, stream, layer = found.groups()
    layers = [f"time_mlp.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")]
    layers += [f"{part}.{what}" for part in ("mod_linear", "encoder", "decoder") for what in ("weight", "bias")]
    missing = sorted(set(layers) - tensors.keys())
    if missing:
        raise ValueError(f"{name} has no {missing[0]!r}; it holds {', '.join(sorted(tensors))}")
    latents, d_in = tensors["encoder.weight"].shape
    if tuple(tensors["decoder.weight"].shape) != (d_in, latents):
        raise ValueError(
            f"{name}: decoder.weight must be {(d_in, latents)}, the encoder's transposed, got "
            f"{tuple(tensors['decoder.weight'].shape)}"
        )
    config = SAEConfig(
        d_in,
        latents,
        k=latents,
        apply_b_dec_to_input=False,
        transcode=kind == "transcoder",
        time_embed_dim=tensors["time_mlp.0.weight"].shape[1],
        hookpoint=f"transformer.transformer_blocks.{layer}.{_DIFFRACT_MODULE[stream]}",
        threshold=0.0,
    )
    ours = {f"modulation.{name}": tensors[name] for name in layers if name.startswith(("time_mlp", "mod_linear"))}
    ours |= {name: tensors[name] for name in ("encoder.weight", "encoder.bias")}
    return config, ours | {"W_dec": tensors["decoder.weight"].t().contiguous(), "b_dec": tensors["decoder.bias"]}


def from_saelens(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Converted:
    """SAELens's inference folders: standard (ReLU), topk, jumprelu, and transcoders from a width to the same width.

    Its hook name becomes the hookpoint. Activations of an SAE that selects them by decoder norm are stored in units of
    that norm.

    Args:
        values: of `cfg.json`.
        tensors: of `sae_weights.safetensors`.

    Raises:
        ValueError: an architecture, normalisation or reshaping that is not read; sizes or tensors missing.
    """
    metadata = values.get("metadata") or {}
    architecture = values.get("architecture", "standard")
    if values.get("activation_fn_str") == "topk":  # SAELens 5 calls all of them standard
        architecture = "topk"
    _check_saelens(values, architecture)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if name not in tensors:
            raise ValueError(f"sae_weights.safetensors has no {name!r}; it holds {', '.join(sorted(tensors))}")
    transcode, jumps = "transcoder" in architecture, "jumprelu" in architecture
    latents, k = values["d_sae"], values["d_sae"]
    if architecture == "topk":
        k = values.get("k") or (values.get("activation_fn_kwargs") or {}).get("k")
        if type(k) is not int:
            raise ValueError(f"cfg.json: k must be a whole number for architecture 'topk', got {k!r}")
    config = SAEConfig(
        values["d_in"],
        latents,
        k,
        apply_b_dec_to_input=bool(values.get("apply_b_dec_to_input", True)),
        input_unit_norm=values.get("normalize_activations") == "layer_norm",
        transcode=transcode,
        skip_connection=architecture == "skip_transcoder",
        hookpoint=metadata.get("hook_name", values.get("hook_name")),
        threshold=None if jumps or architecture == "topk" else 0.0,
        feature_thresholds=jumps,
    )
    ours = {
        "encoder.weight": tensors["W_enc"].t().contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    ours |= {
        mine: tensors[name] for name, mine in (("threshold", "thresholds"), ("W_skip", "W_skip")) if name in tensors
    }
    if values.get("rescale_acts_by_decoder_norm"):
        norm = ours["W_dec"].norm(dim=1)
        ours["encoder.weight"] = ours["encoder.weight"] * norm[:, None]
        ours["encoder.bias"] = ours["encoder.bias"] * norm
        ours["W_dec"] = ours["W_dec"] / norm[:, None]
    return config, ours


def _check_saelens(values: Mapping[str, Any], architecture: str) -> None:
    """Refuse what `from_saelens` does not read."""
    if architecture not in _SAELENS:
        raise ValueError(
            f"SAELens's architecture {architecture!r} is not read, only {', '.join(_SAELENS)}; training checkpoints "
            "of batchtopk become 'jumprelu' when SAELens saves them for inference"
        )
    for name in ("d_in", "d_sae"):
        if type(values.get(name)) is not int:
            raise ValueError(f"cfg.json: {name} must be a whole number, got {values.get(name)!r}")
    if values.get("d_out", values["d_in"]) != values["d_in"]:
        raise ValueError(
            f"a transcoder is read where it leads from a width to the same one, got {values['d_in']} and "
            f"{values['d_out']}"
        )
    scaling = values.get("normalize_activations") or "none"
    if scaling not in ("none", "layer_norm"):
        raise ValueError(
            f"normalize_activations={scaling!r} is not read, only 'none' and 'layer_norm'; fold it into the weights "
            "with SAELens (fold_activation_norm_scaling_factor, fold_activation_whitening) and save again"
        )
    if (values.get("reshape_activations") or "none") != "none":
        raise ValueError(
            f"reshape_activations={values['reshape_activations']!r} is not read: heads are not apart at our hookpoints"
        )
