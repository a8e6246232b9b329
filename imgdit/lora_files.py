"""LoRA files: read any dialect, say what is in them, put them on a transformer, write them with their settings.

Safetensors only: a pickle can run code when it is read.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .lora_dialects import LoraPair, LoraShapeError, from_diffusers, to_diffusers
from .naming import nearest
from .untrusted import parse_object

logger = logging.get_logger(__name__)

_INFO_KEY = "imgdit"


@dataclass(frozen=True)
class AdapterInfo:
    """How a condition adapter was trained: what whoever uses it has to repeat. Kept in the file's header."""

    base_model: str | None = None
    """Model whose weights it belongs to."""
    task: str | None = None
    """What its condition pictures are: "canny", "depth", "subject", …"""
    position: str | tuple[float, float] | None = None
    """As `Condition.position`."""
    scale: float | None = None
    """As `Condition.scale`."""
    mode: str | None = None
    """"joint": conditions see text and image; "independent": only themselves."""
    size: int | None = None
    """Side in pixels of the pictures it was trained on."""
    licence: str | None = None
    """Licence of the weights."""


class AdapterFile(NamedTuple):
    """A LoRA file under diffusers' names."""

    pairs: dict[str, LoraPair]
    """By module of the transformer."""
    dialect: str
    """"peft", "comfyui" or "kohya"."""
    unused: tuple[str, ...]
    """Keys that belong to no LoRA of the transformer."""
    info: AdapterInfo
    source: str

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that occur, the most frequent first."""
        counts = Counter(pair.down.shape[0] for pair in self.pairs.values())
        return tuple(rank for rank, _ in counts.most_common())


class LoadReport(NamedTuple):
    """What of a file went where."""

    adapter: str
    dialect: str
    matched: tuple[str, ...]
    """Modules of the model that have the adapter now."""
    unused: tuple[tuple[str, str], ...]
    """Keys of the file that nothing was done with, each with the nearest module of the model."""
    ranks: tuple[int, ...]
    info: AdapterInfo

    def __str__(self) -> str:
        lines = [f"{self.adapter}: {len(self.matched)} modules of rank {', '.join(map(str, self.ranks))}"]
        lines += [f"  not used: {key} (nearest module: {near})" for key, near in self.unused]
        return "\n".join(lines)


def read_adapter(source: str | Path, weight_name: str | None = None, **hub: Any) -> AdapterFile:
    """Read a LoRA file.

    Args:
        source: a file, a folder, or a repository on the Hub.
        weight_name: file in the folder or repository; may be left out where there is only one.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` of `hf_hub_download`.

    Raises:
        ValueError: not a safetensors file, damaged, without a LoRA, or of a kind other than plain LoRA.
    """
    path = _locate(source, weight_name, hub)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors, it is damaged or something else: {error}") from error
    odd = next((key for key in tensors if re.search(r"magnitude_vector|dora_scale|lokr_|hada_", key)), None)
    if odd is not None:
        raise ValueError(
            f"{path} holds {odd!r}: DoRA, LoKr and LoHa change whole weights and cannot act on one condition's "
            "tokens; expected a plain LoRA (lora_A and lora_B, or lora_down and lora_up)"
        )
    config = parse_object(header.get(LORA_ADAPTER_METADATA_KEY, "{}"), f"{path}: its PEFT configuration")
    try:
        renamed = to_diffusers(tensors, _scales(config, tensors, str(path)))
    except LoraShapeError as error:
        raise ValueError(f"{path} is damaged or no plain LoRA: {error}") from error
    if not renamed.pairs:
        first = next(iter(tensors), "nothing")
        raise ValueError(
            f"{path} holds no LoRA of a transformer: expected keys like 'transformer.<module>.lora_A.weight', "
            f"'diffusion_model.…' or 'lora_unet_…', got {first!r}"
        )
    return AdapterFile(renamed.pairs, renamed.dialect, renamed.unused, _read_info(header, str(path)), str(path))


def write_adapter(
    path: str | Path, pairs: Mapping[str, LoraPair], info: AdapterInfo | None = None, dialect: str = "peft"
) -> Path:
    """Write a LoRA file; "peft" is what diffusers, PEFT and ComfyUI read, "comfyui" uses FLUX's own names."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"LoRA files are written as .safetensors, got {path.name!r}")
    header = {"format": "pt"}
    if info is not None:
        header[_INFO_KEY] = json.dumps({key: value for key, value in asdict(info).items() if value is not None})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(from_diffusers(pairs, dialect), path, metadata=header)
    return path


def adapter_pairs(model: nn.Module, adapter: str) -> dict[str, LoraPair]:
    """An adapter's weights on a model, its scale multiplied in, ready for `write_adapter`."""
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "lora_A", {}):
            down, up = (layer[adapter].weight.detach() for layer in (module.lora_A, module.lora_B))
            scale = module.lora_alpha[adapter] / module.r[adapter]  # not `scaling`, which set_adapters() weights
            pairs[name] = LoraPair(down, up if scale == 1 else up * scale)
    if not pairs:
        raise ValueError(f"there is no adapter {nearest(adapter, loaded_adapters(model))}")
    return pairs


def loaded_adapters(model: nn.Module) -> list[str]:
    """Names of the LoRA adapters on a model."""
    return list(getattr(model, "peft_config", {}))


def attach_adapter(
    model: Any, file: AdapterFile, adapter: str, *, hotswap: bool = False, pipeline: Any = None
) -> LoadReport:
    """Put a LoRA on a transformer without activating it: the adapters that act in a plain run stay those they were.

    Args:
        model: a diffusers model with LoRA support.
        adapter: its name from now on.
        hotswap: take the place of the adapter of that name, in its tensors, so that nothing compiles again.
        pipeline: the model's pipeline, whose offloading has to be paused meanwhile.

    Raises:
        ValueError: the name is taken, or a module of the file has another shape in this model.
    """
    loaded = loaded_adapters(model)
    if not hotswap and adapter in loaded:
        raise ValueError(f"adapter {adapter!r} is loaded already; pass hotswap=True to replace it, or another name")
    if hotswap and adapter not in loaded_adapters(model):
        raise ValueError(
            f"hotswap=True replaces a loaded adapter; there is no {nearest(adapter, loaded_adapters(model))}"
        )
    shapes = _shapes(model)
    pairs = {}
    unused = list(file.unused)
    for name, pair in file.pairs.items():
        if name not in shapes:
            unused.append(name)
            continue
        theirs, ours = (pair.up.shape[0], math.prod(pair.down.shape[1:])), shapes[name]
        if theirs != ours:
            raise ValueError(
                f"{file.source} is for another base model: its {name} is {theirs[0]}x{theirs[1]} (out x in), this "
                f"model's is {ours[0]}x{ours[1]}"
            )
        pairs[name] = pair
    if not pairs:
        first = next(iter(file.pairs))
        raise ValueError(f"{file.source} is for another base model: this one has no module {nearest(first, shapes)}")

    before = active_adapters(model)
    model.load_lora_adapter(
        from_diffusers(pairs, "peft"),
        prefix="transformer",
        adapter_name=adapter,
        hotswap=hotswap,
        metadata=_peft_config(pairs),
        _pipeline=pipeline,
    )
    activate(model, before)
    near = tuple((key, _nearest_module(key, shapes)) for key in unused)
    return LoadReport(adapter, file.dialect, tuple(pairs), near, file.ranks, file.info)


def load_adapter(
    pipe: Any,
    source: str | Path,
    weight_name: str | None = None,
    adapter_name: str | None = None,
    *,
    hotswap: bool = False,
    **hub: Any,
) -> LoadReport:
    """`read_adapter`, then `attach_adapter` to a pipeline's transformer, by the file's name unless another is given;
    what of the file was not used is logged."""
    file = read_adapter(source, weight_name, **hub)
    name = adapter_name or Path(file.source).stem
    report = attach_adapter(pipe.transformer, file, name, hotswap=hotswap, pipeline=pipe)
    if report.unused:
        logger.warning(str(report))
    return report


def active_adapters(model: nn.Module) -> list[str]:
    """Adapters that act in a plain run of a model."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def activate(model: nn.Module, adapters: list[str]) -> None:
    """Make these adapters, and no others, act in a plain run."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapters)


def _locate(source: str | Path, weight_name: str | None, hub: Mapping[str, Any]) -> Path:
    """The file, downloaded where it is on the Hub."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        if weight_name is None and len(files) != 1:
            raise ValueError(f"{path} holds {files or 'no .safetensors file'}; name one by weight_name=")
        path = path / (weight_name or files[0])
    _refuse_pickle(path.name if path.is_file() or weight_name is None else weight_name)
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or str(source).count("/") != 1:
        raise ValueError(
            f"there is no file {str(path)!r}; expected a .safetensors file, its folder or owner/repository"
        )
    from huggingface_hub import hf_hub_download, list_repo_files

    if weight_name is None:
        names = [name for name in list_repo_files(str(source), revision=hub.get("revision"), token=hub.get("token"))]
        files = [name for name in names if name.endswith(".safetensors")]
        if len(files) != 1:
            raise ValueError(f"{source} holds {files or 'no .safetensors file'}; name one by weight_name=")
        weight_name = files[0]
    return Path(hf_hub_download(str(source), weight_name, **hub))


def _refuse_pickle(name: str) -> None:
    suffix = Path(name).suffix
    if suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"):
        raise ValueError(
            f"got {name!r}, expected a .safetensors file: pickled weights can run code when they are loaded. Convert "
            "the file first"
        )


def _scales(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, float]:
    """alpha / rank of each module by the PEFT configuration in a file's header; empty without one."""
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if "lora_alpha" not in config:
        return {}
    if config.get("use_dora"):
        raise ValueError(
            "a DoRA changes whole weights and cannot act on one condition's tokens; expected a plain LoRA"
        )
    patterns = _check_peft_config(config, source)
    scales = {}
    for key, tensor in tensors.items():
        if key.startswith("transformer.") and key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            matching = (p for p in patterns if re.match(rf"(.*\.)?({p.removeprefix('^')})$", name))
            alpha = patterns.get(next(matching, ""), config["lora_alpha"])
            rank = max(tensor.shape[0], 1) if tensor.ndim else 1
            scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


_PATTERN = re.compile(r"(?:[\w.^$|()-]|\\[.d]|\\d\+)*")
"""Module names and what PEFT's patterns have of regular expressions; nothing that takes exponential time to match."""


def _check_peft_config(config: Mapping[str, Any], source: str) -> dict[str, float]:
    """The alphas of a configuration by pattern."""
    patterns = config.get("alpha_pattern") or {}
    alphas = {"lora_alpha": config["lora_alpha"], **(patterns if isinstance(patterns, dict) else {"": patterns})}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            raise ValueError(
                f"{source}: its PEFT configuration has the alpha {alpha!r:.60} of {name!r:.60}; expected a number"
            )
        try:
            sound = _PATTERN.fullmatch(name) and re.compile(f"({name.removeprefix('^')})$")
        except re.error:
            sound = None
        if not sound:
            raise ValueError(f"{source}: alpha_pattern has {name!r:.60}; expected names of modules")
    return patterns


def _read_info(header: Mapping[str, str], source: str) -> AdapterInfo:
    found = parse_object(header.get(_INFO_KEY, "{}"), f"{source}: what it says of its training")
    values = {field.name: found[field.name] for field in fields(AdapterInfo) if found.get(field.name) is not None}
    numbers: dict[str, Any] = {"scale": (int, float), "size": int}
    for name, value in values.items():
        pair = (
            name == "position" and isinstance(value, list) and [type(v) in (int, float) for v in value] == [True, True]
        )
        if pair:
            values[name] = tuple(value)
        elif isinstance(value, bool) or not isinstance(value, numbers.get(name, str)):
            raise ValueError(f"{source}: its {name} cannot be {value!r:.60}; write the file again by write_adapter")
    return AdapterInfo(**values)


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that can have a LoRA. From its attributes: quantised weights are packed."""
    shapes = {}
    for name, module in model.named_modules():
        if re.search(r"\.(base_layer|lora_[AB])(\.|$)", name):
            continue
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Conv2d):
            shapes[name] = (layer.out_channels, layer.in_channels * math.prod(layer.kernel_size))
        elif hasattr(layer, "in_features"):
            shapes[name] = (layer.out_features, layer.in_features)
    return shapes


def _peft_config(pairs: Mapping[str, LoraPair]) -> dict[str, Any]:
    """Fields of a `LoraConfig` with alpha = rank everywhere: the alphas are multiplied into the weights."""
    ranks = {name: pair.down.shape[0] for name, pair in pairs.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    config = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": list(pairs),
    }
    return {f"transformer.{key}": value for key, value in config.items()}


def _nearest_module(key: str, modules: Mapping[str, Any]) -> str:
    name = key.removeprefix("transformer.").removeprefix("diffusion_model.")
    name = re.sub(r"\.(lora_|alpha).*", "", name)
    close = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
    return close[0] if close else "none"
