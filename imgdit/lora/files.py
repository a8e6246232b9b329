"""LoRA files: read any dialect, say what is in them, put them on a transformer, write them with their settings.

Safetensors only: a pickle can run code when it is read.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from imgdit import compat, display
from imgdit.family import LoraNames, find_family
from imgdit.hub import HUB_ID, TIMEOUT, hub_file
from imgdit.io.atomic import write_tensors
from imgdit.io.safe_json import parse_object
from imgdit.lora.config import CONFIG, of_transformer, scale_of
from imgdit.lora.dialects import (
    LoraKindError,
    LoraPair,
    LoraShapeError,
    Names,
    Scale,
    from_diffusers,
    read_pairs,
    sort_names,
)
from imgdit.lora.fitting import (
    check_hotswap,
    fitted,
    keep_precision,
    layers_of,
    lora_weights,
    nearest_modules,
)
from imgdit.lora.guess import family_of
from imgdit.naming import nearest

logger = logging.get_logger(__name__)

_INFO_KEY = "imgdit"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_SHOWN = 10
"""Keys that a report names one by one."""
_NEVER_MEANT = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".webp", ".csv")
"""Endings of what lies beside adapters and is nobody's idea of one."""


@dataclass(frozen=True)
class AdapterInfo:
    """How a condition adapter was trained: what whoever uses it has to repeat. Kept in the file's header."""

    base_model: str | None = None
    """Model whose weights it belongs to."""
    task: str | None = None
    """What its condition images are: "canny", "depth", "subject", …"""
    position: str | tuple[float, float] | None = None
    """As `Condition.position`."""
    scale: float | None = None
    """As `Condition.scale`."""
    mode: str | None = None
    """"joint": conditions see text and image; "independent": only themselves."""
    size: int | None = None
    """Side in pixels of the images it was trained on."""
    licence: str | None = None
    """Licence of the weights."""
    index: float | None = None
    """As `Condition.index`."""
    level: str | None = None
    """As `Condition.level`."""
    acts_on: str | None = None
    """As `Condition.acts_on`."""
    prompt_prefix: str | None = None
    """What its prompts begin with."""
    num_inference_steps: int | None = None
    """Of a few-step LoRA, which has guidance in its weights: the steps it is for."""


