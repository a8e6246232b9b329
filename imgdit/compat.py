"""The one place that registers with diffusers and touches its private names.

Importing this module makes diffusers able to save and load components of imgdit (`model_index.json` entries of the
library "imgdit"), also from the Hub and without `trust_remote_code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.hooks import ModelHook
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
from diffusers.utils import is_xformers_available

__all__ = ["DiffusionPipeline", "ModelMixin", "SchedulerMixin"]

_SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]
# The library's classes are found by name on the package `imgdit`, their base classes too: it re-exports both.
pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
    "imgdit", {"ModelMixin": _SAVE_AND_LOAD, "SchedulerMixin": _SAVE_AND_LOAD}
)

# Published folders whose `model_index.json` leaves components out, by pipeline: where those are and what they are.
_UNLISTED = {"OneDiffusionPipeline": {"transformer": ["imgdit", "NextDiT"]}}


class SafetensorsOnly:
    """Loads no pickled weights: they can run code. Mixed in before diffusers' class."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained` with `use_safetensors=True`; all other arguments are passed on.

        Raises:
            ValueError: `use_safetensors=False` was asked for.
            OSError: the folder holds no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "got use_safetensors=False, but pickled weights can run code; convert them to safetensors"
            )
        kwargs["use_safetensors"] = True
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]


class DiffusionPipeline(SafetensorsOnly, diffusers.DiffusionPipeline):
    """Loads any imgdit pipeline by the class its `model_index.json` names.

    diffusers looks that class up in the root package of the loading class, and only if it is called like this one.
    """

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """A configuration file's contents, components that it leaves out added; the loader then treats them alike."""
        config = super()._dict_from_json_file(json_file)
        return _UNLISTED.get(str(config.get("_class_name")), {}) | config


def register_block(block: type, *, hidden_states: int, encoder_hidden_states: int | None) -> None:
    """Tell diffusers' step caches and layer skipping where a block's streams stand in its returned tuple."""
    TransformerBlockRegistry.register(
        block,
        TransformerBlockMetadata(
            return_hidden_states_index=hidden_states, return_encoder_hidden_states_index=encoder_hidden_states
        ),
    )


def register_attention_processor(processor: type, skip: Any) -> None:
    """Tell diffusers what a skipped attention returns: `skip(attn, hidden_states, encoder_hidden_states, …)`."""
    AttentionProcessorRegistry.register(processor, AttentionProcessorMetadata(skip_processor_output_fn=skip))


def block_streams(block: type) -> tuple[int, int | None] | None:
    """Places of the image and the text stream in what a block returns; `None` for a class diffusers does not list."""
    try:
        metadata = TransformerBlockRegistry.get(block)
    except ValueError:
        return None
    return metadata.return_hidden_states_index, metadata.return_encoder_hidden_states_index


class CallNameHook(ModelHook):
    """A hook on a denoiser that knows the name its pipeline gave the call by `cache_context`, such as "uncond"."""

    _is_stateful = True  # diffusers tells the name to stateful hooks only

    def __init__(self) -> None:
        super().__init__()
        self._state = StateManager(BaseState)

    @property
    def call_name(self) -> str | None:
        return None if self._state._context is None else self._state._context.name

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._state.reset()
        return module


@contextmanager
def step_cache_set_aside(model: torch.nn.Module) -> Iterator[None]:
    """The model without its step cache, which is enabled anew afterwards.

    Hooks registered meanwhile lie under the cache's own: registered above, a change would be applied again to what a
    cached step takes from an earlier one, and removing a hook from under the cache's would cut those off.
    """
    config = getattr(model, "_cache_config", None)
    if config is None:
        yield
        return
    cached: Any = model
    cached.disable_cache()
    try:
        yield
    finally:
        cached.enable_cache(config)


def register_text_to_image(name: str, pipeline: type) -> None:
    """Make `AutoPipelineForText2Image` know a pipeline."""
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = pipeline


def attention_backend_name(backend: Any) -> str:
    """Name of a backend, or of the active one for `None`."""
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    return AttentionBackendName(backend).value


def dispatch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    backend: Any,
    parallel_config: Any,
) -> torch.Tensor:
    """diffusers' attention dispatcher. (B, S, H, D) each."""
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel_config)


__all__ += [
    "CallNameHook",
    "attention_backend_name",
    "block_streams",
    "dispatch_attention",
    "is_xformers_available",
    "register_attention_processor",
    "register_block",
    "register_text_to_image",
    "step_cache_set_aside",
]
