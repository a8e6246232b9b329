"""Looking at features: how often and when they are active, where in an image, and which tell two sets of prompts
apart.

S timesteps, L latents, P images, m chosen features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from imgdit.naming import old_names
from imgdit.sae.concepts import ConceptStatistics
from imgdit.sae.edits import ChosenFeatures
from imgdit.sae.hooks import hooked, hookpoint_of, site
from imgdit.sae.model import DeviceCopies, SparseAutoencoder
from imgdit.sae.sampling import prompt_batches
from imgdit.sae.statistics import collect_statistics
from imgdit.sae.streams import Tokens


@old_names(top_pictures="top_images")
class FeatureSurvey(NamedTuple):
    """How the features of an SAE behave on a list of prompts."""

    timesteps: tuple[float, ...]
    """(S,) falling."""
    density: torch.Tensor
    """(L,) fraction of tokens and timesteps on which a feature is active."""
    means: torch.Tensor
    """(S, L) mean activation."""
    strongest: torch.Tensor
    """(P, L) largest activation within an image, over all timesteps."""
    places: torch.Tensor
    """(P, L) token where that is; patches are counted along the rows."""

    def top_images(self, feature: int, count: int = 8) -> list[tuple[int, float, int]]:
        """Image, activation and token of the strongest ones, falling."""
        values, images = self.strongest[:, feature].topk(min(count, len(self.strongest)))
        return [
            (image, value, int(self.places[image, feature]))
            for image, value in zip(images.tolist(), values.tolist())
            if value > 0
        ]

    def histogram(self, bins: int = 24) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Numbers of features by log10 of their density: counts (bins,), edges (bins + 1,), and how many are dead."""
        alive = self.density[self.density > 0].log10()
        edges = torch.linspace(-6, 0, bins + 1)
        return torch.histc(alive.clamp(-6, 0), bins, -6, 0), edges, int((self.density == 0).sum())


@old_names(pictures="images")
class HeatMaps(NamedTuple):
    """Where chosen features are active."""

    features: tuple[int, ...]
    maps: torch.Tensor | None
    """(P, m, rows, columns) activation, mean over the timesteps; `None` where the SAE reads the text, which has no
    place in the image."""
    images: list[Any]
    """(P,) what the pipeline returned for each prompt."""


@torch.no_grad()
def survey_features(
    pipe: Any,
    sae: SparseAutoencoder,
    prompts: Sequence[Any],
    *,
    hookpoint: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
    **call: Any,
) -> FeatureSurvey:
    """Run a pipeline over prompts and note what every feature does.

    Args:
        hookpoint: `None`: the SAE's own.
        seed: of the first prompt.
        call: arguments of the pipeline.
    """
    place = hookpoint_of(pipe, sae, hookpoint)
    sums: dict[float, torch.Tensor] = {}
    counts: dict[float, int] = {}
    latents, whole = sae.config.num_latents, DeviceCopies(sae)
    active = torch.zeros(latents)
    strongest, places = torch.zeros(len(prompts), latents), torch.zeros(len(prompts), latents, dtype=torch.long)
    first = 0

    def read(tokens: Tokens) -> None:
        if tokens.call.conditional is None:
            return
        near = whole.on(tokens.values.device)
        values = tokens.encoded[tokens.call.conditional].to(near.W_dec.dtype)
        for i, image in enumerate(values):  # one at a time: a dense code of (n, L) is enough
            rows, _ = near.normalize(image, tokens.call.timestep)
            dense = near.encode(rows).dense().float()
            time = tokens.call.timestep
            sums[time] = sums.get(time, 0) + dense.mean(0).cpu()
            counts[time] = counts.get(time, 0) + 1
            active.add_((dense > 0).float().mean(0).cpu())
            best, where = (one.cpu() for one in dense.max(0))
            better = best > strongest[first + i]
            strongest[first + i] = torch.where(better, best, strongest[first + i])
            places[first + i] = torch.where(better, where, places[first + i])

    with hooked(pipe, {place: read}, source={place: sae.config.reads}):
        for batch in prompt_batches(prompts, batch_size, seed):
            first = batch.first
            batch.run(pipe, **call)
    times = tuple(sorted(sums, reverse=True))
    means = torch.stack([sums[time] / counts[time] for time in times])
    return FeatureSurvey(times, active / sum(counts.values()), means, strongest, places)


@torch.no_grad()
def heat_maps(
    pipe: Any,
    sae: SparseAutoencoder,
    prompts: Sequence[Any],
    features: Sequence[int],
    *,
    hookpoint: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
    **call: Any,
) -> HeatMaps:
    """Images of prompts, and where in them features are active; arguments as in `survey_features`."""
    place = hookpoint_of(pipe, sae, hookpoint)
    text = site(pipe, place).text
    for feature in features:
        if not 0 <= feature < sae.config.num_latents:
            raise ValueError(f"the SAE has features 0 to {sae.config.num_latents - 1}, got {feature}")
    chosen: dict[torch.device, ChosenFeatures] = {}
    maps: list[torch.Tensor] = []

    def read(tokens: Tokens) -> None:
        if tokens.call.conditional is None or text:
            return
        values, device = tokens.encoded[tokens.call.conditional].to(sae.W_dec.dtype), tokens.values.device
        if device not in chosen:
            numbers = torch.tensor(list(features), device=device)
            chosen[device] = ChosenFeatures(sae, numbers, torch.zeros(len(numbers), device=device))
        if len(tokens.grids) != 1 or tokens.grids[0][0] * tokens.grids[0][1] != values.shape[1]:
            raise ValueError(f"a heat map needs one whole grid of tokens, got {tokens.grids}")
        rows, _ = chosen[device].normalize(values.reshape(-1, values.shape[-1]), tokens.call.timestep)
        acts = chosen[device].activations(rows, chosen[device].scores(rows))
        maps.append(acts.view(len(values), *tokens.grids[0], -1).permute(0, 3, 1, 2).float().cpu())

    found, images = [], []
    with hooked(pipe, {place: read}, source={place: sae.config.reads}):
        for batch in prompt_batches(prompts, batch_size, seed):
            maps.clear()
            images += list(batch.run(pipe, **call).images)
            if not text:
                found.append(torch.stack(maps).mean(0))
    return HeatMaps(tuple(features), torch.cat(found) if found else None, images)


def contrast_features(
    pipe: Any,
    sae: SparseAutoencoder,
    prompts: Sequence[Any],
    against: Sequence[Any],
    *,
    hookpoint: str | None = None,
    **options: Any,
) -> ConceptStatistics:
    """Statistics of two sets of prompts; `scores("prompts")` tells the features that the first has and the other not.

    Args:
        options: `seed`, `batch_size` and arguments of the pipeline.
    """
    place = hookpoint_of(pipe, sae, hookpoint)
    return collect_statistics(pipe, {place: sae}, {"prompts": prompts, "against": against}, **options)[place]
