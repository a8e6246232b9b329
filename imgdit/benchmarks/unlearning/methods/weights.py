"""Other weights in a model for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from imgdit.benchmarks.unlearning.methods.denoiser import denoiser
from imgdit.benchmarks.unlearning.methods.material import Unlearned


@contextmanager
def swapped(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Parameters by name have other values while the context is open; then they have their own storage again.

    Layers that adapters were put on since keep their names here.
    """
    known = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    parameters = {name: known[name] for name in weights}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


@contextmanager
def training(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters that have these values and alone get gradients while the context is open; an optimizer's steps
    change the values in `weights`."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with swapped(model, weights), torch.enable_grad():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in weights)
            yield [model.get_parameter(name) for name in weights]
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None


def size_of(weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def with_weights(changed: Mapping[str, torch.Tensor]) -> Unlearned:
    """A pipeline whose denoiser has other values of some parameters, by name, while it is attached."""

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        with swapped(denoiser(pipe), changed):
            yield {}

    return Unlearned(attach, size_of(changed))
