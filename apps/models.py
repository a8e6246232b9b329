"""The families of models that the library knows, what works with each, and how much memory a model takes on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgdit.families import MODULES
from imgdit.family import family_named
from imgdit.hub import INDEX, find_pipeline
from imgdit.io.safe_json import read_object

WIDTHS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes of a weight, by precision; scales of quantised weights, a few percent, are left out."""
READ_ONLY = ("SD3JointModelFlexible",)
"""Classes whose weights are read into another."""


def family_table() -> list[dict[str, Any]]:
    """One row for each transformer class: what works with it, and published adapters whose settings are known."""
    rows = []
    for name in MODULES:
        if name in READ_ONLY:
            continue
        family = family_named(name)
        assert family is not None
        named = family.lora is not None and bool(family.lora.blocks or family.lora.layers)
        rows.append(
            {
                "class": name,
                "conditions": family.conditions is not None or name == "MMDiT",
                "activations": True,
                "lora names": named,
                "mup": family.mup is not None,
                "adapters": [] if family.lora is None else [preset.name for preset in family.lora.presets],
            }
        )
    return rows


def memory(source: str) -> dict[str, int]:
    """Parameters of each part of a pipeline, counted from its configurations; no weights are read.

    Raises:
        ValueError: no pipeline of this machine.
    """
    folder = Path(find_pipeline(source))
    if not folder.is_dir():
        raise ValueError(f"configurations are read from a folder of this machine; download {source!r} first")
    found = {}
    for part, named in read_object(folder / INDEX).items():
        config = folder / part / "config.json"
        if isinstance(named, list) and all(named) and config.is_file():
            found[part] = _parameters(named[0], named[1], config.parent)
    return {part: count for part, count in found.items() if count}


def _parameters(library: str, name: str, folder: Path) -> int:
    """Of a model that is built without weights; 0 for what has none."""
    import importlib

    import torch

    owner = getattr(importlib.import_module(library), name, None)
    if owner is None or not issubclass(owner, torch.nn.Module):
        return 0
    with torch.device("meta"):
        if library == "transformers":
            from transformers import AutoConfig

            model = owner(AutoConfig.from_pretrained(folder))
        else:
            model = owner.from_config(owner.load_config(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def memory_lines(parts: dict[str, int]) -> Iterator[str]:
    """The memory of the weights by precision, and what offloading keeps on the device."""
    for part, count in parts.items():
        yield f"  {part:<16}{count / 1e9:>8.3f} B parameters"
    total, largest = sum(parts.values()), max(parts.values(), default=0)
    main = parts.get("transformer") or parts.get("unet") or 0
    for name in ("fp32", "bf16"):
        yield f"  {name}: {total * WIDTHS[name] / 1e9:.1f} GB; --offload model: {largest * WIDTHS[name] / 1e9:.1f} GB"
    for name in ("int8", "nf4"):
        rest = total - main
        size = main * WIDTHS[name] + rest * WIDTHS["bf16"]
        yield f"  bf16, --quantize {name}: {size / 1e9:.1f} GB"
    yield "  weights alone, computed from the configurations; activations of an image come on top"
