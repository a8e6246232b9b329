"""Whether a depth condition still holds while a label is unlearned, and whether the label is gone under it.

N images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count as numbers
from pathlib import Path
from random import Random
from typing import Any

import torch

from imgdit import Condition, DiffusionPipeline
from imgdit.benchmarks.metrics import abs_rel, fitted
from imgdit.benchmarks.scenes.text_to_image import HeldOut, read
from imgdit.benchmarks.unlearning.labels import QUESTIONS
from imgdit.benchmarks.unlearning.methods.material import Unlearned
from imgdit.scenes.captions import plain_caption
from imgdit.scenes.labels import kind_of
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.render import render
from imgdit.scenes.tasks import from_scene
from imgdit.scenes.world import Scene

ADAPTER = "depth"
_FIRST_SEED = 200_000
"""Of scenes that nothing else is measured on."""


def adapter_file(model: Path) -> Path:
    """The depth adapter of a pipeline's folder.

    Raises:
        ValueError: there is none.
    """
    file = model / "adapters" / f"{ADAPTER}.safetensors"
    if not file.is_file():
        raise ValueError(
            f"conditions are measured with a depth adapter; there is no {file} (`imgdit train scenes/control_depth` "
            "trains one)"
        )
    return file


def label_of(scene: Scene, domain: str) -> str:
    """Style, or kind of the only object, of a scene."""
    return scene.style if domain == "style" else scene.objects[0].kind


def conditioned_scenes(target: str, count: int) -> HeldOut:
    """So many scenes of one object that show a label, and then as many that do not."""
    domain = kind_of(target)
    found: dict[bool, list[Scene]] = {True: [], False: []}
    for seed in numbers(_FIRST_SEED):
        scene = Scene.sample(seed, "heldout", 1)
        found[label_of(scene, domain) == target].append(scene)
        if min(map(len, found.values())) >= count:
            break
    scenes = [*found[True][:count], *found[False][:count]]
    return HeldOut(scenes, [plain_caption(scene) for scene in scenes], render(scenes))


class ConditionedImages:
    """Images under a depth condition, with a pipeline of its own: an adapter changes a model's parameter names.

    Args:
        model: folder of a pipeline of the scenes, with the adapter.
        probe: reads depth and labels.
        count: scenes that show a target, and as many that do not.
        call: arguments of the pipeline.
    """

    def __init__(self, model: Path, probe: SceneProbe, count: int, call: Mapping[str, Any]) -> None:
        self.pipe: Any = DiffusionPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.position: Any = (
            self.pipe.load_control(adapter_file(model), adapter_name=ADAPTER).info.position or "aligned"
        )
        self.probe, self.count, self.call = probe, count, dict(call)

    def score(self, target: str, unlearned: Unlearned, *, condition: bool = True) -> dict[str, Any]:
        """What images of a target's scenes and of others show.

        Args:
            condition: whether the depth is given.

        Returns:
            `shown` of the target's images show it, `kept` of the others show their own label of its kind, `of` each;
            `error` and `error_of_others`: mean AbsRel of the depth that the probe sees, after fitting.
        """
        truths, domain = conditioned_scenes(target, self.count), kind_of(target)
        depth = truths.rendering.depth
        maps = torch.stack(
            [from_scene(ADAPTER, s, Random(i), truths.rendering.one(i)).condition for i, s in enumerate(truths.scenes)]
        )
        given = {"conditions": [Condition(maps, ADAPTER, position=self.position)]} if condition else {}
        generators = [torch.Generator().manual_seed(_FIRST_SEED + i) for i in range(len(maps))]
        with unlearned.attach(self.pipe) as call:
            options = {**self.call, **given, **call}
            images = self.pipe(truths.prompts, generator=generators, output_type="pt", **options).images
        seen = read(self.probe, images.float().cpu())
        errors = abs_rel(fitted(seen.depth, depth), depth)
        right = [
            answers[QUESTIONS[domain]] == label_of(scene, domain)
            for answers, scene in zip(seen.answers, truths.scenes)
        ]
        return {
            "shown": sum(right[: self.count]),
            "kept": sum(right[self.count :]),
            "of": self.count,
            "error": float(errors[: self.count].mean()),
            "error_of_others": float(errors[self.count :].mean()),
        }


Prepare = Callable[[str], Unlearned]
"""A method made ready for a target."""


def conditioned(
    images: ConditionedImages, targets: list[str], methods: Mapping[str, Prepare], unmodified: Unlearned
) -> dict[str, Any]:
    """By method and target, see `ConditionedImages.score`; "no condition" is the unmodified model without it."""
    return {
        "no condition": {target: images.score(target, unmodified, condition=False) for target in targets},
        **{
            name: {target: images.score(target, prepare(target)) for target in targets}
            for name, prepare in methods.items()
        },
    }
