"""Modules under the names of version 0.1. They are imported from where they are now, with a DeprecationWarning; the
names go with version 0.3."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

from imgdit.naming import warn_renamed

MOVED = {
    "adapters.large_speed": "benchmarks.speed.large",
    "adapters.speed": "benchmarks.speed.conditions",
    "apps.api_page": "apps.chores.api_page",
    "apps.benches": "benchmarks",
    "apps.benches.canvas": "benchmarks.unlearning.canvas",
    "apps.benches.picture_speed": "benchmarks.speed.pipeline",
    "apps.benches.scene_maker": "benchmarks.scenes.maker",
    "apps.benches.scenes": "benchmarks.scenes.run",
    "apps.benches.speed": "benchmarks.speed.command_line",
    "apps.benches.unlearn": "benchmarks.unlearning.run",
    "apps.benches.unlearn_material": "benchmarks.unlearning.learning",
    "apps.benches.unlearn_pictures": "benchmarks.unlearning.images",
    "apps.bulk_jobs": "apps.jobs.bulk",
    "apps.docs_pictures": "apps.chores.docs_images",
    "apps.frames": "apps.jobs.request",
    "apps.generate": "apps.jobs.run",
    "apps.picture_labels": "benchmarks.unlearning.labels",
    "apps.prepare": "apps.jobs.conditions",
    "apps.request": "apps.jobs.request",
    "apps.run_pipeline": "apps.chores.run_pipeline",
    "apps.subject_pairs": "scenes.subject_pairs",
    "apps.training_plan": "apps.chores.training_plan",
    "apps.training_sheet": "apps.chores.training_sheet",
    "apps.weights": "apps.chores.weights",
    "bulk": "io.bulk",
    "data.captions": "scenes.captions",
    "data.files": "io.atomic",
    "data.geometry": "scenes.geometry",
    "data.labels": "scenes.labels",
    "data.latents": "scenes.latents",
    "data.own": "data",
    "data.own.buckets": "data.buckets",
    "data.own.convert": "data.convert",
    "data.own.folders": "data.folders",
    "data.own.hub": "data.hub",
    "data.own.inspections": "data.inspections",
    "data.own.linter": "data.linter",
    "data.own.opening": "data.opening",
    "data.own.preview": "data.preview",
    "data.own.rows": "data.rows",
    "data.own.shards": "data.shards",
    "data.own.sources": "data.sources",
    "data.own.subjects": "data.subjects",
    "data.pictures": "scenes.images",
    "data.readings": "scenes.readings",
    "data.render": "scenes.render",
    "data.scenes": "scenes.world",
    "data.sentences": "scenes.answers",
    "data.shading": "scenes.shading",
    "data.sheet": "images.sheet",
    "data.tasks": "scenes.tasks",
    "data.tensor_cache": "io.tensor_cache",
    "data.words": "scenes.tokenizer",
    "evaluation": "benchmarks",
    "evaluation.any_speed": "benchmarks.speed.any_to_any",
    "evaluation.any_tasks": "benchmarks.scenes.any_to_any",
    "evaluation.control": "benchmarks.scenes.control",
    "evaluation.growth": "benchmarks.speed.growth",
    "evaluation.metrics": "benchmarks.metrics",
    "evaluation.prompt_attack": "benchmarks.unlearning.prompt_attack",
    "evaluation.sae_speed": "benchmarks.speed.sae",
    "evaluation.scenes": "benchmarks.scenes.text_to_image",
    "evaluation.speed": "benchmarks.speed.timing",
    "evaluation.training_speed": "benchmarks.speed.training",
    "evaluation.unlearning": "benchmarks.unlearning.scores",
    "evaluation.unlearning_methods": "benchmarks.unlearning.methods",
    "evaluation.unlearning_methods.catalogue": "benchmarks.unlearning.methods.catalogue",
    "evaluation.unlearning_methods.closed_form": "benchmarks.unlearning.methods.closed_form",
    "evaluation.unlearning_methods.denoiser": "benchmarks.unlearning.methods.denoiser",
    "evaluation.unlearning_methods.direction": "benchmarks.unlearning.methods.direction",
    "evaluation.unlearning_methods.features": "benchmarks.unlearning.methods.features",
    "evaluation.unlearning_methods.finetune": "benchmarks.unlearning.methods.finetune",
    "evaluation.unlearning_methods.guidance": "benchmarks.unlearning.methods.guidance",
    "evaluation.unlearning_methods.material": "benchmarks.unlearning.methods.material",
    "evaluation.unlearning_methods.weights": "benchmarks.unlearning.methods.weights",
    "evaluation.unlearning_pictures": "benchmarks.unlearning.plan",
    "evaluation.unlearning_table": "benchmarks.unlearning.table",
    "lora_dialects": "lora.dialects",
    "lora_files": "lora.files",
    "models.autoencoding": "images.latents",
    "models.caption_reader": "scenes.caption_reader",
    "models.scene_probe": "scenes.probe",
    "models.softcap": "attention.softcap",
    "sae.recipe": "training.sae_recipe",
    "sae.run": "training.sae_run",
    "training.blobs": "training.toy_data",
    "training.checkpoint": "io.checkpoints",
    "training.config": "training.recipe",
    "training.data": "io.order",
    "training.fitting": "training.memory_advice",
    "training.quantized": "models.quantized",
    "training.reader": "scenes.training_readers",
    "training.scene_conditions": "scenes.training_conditions",
    "training.own_encoding": "training.user_images.encoder",
    "training.own_needs": "training.user_images.needs",
    "training.own_pictures": "training.user_images.dataset",
    "training.scene_frames": "scenes.training_frames",
    "training.shards": "io.sharded",
    "untrusted": "io.safe_json",
}
"""Old name within `imgdit` -> new name; of a module whose content went to several, where its first part is."""
SPLIT = {
    "apps.generate": ("apps.jobs.plan",),
    "apps.request": ("apps.jobs.png",),
    "data.tasks": ("images.preprocess",),
    "training.config": ("recipes", "training.build"),
    "models.autoencoding": ("io.fingerprints",),
    "data.words": ("pipelines.texts",),
    "data.sentences": ("tasks",),
    "data.captions": ("tasks",),
}
"""Names of modules that were split -> the other modules that hold their content now."""

RENAMED = {"PictureFrame": "tasks.ImageFrame", "AskedFrame": "apps.jobs.request.RequestFrame"}
"""Classes that are called otherwise now -> their module within `imgdit` and name. `imgdit` had them too."""


def renamed(module: str, name: str, table: Mapping[str, str] = RENAMED) -> object:
    """What a module gives for the old name of a class or function, with a DeprecationWarning.

    Args:
        module: that was asked for the name.
        name: the old one.
        table: old names -> where they are within `imgdit` now, and how they are called there.

    Raises:
        AttributeError: it is no old name.
    """
    if name not in table:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, new = table[name].rpartition(".")
    now = new if new != name else f"imgdit.{home}.{new}"
    warn_renamed(f"{module}.{name}", now, 3)
    return getattr(importlib.import_module(f"imgdit.{home}"), new)


def _said_image(name: str) -> str:
    """A name of version 0.1, which said picture, in today's words."""
    for old, new in (("picture", "image"), ("Picture", "Image"), ("PICTURE", "IMAGE")):
        name = name.replace(old, new)
    return name


