"""How much a model sees of the reference images that its pipeline is given: FLUX.2, Kontext, Qwen-Image-Edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from imgdit.adapters.condition import acts_in, check_acting
from imgdit.frames import Frame
from imgdit.images.masks import to_mask
from imgdit.naming import check_choice

Cached = bool | Literal["approximate"]


@dataclass(frozen=True, eq=False)
class References:
    """Settings of a pipeline's own reference images, which need no adapter. The defaults change nothing.

    Raises:
        ValueError: a value that no reference can have.
    """

    strength: float | Sequence[float] = 1.0
    """γ: log γ is added to the attention logits between a reference and everything else, as for a condition. 1 is no
    bias, 0 leaves it out of the attention. One for all references, or one for each."""
    start: float = 0.0
    """Fraction of the steps after which they begin to act; before, they are left out."""
    end: float = 1.0
    """Fraction of the steps after which they act no more."""
    mask: Any = None
    """Which tokens of a reference are present, as `Condition.mask`; a list has one for each, `None` for all tokens."""
    cached: Cached = False
    """`True`: compute blocks of text and references that do not depend on the timestep once in a run, which is exact:
    those before the joint blocks of FLUX.3, unless it is a flow map. In steps in which conditions act they are
    computed. "approximate", of the other families: read the references' keys and values of the first step in which
    they act in all later steps. They depend on the timestep, so results change; in the first step that reads them the
    model also computes them, and the relative change of its result is logged (`OmniControl.reference_error`)."""

    def __post_init__(self) -> None:
        if self.cached not in (True, False):
            check_choice("cached", self.cached, ("approximate",))
        for strength in self._listed(self.strength):
            check_acting(strength, self.start, self.end)

    @staticmethod
    def _listed(value: Any) -> Sequence[Any]:
        return value if isinstance(value, (list, tuple)) else (value,)

    def of(self, number: int, count: int) -> tuple[float, Any]:
        """Strength and mask of a reference, numbered from 0.

        Raises:
            ValueError: the settings are for another number of references.
        """
        found = []
        for name in ("strength", "mask"):
            listed = self._listed(getattr(self, name))
            if len(listed) not in (1, count):
                raise ValueError(
                    f"{name} has {len(listed)} values for the {count} reference image(s) of the pipeline; give one "
                    "for all or one for each"
                )
            found.append(listed[number % len(listed)])
        return found[0], found[1]

    def acts(self, step: int, steps: int) -> bool:
        """Whether they act in a step, numbered from 0."""
        return acts_in(step, steps, self.start, self.end)

    def seen(self, references: Sequence[Frame], side: int, *, acting: bool, keep: bool) -> SeenReferences:
        """What is in the sequence of references.

        Args:
            references: frames of all of them, in the order of their tokens.
            side: pixels per side of a token.
            acting: whether they act in the present step.
            keep: leave those that do not act now in the sequence, for caches that compare steps.

        Raises:
            ValueError: there are none, or the settings are for another number or size.
        """
        if not references:
            raise ValueError(
                "references() changes what a model sees of the pipeline's reference images, and this call has none; "
                "pass image= to the pipeline, or leave references() out"
            )
        frames: list[Frame] = []
        present: list[torch.Tensor] = []
        for number, frame in enumerate(references):
            strength, own_mask = self.of(number, len(references))
            mask = None if own_mask is None else to_mask(own_mask, frame.size, side)
            if strength == 0.0 or not (acting or keep):
                present.append(torch.zeros(frame.size, dtype=torch.bool).flatten())
                continue
            frames.append(replace(frame, strength=strength, mask=mask, index=number + 1.0))
            present.append(torch.ones(frame.length, dtype=torch.bool) if mask is None else mask.flatten())
        return SeenReferences(
            tuple(frames),
            torch.cat(present),
            hidden=not acting,
            cached=self.cached is True,
            keeps=self.cached == "approximate" and acting and bool(frames),
        )


class SeenReferences(NamedTuple):
    """The references of a pass."""

    frames: tuple[Frame, ...]
    """Of those in the sequence."""
    present: torch.Tensor
    """Boolean, one for each of their tokens that the model is given: whether it is in the sequence."""
    hidden: bool
    """Whether those in the sequence are not seen."""
    cached: bool
    """Whether what does not depend on the timestep is kept over the steps."""
    keeps: bool
    """Whether their keys and values are those of the first step."""

    @property
    def changes(self) -> bool:
        """Whether they are seen, or computed, otherwise than by the plain model."""
        return (
            self.hidden
            or self.cached
            or self.keeps
            or not bool(self.present.all())
            or any(frame.strength != 1.0 for frame in self.frames)
        )
