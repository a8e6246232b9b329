"""Safetensors of sparse autoencoders that are published as pickles. A pickle is read by torch's restricted loader,
which builds tensors and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from imgdit.io.safe_json import read_object
from imgdit.sae.config import SAEConfig
from imgdit.sae.files import UNBOX_CONFIG, check_tensors
from imgdit.sae.model import autoencoder_of
from imgdit.sae.published import from_difffract, from_unbox

UNBOX_PICKLE = "state_dict.pth"


def convert_published(source: str | Path, folder: str | Path) -> list[Path]:
    """Write safetensors of published pickles.

    Args:
        source: sdxl-unbox's folder of one SAE, or DifFRACT's folder of `transcoder_*.pt` or `sae_*.pt`, or one of its
            files.
        folder: to write. Of DifFRACT's, each dictionary gets a folder in it that is called by its hookpoint.

    Returns:
        The folders that were written.

    Raises:
        ValueError: files of neither, or damaged, or with other tensors.
    """
    source = Path(source)
    if source.is_dir() and (source / UNBOX_CONFIG).is_file():
        convert_sdxl_unbox(source, folder)
        return [Path(folder)]
    return convert_difffract(source, folder)


def convert_difffract(source: str | Path, folder: str | Path) -> list[Path]:
    """Write safetensors of DifFRACT's time-conditioned transcoders or SAEs; see `convert_published`."""
    source = Path(source)
    files = [source] if source.is_file() else sorted([*source.glob("transcoder_*.pt"), *source.glob("sae_*.pt")])
    if not files:
        raise ValueError(
            f"{source} holds nothing that is converted: neither sdxl-unbox's {UNBOX_CONFIG} nor DifFRACT's "
            "transcoder_*.pt or sae_*.pt"
        )
    written: dict[Path, Path] = {}
    for file in files:
        config, tensors = from_difffract(file.stem, _read_pickle(file))
        assert config.hookpoint is not None
        target = Path(folder) / config.hookpoint
        if target in written:
            raise ValueError(
                f"{file.name} and {written[target].name} are for the same module; convert one kind at a time"
            )
        _write(file, config, tensors, target)
        written[target] = file
    return list(written)


def convert_sdxl_unbox(source: str | Path, folder: str | Path) -> None:
    """Write our files of a published sdxl-unbox folder (`config.json`, `state_dict.pth`)."""
    source = Path(source)
    for name in (UNBOX_CONFIG, UNBOX_PICKLE):
        if not (source / name).is_file():
            raise ValueError(f"{source} is no sdxl-unbox folder: it has no {name}")
    state = _read_pickle(source / UNBOX_PICKLE)
    config, tensors = from_unbox(read_object(source / UNBOX_CONFIG), state.get("state_dict", state))
    _write(source, config, tensors, Path(folder))


def _read_pickle(file: Path) -> dict:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler, zip reader or storage does
        raise ValueError(f"{file} is damaged, or holds more than tensors: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def _write(source: Path, config: SAEConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    sae = autoencoder_of(config)
    check_tensors(source, tensors, {name: tuple(t.shape) for name, t in sae.state_dict().items()})
    sae.load_state_dict(tensors)
    sae.save_pretrained(folder)
