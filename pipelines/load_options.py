"""How a model is loaded, as a person says it. Without torch, so that `imgdit --help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from imgdit.naming import check_choice

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Offload = Literal["none", "model", "sequential", "group"]
Quantize = Literal["none", "int8", "nf4", "torchao_int8", "bnb_int8"]


@dataclass(frozen=True)
class LoadOptions:
    """In which precision, on which device, kept where, in how few bits."""

    dtype: Dtype = "auto"
    """Of all parts: weights and activations. "auto": bf16 on CUDA, fp32 elsewhere."""
    device: str = "auto"
    """As torch calls it: cpu, cuda, cuda:1, mps. "auto": CUDA where there is one, else cpu."""
    offload: Offload = "none"
    """What is kept in the computer's memory until the device needs it: whole models (model), single layers
    (sequential, group)."""
    quantize: Quantize = "none"
    """Bits of the denoiser's matrices: int8 needs nothing; nf4 and bnb_int8 need bitsandbytes and CUDA, torchao_int8
    needs torchao."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("offload", self.offload, get_args(Offload))
        check_choice("quantize", self.quantize, get_args(Quantize))

    @property
    def asked(self) -> list[str]:
        """What was asked for that decides pixels: precision and bits."""
        return [
            f"{name}={getattr(self, name)}"
            for name in ("dtype", "quantize")
            if getattr(self, name) != getattr(LoadOptions, name)
        ]


AUTO = LoadOptions()
"""What suits the machine."""
