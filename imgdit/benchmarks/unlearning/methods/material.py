"""What methods learn from, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from imgdit.naming import nearest
from imgdit.sae.concepts import ConceptStatistics
from imgdit.sae.hooks import site
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.statistics import collect_statistics

Stream = Literal["text", "image"]
"""What hookpoints read."""

Statistics = dict[str, dict[str, ConceptStatistics]]
"""By kind of label and hookpoint."""


class Unlearned(NamedTuple):
    """A method made ready for some concepts."""

    attach: Callable[[Any], AbstractContextManager[dict[str, Any]]]
    """`with attach(pipe) as call: pipe(prompt, **call)` samples without the concepts. Afterwards the pipeline is as it
    was."""
    size: int
    """Bytes that must be kept beside the model."""


@dataclass(frozen=True)
class Material:
    """Prompts and images of every label, none of which a method is judged by."""

    prompts: Mapping[str, Mapping[str, Sequence[str]]]
    """By kind and label. Prompt i of the labels of a kind differs in the label alone."""
    words: Mapping[str, str]
    """How a label is said alone."""
    saes: Mapping[str, SparseAutoencoder] = field(default_factory=dict)
    """By hookpoint."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline, as `num_inference_steps` and `guidance_scale`."""
    seed: int = 0
    """Of the first image of each label."""
    batch_size: int = 8
    """Images made at once."""
    statistics: Statistics = field(default_factory=dict)
    """Activations of all labels, see `collect`."""

    def kind(self, label: str) -> str:
        """The kind that a label belongs to."""
        for kind, labels in self.prompts.items():
            if label in labels:
                return kind
        known = [label for labels in self.prompts.values() for label in labels]
        raise ValueError(f"unknown label {nearest(label, known)}")

    def lines(self, label: str) -> Sequence[str]:
        """Prompts with a label."""
        return self.prompts[self.kind(label)][label]

    def others(self, label: str, taken: Collection[str] = ()) -> list[str]:
        """The other labels of its kind, those behind it first, without `taken`."""
        labels = list(self.prompts[self.kind(label)])
        place = labels.index(label)
        found = [other for other in labels[place + 1 :] + labels[:place] if other not in taken]
        if not found:
            raise ValueError(f"nothing is left to put in the place of {label!r}: every other label is unlearned too")
        return found

    def streams(self, pipe: Any) -> dict[Stream, list[str]]:
        """Hookpoints by what they read."""
        found: dict[Stream, list[str]] = {}
        for place in self.saes:
            found.setdefault("text" if site(pipe, place).text else "image", []).append(place)
        return found

    def recorded(self, label: str, hookpoint: str) -> ConceptStatistics:
        """The statistics that tell a label from its kind."""
        found = self.statistics.get(self.kind(label), {})
        if hookpoint not in found:
            raise ValueError(f"no statistics at {hookpoint!r}; give Material(statistics=collect(pipe, material))")
        return found[hookpoint]


def collect(pipe: Any, material: Material) -> Statistics:
    """Activations of all labels at the hookpoints of the SAEs."""
    if not material.saes:
        return {}
    return {
        kind: collect_statistics(
            pipe,
            material.saes,
            prompts,
            seed=material.seed,
            batch_size=material.batch_size,
            **material.call,
        )
        for kind, prompts in material.prompts.items()
    }
