"""Where in an image a concept is seen, by the features that are its own.

S timesteps, P images, C concepts, U selected features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from imgdit.sae.concepts import ConceptBook, ConceptSelection, check_concepts
from imgdit.sae.edits import ChosenFeatures
from imgdit.sae.hooks import hooked, hookpoint_of, site
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.sampling import prompt_batches
from imgdit.sae.streams import Tokens

OWN = 2.0
"""How many times as active as for the other concepts a feature must be to be a concept's own. Selections hold further
ones, which help to unlearn and are active elsewhere: of a cone's, some are strongest on the sky beside it."""


class ConceptMaps(NamedTuple):
    """Where concepts are seen."""

    concepts: tuple[str, ...]
    """(C,) those that have features which are ever active."""
    maps: torch.Tensor
    """(P, C, rows, columns): activation of a concept's own features in units of their mean over its images, mean over
    the timesteps. About 1 and above where the concept is seen, near 0 elsewhere."""


def own_features(selection: ConceptSelection, concepts: int) -> torch.Tensor:
    """Boolean (S, U): features that are selected at a timestep and `OWN` times as active as for the other concepts;
    where no feature is at any timestep, all that are selected.

    Args:
        selection: of a concept.
        concepts: how many it was selected among; of a single one, all selected features are its own.
    """
    if concepts == 1:
        return selection.selected
    # Thresholds are means over all concepts, this one among them.
    others = (concepts * selection.thresholds - selection.means) / (concepts - 1)
    active = selection.selected & (selection.means > 0)
    own = active & (selection.means >= OWN * others)
    return own if own.any() else active


@torch.no_grad()
def concept_maps(
    pipe: Any,
    sae: SparseAutoencoder,
    book: ConceptBook,
    concepts: Sequence[str],
    prompts: Sequence[Any],
    *,
    hookpoint: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
    **call: Any,
) -> ConceptMaps:
    """Run a pipeline over prompts, and note where concepts are seen.

    Args:
        book: the concepts that were selected with this SAE.
        concepts: names of some.
        hookpoint: of the image; `None`: the SAE's own.
        seed: of the first prompt.
        call: arguments of the pipeline.

    Raises:
        ValueError: an unknown concept, or a hookpoint of the text, which has no place in the image.
    """
    check_concepts(concepts, book.selections)
    place = hookpoint_of(pipe, sae, hookpoint)
    if site(pipe, place).text:
        raise ValueError(f"{place} reads the text, which has no place in the image; give a hookpoint of the image")
    selections = [book.selections[name] for name in concepts]
    owns = [own_features(selection, len(book.selections)) for selection in selections]
    numbers = torch.cat([selection.features for selection in selections]).unique()
    device = sae.W_dec.device
    chosen = ChosenFeatures(sae, numbers.to(device), torch.zeros(len(numbers), device=device))
    found: dict[int, list[torch.Tensor]] = {}  # by concept, a map (B, rows, columns) of each timestep

    def read(tokens: Tokens) -> None:
        if tokens.call.conditional is None:
            return
        values = tokens.encoded[tokens.call.conditional].to(sae.W_dec)
        if len(tokens.grids) != 1 or tokens.grids[0][0] * tokens.grids[0][1] != values.shape[1]:
            raise ValueError(f"a map needs one whole grid of tokens, got {tokens.grids}")
        rows, _ = chosen.normalize(values.reshape(-1, values.shape[-1]), tokens.call.timestep)
        acts = chosen.activations(rows, chosen.scores(rows)).float().cpu()  # (N, m)
        for i, (selection, own) in enumerate(zip(selections, owns)):
            step = _nearest(selection.timesteps, tokens.call.timestep)
            if own[step].any():
                columns = torch.searchsorted(numbers, selection.features[own[step]])
                seen = acts[:, columns].sum(1) / selection.means[step][own[step]].sum()
                found.setdefault(i, []).append(seen.view(len(values), *tokens.grids[0]))

    parts = []
    with hooked(pipe, {place: read}, source={place: sae.config.reads}):
        for batch in prompt_batches(prompts, batch_size, seed):
            found.clear()
            batch.run(pipe, **call)
            parts.append([torch.stack(maps).mean(0) for _, maps in sorted(found.items())])
    maps = torch.cat([torch.stack(part, dim=1) for part in parts]) if found else torch.zeros(len(prompts), 0, 1, 1)
    return ConceptMaps(tuple(concepts[i] for i in sorted(found)), maps)


def _nearest(timesteps: Sequence[float], timestep: float) -> int:
    return min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))
