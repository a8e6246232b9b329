"""The transformer of a folder in the class that it is trained in."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from imgdit.adapters.stock_frames import trained_classes
from imgdit.family import family_named
from imgdit.models.mmdit import MMDiT


def load_transformer(path: str, *, subfolder: str | None = None, **options: Any) -> torch.nn.Module:
    """The transformer of a folder: `MMDiT` where it is one, FLUX.1's or SD3's, else diffusers' own class.

    Args:
        path: folder, or repository on the Hub.
        subfolder: of the model in it.
        options: of `from_pretrained`.

    Raises:
        ValueError: the folder is of a class that is not trained.
    """
    owner, _ = transformer_class(path, subfolder)
    return owner.from_pretrained(path, subfolder=subfolder, **options)


def transformer_class(path: str, subfolder: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The class that the transformer of a folder is trained in, and its configuration.

    Raises:
        ValueError: see `load_transformer`.
    """
    config = MMDiT.load_config(path, subfolder=subfolder)
    name = str(config.get("_class_name"))
    family = family_named(name)
    if name == MMDiT.__name__ or (family is not None and family.as_mmdit is not None):
        return MMDiT, config
    if family is None or family.training is None:
        raise ValueError(
            f"{path} holds a {name}, which model.kind 'transformer' does not train; expected an MMDiT, a FLUX.1 or "
            f"SD3 transformer, or a {trained_classes()}"
        )
    return getattr(diffusers, name), config
