"""Do directions in activations detect a concept? Features of sparse autoencoders against dense directions.

P images, S timesteps, L latents, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from imgdit.sae.concepts import ConceptSelection, ConceptStatistics, select_concept
from imgdit.sae.hooks import hooked
from imgdit.sae.model import DeviceCopies, SparseAutoencoder
from imgdit.sae.sampling import prompt_batches
from imgdit.sae.streams import Tokens

DIRECTIONS = ("features", "difference", "pca", "random")
COMPONENTS = 10
"""Principal components among which the one that tells a concept best is chosen."""


class Recorded(NamedTuple):
    """Activations at one hookpoint, means over the tokens of each image."""

    timesteps: tuple[float, ...]
    """(S,) falling."""
    inputs: dict[str, torch.Tensor]
    """Per label (P, S, d)."""
    codes: dict[str, torch.Tensor]
    """Per label (P, S, L)."""
    norms: torch.Tensor
    """(S,) root mean square of the tokens' norms."""

    def statistics(self) -> ConceptStatistics:
        """Means of the labels."""
        return ConceptStatistics(
            self.timesteps,
            {label: codes.mean(0) for label, codes in self.codes.items()},
            {label: len(codes) for label, codes in self.codes.items()},
            {label: inputs.mean(0) for label, inputs in self.inputs.items()},
        )

    def others(self, concept: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`values` of the images of all other labels (P, S, ·)."""
        return torch.cat([rows for label, rows in values.items() if label != concept])


class _Reader:
    """What each image has at one hookpoint, in the order of the calls."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.whole = DeviceCopies(sae)
        self.found: dict[float, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, tokens: Tokens) -> None:
        if tokens.call.conditional is None:
            return
        sae = self.whole.on(tokens.values.device)
        x = tokens.encoded[tokens.call.conditional].to(sae.W_dec.dtype)  # (B, n, d)
        flat, _ = sae.normalize(x.reshape(-1, x.shape[-1]), tokens.call.timestep)
        codes = sae.encode(flat).mean(x.shape[1])
        mean, code, square = (part.float().cpu() for part in (x.mean(1), codes, x.square().sum(2).mean(1)))
        self.found.setdefault(tokens.call.timestep, []).append((mean, code, square))

    def stacked(self, part: int) -> torch.Tensor:
        """(P, S, ·), from the highest timestep down."""
        return torch.stack(
            [torch.cat([row[part] for row in self.found[t]]) for t in sorted(self.found, reverse=True)], dim=1
        )


@torch.no_grad()
def record(
    pipe: Any,
    saes: Mapping[str, SparseAutoencoder],
    prompts: Mapping[str, Sequence[str]],
    *,
    seed: int,
    batch_size: int = 8,
    **call: Any,
) -> dict[str, Recorded]:
    """Activations of the images of labels, by hookpoint.

    Args:
        prompts: by label.
        seed: prompt i of every label starts from the noise of seed + i.
        call: arguments of the pipeline.
    """
    readers = {label: {place: _Reader(sae) for place, sae in saes.items()} for label in prompts}
    source = {place: sae.config.reads for place, sae in saes.items()}
    for label, lines in prompts.items():
        with hooked(pipe, readers[label], source=source):
            for batch in prompt_batches(lines, batch_size, seed):
                batch.run(pipe, **call)
    found = {}
    for place in saes:
        of_labels = {label: readers[label][place] for label in prompts}
        squares = torch.cat([reader.stacked(2) for reader in of_labels.values()])  # (P, S)
        found[place] = Recorded(
            tuple(sorted(next(iter(of_labels.values())).found, reverse=True)),
            {label: reader.stacked(0) for label, reader in of_labels.items()},
            {label: reader.stacked(1) for label, reader in of_labels.items()},
            squares.mean(0).sqrt(),
        )
    return found


class Directions(NamedTuple):
    """What was learned about a concept at one hookpoint."""

    selection: ConceptSelection
    units: dict[str, torch.Tensor]
    """By name of `DIRECTIONS`: (S, d) of norm 1; 0 where no feature was selected."""


def learn_directions(found: Recorded, sae: SparseAutoencoder, concept: str, *, top_n: int, seed: int) -> Directions:
    """The directions of a concept at each timestep.

    features    sum of the decoder's rows of the selected features, by how much more active they are for the concept
    difference  mean with the concept - mean without it
    pca         of the first principal components of all images, the one that tells the concept best
    random      the same Gaussian direction at all timesteps

    Args:
        found: activations to learn from.
        top_n: features per timestep.
        seed: of the random direction.
    """
    statistics = found.statistics()
    selection = select_concept(statistics, concept, top_n=top_n, floor=0.1)
    numbers = selection.features
    without = statistics.others(concept, statistics.means)[:, numbers]
    more = (selection.means - without) * selection.selected  # (S, U)
    random = torch.randn(sae.config.d_in, generator=torch.Generator().manual_seed(seed))
    difference = statistics.inputs[concept] - statistics.others(concept, statistics.inputs)
    units = {
        "features": more @ sae.W_dec[numbers.to(sae.W_dec.device)].float().cpu(),
        "difference": difference,
        "pca": _component(found.inputs[concept], found.others(concept, found.inputs)),
        "random": random.expand_as(difference),
    }
    return Directions(selection, {name: F.normalize(value, dim=1) for name, value in units.items()})


def _component(own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(S, d) principal components that tell `own` (P, S, d) from `others`, pointing to `own`."""
    rows = []
    for mine, rest in zip(own.unbind(1), others.unbind(1)):
        every = torch.cat([mine, rest])
        centred = every - every.mean(0)
        components = torch.linalg.svd(centred, full_matrices=False).Vh[:COMPONENTS]
        scores = torch.stack([auc(mine @ one, rest @ one) for one in components])
        best = int((scores - 0.5).abs().argmax())
        rows.append(components[best] * (1.0 if scores[best] >= 0.5 else -1.0))
    return torch.stack(rows)


def detection(found: Recorded, learned: Directions) -> dict[str, list[float]]:
    """AUC of each of `DIRECTIONS` at each timestep. "features" is the sum of the selected features' activations; the
    others are the component of the mean activation along the direction.

    Args:
        found: activations of other images than the directions were learned from.
    """
    concept, numbers = learned.selection.name, learned.selection.features
    chosen = learned.selection.selected.float()  # (S, U)

    def scores(name: str, inputs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        if name == "features":
            return (codes[..., numbers] * chosen).sum(-1)  # (P, S)
        return (inputs * learned.units[name]).sum(-1)

    result = {}
    for name in DIRECTIONS:
        mine = scores(name, found.inputs[concept], found.codes[concept])
        rest = scores(name, found.others(concept, found.inputs), found.others(concept, found.codes))
        result[name] = [float(auc(a, b)) for a, b in zip(mine.unbind(1), rest.unbind(1))]
    return result


def auc(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Probability that a positive's score is above a negative's, ties counting half; of (P,) and (N,)."""
    above = positive[:, None] - negative
    return (above > 0).double().mean() + 0.5 * (above == 0).double().mean()
