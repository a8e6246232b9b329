"""How a call of our pipelines samples, and what `OneDiffusionPipeline` makes of its frames: one object for each group
of arguments, checked where it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from imgdit.cameras import FOCAL_LENGTH
from imgdit.naming import check_choice, old_names, shown

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """How a call samples, by the names of its arguments; `ImgDiTPipeline` says what each does.

    Raises:
        ValueError: a value that no model takes.
    """

    num_inference_steps: int
    sigmas: Sequence[float] | None
    guidance_scale: float
    true_cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    num_images_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    max_sequence_length: int = 256
    output_type: str = "pil"
    joint_attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "true_cfg_scale"):
            scale = getattr(self, name)
            if not isinstance(scale, Real):
                raise ValueError(f"{name} is one number for all images, got {shown(scale)}")
            if not float(scale) >= 0:
                raise ValueError(f"{name} must not be negative, got {scale}")
        low, high = self.guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1 in sigma, got {(low, high)}")
        if self.num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {self.num_images_per_prompt}")
        check_choice("output_type", self.output_type, OUTPUT_TYPES)

    @property
    def callback_tensors(self) -> Sequence[str]:
        """Names of the tensors that the callback gets."""
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            return self.callback_on_step_end.tensor_inputs
        names = self.callback_on_step_end_tensor_inputs
        return ["latents"] if names is None else names


@old_names(given_level="conditioning_level")
@dataclass(frozen=True, eq=False)
class FrameOptions:
    """What `OneDiffusionPipeline` makes of its frames, by the names of its arguments.

    Raises:
        ValueError: a value that no model takes.
    """

    crop: bool = True
    """See `pixels_of_images`."""
    focal_length: float | torch.Tensor = FOCAL_LENGTH
    """Of the cameras, in image widths, or intrinsics; see `imgdit.cameras.relative_rays`."""
    conditioning_level: Literal["last", "clean"] | None = None
    """Noise level of conditioning frames: the schedule's lowest, or 0. `None`: as the model was trained."""
    noise_scale: float = 1.0
    """Factor of the generated tokens by which the schedule is shifted."""
    scale_factor: float = 1.0
    scale_watershed: float = 1.0
    """See `NextDiT.forward`."""

    def __post_init__(self) -> None:
        check_choice("conditioning_level", self.conditioning_level, ("last", "clean", None))
        for name in ("noise_scale", "scale_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def scaling(self) -> dict[str, float]:
        """What a `NextDiT` takes."""
        return {"scale_factor": self.scale_factor, "scale_watershed": self.scale_watershed}
