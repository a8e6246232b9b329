"""imgdit in eval-unlearn (REAL-Lab, 1.1), which finds these classes by the entry points of this package.

technique  imgdit          concepts are unlearned by sparse autoencoders, in any pipeline of diffusers
dataset    imgdit_scenes   prompts of every style with every object of the rendered scenes
metric     imgdit_scenes   UA, IRA and CRA of these images (arXiv 2402.11846), as the scene probe sees them
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import eval_unlearn
import torch
from eval_unlearn.types import Dataset, MetricResult
from PIL import Image
from torch.utils.data import DataLoader

from imgdit.benchmarks.unlearning.labels import probe_labels
from imgdit.benchmarks.unlearning.plan import TEST, Cell, Seen, cells, scene_seeds
from imgdit.benchmarks.unlearning.table import score_images
from imgdit.checkpoints import EMBEDDED, SCENE_PROBE, SCENES
from imgdit.images import to_pixels
from imgdit.naming import check_name
from imgdit.pipelines.load_options import LoadOptions
from imgdit.pipelines.loading import load_pipeline
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes.labels import kind_of
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.world import OBJECTS, STYLES

SOURCE = "imgdit_scenes"
VERSIONS = (1, 1), (2,)
"""The first version of eval-unlearn whose interface this is, and the first that may have another."""


@dataclass(frozen=True)
class TechniqueConfig:
    """`technique.config` of an eval-unlearn run."""

    erase_concept: str
    """Concepts to unlearn, separated by commas; empty: none, which is the unmodified model."""
    model: str = EMBEDDED
    """Folder or Hub repository of a pipeline."""
    sae: str | None = None
    """Folder or Hub repository of its sparse autoencoders; `None`: the embedded model's."""
    learn: dict[str, list[str]] = field(default_factory=dict)
    """Prompts per concept, to select features from if they are not stored with the autoencoders."""
    top_n: int = 4
    """Features per timestep that are selected then."""
    mode: str | None = None
    """See `ConceptUnlearner.attach`; so are the next three."""
    multiplier: float | None = None
    halves: str = "both"
    hookpoints: list[str] | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline, such as `height` and `width`."""
    seed: int = 0
    """Of the first image, where eval-unlearn gives none."""
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"


@dataclass(frozen=True)
class ScenesConfig:
    """`metric.config` of an eval-unlearn run with the scenes."""

    erase_concept: str
    """The style or object that is unlearned."""
    seeds: int = 1
    """Images of each style with each object."""
    styles: tuple[str, ...] = STYLES
    """Styles that are asked for; the unlearned one among them, if it is a style."""
    objects: tuple[str, ...] = OBJECTS
    """Objects, likewise."""
    batch_size: int = 8
    probe: str | None = None
    """Folder of a `SceneProbe`; `None`: the embedded one."""

    def __post_init__(self) -> None:
        kind_of(self.erase_concept)
        for kind, wanted, known in (("style", self.styles, STYLES), ("object", self.objects, OBJECTS)):
            for name in wanted:
                check_name(kind, name, known)
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        asked = self.styles if kind_of(self.erase_concept) == "style" else self.objects
        if self.erase_concept not in asked or len(asked) < 2:
            raise ValueError(
                f"{self.erase_concept!r} and at least one other {kind_of(self.erase_concept)} must be asked for, got "
                f"{', '.join(asked)}"
            )


class UnlearningTechnique:
    """`ConceptUnlearner` as a technique of eval-unlearn."""

    def __init__(self, **config: Any) -> None:
        """
        Args:
            config: see `TechniqueConfig`.

        Raises:
            ValueError: an unknown key, model, concept, mode or hookpoint.
        """
        self.config = _read(TechniqueConfig, config)
        self.concepts = [name for part in self.config.erase_concept.split(",") if (name := part.strip())]
        options: Any = {name: getattr(self.config, name) for name in ("dtype", "device", "offload")}
        source = SCENES if self.config.model == EMBEDDED else self.config.model
        if self.config.sae is None and source != SCENES:
            raise ValueError(f"sae must name the sparse autoencoders of {self.config.model}, got None")
        self.pipe = load_pipeline(source, LoadOptions(**options))
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            **self.config.call,
        }
        self.unlearner = ConceptUnlearner.from_pretrained(self.config.sae or SCENES / "sae")
        if self.config.learn:
            self.unlearner.learn(self.pipe, self.config.learn, top_n=self.config.top_n, **self.call)
        with self._unlearned():  # what cannot be unlearned is said before images are generated
            pass
        self.generated = 0

    def _unlearned(self) -> Any:
        stack = ExitStack()
        if self.concepts:
            how: Any = {name: getattr(self.config, name) for name in ("mode", "multiplier", "halves", "hookpoints")}
            stack.enter_context(self.unlearner.attach(self.pipe, self.concepts, **how))
        return stack

    def generate(self, prompts: Sequence[str], seed: int | None = None, **call: Any) -> list[Image.Image]:
        """Images of prompts, one at a time, so that a batch's size changes nothing.

        Args:
            seed: of the first of them; `None`: each image of this technique has a seed of its own, counted from the
                configuration's.
            call: further arguments of the pipeline.
        """
        first = self.config.seed + self.generated if seed is None else seed
        images = []
        with self._unlearned():
            for number, prompt in enumerate(prompts, start=first):
                generator = torch.Generator().manual_seed(number)
                images += self.pipe(prompt, generator=generator, output_type="pil", **{**self.call, **call}).images
        self.generated += len(images)
        return images


def load_scenes(**config: Any) -> DataLoader:
    """Prompts of every style with every object, as batches of eval-unlearn's `Dataset`.

    Args:
        config: see `ScenesConfig`.

    Raises:
        ValueError: an unknown key, style or object.
    """
    plan = _read(ScenesConfig, config)
    kind = kind_of(plan.erase_concept)
    wanted = cells(scene_seeds(plan.seeds, TEST), plan.styles, plan.objects)

    def batch(part: Sequence[Cell]) -> Dataset:
        categories = ["target" if cell.expected(kind) == plan.erase_concept else "retain" for cell in part]
        metadata = {"source": SOURCE, "categories": categories, "cells": [list(cell) for cell in part]}
        return Dataset(prompts=[cell.prompt for cell in part], metadata=metadata)

    return DataLoader(wanted, batch_size=plan.batch_size, collate_fn=batch)  # type: ignore[arg-type]


class ScenesMetric:
    """UnlearnCanvas' scores on the scenes: the value is the mean of UA, IRA and CRA."""

    def __init__(self, **config: Any) -> None:
        """
        Args:
            config: see `ScenesConfig`.
        """
        self.config = _read(ScenesConfig, config)
        self.probe = SceneProbe.from_pretrained(Path(self.config.probe or SCENE_PROBE)).eval()
        self.seen: list[Seen] = []

    def load_dataset(self) -> DataLoader:
        """See `load_scenes`."""
        return load_scenes(**dataclasses.asdict(self.config))

    def update(self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Look at the images of a batch.

        Raises:
            ValueError: the batch is not of the scenes, or a technique returned another number of images.
        """
        if metadata.get("source") != SOURCE:
            raise ValueError(f"this metric scores images of the data set {SOURCE!r}, got {metadata.get('source')!r}")
        if len(images) != len(prompts):
            raise ValueError(f"the technique returned {len(images)} images of {len(prompts)} prompts")
        labels = probe_labels(self.probe, torch.cat([to_pixels(image) for image in images]))
        rows = zip(metadata["cells"], labels["style"], labels["object"], strict=True)
        self.seen += [Seen(Cell(*cell), style, thing) for cell, style, thing in rows]

    def compute(self) -> MetricResult:
        """Scores of all batches."""
        scored = score_images(self.config.erase_concept, kind_of(self.config.erase_concept), self.seen)
        details = {
            "UA": scored.scores.unlearned,
            "IRA": scored.scores.retained,
            "CRA": scored.scores.cross,
            "UA_interval": list(scored.unlearned),
            "images": len(self.seen),
            "confusion": scored.confusion,
        }
        return MetricResult(name="IMGDIT_SCENES", value=scored.scores.mean, details=details)


def _read(kind: Any, values: Mapping[str, Any]) -> Any:
    """A configuration; names are checked, because eval-unlearn ignores what it does not know."""
    first, other = VERSIONS
    numbers = re.findall(r"\d+", eval_unlearn.__version__)
    if not first <= tuple(map(int, numbers[:2])) < other:
        raise ValueError(
            f"eval-unlearn {eval_unlearn.__version__} is installed, imgdit's plug-in is for 1.1 and later, below 2; "
            'install it with: pip install "imgdit[unlearn]"'
        )
    known = [one.name for one in dataclasses.fields(kind)]
    for name in values:
        check_name("key", name, known)
    if "erase_concept" not in values:
        raise ValueError(f"erase_concept is missing; the keys are {', '.join(known)}")
    return kind(**{name: tuple(value) if name in ("styles", "objects") else value for name, value in values.items()})
