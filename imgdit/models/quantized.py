"""Frozen weights in few bits, on which an adapter is trained.

| kind | entry | by | needs |
|---|---|---|---|
| int8 | 8 bits, a scale per row | `Int8Linear` below, on any device | nothing |
| torchao_int8 | 8 bits, a scale per row | torchao's Int8WeightOnlyConfig | imgdit[quantized] |
| bnb_int8 | 8 bits, outliers in half precision (LLM.int8, arXiv 2208.07339) | bitsandbytes | the same, and a GPU |
| bnb_nf4 | 4 bits, a scale per 64 (QLoRA, arXiv 2305.14314) | bitsandbytes | the same, and a GPU |

All linear layers but the few in `KEPT` are quantised. What is trained stays float32, and files of adapters do not know
what they were trained on. diffusers' layerwise casting, which would need nothing either, casts adapters too and has no
backward pass.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from imgdit.kernels import is_linear

KEPT = (
    *("x_embedder", "pos_embed", "context_embedder", "time_text_embed", "norm_out"),
    *("img_in", "txt_in", "all_x_embedder", "cap_embedder", "all_final_layer", "final_layer"),
    *("time_guidance_embed", "time_embed", "t_embedder"),
)
"""Layers at the model's edges, which are small and where rounding is seen most."""
KINDS = {
    "int8": 1.0,
    "torchao_int8": 1.0,
    "bnb_int8": 1.0,
    "bnb_nf4": 0.5 + 4 / 64,
}
"""Bytes per entry of a quantised matrix, without the scales of rows."""


def need(package: str, what: str) -> None:
    """Say how to install a package where it is missing.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec(package) is None:
        raise ImportError(f"{what} needs {package}; install it with: pip install 'imgdit[quantized]'")


def load_options(kind: str, dtype: torch.dtype, asked: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load a model quantised; none for "int8", which quantises afterwards.

    Args:
        kind: a key of `KINDS`, or "none".
        dtype: of the activations.
        asked: what the person wrote, for the message; the recipe's key by default.

    Raises:
        ImportError: the package that does it is not installed.
    """
    kept, asked = list(KEPT), asked or f"model.quantize {kind!r}"
    if kind == "torchao_int8":
        need("torchao", asked)
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)}
    if kind.startswith("bnb_"):
        need("bitsandbytes", asked)
        from diffusers import BitsAndBytesConfig

        bits: dict[str, Any] = {"load_in_8bit": True}
        if kind == "bnb_nf4":
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": BitsAndBytesConfig(**bits, llm_int8_skip_modules=kept)}
    return {}


def quantize_rows(model: nn.Module) -> None:
    """Replace a model's linear layers by `Int8Linear`, one after the other; on the meta device by their shapes."""
    for name, module in list(model.named_modules()):
        if is_linear(module) and name.partition(".")[0] not in KEPT:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Int8Linear(module))
    for parameter in model.parameters():  # what is left of a mapped file would keep all of it in memory
        parameter.data = parameter.data.clone()


class Int8Linear(nn.Linear):
    """A frozen linear layer with whole numbers in [-127, 127] and a scale per row.

    Args:
        linear: whose weights are rounded; its bias is kept.
    """

    weight_scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127  # (out,)
        rounded = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        # Not in state dicts: checkpoints hold what is trained, and this belongs to the frozen base.
        self.register_buffer("weight_scale", scale, persistent=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out = _Product.apply(x, self.weight, self.weight_scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ for W = scale · whole numbers. Autograd itself would keep the matrix that the numbers are turned into."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ weight.to(grad.dtype), None, None
