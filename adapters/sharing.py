"""A condition adapter as others load it: its file, and a model card that says how."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from imgdit.cards import CardDetails, ModelCard, write_card
from imgdit.checkpoints import EMBEDDED
from imgdit.hub import HUB_ID, push_folder
from imgdit.lora.dialects import LoraPair
from imgdit.lora.files import AdapterInfo, write_adapter

_STOCK = """import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

from imgdit import Condition, OmniControl

pipe = DiffusionPipeline.from_pretrained({base}, dtype=torch.bfloat16).to("cuda")
control = OmniControl(pipe)
control.load({source}, adapter_name={name})
with control.use([Condition(load_image("condition.png"), {name})]):
    image = pipe(prompt="a red cube on a table").images[0]"""
_OWN = """from diffusers.utils import load_image

from imgdit import Condition, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base})
pipe.load_control({source}, adapter_name={name})
image = pipe("a red cube on a table", conditions=[Condition(load_image("condition.png"), {name})]).images[0]"""


def save_adapter(
    folder: str | Path,
    name: str,
    pairs: Mapping[str, LoraPair],
    info: AdapterInfo,
    details: CardDetails | None = None,
    *,
    source: str | None = None,
    own: bool = False,
) -> Path:
    """Write `<name>.safetensors` and its model card into a folder.

    Args:
        folder: is made where it is missing; a README.md that somebody wrote stays.
        name: of the adapter.
        pairs, info: see `write_adapter`.
        details: of the card; licence and base model are those of `info` where it says none.
        source: what the card loads the adapter from; the folder by default.
        own: it belongs to a pipeline of imgdit (`load_control`), not of diffusers (`OmniControl`).

    Returns:
        The adapter's file.

    Raises:
        ValueError: the card's image cannot be read, or the disk refuses.
    """
    folder, details = Path(folder), details or CardDetails()
    details = replace(
        details, licence=details.licence or info.licence, base_model=details.base_model or info.base_model
    )
    info = replace(info, licence=details.licence, base_model=details.base_model)
    write_card(folder, _card(name, pairs, info, details, source or folder.name, own))
    return write_adapter(folder / f"{name}.safetensors", pairs, info)


def push_adapter(
    repository: str,
    name: str,
    pairs: Mapping[str, LoraPair],
    info: AdapterInfo,
    details: CardDetails | None = None,
    *,
    own: bool = False,
    **hub: Any,
) -> str:
    """Upload an adapter with its model card.

    Args:
        repository: owner/name on the Hub.
        name, pairs, info, details, own: see `save_adapter`.
        hub: `private`, `token`, `message` of `push_folder`.

    Returns:
        The repository's address.

    Raises:
        ValueError: see `save_adapter` and `push_folder`.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, name, pairs, info, details, source=repository, own=own)
        return push_folder(folder, repository, **hub)


def with_base(info: AdapterInfo | None, pipe: Any) -> AdapterInfo:
    """How an adapter was trained, with the Hub id that its pipeline was loaded from where it names no base model."""
    info = info or AdapterInfo()
    loaded = str(getattr(pipe.config, "_name_or_path", "") or "")
    if info.base_model is None and re.fullmatch(HUB_ID, loaded) and not Path(loaded).exists():
        return replace(info, base_model=loaded)
    return info


def _card(
    name: str, pairs: Mapping[str, LoraPair], info: AdapterInfo, details: CardDetails, source: str, own: bool
) -> ModelCard:
    task = f" that reads {info.task}" if info.task else ""
    ranks = sorted({pair.down.shape[0] for pair in pairs.values()})
    base = details.base_model
    settings = {key: value for key, value in asdict(info).items() if key not in ("base_model", "licence")}
    shown = "SCENES" if own and base == EMBEDDED else json.dumps(base or "BASE MODEL")
    usage = (_OWN if own else _STOCK).format(base=shown, source=json.dumps(source), name=json.dumps(name))
    if shown == "SCENES":
        usage = usage.replace("DiffusionPipeline\n", "DiffusionPipeline\nfrom imgdit.checkpoints import SCENES\n", 1)
    return ModelCard(
        title=source.rpartition("/")[2],
        summary=f"A condition adapter{task}: a LoRA that acts on the tokens of a condition image (OminiControl).",
        usage=usage,
        details=details,
        settings={**settings, "rank": ", ".join(map(str, ranks)), "modules": len(pairs)},
        tags=("ominicontrol", "controlnet", "lora", *((info.task,) if info.task else ())),
        relation="adapter",
    )