class AdapterFile(NamedTuple):
    """A LoRA file under diffusers' names."""

    pairs: dict[str, LoraPair]
    """By module of the transformer."""
    dialect: str
    """"peft", "comfyui", "kohya", "onetrainer" or "xlabs"; see `imgdit.lora.dialects`."""
    unused: tuple[str, ...]
    """Keys that belong to no LoRA of the transformer."""
    info: AdapterInfo
    source: str
    used: int = 0
    """Keys that were read."""
    aside: Mapping[str, str] = {}
    """Those of the unused keys that are understood: key and what it is."""
    families: tuple[LoraNames, ...] = ()
    """Families of transformers whose names it has; none where the names do not tell."""
    preset: str | None = None
    """Published adapter whose settings `info` has, as the file says none."""

    @property
    def family(self) -> str | None:
        """What its family, or each that it may be, is called."""
        return " or ".join(names.label for names in self.families) or None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that occur, the most frequent first."""
        counts = Counter(pair.down.shape[0] for pair in self.pairs.values())
        return tuple(rank for rank, _ in counts.most_common())

    @property
    def unread(self) -> tuple[str, ...]:
        """The unused keys that are not understood."""
        return tuple(key for key in self.unused if key not in self.aside)


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
    used: int = 0
    """Keys of the file that were read."""
    aside: Mapping[str, str] = {}
    """Keys that were set aside, and what they are."""
    preset: str | None = None
    """Published adapter whose settings `info` has, as the file says none."""

    def __str__(self) -> str:
        lines = [
            f"{self.adapter}: {len(self.matched)} modules of rank {', '.join(map(str, self.ranks))} "
            f"({self.used} keys, {self.dialect} names)"
        ]
        if self.preset:
            values = ((name, value) for name, value in vars(self.info).items() if value is not None)
            settings = ", ".join(f"{name}={value!r}" for name, value in values)
            lines.append(f"  the file does not say how it was trained; taken for a {self.preset}: {settings}")
        if self.info.prompt_prefix:
            lines.append(f"  its prompts begin with {self.info.prompt_prefix!r}")
        lines += [f"  set aside: {line}" for line in counted(self.aside)]
        lines += [f"  not used: {key} (nearest module: {near})" for key, near in self.unused[:_SHOWN]]
        if len(self.unused) > _SHOWN:
            lines.append(f"  not used: {len(self.unused) - _SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return display.lines(str(self))


def counted(aside: Mapping[str, str]) -> list[str]:
    """A line for each reason by which keys were set aside."""
    return [f"{n} {'key' if n == 1 else 'keys'} {reason}" for reason, n in Counter(aside.values()).items()]


def read_adapter(
    source: str | Path, weight_name: str | None = None, *, family: LoraNames | None = None, **hub: Any
) -> AdapterFile:
    """Read a LoRA file. The factor of each module (alpha / rank) is multiplied in, wherever the alpha stands: in keys,
    in the header, or in the `adapter_config.json` beside the weights.

    Args:
        source: a file, a folder, or a repository on the Hub.
        weight_name: file in the folder or repository; may be left out where there is only one.
        family: names of the family of the model that it is for, if that is known.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` of `hf_hub_download`.

    Raises:
        ValueError: not a safetensors file, damaged, without a LoRA, or of a kind other than plain LoRA.
    """
    path, config = _locate(source, weight_name, hub)
    with _open(path) as file:
        header, names, scale = _understood(file, path, config, family)
        tensors = {key: file.get_tensor(key) for key in names.used}
    pairs = _pairs(names, tensors, scale, str(path))
    info, preset = _info(header, names, family, str(path))
    return AdapterFile(
        pairs, names.dialect, names.unused, info, str(path), len(names.used), names.aside, names.families, preset
    )


def read_info(source: str | Path) -> AdapterInfo:
    """How an adapter was trained, from its file's header alone: no tensor is read.

    Raises:
        ValueError: as `read_adapter`, but for shapes.
    """
    path, config = _locate(source, None, {})
    with _open(path) as file:
        header, names, _ = _understood(file, path, config)
    return _info(header, names, None, str(path))[0]


class FoundAdapter(NamedTuple):
    """A condition adapter of a folder."""

    path: Path
    info: AdapterInfo


def find_adapters(folder: Path) -> dict[str, FoundAdapter]:
    """The adapters of a folder by their files' names; only headers are read.

    What else lies there (hidden files, half downloads, pickles, LoRAs of something else, whole models) is passed over
    and named in one warning.
    """
    found: dict[str, FoundAdapter] = {}
    strangers: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.stem
        if path.is_dir():  # as PEFT saves an adapter
            name, path = path.name, path / _PEFT_WEIGHTS
            if not path.is_file():
                continue
        if path.suffix.lower() in _NEVER_MEANT or path.name in (".DS_Store", "Thumbs.db"):
            continue
        try:
            if path.name.startswith("."):
                raise ValueError("a hidden file")
            if path.suffix != ".safetensors":
                raise ValueError(f"a {path.suffix or 'nameless'} file, no .safetensors")
            found[name] = FoundAdapter(path, read_info(path))
        except ValueError as error:
            reason = re.split(r"[.;] [Ee]xpected", str(error).removeprefix(str(path)))[0].strip(" :")
            strangers.append(f"{path.relative_to(folder)}: {reason}")
    if strangers:
        logger.warning("passed over in %s:\n  %s", folder, "\n  ".join(strangers))
    return found


def write_adapter(
    path: str | Path,
    pairs: Mapping[str, LoraPair],
    info: AdapterInfo | None = None,
    dialect: str = "peft",
    family: LoraNames | None = None,
) -> Path:
    """Write a LoRA file; "peft" is what diffusers, PEFT and ComfyUI read, "comfyui" and "kohya" use the names of the
    model's repository. A file that is there is replaced when the new one is whole.

    Args:
        family: whose layers these are; `None`: told by their names.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"LoRA files are written as .safetensors, got {path.name!r}")
    header = {"format": "pt"}
    if info is not None:
        header[_INFO_KEY] = json.dumps({key: value for key, value in asdict(info).items() if value is not None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, from_diffusers(pairs, dialect, family), header)
    return path


def pairs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, LoraPair]:
    """The LoRAs of a state dict, whose `alpha` keys alone tell its strength.

    Raises:
        ValueError: it holds no plain LoRA.
    """
    source = "the state dict"
    names = _names(tensors, source)
    return _pairs(names, tensors, None, source)


def diffusers_state(pairs: Mapping[str, LoraPair]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What diffusers' `load_lora_adapter` takes: a state dict, and its PEFT configuration."""
    return from_diffusers(pairs, "peft"), _peft_config(pairs)


def adapter_pairs(model: nn.Module, adapter: str) -> dict[str, LoraPair]:
    """An adapter's weights on a model, its scale multiplied in, ready for `write_adapter`.

    Raises:
        ValueError: there is no adapter of that name, or it is more than a plain LoRA.
    """
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            if adapter in module.lora_variant or module.lora_bias.get(adapter):
                raise ValueError(
                    f"adapter {adapter!r} is no plain LoRA (DoRA, biases, …), which is all that can be written"
                )
            down, up = (layer[adapter].weight.detach() for layer in (module.lora_A, module.lora_B))
            if down.itemsize == 1:  # stored by layerwise casting, which has no products
                down, up = down.bfloat16(), up.bfloat16()
            rank = module.r[adapter]
            # Not `scaling`, which set_adapters() weights.
            scale = module.lora_alpha[adapter] / (math.sqrt(rank) if module.use_rslora.get(adapter) else rank)
            pairs[name] = LoraPair(down, up if scale == 1 else up * scale)
    if not pairs:
        raise ValueError(f"there is no adapter {nearest(adapter, loaded_adapters(model))}")
    return pairs


def loaded_adapters(model: nn.Module) -> list[str]:
    """Names of the LoRA adapters on a model."""
    return list(getattr(model, "peft_config", {}))


_NAMESPACE = nn.ModuleDict()
"""What PEFT keeps adapters in."""


def legal_name(name: str, taken: Iterable[str] = ()) -> str:
    """The name of an adapter for a file of this name: torch takes no dots and none of the names of its own methods.

    Args:
        taken: names that it must not be; then a number is added.
    """
    name = name.replace(".", "_") or "adapter"
    if hasattr(_NAMESPACE, name):
        name += "_adapter"
    taken, free = set(taken), name
    for number in itertools.count(2):
        if free not in taken:
            break
        free = f"{name}_{number}"
    return free


def attach_adapter(
    model: Any, file: AdapterFile, adapter: str, *, hotswap: bool = False, pipeline: Any = None
) -> LoadReport:
    """Put a LoRA on a transformer without activating it: the adapters that act in a plain run stay those they were.
    Where that fails, the model is what it was.

    Args:
        model: a diffusers model with LoRA support.
        adapter: its name from now on.
        hotswap: take the place of the adapter of that name, in its tensors, so that nothing compiles again.
        pipeline: the model's pipeline, whose offloading has to be paused meanwhile.

    Raises:
        ValueError: the name is taken or cannot be one, or a module of the file has another shape in this model.
    """
    check_adapter_name(model, adapter, hotswap)
    layers = layers_of(model)
    pairs, unknown = fitted(file.pairs, file.source, model, layers)
    if hotswap:
        check_hotswap(model, adapter, pairs)
    before = active_by_layer(model)
    with all_or_nothing(model, adapter, hotswap, pipeline), compat.several_adapters():
        state, config = diffusers_state(pairs)
        model.load_lora_adapter(
            state, prefix="transformer", adapter_name=adapter, hotswap=hotswap, metadata=config, _pipeline=pipeline
        )
        keep_precision(model, adapter, state)
    activate_by_layer(model, before)
    near = nearest_modules([*file.unread, *unknown], layers)
    return LoadReport(
        adapter,
        file.dialect,
        tuple(pairs),
        near,
        file.ranks,
        file.info,
        used=file.used,
        aside=file.aside,
        preset=file.preset,
    )


def load_adapter(
    pipe: Any,
    source: str | Path,
    weight_name: str | None = None,
    adapter_name: str | None = None,
    *,
    hotswap: bool = False,
    **hub: Any,
) -> LoadReport:
    """`read_adapter`, then `attach_adapter` to a pipeline's transformer, by the file's name unless another is given
    (`legal_name`); what of the file was not used is logged."""
    model = compat.unwrapped(pipe.transformer)
    known = find_family(model)
    file = read_adapter(source, weight_name, family=None if known is None else known.lora, **hub)
    name = legal_name(Path(file.source).stem) if adapter_name is None else adapter_name
    report = attach_adapter(model, file, name, hotswap=hotswap, pipeline=pipe)
    if report.unused or report.aside:
        logger.warning(str(report))
    return report


def active_adapters(model: nn.Module) -> list[str]:
    """Adapters that act in a plain run of a model."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def active_by_layer(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Adapters that act in a plain run, of each layer that has any; PEFT lets layers differ."""
    return {module: list(module.active_adapters) for module in model.modules() if isinstance(module, BaseTunerLayer)}


def activate_by_layer(model: nn.Module, active: Mapping[nn.Module, list[str]]) -> None:
    """Make these adapters, and no others, act in a plain run.

    Args:
        active: as of `active_by_layer`. Layers that it does not have get the names of all others, as PEFT does; they
            have no weights of them.
    """
    everywhere = list(dict.fromkeys(name for names in active.values() for name in names))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(active.get(module, everywhere))


def activate(model: nn.Module, adapters: list[str]) -> None:
    """Make these adapters, and no others, act in a plain run."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapters)


def _understood(
    file: Any, path: Path, config: Path | None, family: LoraNames | None = None
) -> tuple[dict[str, str], Names, Scale | None]:
    """The header of an open file, its keys, and the scale of its modules."""
    header = file.metadata() or {}
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    names, scale = _names(shapes, str(path), family, shapes), None
    try:
        if metadata := header.get(LORA_ADAPTER_METADATA_KEY):
            scale = scale_of(of_transformer(parse_object(metadata, f"{path}: its PEFT configuration")), str(path))
        if scale is None and config is not None:
            scale = scale_of(parse_object(config.read_bytes(), str(config)), str(config))
    except LoraKindError as error:
        raise ValueError(f"{path} {error}") from error
    except OSError as error:
        raise ValueError(f"{config} cannot be read: {error}") from error
    return header, names, scale


def _names(
    keys: Iterable[str],
    source: str,
    family: LoraNames | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Names:
    """Keys that hold a LoRA of a transformer."""
    try:
        names = sort_names(keys, family, shapes)
    except LoraKindError as error:
        raise ValueError(f"{source} {error}") from error
    if names.parts:
        return names
    first = next(iter(keys), None)
    reason = "; ".join(counted(names.aside)) or ("it is empty" if first is None else f"its first key is {first!r}")
    of = family_of(keys)
    raise ValueError(
        f"{source} holds no LoRA of a transformer: {reason}"
        + (f"; it has the names of {of}" if of else "")
        + ". Expected keys like 'transformer.<module>.lora_A.weight', 'diffusion_model.…', 'lora_unet_…' or "
        "'lora_transformer_…'"
    )


def _pairs(names: Names, tensors: Mapping[str, torch.Tensor], scale: Scale | None, source: str) -> dict[str, LoraPair]:
    try:
        return read_pairs(names, tensors, scale)
    except LoraShapeError as error:
        raise ValueError(f"{source} is damaged or no plain LoRA: {error}") from error


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it cannot be read, with what it is where that can be seen.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        start = path.read_bytes()[:64] if path.is_file() and path.stat().st_size < 2**20 else b""
        what = "damaged or something else"
        if start.startswith(b"version https://git-lfs"):
            what = "Git LFS's note of the file; fetch the file itself (git lfs pull)"
        elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            what = "a web page, as a download without a login gives; download the file again"
        raise ValueError(f"{path} cannot be read as safetensors, it is {what}: {error}") from error


def _locate(source: str | Path, weight_name: str | None, hub: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """The file, downloaded where it is on the Hub, and its `adapter_config.json`."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / weight_name if weight_name is not None else _only_file(path)
    _refuse_pickle(path.name if path.is_file() or weight_name is None else weight_name)
    if path.is_file():
        return path, _config_beside(path)
    if isinstance(source, Path) or not re.fullmatch(HUB_ID, str(source)) or path.parent.is_dir():
        raise ValueError(
            f"there is no file {str(path)!r}; expected a .safetensors file, its folder or owner/repository"
        )
    return _download(str(source), weight_name, hub)


def _only_file(folder: Path) -> Path:
    """The weights in a folder; PEFT puts those of an adapter that is not called "default" one folder below."""
    files = _visible(folder) or [path for path in sorted(folder.glob(f"*/{_PEFT_WEIGHTS}")) if _config_beside(path)]
    if len(files) != 1:
        names = [str(path.relative_to(folder)) for path in files]
        raise ValueError(f"{folder} holds {names or 'no .safetensors file'}; name one by weight_name=")
    return files[0]


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(".")]


def _config_beside(path: Path) -> Path | None:
    """PEFT's configuration, which belongs to `adapter_model.safetensors`, or to the only weights of its folder."""
    config = path.with_name(CONFIG)
    ours = path.name == _PEFT_WEIGHTS or _visible(path.parent) == [path]
    return config if ours and config.is_file() else None


def _download(repository: str, weight_name: str | None, hub: Mapping[str, Any]) -> tuple[Path, Path | None]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    files: list[str] = []
    try:
        if weight_name is None:
            asked = {name: hub[name] for name in ("revision", "token") if name in hub}
            found = HfApi().model_info(repository, **asked, timeout=TIMEOUT).siblings or []
            files = [file.rfilename for file in found if file.rfilename.endswith(".safetensors")]
            weight_name = files[0] if len(files) == 1 else None
        if weight_name is not None:
            path = hub_file(repository, weight_name, **hub)
    except Exception as error:  # of whichever library carries the request: no repository, no network, offline mode
        message = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"there is no file or folder {repository!r} here, and on the Hub {weight_name or 'its list of files'} "
            f"could not be read: {type(error).__name__}: {message}"
        ) from error
    if weight_name is None:
        raise ValueError(f"{repository} holds {files or 'no .safetensors file'}; name one by weight_name=")
    if path.name != _PEFT_WEIGHTS:
        return path, None
    name = weight_name.removesuffix(_PEFT_WEIGHTS) + CONFIG
    try:
        return path, hub_file(repository, name, **hub)
    except EntryNotFoundError:
        return path, None
    except Exception as error:  # as above
        raise ValueError(
            f"{repository} has PEFT's {weight_name}, whose strength stands in {name}, which could not be read: {error}"
        ) from error


def _refuse_pickle(name: str) -> None:
    suffix = Path(name).suffix
    if suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"):
        raise ValueError(
            f"got {name!r}, expected a .safetensors file: pickled weights can run code when they are loaded. Convert "
            "the file first"
        )


def _info(
    header: Mapping[str, str], names: Names, family: LoraNames | None, source: str
) -> tuple[AdapterInfo, str | None]:
    """How an adapter was trained, and the preset that tells it where its file does not."""
    info = _read_info(header, source)
    if _INFO_KEY in header:
        return info, None
    first = family if family is not None else (names.families[0] if len(names.families) == 1 else None)
    words = " ".join([Path(source).name, *header.values()])
    for preset in () if first is None else first.presets:
        if re.search(preset.header, words, re.IGNORECASE) and any(re.search(preset.keys, key) for key in names.used):
            return AdapterInfo(**preset.settings), preset.name
    return info, None


def _read_info(header: Mapping[str, str], source: str) -> AdapterInfo:
    found = parse_object(header.get(_INFO_KEY, "{}"), f"{source}: what it says of its training")
    values = {field.name: found[field.name] for field in fields(AdapterInfo) if found.get(field.name) is not None}
    numbers: dict[str, Any] = {"scale": (int, float), "index": (int, float), "size": int, "num_inference_steps": int}
    choices = {"level": ("clean", "image"), "acts_on": ("condition", "all")}
    for name, value in values.items():
        pair = (
            name == "position" and isinstance(value, list) and [type(v) in (int, float) for v in value] == [True, True]
        )
        if pair:
            values[name] = tuple(value)
        elif (
            isinstance(value, bool)
            or not isinstance(value, numbers.get(name, str))
            or value not in choices.get(name, (value,))
        ):
            raise ValueError(f"{source}: its {name} cannot be {value!r:.60}; write the file again by write_adapter")
    return AdapterInfo(**values)


def check_adapter_name(model: nn.Module, adapter: str, hotswap: bool) -> None:
    """Refuse a name that is taken (or, for `hotswap`, is not), or that torch cannot have."""
    loaded = loaded_adapters(model)
    if hotswap and adapter not in loaded:
        raise ValueError(f"hotswap=True replaces a loaded adapter; there is no {nearest(adapter, loaded)}")
    if not hotswap and adapter in loaded:
        raise ValueError(
            f"adapter {adapter!r} is loaded already; pass hotswap=True to replace it, or another name (adapter_name=)"
        )
    if adapter != legal_name(adapter):
        raise ValueError(f"an adapter cannot be called {adapter!r} in torch; take {legal_name(adapter, loaded)!r}")


@contextmanager
def all_or_nothing(model: Any, adapter: str, hotswap: bool, pipeline: Any) -> Iterator[None]:
    """Where loading fails, the adapters, what acts and the offloading are as before; other adapters stay in any case.
    (PEFT's hot-swapping empties those whose name holds this one's.)"""
    names, active = loaded_adapters(model), active_by_layer(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = lora_weights(model) if hotswap else {}
    weights = {name: parameter.detach().clone() for name, parameter in kept.items()}
    scales = [(layer, copy.deepcopy(layer.scaling)) for layer in model.modules() if isinstance(layer, LoraLayer)]
    offload = compat.offloading(pipeline)
    try:
        yield
        for name, parameter in kept.items():
            if name.split(".")[-2] != adapter:
                parameter.data.copy_(weights[name])
    except BaseException:
        for name, parameter in kept.items():
            parameter.data = weights[name]
        for layer, scaling in scales:
            layer.scaling.update(scaling)
        if not hotswap:
            _take_off(model, adapter, names)
            activate_by_layer(model, active)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if offload is not None:
            offload()
        raise


def _take_off(model: Any, adapter: str, names: list[str]) -> None:
    """Remove what a load that failed left of an adapter."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            module.delete_adapter(adapter)
    if hasattr(model, "peft_config"):
        model.peft_config.pop(adapter, None)
    if not names:
        model.unload_lora()


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
