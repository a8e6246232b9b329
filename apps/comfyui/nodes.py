"""ComfyUI's nodes around pipelines of diffusers and imgdit.

A node is a class with `INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION` and `CATEGORY`. ComfyUI's images are (B, H, W, C) in
[0, 1], its masks (B, H, W) or (H, W) in [0, 1]. Pipelines, adapters, conditions and unlearners travel on sockets of
their own: ComfyUI's MODEL, CLIP and VAE are other classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import torch

from imgdit import compat
from imgdit.adapters.condition import PLACES, Condition
from imgdit.adapters.omni_control import OmniControl
from imgdit.apps.jobs.shelf import MODES, SAE
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.defaults import GUIDANCE, STEPS
from imgdit.family import find_family
from imgdit.lora.files import LoadReport, legal_name, loaded_adapters
from imgdit.pipelines.load_options import Dtype, LoadOptions, Offload, Quantize
from imgdit.pipelines.loading import denoiser, load_pipeline
from imgdit.sae.unlearning import ConceptUnlearner

CATEGORY = "imgdit"
AS_TRAINED = "as trained"
DEFAULT_MODE = "default"
"""What `ConceptUnlearner.default_mode` chooses."""
_FRACTION = {"min": 0.0, "max": 1.0, "step": 0.01}
_TEXT = {"multiline": True, "dynamicPrompts": True}


@dataclass
class Loaded:
    """A pipeline and the condition adapters that nodes put on it."""

    pipe: Any
    control: OmniControl | None
    """Lets conditions into a pipeline whose call takes none."""
    reports: dict[tuple[str, str], LoadReport] = field(default_factory=dict)
    """By the source and the file of an adapter."""


class Unlearning(NamedTuple):
    """Concepts that a run leaves out, as `ConceptUnlearner.attach` takes them."""

    unlearner: ConceptUnlearner
    concepts: tuple[str, ...]
    mode: str | None
    multiplier: float | None


class LoadPipeline:
    """A folder or Hub id of a pipeline of diffusers or imgdit; "embedded" is the model that comes with imgdit."""

    RETURN_TYPES = ("IMGDIT_PIPELINE",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        choices = {"dtype": get_args(Dtype), "offload": get_args(Offload), "quantize": get_args(Quantize)}
        return {
            "required": {
                "model": ("STRING", {"default": EMBEDDED}),
                **{name: (list(values), {"default": values[0]}) for name, values in choices.items()},
            }
        }

    def load(self, model: str, dtype: Any, offload: Any, quantize: Any) -> tuple[Loaded]:
        pipe = load_pipeline(model, LoadOptions(dtype=dtype, offload=offload, quantize=quantize))
        takes = "conditions" in inspect.signature(type(pipe).__call__).parameters
        family = None if takes else find_family(compat.unwrapped(denoiser(pipe)))
        return (Loaded(pipe, None if family is None or family.conditions is None else OmniControl(pipe)),)


class LoadConditionAdapter:
    """A condition adapter on a pipeline: a .safetensors file, a folder, or a repository on the Hub."""

    RETURN_TYPES = ("IMGDIT_PIPELINE", "IMGDIT_ADAPTER")
    RETURN_NAMES = ("pipeline", "adapter")
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pipeline": ("IMGDIT_PIPELINE",), "source": ("STRING", {"default": "Yuanshi/OminiControl"})},
            "optional": {"weight_name": ("STRING", {"default": ""})},
        }

    def load(self, pipeline: Loaded, source: str, weight_name: str = "") -> tuple[Loaded, LoadReport]:
        load = pipeline.control.load if pipeline.control else getattr(pipeline.pipe, "load_control", None)
        if load is None:
            raise ValueError(
                f"{type(pipeline.pipe).__name__} takes no conditions; `imgdit models` lists the families that do"
            )
        path = str(SCENES / "adapters" / weight_name) if source == EMBEDDED else source
        if (report := pipeline.reports.get((source, weight_name))) is None:  # a changed graph runs its nodes again
            stem = (weight_name or source).removesuffix(".safetensors").rpartition("/")[2]
            name = legal_name(stem, loaded_adapters(compat.unwrapped(denoiser(pipeline.pipe))))
            report = load(path, (weight_name if path == source else "") or None, name)
            pipeline.reports[source, weight_name] = report
        return pipeline, report


class ApplyCondition:
    """An image that steers a generation through its adapter; several are chained by the socket `conditions`."""

    RETURN_TYPES = ("IMGDIT_CONDITIONS",)
    FUNCTION = "apply"
    CATEGORY = CATEGORY
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "adapter": ("IMGDIT_ADAPTER",),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}),
                "start": ("FLOAT", {"default": 0.0, **_FRACTION}),
                "end": ("FLOAT", {"default": 1.0, **_FRACTION}),
                "position": ([AS_TRAINED, *PLACES], {"default": AS_TRAINED}),
            },
            "optional": {"mask": ("MASK",), "conditions": ("IMGDIT_CONDITIONS",)},
        }

    def apply(
        self,
        adapter: LoadReport,
        image: torch.Tensor,
        strength: float,
        start: float,
        end: float,
        position: Any,
        mask: torch.Tensor | None = None,
        conditions: tuple[Condition, ...] = (),
    ) -> tuple[tuple[Condition, ...]]:
        if image.ndim != 4:
            raise ValueError(f"an image of ComfyUI is (B, H, W, C), got {tuple(image.shape)}")
        place: Any = (adapter.info.position or "aligned") if position == AS_TRAINED else position
        condition = Condition(
            image.movedim(-1, 1),  # (B, C, H, W)
            adapter.adapter,
            position=place,
            scale=adapter.info.scale or 1.0,
            strength=strength,
            start=start,
            end=end,
            mask=None if mask is None else _only_mask(mask),
        )
        return ((*conditions, condition),)


class LoadUnlearner:
    """Sparse autoencoders and their concepts: a folder, or a repository on the Hub."""

    RETURN_TYPES = ("IMGDIT_UNLEARNER", "STRING")
    RETURN_NAMES = ("unlearner", "concepts")
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("STRING", {"default": EMBEDDED})}}

    def load(self, source: str) -> tuple[ConceptUnlearner, str]:
        unlearner = ConceptUnlearner.from_pretrained(SCENES / SAE if source == EMBEDDED else source)
        return unlearner, ", ".join(unlearner.concepts)


class Unlearn:
    """Concepts, separated by commas, that images are generated without."""

    RETURN_TYPES = ("IMGDIT_UNLEARNING",)
    FUNCTION = "unlearn"
    CATEGORY = CATEGORY
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "unlearner": ("IMGDIT_UNLEARNER",),
                "concepts": ("STRING", {"default": ""}),
                "mode": ([DEFAULT_MODE, *MODES], {"default": DEFAULT_MODE}),
            },
            "optional": {"multiplier": ("FLOAT", {"default": -1.0, "min": -100.0, "max": 100.0, "forceInput": True})},
        }

    def unlearn(
        self, unlearner: ConceptUnlearner, concepts: str, mode: str, multiplier: float | None = None
    ) -> tuple[Unlearning]:
        names = tuple(name.strip() for name in concepts.split(",") if name.strip())
        return (Unlearning(unlearner, names, None if mode == DEFAULT_MODE else mode, multiplier),)


class Generate:
    """Images from a prompt, with conditions and without concepts."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"
    CATEGORY = CATEGORY
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 0, "min": 0, "max": 16384, "step": 16, "tooltip": "pixels; 0: the model's own"}
        return {
            "required": {
                "pipeline": ("IMGDIT_PIPELINE",),
                "prompt": ("STRING", dict(_TEXT)),
                "negative_prompt": ("STRING", dict(_TEXT)),
                "width": ("INT", dict(side)),
                "height": ("INT", dict(side)),
                "steps": ("INT", {"default": STEPS, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": GUIDANCE, "min": 0.0, "max": 100.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
            },
            "optional": {"conditions": ("IMGDIT_CONDITIONS",), "unlearning": ("IMGDIT_UNLEARNING",)},
        }

    @torch.no_grad()
    def generate(
        self,
        pipeline: Loaded,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        conditions: tuple[Condition, ...] = (),
        unlearning: Unlearning | None = None,
    ) -> tuple[torch.Tensor]:
        pipe = pipeline.pipe
        call: dict[str, Any] = {"negative_prompt": negative_prompt} if negative_prompt else {}
        call |= {"width": width or None, "height": height or None} if width or height else {}
        with ExitStack() as open_hooks:
            if conditions and pipeline.control is not None:
                open_hooks.enter_context(pipeline.control.use(conditions))
            elif conditions:
                call["conditions"] = list(conditions)
            if unlearning is not None and unlearning.concepts:
                unlearner, concepts, mode, multiplier = unlearning
                open_hooks.enter_context(
                    unlearner.attach(pipe, concepts, mode=mode, multiplier=multiplier)  # type: ignore[arg-type]
                )
            images = pipe(
                prompt=prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                **call,
                **_watched(steps),
            ).images
        return (torch.as_tensor(images, dtype=torch.float32),)  # (B, H, W, C)


def _only_mask(mask: torch.Tensor) -> torch.Tensor:
    """The one mask of a batch of masks, (H, W)."""
    if mask.ndim == 3 and len(mask) == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise ValueError(f"a condition has one mask, (1, H, W) or (H, W), got {tuple(mask.shape)}")
    return mask


def _watched(steps: int) -> dict[str, Callable[..., dict[str, Any]]]:
    """Inside ComfyUI, its progress bar and its Cancel button."""
    if find_spec("comfy") is None:
        return {}
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar = ProgressBar(steps)

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        throw_exception_if_processing_interrupted()
        bar.update(1)
        return {}

    return {"callback_on_step_end": step_end}


NODE_CLASS_MAPPINGS: dict[str, type] = {
    f"imgdit{node.__name__}": node
    for node in (LoadPipeline, LoadConditionAdapter, ApplyCondition, LoadUnlearner, Unlearn, Generate)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "imgditLoadPipeline": "Load pipeline (imgdit)",
    "imgditLoadConditionAdapter": "Load condition adapter (imgdit)",
    "imgditApplyCondition": "Apply condition (imgdit)",
    "imgditLoadUnlearner": "Load unlearner (imgdit)",
    "imgditUnlearn": "Unlearn (imgdit)",
    "imgditGenerate": "Generate (imgdit)",
}
