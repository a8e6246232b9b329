"""LoRA files in and out of an imgdit pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.loaders import AuraFlowLoraLoaderMixin


class LoraLoaderMixin(AuraFlowLoraLoaderMixin):
    """LoRA for the transformer alone: load, save with metadata, combine, fuse, hot-swap. Safetensors only.

    diffusers' mixin for a transformer without text-encoder LoRA does the work; it would also read pickles.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> Any:
        """Tensors of a LoRA file or of a repository's.

        Raises:
            ValueError: the file is not safetensors; unpickling it could run code.
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
        return super().lora_state_dict(source, use_safetensors=True, **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """Take fused adapters out of the base again. (The parent's default names text encoders, and fails.)"""
        super().unfuse_lora(components=list(components), **kwargs)
