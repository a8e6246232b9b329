"""A text head for an `MMDiT` that has none, and its file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from imgdit.io.atomic import write_tensors
from imgdit.models.mmdit import MMDiT

HEAD = ("text_proj_out.weight", "text_proj_out.bias", "text_embedder.weight")
"""Tensors of a file."""
_AXIS = "text_rope_axis"


def add_text_head(
    model: MMDiT,
    vocab_size: int,
    *,
    rope_axis: int | None = None,
    embeds: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Give a model a text head. What else it predicts stays bitwise what it was.

    Args:
        model: without a text head.
        vocab_size: tokens that the head predicts.
        rope_axis: `text_rope_axis` of `MMDiT`.
        embeds: `text_embeds` of `MMDiT`.
        generator: source of the embeddings, on the CPU; the head begins with zeros.

    Raises:
        ValueError: the model has a text head, or its last block ends the text stream.
    """
    if model.config.text_vocab_size is not None:
        raise ValueError(f"the model has a text head of {model.config.text_vocab_size} tokens already")
    blocks = model.transformer_blocks
    if not model.config.num_single_layers and blocks[-1].context_pre_only:
        raise ValueError(
            "the model's last block ends the text stream, so there is no text for a head to read; build a model with "
            "text_vocab_size and load these weights into it"
        )
    model.register_to_config(text_vocab_size=vocab_size, text_rope_axis=rope_axis, text_embeds=embeds)
    model._add_text_head(vocab_size, 0)
    with torch.no_grad():
        model.text_proj_out.weight.zero_()
        model.text_proj_out.bias.zero_()
        if embeds:
            weight = model.text_embedder.weight
            weight.copy_(torch.randn(weight.shape, generator=generator))
    for name in ("text_norm_out", "text_proj_out", "text_embedder"):
        if hasattr(model, name):
            getattr(model, name).to(model.device, model.dtype).train(model.training)


def save_text_head(model: MMDiT, path: str | Path) -> None:
    """Write a model's text head in half precision."""
    state = model.state_dict()
    tensors = {name: state[name].half().contiguous() for name in HEAD if name in state}
    axis = model.config.text_rope_axis
    write_tensors(Path(path), tensors, {"format": "pt", **({} if axis is None else {_AXIS: str(axis)})})


def load_text_head(model: MMDiT, path: str | Path) -> None:
    """Give a model the text head of a file.

    Raises:
        ValueError: the file is of another model, or the model has a text head.
    """
    with safe_open(path, framework="pt") as file:
        axis = (file.metadata() or {}).get(_AXIS)
        names = set(file.keys()) & set(HEAD)
        tensors = {name: file.get_tensor(name) for name in names}
    if HEAD[0] not in tensors or tensors[HEAD[0]].shape[1] != model.inner_dim:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{path} holds no text head of a model of width {model.inner_dim}: {found}")
    embeds = HEAD[2] in tensors
    add_text_head(model, len(tensors[HEAD[0]]), rope_axis=None if axis is None else int(axis), embeds=embeds)
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
