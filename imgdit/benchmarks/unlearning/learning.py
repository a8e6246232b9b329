"""What the unlearning benchmark's methods learn from; the statistics are kept on disk."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

from imgdit.benchmarks.unlearning.images import digest
from imgdit.benchmarks.unlearning.methods.material import Material, Statistics, collect
from imgdit.io.atomic import write_tensors, write_text
from imgdit.io.fingerprints import weights_hash
from imgdit.io.safe_json import read_object
from imgdit.sae.concepts import ConceptStatistics
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes.labels import LABELS, label_prompts, label_words

SEED = 7
"""Of the prompts and images that methods learn from; those that judge them have other seeds."""


def build_material(
    pipe: Any, saes: Path | None, folder: Path, *, prompts_per_label: int, steps: int, guidance: float
) -> tuple[Material, float]:
    """Prompts for every style and object, and with SAEs their activations.

    Args:
        saes: folder of the SAEs; `None`: no method needs them.
        folder: of the statistics.
        prompts_per_label: to learn from.

    Returns:
        The material, and the seconds that its statistics took.
    """
    prompts = {kind: label_prompts(prompts_per_label, SEED, kind) for kind in LABELS}
    words = {label: label_words(label) for labels in LABELS.values() for label in labels}
    found = {} if saes is None else ConceptUnlearner.from_pretrained(saes).saes
    for sae in found.values():
        sae.to(pipe.transformer.device).requires_grad_(False)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    material = Material(prompts, words, found, call, seed=SEED)
    if not found:
        return material, 0.0
    key = digest(weights_hash(pipe.transformer, pipe.text_encoder), _names(found), prompts, call)
    file = folder / f"statistics-{key}.safetensors"
    summary = file.with_suffix(".json")
    if not summary.is_file():
        start = time.perf_counter()
        statistics = collect(pipe, material)
        seconds = time.perf_counter() - start
        folder.mkdir(parents=True, exist_ok=True)
        _save(statistics, file, summary, seconds)
    statistics, seconds = _load(file, summary)
    return dataclasses.replace(material, statistics=statistics), seconds


def _names(saes: dict[str, Any]) -> dict[str, str]:
    return {hookpoint: sae.fingerprint() for hookpoint, sae in saes.items()}


def _save(statistics: Statistics, file: Path, summary: Path, seconds: float) -> None:
    tensors, values = {}, []
    for kind, places in statistics.items():
        for hookpoint, found in places.items():
            for label, count in found.counts.items():
                tensors[f"{kind}/{hookpoint}/{label}/means"] = found.means[label].contiguous()
                tensors[f"{kind}/{hookpoint}/{label}/inputs"] = found.inputs[label].contiguous()
                values.append([kind, hookpoint, label, count, list(found.timesteps)])
    write_tensors(file, tensors)
    write_text(summary, json.dumps({"seconds": seconds, "labels": values}))  # last: it says that the file is whole


def _load(file: Path, summary: Path) -> tuple[Statistics, float]:
    values = read_object(summary)
    statistics: Statistics = {}
    with safe_open(file, "pt") as tensors:
        for kind, hookpoint, label, count, timesteps in values["labels"]:
            place = statistics.setdefault(kind, {})
            if hookpoint not in place:
                place[hookpoint] = ConceptStatistics(tuple(timesteps), {}, {}, {})
            found, name = place[hookpoint], f"{kind}/{hookpoint}/{label}"
            found.means[label] = tensors.get_tensor(f"{name}/means")
            found.inputs[label] = tensors.get_tensor(f"{name}/inputs")
            found.counts[label] = count
    return statistics, values["seconds"]
