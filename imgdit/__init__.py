"""Controllable image generation with diffusion transformers.

The names below are imported when they are first used, so `import imgdit` costs milliseconds and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from imgdit.moved import RENAMED, renamed
from imgdit.moved import install as install_old_names
from imgdit.quiet import keep_back

__version__ = "0.1.0"

_EXPORTS = {
    "BD3LM": "imgdit.models.bd3lm",
    "BlockTextPipeline": "imgdit.pipelines.block_text",
    "CardDetails": "imgdit.cards",
    "ConceptUnlearner": "imgdit.sae.unlearning",
    "Condition": "imgdit.adapters.condition",
    "ConditionOptions": "imgdit.adapters.options",
    "DiffusionPipeline": "imgdit.compat",
    "FluxOmniControlPipeline": "imgdit.pipelines.omni_control",
    "Frame": "imgdit.frames",
    "FrameLayout": "imgdit.layout",
    "ImageFrame": "imgdit.tasks",
    "ImageProjector": "imgdit.models.image_tokens",
    "ImageTextPipeline": "imgdit.pipelines.image_text",
    "ImageTextPipelineOutput": "imgdit.pipelines.image_text",
    "ImgDiTPipeline": "imgdit.pipelines.text_to_image",
    "ImgDiTPipelineOutput": "imgdit.pipelines.text_to_image",
    "KVCache": "imgdit.attention.cache",
    "LLaDAVPipeline": "imgdit.pipelines.vision_language",
    "LaViDaPipeline": "imgdit.pipelines.vision_language",
    "MMDiT": "imgdit.models.mmdit",
    "MMaDAPipeline": "imgdit.pipelines.mmada",
    "MMaDAPipelineOutput": "imgdit.pipelines.mmada",
    "MagViTv2": "imgdit.models.magvitv2",
    "MaskedTextPipeline": "imgdit.pipelines.masked_text",
    "MaskedTextPipelineOutput": "imgdit.pipelines.masked_text",
    "MaskedTextScheduler": "imgdit.schedulers.masked_text",
    "ModelMixin": "imgdit.compat",
    "MultiFrameFlowMatchScheduler": "imgdit.schedulers.flow_match",
    "NextDiT": "imgdit.models.nextdit",
    "OmniControl": "imgdit.adapters.omni_control",
    "OneDiffusionPipeline": "imgdit.pipelines.one_diffusion",
    "OneDiffusionPipelineOutput": "imgdit.pipelines.one_diffusion",
    "References": "imgdit.adapters.references",
    "SchedulerMixin": "imgdit.compat",
    "SparseAutoencoder": "imgdit.sae.model",
    "StableDiffusion3OmniControlPipeline": "imgdit.pipelines.omni_control",
    "TextFrame": "imgdit.frames",
}
__all__ = list(_EXPORTS)

# A wheel holds imgdit/pipelines and its siblings; a checkout keeps them next to imgdit/, so look there as well.
_here = Path(__file__).resolve().parent
if not (_here / "pipelines").exists() and (_here.parent / "pipelines" / "__init__.py").exists():
    __path__.append(str(_here.parent))

keep_back()  # before diffusers is imported, which tells of optional packages at once

install_old_names()

if TYPE_CHECKING:
    from imgdit.adapters.condition import Condition as Condition
    from imgdit.adapters.omni_control import OmniControl as OmniControl
    from imgdit.adapters.options import ConditionOptions as ConditionOptions
    from imgdit.adapters.references import References as References
    from imgdit.attention.cache import KVCache as KVCache
    from imgdit.cards import CardDetails as CardDetails
    from imgdit.compat import DiffusionPipeline as DiffusionPipeline
    from imgdit.compat import ModelMixin as ModelMixin
    from imgdit.compat import SchedulerMixin as SchedulerMixin
    from imgdit.frames import Frame as Frame
    from imgdit.frames import TextFrame as TextFrame
    from imgdit.layout import FrameLayout as FrameLayout
    from imgdit.models.bd3lm import BD3LM as BD3LM
    from imgdit.models.image_tokens import ImageProjector as ImageProjector
    from imgdit.models.magvitv2 import MagViTv2 as MagViTv2
    from imgdit.models.mmdit import MMDiT as MMDiT
    from imgdit.models.nextdit import NextDiT as NextDiT
    from imgdit.pipelines.block_text import BlockTextPipeline as BlockTextPipeline
    from imgdit.pipelines.image_text import ImageTextPipeline as ImageTextPipeline
    from imgdit.pipelines.image_text import ImageTextPipelineOutput as ImageTextPipelineOutput
    from imgdit.pipelines.masked_text import MaskedTextPipeline as MaskedTextPipeline
    from imgdit.pipelines.masked_text import MaskedTextPipelineOutput as MaskedTextPipelineOutput
    from imgdit.pipelines.mmada import MMaDAPipeline as MMaDAPipeline
    from imgdit.pipelines.mmada import MMaDAPipelineOutput as MMaDAPipelineOutput
    from imgdit.pipelines.omni_control import FluxOmniControlPipeline as FluxOmniControlPipeline
    from imgdit.pipelines.omni_control import (
        StableDiffusion3OmniControlPipeline as StableDiffusion3OmniControlPipeline,
    )
    from imgdit.pipelines.one_diffusion import OneDiffusionPipeline as OneDiffusionPipeline
    from imgdit.pipelines.one_diffusion import OneDiffusionPipelineOutput as OneDiffusionPipelineOutput
    from imgdit.pipelines.text_to_image import ImgDiTPipeline as ImgDiTPipeline
    from imgdit.pipelines.text_to_image import ImgDiTPipelineOutput as ImgDiTPipelineOutput
    from imgdit.pipelines.vision_language import LaViDaPipeline as LaViDaPipeline
    from imgdit.pipelines.vision_language import LLaDAVPipeline as LLaDAVPipeline
    from imgdit.sae.model import SparseAutoencoder as SparseAutoencoder
    from imgdit.sae.unlearning import ConceptUnlearner as ConceptUnlearner
    from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler as MultiFrameFlowMatchScheduler
    from imgdit.schedulers.masked_text import MaskedTextScheduler as MaskedTextScheduler
    from imgdit.tasks import ImageFrame as ImageFrame
else:
    # Hidden from type checkers, which would otherwise accept any attribute of this package.
    def __getattr__(name: str) -> object:
        if name in RENAMED:
            return renamed(__name__, name)
        if name not in _EXPORTS:
            from imgdit.naming import closest

            near = closest(name, _EXPORTS)
            raise AttributeError(f"module 'imgdit' has no attribute {name!r}; the nearest name is {near!r}")
        value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
