"""The methods by name, with the settings that they are compared at and those that tuning tries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from imgdit.benchmarks.unlearning.methods.closed_form import edited_in_closed_form
from imgdit.benchmarks.unlearning.methods.direction import without_direction
from imgdit.benchmarks.unlearning.methods.features import without_features
from imgdit.benchmarks.unlearning.methods.finetune import erased_by_finetuning
from imgdit.benchmarks.unlearning.methods.gem import erased_by_velocity_matching
from imgdit.benchmarks.unlearning.methods.guidance import negative_prompt, nothing, safe_latent_guidance
from imgdit.benchmarks.unlearning.methods.material import Unlearned
from imgdit.benchmarks.unlearning.methods.orthogonal import erased_by_rotation
from imgdit.benchmarks.unlearning.methods.safree import filtered_tokens
from imgdit.benchmarks.unlearning.methods.steerers import steered_away


class Method(NamedTuple):
    """One row of the table."""

    title: str
    prepare: Callable[..., Unlearned]
    """Called as `prepare(pipe, concepts, material, **settings)`."""
    grid: tuple[Mapping[str, Any], ...] = ({},)
    """Settings that tuning tries; the first are used without it. One setting serves all concepts."""
    needs_saes: bool = False
    needs_other: bool = False
    """Whether it puts another label in the place of one, so that not all of a kind can be unlearned at once."""
    rule: int = 1
    """Raised where a method makes other images than an earlier version of it; stored images tell them apart."""

    def usable(self, streams: Collection[str]) -> tuple[Mapping[str, Any], ...]:
        """Settings of the grid for which there is an autoencoder.

        Args:
            streams: what autoencoders read, see `Material.streams`.
        """
        if not self.needs_saes:
            return self.grid
        found = tuple(settings for settings in self.grid if settings.get("stream", "image") in streams)
        if not found:
            wanted = " or ".join(dict.fromkeys(settings.get("stream", "image") for settings in self.grid))
            raise ValueError(
                f"the method {self.title!r} needs an autoencoder of the {wanted}; there are some of the "
                f"{' and the '.join(streams)}"
            )
        return found

    @property
    def tuned(self) -> int:
        """Values that differ within the grid."""
        names = {name for settings in self.grid for name in settings}
        return sum(len({repr(settings.get(name)) for settings in self.grid}) > 1 for name in names)


# Safe Latent Diffusion's own settings (its table of hyper-parameters): medium, weak, strong, maximum.
_SAFE = (
    {"scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4, "warmup": 0.2},
    {"scale": 200.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum_beta": 0.0, "warmup": 0.3},
    {"scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum_beta": 0.7, "warmup": 0.14},
    {"scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum_beta": 0.7, "warmup": 0.0},
)
_RANDOM = 0


def _features(*pairs: tuple[int, float], **fixed: Any) -> tuple[dict[str, Any], ...]:
    """SAeUron's own values to tune: how many features, and by how much their activation is turned round."""
    return tuple({"top_n": top_n, "multiplier": multiplier, **fixed} for top_n, multiplier in pairs)


_IMAGE = ((4, -5.0), (4, -1.0), (2, -5.0), (8, -5.0), (4, -15.0), (8, -1.0))
_TEXT = ((4, -0.5), (4, -0.2), (4, -1.0), (8, -0.5))
_FLOOR = 0.1  # ours leaves out features that a concept only seems to have


METHODS: dict[str, Method] = {
    "none": Method("none", nothing),
    "negative": Method("negative prompt", negative_prompt),
    "safe": Method("safe latent guidance", safe_latent_guidance, _SAFE),
    "finetune": Method(
        "ESD-like fine-tune",
        erased_by_finetuning,
        tuple({"lr": lr} for lr in (1e-4, 3e-5, 3e-4, 1e-3)),
        needs_other=True,
    ),
    "gem": Method(
        "GEM", erased_by_velocity_matching, tuple({"lr": lr} for lr in (1e-3, 3e-4, 1e-4, 3e-3)), needs_other=True
    ),
    "closed_form": Method(
        "UCE-like closed form",
        edited_in_closed_form,
        tuple({"preserve": weight} for weight in (0.1, 0.01, 1.0, 0.3)),
        needs_other=True,
    ),
    "orthogonal": Method(
        "OCE, rotation",
        erased_by_rotation,
        tuple({"erase": weight} for weight in (1000.0, 300.0, 100.0, 3000.0)),
        needs_other=True,
    ),
    "safree": Method(
        "SAFREE",
        filtered_tokens,
        (  # as published, and in all steps
            {"alpha": 0.01, "last": 10.0, "middle": 0.5333},
            *({"alpha": alpha, "last": 50.0, "middle": 0.0} for alpha in (0.01, 0.0)),
        ),
    ),
    "direction": Method(
        "difference of means",
        without_direction,
        (
            *({"strength": strength, "stream": "text"} for strength in (1.0, 1.5, 2.0)),
            *({"strength": strength, "stream": "image"} for strength in (1.0, 2.0, 4.0)),
        ),
        needs_saes=True,
    ),
    "steerers": Method(
        "Concept Steerers",
        steered_away,
        tuple({"strength": strength, "stream": "text"} for strength in (-0.5, -0.25, -1.0, -2.0)),
        needs_saes=True,
    ),
    "saeuron": Method(
        "SAeUron as published", without_features, _features(*_IMAGE, paper_compat=True), needs_saes=True
    ),
    "scale": Method(
        "ours, scale",
        without_features,
        (
            *_features(*_TEXT, stream="text", floor=_FLOOR),
            *_features(*_IMAGE[:2], stream="image", floor=_FLOOR),
        ),
        needs_saes=True,
    ),
    "replace": Method(
        "ours, replace",
        without_features,
        tuple(
            {"mode": "replace", "top_n": top_n, "stream": s, "floor": _FLOOR}
            for s in ("text", "image")
            for top_n in (2, 4)
        ),
        needs_saes=True,
        rule=2,
    ),
    "random": Method(
        "random features",
        without_features,
        _features(_TEXT[0], random_seed=_RANDOM, stream="text", floor=_FLOOR),
        needs_saes=True,
    ),
}
"""In the order of the table."""
