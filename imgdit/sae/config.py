"""What a sparse autoencoder is, as its `cfg.json` says it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from imgdit.naming import check_choice
from imgdit.recipes import parse_as

_ACTIVATIONS = ("topk", "batch_topk", "sample_topk", "groupmax")

Reads = Literal["output", "update", "input"]
"""What of a module is encoded: its output, output minus input, or its input (transcoders)."""


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
    apply_b_dec_to_input: bool = True
    """The decoder's bias is subtracted from the input (SAELens's name; transcoders never do)."""
    transcode: bool = False
    """A transcoder: the module's input is encoded, and its output is what the features add up to."""
    skip_connection: bool = False
    """A linear map from input to output beside the code (sparsify)."""
    time_embed_dim: int | None = None
    """Size of the timestep embedding of a `TimeConditionedAutoencoder`; `None`: the timestep does not matter."""
    hookpoint: str | None = None
    """Module path in the pipeline, as in "transformer.transformer_blocks.3"."""
    source: Literal["output", "update"] = "output"
    """What of the module is read: its output, or output minus input (sdxl-unbox)."""
    threshold: float | None = None
    """Activation above which a feature counts as active at inference, learned with batch_topk; 0: all positive ones
    (ReLU)."""
    feature_thresholds: bool = False
    """Every feature has a threshold of its own, stored with the weights (JumpReLU, arXiv 2407.14435)."""

    def __post_init__(self) -> None:
        for name in ("d_in", "num_latents", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.time_embed_dim is not None and self.time_embed_dim < 2:
            raise ValueError(f"time_embed_dim must be at least 2, got {self.time_embed_dim}")
        if self.threshold is not None and self.feature_thresholds:
            raise ValueError(f"threshold is for all features, got {self.threshold} and thresholds per feature")
        if self.transcode and (self.source != "output" or self.input_unit_norm):
            raise ValueError(
                "a transcoder encodes a module's input and adds up to its output: source must be 'output' and "
                f"input_unit_norm false, got {self.source!r} and {self.input_unit_norm}"
            )
        if self.k > self.num_latents:
            raise ValueError(f"k active features out of num_latents: got k={self.k}, num_latents={self.num_latents}")
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_choice("source", self.source, ("output", "update"))
        if self.activation == "groupmax" and self.num_latents % self.k:
            raise ValueError(f"groupmax needs num_latents that k divides, got {self.num_latents} and k={self.k}")

    @property
    def reads(self) -> Reads:
        """What of its module is encoded."""
        return "input" if self.transcode else self.source

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether the decoder's bias is subtracted from what is encoded."""
        return self.apply_b_dec_to_input and not self.transcode

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
