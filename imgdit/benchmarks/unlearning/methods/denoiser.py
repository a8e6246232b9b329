"""Hooks on the model that predicts: what a call is given, of which rows of its batch, and what it returns.

Backbones are diffusers' or `MMDiT`: their `forward` returns a tuple whose first entry is the prediction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from imgdit import compat
from imgdit.sae.calls import DenoiserCall, bind, describe_call
from imgdit.sae.hooks import denoiser_names

PER_SAMPLE = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "encoder_attention_mask",
    "timestep",
    "guidance",
)
"""Arguments with a row for each sample of the batch."""

_numbers = itertools.count()


def denoiser(pipe: Any) -> torch.nn.Module:
    """The transformer or UNet of a pipeline."""
    names = denoiser_names(pipe)
    if not names:
        raise ValueError(f"{type(pipe).__name__} has no transformer and no unet")
    return compat.unwrapped(getattr(pipe, names[0]))


def rows(arguments: dict[str, Any], of: slice | torch.Tensor) -> dict[str, Any]:
    """Arguments of a call for some samples of its batch."""
    chosen = {name: value[of] for name, value in arguments.items() if name in PER_SAMPLE and value is not None}
    return {**arguments, **chosen}


class CallHook(compat.CallNameHook):
    """Knows the arguments of the denoiser's call by name, and which rows are guided."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe, self.model = pipe, denoiser(pipe)

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        arguments = {name: value for name, value in bind(self.model, args, kwargs).items() if name != "self"}
        return (), self.before(arguments, describe_call(self.pipe, self.model, arguments, self.call_name))

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        return (self.after(output[0]), *output[1:])

    def before(self, arguments: dict[str, Any], call: DenoiserCall) -> dict[str, Any]:
        """The arguments that the model gets."""
        return arguments

    def after(self, prediction: torch.Tensor) -> torch.Tensor:
        """The prediction that the pipeline gets."""
        return prediction


@contextmanager
def placed(hook: CallHook) -> Iterator[None]:
    """The hook on its pipeline's denoiser while the context is open."""
    name = f"imgdit_unlearning_{next(_numbers)}"
    with compat.step_cache_set_aside(hook.model):
        compat.add_hook(hook.model, hook, name)
        try:
            yield
        finally:
            compat.remove_hook(hook.model, name)
