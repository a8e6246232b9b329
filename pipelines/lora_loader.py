"""LoRA files in and out of an imgdit pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.loaders import AuraFlowLoraLoaderMixin
from diffusers.utils import get_adapter_name

from imgdit.lora.dialects import LoraPair
from imgdit.lora.files import all_or_nothing, check_adapter_name, diffusers_state, pairs_of, read_adapter
from imgdit.lora.fitting import keep_precision

_PLAIN = re.compile(r"transformer\.(?!base_model\.).+\.lora_(A|B|magnitude_vector)(\.weight|\.bias)?")
"""A key as diffusers' pipelines write it, which its own loader reads as it stands."""


class LoraLoaderMixin(AuraFlowLoraLoaderMixin):
    """LoRA for the transformer alone: load, save with metadata, combine, fuse, hot-swap. Safetensors only.

    diffusers' mixin for a transformer without text-encoder LoRA does the work; it would also read pickles, and of
    other dialects' files nothing.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> Any:
        """Tensors of a LoRA file or of a repository's, under diffusers' names whatever the file's are.

        Raises:
            ValueError: the file is not safetensors, as unpickling it could run code; or it holds no plain LoRA under
                names that are known.
        """
        source = pretrained_model_name_or_path_or_dict
        weight_name = kwargs.get("weight_name")
        if weight_name is None and not isinstance(source, dict) and os.path.isfile(source):
            weight_name = os.path.basename(source)
        if kwargs.pop("use_safetensors", True) is False or not str(weight_name or ".safetensors").endswith(
            ".safetensors"
        ):
            raise ValueError(
                f"got {weight_name or 'use_safetensors=False'}, expected a .safetensors file: pickled weights can run "
                "code when they are loaded. Convert the file first"
            )
        with_metadata = kwargs.pop("return_lora_metadata", False)
        tensors, metadata = super().lora_state_dict(source, use_safetensors=True, return_lora_metadata=True, **kwargs)
        if not all(_PLAIN.fullmatch(key) for key in tensors):
            tensors, metadata = diffusers_state(
                pairs_of(source) if isinstance(source, dict) else _read(source, **kwargs)
            )
        return (tensors, metadata) if with_metadata else tensors

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: Any,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        *,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """diffusers' own, which leaves the transformer as it was where it fails.

        Raises:
            ValueError: the name is taken, or torch cannot have it.
        """
        name = get_adapter_name(transformer) if adapter_name is None else adapter_name
        check_adapter_name(transformer, name, hotswap)
        with all_or_nothing(transformer, name, hotswap, _pipeline):
            super().load_lora_into_transformer(
                state_dict, transformer, name, _pipeline=_pipeline, hotswap=hotswap, **kwargs
            )
            keep_precision(transformer, name, state_dict)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """Take fused adapters out of the base again. (The parent's default names text encoders, and fails.)"""
        super().unfuse_lora(components=list(components), **kwargs)


def _read(
    source: str | os.PathLike, weight_name: str | None = None, subfolder: str | None = None, **options: Any
) -> dict[str, LoraPair]:
    """The LoRAs of a file of any dialect.

    Args:
        options: of diffusers' `load_lora_weights`, of which those of the Hub count.
    """
    if subfolder and weight_name:
        weight_name = f"{subfolder}/{weight_name}"
    elif subfolder:
        source = os.path.join(source, subfolder)
    hub = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    file = read_adapter(os.fspath(source), weight_name, **{name: options[name] for name in hub if name in options})
    return file.pairs
