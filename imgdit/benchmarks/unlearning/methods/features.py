"""Unlearning by the features of sparse autoencoders: SAeUron's rule as published, ours, and random features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from imgdit.benchmarks.unlearning.methods.denoiser import denoiser
from imgdit.benchmarks.unlearning.methods.material import Material, Stream, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import size_of
from imgdit.sae.concepts import ConceptBook, ConceptSelection, ConceptStatistics, select_concept
from imgdit.sae.fingerprints import model_fingerprint
from imgdit.sae.unlearning import ConceptUnlearner, Mode


def without_features(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    stream: Stream = "image",
    mode: Mode = "scale",
    top_n: int = 4,
    floor: float = 0.0,
    multiplier: float = -1.0,
    until: float = 0.0,
    paper_compat: bool = False,
    random_seed: int | None = None,
) -> Unlearned:
    """The features that score highest for the concepts are scaled, removed, or their patches replaced.

    Args:
        stream: whose tokens.
        mode, multiplier, paper_compat: see `ConceptUnlearner.attach`.
        top_n, floor: features for each concept and timestep, see `select_concept`.
        until: timestep below which nothing is changed.
        random_seed: take as many features at random instead, with the concept's means.
    """
    books: dict[str, ConceptBook] = {}
    model = model_fingerprint(denoiser(pipe))
    for hookpoint in material.streams(pipe).get(stream, ()):
        selections = {}
        for concept in concepts:
            statistics = material.recorded(concept, hookpoint)
            selection = select_concept(statistics, concept, top_n=top_n, floor=floor)
            if random_seed is not None:
                selection = _at_random(selection, statistics, random_seed)
            selections[concept] = selection
            if mode == "replace":  # another label of the kind takes the concept's place in a text
                for label in statistics.means.keys() - set(concepts):
                    selections[label] = select_concept(statistics, label, top_n=top_n, floor=floor)
        books[hookpoint] = ConceptBook(material.saes[hookpoint].fingerprint(), model, selections)
    unlearner = ConceptUnlearner(material.saes, books)

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        with unlearner.attach(
            pipe,
            list(concepts),
            mode=mode,
            multiplier=multiplier,
            timesteps=(until, 1000.0),
            hookpoints=list(books),
            paper_compat=paper_compat,
        ):
            yield {}

    stored = [s for book in books.values() for s in book.selections.values()]
    size = 0
    for s in stored:
        kept = {"means": s.means, "thresholds": s.thresholds, "replacement": s.replacement}
        size += size_of(kept if mode != "replace" or s.mean is None else {**kept, "mean": s.mean})
    return Unlearned(
        attach, size + sum(size_of(material.saes[place].state_dict()) for place in books) if stored else 0
    )


def _at_random(selection: ConceptSelection, statistics: ConceptStatistics, seed: int) -> ConceptSelection:
    """As many other features that are alive, in the places of those selected."""
    alive = statistics.thresholds().amax(0) > 0  # (L,)
    alive[selection.features] = False
    pool = alive.nonzero().flatten()
    count = len(selection.features)
    if len(pool) < count:
        raise ValueError(f"{count} random features were asked for, only {len(pool)} others are alive")
    chosen = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]
    return dataclasses.replace(
        selection,
        features=chosen.sort().values,
        thresholds=statistics.thresholds()[:, chosen.sort().values],
    )
