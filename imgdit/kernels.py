"""Which kernel multiplies float32 matrices on a CPU.

PyTorch hands them to MKL, whose kernels for other makers' processors use AVX2 where the processor has AVX-512; oneDNN,
which the same PyTorch carries, uses what is there. On a Zen 5 core it takes 0.47 times as long (docs/log.md).

`torch.backends.mkldnn.enabled = False` leaves everything to MKL, bit for bit what the layers compute alone.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from imgdit import compat

SMALLEST = 2**22
"""Multiplications from which oneDNN's longer way to its kernel pays (84 x 256 x 256: 0.083 ms against MKL's 0.107)."""
LARGE_WEIGHT = 2**20
"""Entries of a weight from which it pays with any number of rows (3 x 768 x 4608: 1.0 ms against MKL's 2.7)."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 on which MKL takes its AVX2 way. Told by its maker, never by timing:
    the same machine always gives the same bits."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or compat.onednn_linear() is None:
        return False
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.exists() else platform.processor()
    return "GenuineIntel" not in text


class OneDNNLinear(nn.Linear):
    """`nn.Linear` that multiplies by oneDNN in float32 inference on a CPU, and is `nn.Linear` everywhere else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not _fits(self.weight, input):
            return super().forward(input)
        return _onednn(input, self.weight, self.bias)


def prefer_onednn(model: nn.Module) -> Callable[[], None]:
    """Let a model's linear layers multiply by oneDNN where that is faster: float32 inference on AMD's processors.

    The layers stay the same objects, with their parameters, names and hooks; only their class becomes `OneDNNLinear`.
    Subclasses, such as quantised layers, are left alone. On other processors nothing changes.

    Returns:
        What takes the change back.
    """
    changed = [layer for layer in model.modules() if type(layer) is nn.Linear] if onednn_is_faster() else []
    for layer in changed:
        layer.__class__ = OneDNNLinear

    def undo() -> None:
        for layer in changed:
            if type(layer) is OneDNNLinear:
                layer.__class__ = nn.Linear  # type: ignore[assignment]

    return undo


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear` itself, by whichever kernel, and no subclass with other weights."""
    return type(module) in (nn.Linear, OneDNNLinear)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias` of rows (N, features), in the same way; `out` is a place that a kernel may write to."""
    return _onednn(x, weight, bias) if _fits(weight, x) else torch.addmm(bias, x, weight.t(), out=out)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return compat.onednn_linear()(x.contiguous(), weight, bias, "none", [], "")


def _fits(weight: torch.Tensor, x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (weight.numel() >= LARGE_WEIGHT or x.numel() * weight.shape[0] >= SMALLEST)
        and type(x) is torch.Tensor
        and type(weight) is nn.Parameter  # no DTensor, no quantised weight
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Of one product, for `FlopCounterMode`, which does not know oneDNN's."""
    return 2 * math.prod(x) * weight[0]


if compat.onednn_linear() is not None and compat.onednn_linear() not in flop_registry:  # a reload finds it there
    register_flop_formula(compat.onednn_linear())(_flops)
