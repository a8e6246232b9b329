"""Sparse autoencoders on disk.

    <folder>/cfg.json            sizes and rules
    <folder>/sae.safetensors     encoder.weight (L, d), encoder.bias (L), W_dec (L, d), b_dec (d)

That is SAeUron's and sparsify's format, which is ours too. SAELens's folders (`cfg.json`, `sae_weights.safetensors`)
and sdxl-unbox's (`config.json`, decoder transposed) are read as well, see `imgdit.sae.published`. What is published as
pickles, which can run code, is converted once by `imgdit.sae.convert`.
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
from imgdit.sae.published import from_saelens, from_unbox

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SAELENS_WEIGHTS = "sae_weights.safetensors"
UNBOX_CONFIG, _UNBOX_WEIGHTS = "config.json", "state_dict.safetensors"
_PICKLES = ("*.pt", "*.pth", "*.pkl", "*.bin", "*.ckpt")


def local_folder(
    path_or_repo: str | Path, subfolder: str | None = None, *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder itself, or the Hub repository's local copy.

    Args:
        revision: branch, tag or commit of the repository; `None`: main.
        token: `None`: the one that `hf auth login` stored.
    """
    path = Path(path_or_repo)
    if not path.is_dir():
        if path.exists() or len(path.parts) != 2:
            raise ValueError(f"{path_or_repo} is no folder and no Hub repository (owner/name)")
        # Nothing but what is read; pickles are not even fetched.
        pattern = f"{subfolder}/*" if subfolder else "*"
        allowed = [pattern + ending for ending in (".json", ".safetensors")]
        options: dict[str, Any] = {"revision": revision, "token": token}
        path = Path(snapshot_download(str(path_or_repo), allow_patterns=allowed, **options))
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
    if (folder / SAELENS_WEIGHTS).is_file():
        config, tensors = from_saelens(read_object(folder / CONFIG), _read_weights(folder, SAELENS_WEIGHTS))
    elif (folder / CONFIG).is_file():
        config, tensors = SAEConfig.from_dict(read_object(folder / CONFIG)), _read_weights(folder, WEIGHTS)
    elif (folder / UNBOX_CONFIG).is_file():
        config, tensors = from_unbox(read_object(folder / UNBOX_CONFIG), _read_weights(folder, _UNBOX_WEIGHTS))
    else:
        inner = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG}"))
        hint = f"; its hookpoints are {', '.join(inner)}, name one as subfolder" if inner else ""
        raise ValueError(f"{folder} holds no sparse autoencoder: it has no {CONFIG}{hint}")
    if config.hookpoint is None and "." in folder.name:  # SAeUron and sparsify call the folder by its hookpoint
        config = dataclasses.replace(config, hookpoint=folder.name)
    # Before anything of these sizes is made.
    check_tensors(folder, tensors, {"encoder.weight": (config.num_latents, config.d_in)}, complete=False)
    return config, tensors, folder


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    if not (folder / name).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has {', '.join(pickles)} instead of {name}; pickles can run code and are not loaded. "
                "For DifFRACT's and sdxl-unbox's files, run `imgdit sae convert` once"
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
    moved = {"load_sae": "sae.model", "save_sae": "sae.model", "convert_sdxl_unbox": "sae.convert"}
    return renamed(__name__, name, {old: f"{module}.{old}" for old, module in moved.items()})
