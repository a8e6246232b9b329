"""How a model is loaded, as a person says it. Without torch, so that `imgdit --help` stays quick."""

from __future__ import annotations

from collections.abc import Sequence
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
    compile: bool = False
    """Compile the denoiser's repeated blocks: the first image takes longer, the others less long."""
    lora: Sequence[str] = ()
    """LoRA files or Hub repositories for all tokens, as FILE or FILE:WEIGHT; the weight is 1 by default."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("offload", self.offload, get_args(Offload))
        check_choice("quantize", self.quantize, get_args(Quantize))
        object.__setattr__(self, "lora", tuple(self.lora or ()))
        for one in self.loras:
            if not one[0]:
                raise ValueError(f"a LoRA is FILE or FILE:WEIGHT, got {self.lora}")

    @property
    def loras(self) -> list[tuple[str, float]]:
        """File or repository, and weight, of each LoRA."""
        found = []
        for text in self.lora:
            name, colon, weight = text.rpartition(":")
            try:
                found.append((name, float(weight)) if colon else (text, 1.0))
            except ValueError:  # a colon of the name: C:\\lora.safetensors
                found.append((text, 1.0))
        return found

    @property
    def asked(self) -> list[str]:
        """What was asked for that decides pixels: precision, bits, compiled blocks and LoRAs."""
        said = [
            f"{name}={getattr(self, name)}"
            for name in ("dtype", "quantize", "compile")
            if getattr(self, name) != getattr(LoadOptions, name)
        ]
        return said + [f"lora={one}" for one in self.lora]


AUTO = LoadOptions()
"""What suits the machine."""
