"""Sparse autoencoders on disk.

    <folder>/cfg.json            sizes and rules
    <folder>/sae.safetensors     encoder.weight (L, d), encoder.bias (L), W_dec (L, d), b_dec (d)

That is SAeUron's and sparsify's format, which is ours too. sdxl-unbox's folders (`config.json`, decoder transposed)
are read as well; as published they hold pickles, which can run code: `convert_sdxl_unbox` makes safetensors of them
once, with torch's loader that only admits tensors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from imgdit.io.safe_json import read_object
from imgdit.moved import renamed
from imgdit.sae.config import SAEConfig

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
UNBOX_CONFIG, _UNBOX_WEIGHTS, UNBOX_PICKLE = "config.json", "state_dict.safetensors", "state_dict.pth"
_PICKLES = ("*.pt", "*.pth", "*.pkl", "*.bin", "*.ckpt")


def local_folder(path_or_repo: str | Path, subfolder: str | None = None) -> Path:
    """The folder itself, or the Hub repository's local copy."""
    path = Path(path_or_repo)
    if not path.is_dir():
        if path.exists() or len(path.parts) != 2:
            raise ValueError(f"{path_or_repo} is no folder and no Hub repository (owner/name)")
        # Nothing but what is read; pickles are not even fetched.
        pattern = f"{subfolder}/*" if subfolder else "*"
        allowed = [pattern + ending for ending in (".json", ".safetensors")]
        path = Path(snapshot_download(str(path_or_repo), allow_patterns=allowed))
    path = path / subfolder if subfolder else path
    if not path.is_dir():
        known = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
        raise ValueError(f"{path.parent} has no folder {path.name!r}; it has {', '.join(known) or 'none'}")
    return path


def read_autoencoder(
    path_or_repo: str | Path, subfolder: str | None = None
) -> tuple[SAEConfig, dict[str, torch.Tensor], Path]:
    """The configuration and weights of a saved sparse autoencoder, and the folder they lie in.

    Args:
        path_or_repo: folder, or Hub repository.
        subfolder: of a hookpoint, as in "unet.up_blocks.1.attentions.1".

    Raises:
        ValueError: files missing, pickled, damaged or of other shapes than the configuration says.
    """
    folder = local_folder(path_or_repo, subfolder)
    if (folder / CONFIG).is_file():
        config, tensors = SAEConfig.from_dict(read_config_file(folder / CONFIG)), _read_weights(folder, WEIGHTS)
    elif (folder / UNBOX_CONFIG).is_file():
        config, tensors = from_unbox(read_config_file(folder / UNBOX_CONFIG), _read_weights(folder, _UNBOX_WEIGHTS))
    else:
        inner = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG}"))
        hint = f"; its hookpoints are {', '.join(inner)}, name one as subfolder" if inner else ""
        raise ValueError(f"{folder} holds no sparse autoencoder: it has no {CONFIG}{hint}")
    if config.hookpoint is None and "." in folder.name:  # SAeUron and sparsify call the folder by its hookpoint
        config = dataclasses.replace(config, hookpoint=folder.name)
    # Before anything of these sizes is made.
    check_tensors(folder, tensors, {"encoder.weight": (config.num_latents, config.d_in)}, complete=False)
    return config, tensors, folder


def from_unbox(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[SAEConfig, dict[str, torch.Tensor]]:
    """sdxl-unbox: the decoder is transposed, the biases have other names, a block's update is what is coded."""
    for name in ("d_model", "n_dirs_local", "k"):
        if name not in values:
            raise ValueError(f"{UNBOX_CONFIG} is not sdxl-unbox's: it has no {name!r}")
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


def read_config_file(path: Path) -> dict[str, Any]:
    return read_object(path)


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    if not (folder / name).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has {', '.join(pickles)} instead of {name}; pickles can run code and are not loaded. "
                "For sdxl-unbox's files, run `imgdit sae convert` once"
            )
        raise ValueError(f"{folder} has no {name}")
    try:
        return load_file(folder / name)
    except SafetensorError as error:
        raise ValueError(f"{folder / name} is damaged or no safetensors file: {error}") from error


def check_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], complete: bool = True
) -> None:
    """Refuse tensors that are not of the expected shapes, or not `complete` all that there are."""
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"the weights in {folder} have no {name!r}; they hold {', '.join(sorted(tensors))}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{folder}: {name} must be {shape} by its configuration, got {tuple(tensors[name].shape)}"
            )
    extra = sorted(tensors.keys() - expected.keys())
    if extra and complete:
        raise ValueError(f"the weights in {folder} hold {extra[0]!r}, which no configuration of ours has")


def __getattr__(name: str) -> Any:
    """Names of version 0.1; they go with version 0.3."""
    names = ("load_sae", "save_sae", "convert_sdxl_unbox")
    return renamed(__name__, name, {moved: f"sae.model.{moved}" for moved in names})
