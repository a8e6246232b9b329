"""What a sparse autoencoder is, as its `cfg.json` says it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from imgdit.naming import check_choice
from imgdit.recipes import parse_as

_ACTIVATIONS = ("topk", "batch_topk", "sample_topk", "groupmax")


@dataclass(frozen=True)
class SAEConfig:
    """A sparse autoencoder's sizes and rules."""

    d_in: int
    """Width of the activations."""
    num_latents: int
    """Features it knows."""
    k: int = 32
    """Features active at once; what "at once" counts is said by `activation`."""
    activation: Literal["topk", "batch_topk", "sample_topk", "groupmax"] = "topk"
    """How the active ones are chosen in training, see `imgdit.sae.sparse.select`. At inference: all above the
    learned threshold where there is one, otherwise the k largest of each token (groupmax: of each group)."""
    input_unit_norm: bool = False
    """Each token is brought to mean 0 and standard deviation 1 before, and back after."""
    multi_topk: bool = False
    """A second loss with 4k active features, which keeps the code useful for other k."""
    normalize_decoder: bool = True
    """Rows of the decoder are brought to norm 1 before each training step."""
    transcode: bool = False
    """The output is not the input (sparsify's transcoders): the decoder's bias is not taken from the input."""
    skip_connection: bool = False
    """A linear map from input to output beside the code (sparsify)."""
    hookpoint: str | None = None
    """Module path in the pipeline, as in "transformer.transformer_blocks.3"."""
    source: Literal["output", "update"] = "output"
    """What of the module is read: its output, or output minus input (sdxl-unbox)."""
    threshold: float | None = None
    """Activation from which a feature counts as active at inference, learned with batch_topk."""

    def __post_init__(self) -> None:
        for name in ("d_in", "num_latents", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.k > self.num_latents:
            raise ValueError(f"k active features out of num_latents: got k={self.k}, num_latents={self.num_latents}")
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_choice("source", self.source, ("output", "update"))
        if self.activation == "groupmax" and self.num_latents % self.k:
            raise ValueError(f"groupmax needs num_latents that k divides, got {self.num_latents} and k={self.k}")

    def to_dict(self) -> dict[str, Any]:
        """As SAeUron's `cfg.json`, with our fields besides (its reader drops what it does not know)."""
        ours = dataclasses.asdict(self)
        return {
            "expansion_factor": max(self.num_latents // self.d_in, 1),
            **ours,
            "batch_topk": self.activation == "batch_topk",
            "sample_topk": self.activation == "sample_topk",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """From our, SAeUron's or sparsify's `cfg.json`; what is not known is ignored, as their readers do."""
        for name in ("d_in", "k"):
            if name not in values:
                raise ValueError(f"cfg.json has no {name!r}; it holds {', '.join(sorted(values))}")
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {name: value for name, value in values.items() if name in known}
        if not fields.get("num_latents"):
            sizes = values["d_in"], values.get("expansion_factor")
            if not all(type(size) is int for size in sizes):
                raise ValueError(f"cfg.json: d_in and expansion_factor must be whole numbers, got {sizes}")
            fields["num_latents"] = sizes[0] * sizes[1]
        if values.get("batch_topk"):
            fields["activation"] = "batch_topk"
        elif values.get("sample_topk"):
            fields["activation"] = "sample_topk"
        return parse_as(cls, fields, "cfg.json")
