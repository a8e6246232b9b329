"""Which features belong to a concept, at which timestep, and how strongly (SAeUron, arXiv 2501.18052, section 4).

S timesteps, L latents, U selected features, d width.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit.io.atomic import write_tensors, write_text
from imgdit.io.checkpoints import read_tensors
from imgdit.io.safe_json import read_object
from imgdit.naming import check_name
from imgdit.sae.config import SAEConfig
from imgdit.sae.fingerprints import is_fingerprint_of, model_fingerprint

SCORE_EPS = 1e-8
FORMAT = "imgdit-concepts-1"
CONCEPTS, _TENSORS = "concepts.json", "concepts.safetensors"
_STORED = ("features", "selected", "means", "thresholds", "replacement")


@dataclasses.dataclass(frozen=True, eq=False)
class ConceptStatistics:
    """Mean activations of every feature per concept and timestep, at one hookpoint."""

    timesteps: tuple[float, ...]
    """(S,) the scheduler's, falling."""
    means: dict[str, torch.Tensor]
    """Per concept (S, L): mean over prompts and patches of the code."""
    counts: dict[str, int]
    """Prompts of each concept."""
    inputs: dict[str, torch.Tensor]
    """Per concept (S, d): mean activation vector."""

    def others(self, concept: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean of `values` over the pooled prompts of all other concepts."""
        rest = [name for name in values if name != concept]
        total = sum(self.counts[name] for name in rest)
        return torch.stack([values[name] * (self.counts[name] / total) for name in rest]).sum(0)

    def scores(self, concept: str) -> torch.Tensor:
        """(S, L): fraction of the concept's activation that falls to a feature, minus its share for other concepts."""
        means = self.means[concept]
        if len(self.means) == 1:
            return means
        others = self.others(concept, self.means)
        return means / (means.sum(1, keepdim=True) + SCORE_EPS) - others / (others.sum(1, keepdim=True) + SCORE_EPS)

    def thresholds(self) -> torch.Tensor:
        """(S, L): unweighted mean over all concepts, above which an activation counts as meant."""
        return torch.stack(list(self.means.values())).mean(0)


def quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """Linear-interpolation quantile of each row (S, L) -> (S,). torch's own refuses more than 2^24 values."""
    size = values.shape[1]
    place = q * (size - 1)
    low = min(math.floor(place), size - 1)
    largest = values.topk(size - low, dim=1).values  # few, as q is near 1
    below, above = largest[:, -1], largest[:, max(size - low - 2, 0)]
    return torch.lerp(below, above, place - low)


class ConceptStep(NamedTuple):
    """A concept's features at one timestep."""

    features: torch.Tensor
    """(m,)"""
    means: torch.Tensor
    """(m,) mean activation for the concept."""
    thresholds: torch.Tensor
    """(m,)"""
    weights: torch.Tensor
    """(m,) in [0, 1]: 1 where the feature is selected on both sides of the timestep."""
    replacement: torch.Tensor
    """(d,) mean activation vector without the concept."""


@dataclasses.dataclass(frozen=True, eq=False)
class ConceptSelection:
    """The features of a concept over the timesteps; kilobytes."""

    name: str
    timesteps: tuple[float, ...]
    """(S,) falling."""
    features: torch.Tensor
    """(U,) every feature that is selected at some timestep, rising."""
    selected: torch.Tensor
    """Boolean (S, U)."""
    means: torch.Tensor
    """(S, U) mean activation for the concept."""
    thresholds: torch.Tensor
    """(S, U) activation above which a patch counts as showing the concept."""
    replacement: torch.Tensor
    """(S, d) mean activation vector of the other concepts."""
    multiplier: float = -1.0
    """How strongly it is unlearned where nothing else is said, see `ConceptUnlearner.attach`."""
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How it was selected: rule, prompts, seed, arguments of the pipeline."""
    mean: torch.Tensor | None = None
    """(S, d) mean activation vector of the concept; `None` in files of earlier versions."""
    others: tuple[str, ...] = ()
    """The concepts that it was told apart from."""

    def at(self, timestep: float) -> ConceptStep:
        """The selection at a timestep, linear between those it was made at, the nearest outside of them."""
        low, high, fraction = self._place(timestep)
        weights = torch.lerp(self.selected[low].float(), self.selected[high].float(), fraction)
        kept = weights > 0

        def between(values: torch.Tensor) -> torch.Tensor:
            return torch.lerp(values[low], values[high], fraction)

        return ConceptStep(
            self.features[kept],
            between(self.means)[kept],
            between(self.thresholds)[kept],
            weights[kept],
            between(self.replacement),
        )

    def _place(self, timestep: float) -> tuple[int, int, float]:
        """Numbers of the timesteps around one, and how far it lies towards the second."""
        rising = self.timesteps[::-1]
        after = bisect_right(rising, timestep)
        last = len(rising) - 1
        low, high = last - max(after - 1, 0), last - min(after, last)  # places in the falling order
        gap = self.timesteps[high] - self.timesteps[low]
        return low, high, (timestep - self.timesteps[low]) / gap if gap else 0.0

    def staying(self, known: Mapping[str, ConceptSelection], unlearned: Collection[str]) -> list[ConceptSelection]:
        """The concepts that it was told apart from and that can take its place in a text: their means are known.

        Args:
            known: selections by name.
            unlearned: names that must not take its place.
        """
        if self.mean is None:
            return []
        others = [known[name] for name in self.others if name in known and name not in unlearned]
        return [other for other in others if other.mean is not None]

    def exchanged(self, known: Mapping[str, ConceptSelection], unlearned: Collection[str]) -> ConceptSelection:
        """A copy whose `replacement` is what turns its mean activation into that of the nearest other concept.

        Args:
            known: selections by name, in which the other concept is looked for.
            unlearned: names that must not take its place. Where none is left, the mean of all others does.

        Raises:
            ValueError: its mean is not known, or it was told apart from nothing.
        """
        if self.mean is None or not self.others:
            raise ValueError(
                f"the concept {self.name!r} has no mean activation of its own and of others, which mode='replace' "
                "needs in a text; select it anew with `learn`, together with other concepts of its kind, or use "
                "another mode"
            )
        values = []
        for other in self.staying(known, unlearned):
            assert other.mean is not None
            places = [other._place(timestep) for timestep in self.timesteps]
            values.append(torch.stack([torch.lerp(other.mean[i], other.mean[j], t) for i, j, t in places]))
        changes = [value - self.mean for value in values or [self.replacement]]
        nearest = min(changes, key=lambda change: float(change.square().sum()))
        return dataclasses.replace(self, replacement=nearest)


def select_concept(
    statistics: ConceptStatistics,
    concept: str,
    *,
    percentile: float | None = None,
    top_n: int | None = None,
    floor: float = 0.0,
    multiplier: float = -1.0,
    origin: Mapping[str, Any] | None = None,
) -> ConceptSelection:
    """The features that score highest for a concept at each timestep.

    Args:
        percentile: features whose score lies above this percentile, as SAeUron counts (99.999 of 20480 is one).
        top_n: instead, so many features per timestep.
        floor: of these, features that score below this fraction of the timestep's best are left out. A concept that
            has few features of its own would otherwise be filled up with features of something else.
        multiplier: stored with the selection: the one it is unlearned with unless another is asked for.
        origin: stored with the selection.
    """
    if concept not in statistics.means:
        raise ValueError(f"unknown concept {concept!r}; statistics exist for {', '.join(statistics.means)}")
    check_rule(percentile, top_n, floor, statistics.means[concept].shape[1])
    scores = statistics.scores(concept)
    if percentile is not None:
        selected = scores > quantile(scores, percentile / 100)[:, None]
    else:
        assert top_n is not None
        chosen = scores.topk(top_n, dim=1).indices
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    if floor:
        selected &= scores >= floor * scores.amax(1, keepdim=True)
    features = selected.any(0).nonzero().flatten()
    rest = statistics.inputs if len(statistics.inputs) == 1 else None
    return ConceptSelection(
        name=concept,
        timesteps=statistics.timesteps,
        features=features,
        selected=selected[:, features],
        means=statistics.means[concept][:, features],
        thresholds=statistics.thresholds()[:, features],
        replacement=statistics.inputs[concept] if rest else statistics.others(concept, statistics.inputs),
        multiplier=multiplier,
        origin={"percentile": percentile, "top_n": top_n, "floor": floor, **(origin or {})},
        mean=statistics.inputs[concept],
        others=tuple(name for name in statistics.inputs if name != concept),
    )


def check_rule(percentile: float | None, top_n: int | None, floor: float, num_latents: int) -> None:
    """Refuse a rule of `select_concept` that no SAE of so many features can follow."""
    if (percentile is None) == (top_n is None):
        raise ValueError(f"give either percentile or top_n, got percentile={percentile} and top_n={top_n}")
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percentile}")
    if top_n is not None and not 1 <= top_n <= num_latents:
        raise ValueError(f"top_n must be in [1, {num_latents}], got {top_n}")
    check_floor(floor)


def check_floor(floor: float) -> None:
    """Refuse what is no fraction."""
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is a fraction of the best score and must be in [0, 1], got {floor}")


# Files


@dataclasses.dataclass(frozen=True, eq=False)
class ConceptBook:
    """The concepts that were selected with one SAE in one model."""

    sae: str
    """Fingerprint of the SAE."""
    model: dict[str, Any]
    """Fingerprint of the denoiser, see `model_fingerprint`."""
    selections: dict[str, ConceptSelection]
    saes: str | None = None
    """Folder or Hub repository of the SAEs, where this one does not lie beside the concepts."""

    @classmethod
    def empty(cls, sae: str, denoiser: torch.nn.Module) -> ConceptBook:
        """One without concepts, of an SAE's fingerprint and a model."""
        return cls(sae, model_fingerprint(denoiser), {})

    def with_selections(self, selections: Iterable[ConceptSelection]) -> ConceptBook:
        """A copy with selections added or replaced."""
        return dataclasses.replace(self, selections={**self.selections, **{s.name: s for s in selections}})

    def only(self, names: Iterable[str]) -> ConceptBook:
        """A copy with those of the concepts that it has."""
        wanted = set(names)
        return dataclasses.replace(self, selections={n: s for n, s in self.selections.items() if n in wanted})

    def is_of(self, denoiser: torch.nn.Module) -> bool:
        """Whether the concepts were selected in this model."""
        return is_fingerprint_of(self.model, denoiser)

    def save(self, folder: str | Path) -> None:
        """Write `concepts.json` and `concepts.safetensors` beside the SAE."""
        folder = Path(folder)
        tensors = {
            f"{name}/{part}": getattr(selection, part).contiguous()
            for name, selection in self.selections.items()
            for part in (*_STORED, *(("mean",) if selection.mean is not None else ()))
        }
        write_tensors(folder / _TENSORS, tensors)
        concepts = {
            name: {"timesteps": s.timesteps, "multiplier": s.multiplier, "origin": s.origin, "others": s.others}
            for name, s in self.selections.items()
        }
        values = {"format": FORMAT, "sae": self.sae, "model": self.model, "concepts": concepts}
        if self.saes is not None:
            values["saes"] = self.saes
        write_text(folder / CONCEPTS, json.dumps(values, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> ConceptBook | None:
        """What `save` wrote; `None` where nothing was."""
        folder = Path(folder)
        if not (folder / CONCEPTS).is_file():
            return None
        values = read_object(folder / CONCEPTS)
        if values.get("format") != FORMAT:
            raise ValueError(f"{folder / CONCEPTS}: expected format {FORMAT!r}, got {values.get('format')!r}")
        tensors = read_tensors(folder / _TENSORS)
        expected = {"sae": str, "model": dict, "concepts": dict}
        for name, kind in expected.items():
            if not isinstance(values.get(name), kind):
                raise ValueError(f"{folder / CONCEPTS}: {name} must be {kind.__name__}, got {values.get(name)!r:.60}")
        known = values["model"]
        sketch = known.get("sketch")
        numbers = isinstance(sketch, list) and all(value is None or type(value) in (int, float) for value in sketch)
        if not numbers or not {"class", "parameters"} <= known.keys():
            raise ValueError(f"{folder / CONCEPTS}: model must have class, parameters and sketch, got {known!r:.80}")
        selections = {}
        for name, entry in values["concepts"].items():
            missing = [part for part in _STORED if f"{name}/{part}" not in tensors]
            if missing:
                raise ValueError(f"{folder / _TENSORS} has no {name}/{missing[0]}")
            parts: dict[str, Any] = {
                part: tensors[f"{name}/{part}"] for part in (*_STORED, "mean") if f"{name}/{part}" in tensors
            }
            timesteps = _timesteps(entry, f"{folder / CONCEPTS}: {name}")
            _check_shapes(parts, len(timesteps), f"{folder / _TENSORS}: {name}")
            multiplier = entry.get("multiplier", -1.0)
            if type(multiplier) not in (int, float) or not math.isfinite(multiplier):
                raise ValueError(f"{folder / CONCEPTS}: {name}: multiplier must be a number, got {multiplier!r:.60}")
            others = entry.get("others", [])
            if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
                raise ValueError(f"{folder / CONCEPTS}: {name}: others must be a list of names, got {others!r:.60}")
            more: dict[str, Any] = {
                "multiplier": float(multiplier),
                "origin": entry.get("origin") or {},
                "others": tuple(others),
            }
            selections[name] = ConceptSelection(name, timesteps, **parts, **more)
        elsewhere = values.get("saes")
        if elsewhere is not None and not isinstance(elsewhere, str):
            raise ValueError(f"{folder / CONCEPTS}: saes must be str, got {elsewhere!r:.60}")
        return cls(values["sae"], values["model"], selections, elsewhere)


def _timesteps(entry: Any, where: str) -> tuple[float, ...]:
    found = entry.get("timesteps") if isinstance(entry, dict) else None
    numbers = isinstance(found, list) and all(type(t) in (int, float) and math.isfinite(t) for t in found)
    if not numbers or not found or found != sorted(set(found), reverse=True):
        raise ValueError(f"{where}: timesteps must be falling numbers, got {found!r:.80}")
    return tuple(found)


def _check_shapes(parts: Mapping[str, torch.Tensor], steps: int, where: str) -> None:
    features, replacement = parts["features"], parts["replacement"]
    if features.ndim != 1 or features.dtype != torch.int64 or (features < 0).any():
        raise ValueError(f"{where}/features must be numbers of features, got {features.dtype} {tuple(features.shape)}")
    for name in ("selected", "means", "thresholds"):
        if tuple(parts[name].shape) != (steps, len(features)):
            expected = (steps, len(features))
            raise ValueError(
                f"{where}/{name} must be {expected} (timesteps, features), got {tuple(parts[name].shape)}"
            )
    if replacement.ndim != 2 or len(replacement) != steps:
        raise ValueError(f"{where}/replacement must have a row per timestep, got {tuple(replacement.shape)}")
    if "mean" in parts and parts["mean"].shape != replacement.shape:
        raise ValueError(f"{where}/mean must be {tuple(replacement.shape)}, got {tuple(parts['mean'].shape)}")


def check_fit(selection: ConceptSelection, config: SAEConfig, what: str) -> None:
    """Refuse a selection of features that an SAE has not, or of another width."""
    largest = int(selection.features.max()) if len(selection.features) else -1
    if largest >= config.num_latents or selection.replacement.shape[1] != config.d_in:
        raise ValueError(
            f"{what} is of another SAE: it has feature {largest} and width {selection.replacement.shape[1]}, this SAE "
            f"has {config.num_latents} features and width {config.d_in}"
        )


def check_concepts(names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse concepts that were never selected."""
    known = list(known)
    for name in names:
        check_name("concept", name, known or ["none"])


def concept_names(folder: str | Path) -> list[str]:
    """Concepts that are saved in an SAE's folder, or in a folder of several, without reading the SAEs.

    Raises:
        ValueError: a damaged file.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(folder).rglob(CONCEPTS)):
        concepts = read_object(path).get("concepts")
        if not isinstance(concepts, dict):
            raise ValueError(f"{path}: concepts must be dict, got {concepts!r:.60}")
        found |= dict.fromkeys(concepts)
    return list(found)