class MovedFinder:
    """Finds modules of `imgdit` by their old names; stands last in `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module that was moved; `None`: it was not."""
        if name.removeprefix("imgdit.") not in MOVED or not name.startswith("imgdit."):
            return None
        return ModuleSpec(name, MovedLoader(), is_package=name.removeprefix("imgdit.") in PACKAGES)


class MovedLoader(Loader):
    """Makes a module that hands on the names of the modules where its content is now."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Python makes an empty one."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill it."""
        old = module.__name__.removeprefix("imgdit.")
        new = MOVED[old]
        warn_renamed(f"imgdit.{old}", f"imgdit.{new}")
        homes = [importlib.import_module(f"imgdit.{home}") for home in (new, *SPLIT.get(old, ()))]

        def __getattr__(name: str) -> object:
            for home, now in itertools.product(homes, dict.fromkeys((name, _said_image(name)))):
                if hasattr(home, now):
                    return getattr(home, now)
            if name in RENAMED:
                return renamed(module.__name__, name)
            raise AttributeError(f"module {module.__name__!r} (now {homes[0].__name__!r}) has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[method-assign]
        module.__doc__ = homes[0].__doc__


PACKAGES = {"data.own", "evaluation", "evaluation.unlearning_methods", "apps.benches"}
"""Those of them that were folders."""


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
