"""What lies in a model's folder and beside it, read without loading the model: what it can be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from imgdit.apps.jobs.request import Control, Request
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.hub import INDEX, find_pipeline
from imgdit.io.safe_json import read_object
from imgdit.lora.files import FoundAdapter, find_adapters
from imgdit.naming import check_name, nearest
from imgdit.pipelines.few_steps import TURBO, steps_of, turbo_file
from imgdit.prompts import PromptWords, read_prompt, remark
from imgdit.sae.concepts import check_concepts, concept_names
from imgdit.sae.files import CONFIG
from imgdit.tasks import KINDS, TASKS
from imgdit.taught import Taught, read_taught

ADAPTERS, SAE = "adapters", "sae"
"""Folders, inside a pipeline's, of condition adapters (`NAME.safetensors`) and of sparse autoencoders."""
MODES = ("scale", "remove", "replace")
"""Ways to unlearn, see `ConceptUnlearner.attach`."""
FRAMED = ("ImgDiTPipeline", "OneDiffusionPipeline")
"""Pipelines that take frames."""


class Shelf:
    """Names and files around a model.

    Args:
        source: folder or Hub repository of a pipeline.
        adapters: folder of condition adapters; the pipeline folder's own by default.
        sae: folder of sparse autoencoders; the pipeline folder's own by default.

    Raises:
        ValueError: a folder that was named does not exist.
    """

    def __init__(self, source: str | Path, adapters: Path | None = None, sae: Path | None = None):
        for what, folder in (("adapters", adapters), ("sparse autoencoders", sae)):
            if folder is not None and not folder.expanduser().exists():
                raise ValueError(f"there is no folder {str(folder)!r} of {what}")
        self.places = {
            "model": str(source),
            "adapters": None if adapters is None else str(adapters),
            "sae": None if sae is None else str(sae),
        }
        self.home = SCENES if source == EMBEDDED else Path(source).expanduser()
        """The pipeline's folder; of a model on the Hub there is none."""
        self.adapter_folder = self.home / ADAPTERS if adapters is None else adapters.expanduser()
        self.sae_folder = self.home / SAE if sae is None else sae.expanduser()

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """Files of condition adapters by name."""
        return {name: found.path for name, found in self.found.items()}

    @cached_property
    def found(self) -> dict[str, FoundAdapter]:
        """The adapters by name; the header of each file is read, once."""
        return find_adapters(self.adapter_folder)

    @cached_property
    def _adapter_of(self) -> dict[str, str]:
        """Adapter by what its condition shows, as its header tells."""
        return {task: name for name, found in self.found.items() if (task := found.info.task)}

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks of frames that the model can be asked for; a `Session` that has loaded the model sets them."""
        index = self._index
        if index.get("_class_name") not in FRAMED:
            return []
        if index.get("transformer", ["imgdit", "NextDiT"])[1] == "NextDiT":  # it reads any token
            return list(TASKS)
        from transformers import AutoTokenizer

        taught = AutoTokenizer.from_pretrained(self.home, subfolder="tokenizer").get_vocab()
        return [name for name, task in TASKS.items() if task.token in taught]

    @property
    def controls(self) -> list[str]:
        """Kinds of images that can steer, through an adapter or as a conditioning frame."""
        framed = [name for name in self.tasks if TASKS[name].frames == (2, 2)]
        return list(dict.fromkeys([*self._adapter_of, *self.adapters, *framed]))

    def adapter_for(self, kind: str) -> str | None:
        """Name of the adapter that reads a kind of image."""
        return kind if kind in self.adapters else self._adapter_of.get(kind)

    @cached_property
    def turbo(self) -> tuple[Path, int] | None:
        """The few-step LoRA of the pipeline's folder, and its number of steps; `None`: there is none.

        Raises:
            ValueError: the file is no few-step LoRA.
        """
        file = turbo_file(self.home)
        return None if file is None else (file, steps_of(file))

    @property
    def has_sae(self) -> bool:
        """Whether there is an autoencoder to unlearn and steer with."""
        return self.sae_folder.is_dir() and any(self.sae_folder.rglob(CONFIG))

    @cached_property
    def taught(self) -> Taught:
        """Sizes and words, where the folder tells them."""
        return read_taught(self.home)

    @cached_property
    def prompt_words(self) -> PromptWords | None:
        """The captions that the model was trained on, where the folder tells them."""
        return PromptWords.of_folder(self.home)

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self.home / INDEX
        return read_object(path) if path.is_file() else {}

    # What may be asked

    def check(self, request: Request) -> None:
        """Refuse names that nothing here goes by: kinds, adapters, concepts, modes.

        Of a model that is on the Hub only what lies here is looked at; the rest is refused when it is loaded.

        Raises:
            ValueError: an unknown name, with the nearest known one, or a model that is nowhere.
        """
        find_pipeline(self.places["model"] or "")
        if request.concepts:
            if request.mode is not None:
                check_name("mode", request.mode, MODES)
            self.need_sae()
            check_concepts(request.concepts, concept_names(self.sae_folder))
        if request.turbo:
            self.check_turbo(request)
        if not self._index:
            return
        if request.controls:
            self.as_frames(request.controls)
        if request.frames:
            self._check_kinds([frame.kind for frame in request.frames])

    def check_turbo(self, request: Request) -> None:
        """Refuse what the few-step LoRA was not trained for.

        Raises:
            ValueError: there is none, or other steps, guidance, or edits are asked for.
        """
        if self.turbo is None:
            raise ValueError(
                f"{self.places['model']} has no few-step LoRA ({TURBO} in its folder); leave out turbo, or train one: "
                "imgdit train own/few_steps"
            )
        steps = self.turbo[1]
        asked = {
            f"steps={request.steps}": request.steps != steps,
            f"guidance={request.guidance}": request.guidance is not None and request.guidance > 1.0,
            f"negative_prompt={request.negative_prompt!r}": bool(request.negative_prompt),
            "frames": bool(request.frames) or (bool(request.controls) and self.as_frames(request.controls)),
            "concepts": bool(request.concepts),
            "features": bool(request.features),
        }
        wrong = [name for name, holds in asked.items() if holds]
        if wrong:
            raise ValueError(
                f"turbo generates images from prompts and condition adapters in {steps} steps with a guidance of 1, "
                f"which is in its weights; it does not go with {', '.join(wrong)}"
            )

    def about_words(self, prompts: Iterable[str]) -> str | None:
        """One message on words that this model was never taught and draws as something else; `None`: nothing to say,
        or nothing known of its words."""
        words = self.prompt_words
        if words is None:
            return None
        return remark(words, [note for prompt in prompts for note in read_prompt(words, prompt).notes])

    def need_sae(self) -> None:
        """Refuse to go on without an autoencoder."""
        if not self.has_sae:
            raise ValueError(
                f"there is no sparse autoencoder in {self.sae_folder}; train one with `imgdit sae train RECIPE`, or "
                "name its folder"
            )

    def as_frames(self, controls: Sequence[Control]) -> bool:
        """Whether the only control is a frame that the model was taught to read, instead of an adapter's condition.

        Raises:
            ValueError: nothing reads a control, or it is used as only an adapter's can be.
        """
        without = [control for control in controls if self.adapter_for(control.kind) is None]
        for control in without:
            if control.kind not in self.controls:
                raise ValueError(
                    f"nothing reads a control of kind {nearest(control.kind, self.controls)} "
                    f"(adapters are looked for in {self.adapter_folder})"
                )
        if without and len(controls) > 1:
            raise ValueError(
                f"there is no adapter for {without[0].kind!r} in {self.adapter_folder}; without one it can only be "
                "used alone, as a conditioning frame"
            )
        if without and (without[0].strength, without[0].start, without[0].end) != (1.0, 0.0, 1.0):
            raise ValueError(
                f"strength, start and end belong to adapters, and there is none for {without[0].kind!r} in "
                f"{self.adapter_folder}; leave them out"
            )
        return bool(without)

    def _check_kinds(self, kinds: Sequence[str]) -> None:
        """Refuse frames that the model does not know."""
        name = self._index.get("_class_name")
        if name not in FRAMED:
            raise ValueError(
                f"{name} generates images from text and conditions; for any-to-any take the embedded model or a "
                "OneDiffusion folder"
            )
        tasks = self.tasks
        taught = dict.fromkeys(["image", *tasks, *(TASKS[task].condition for task in tasks)])
        known = [kind for kind in taught if kind in KINDS or TASKS[kind].frames == (2, 2)]
        for kind in kinds:
            check_name("kind of frame", kind, known)
