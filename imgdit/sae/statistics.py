"""Mean activations of features per concept and timestep, from images generated for the purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from imgdit.sae.concepts import ConceptStatistics
from imgdit.sae.hooks import check_width, hooked
from imgdit.sae.model import DeviceCopies, SparseAutoencoder
from imgdit.sae.sampling import prompt_batches
from imgdit.sae.streams import Tokens


class _Means:
    """Sums per timestep at one hookpoint."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.whole = DeviceCopies(sae)
        self.codes: dict[float, torch.Tensor] = {}
        self.inputs: dict[float, torch.Tensor] = {}
        self.images: dict[float, int] = {}

    def __call__(self, tokens: Tokens) -> None:
        rows = tokens.call.conditional
        if rows is None:
            return
        sae = self.whole.on(tokens.values.device)
        x = tokens.encoded[rows].to(sae.W_dec.dtype)  # (P, n, d)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"the activations at timestep {tokens.call.timestep:g} are NaN or infinite")
        flat, _ = sae.normalize(x.reshape(-1, x.shape[-1]), tokens.call.timestep)
        code = sae.encode(flat)
        means = code._replace(acts=code.acts.float()).mean(x.shape[1]).sum(0)  # (L,), summed over the images
        time = tokens.call.timestep
        self.codes[time] = self.codes[time] + means if time in self.codes else means
        vector = x.float().mean(1).sum(0)
        self.inputs[time] = self.inputs[time] + vector if time in self.inputs else vector
        self.images[time] = self.images.get(time, 0) + len(x)

    def stacked(self, sums: dict[float, torch.Tensor]) -> torch.Tensor:
        """(S, ·) means, from the highest timestep down."""
        return torch.stack([sums[time] / self.images[time] for time in sorted(sums, reverse=True)]).cpu()


@torch.no_grad()
def collect_statistics(
    pipe: Any,
    saes: Mapping[str, SparseAutoencoder],
    prompts: Mapping[str, Sequence[Any]],
    *,
    seed: int = 0,
    batch_size: int = 4,
    **call: Any,
) -> dict[str, ConceptStatistics]:
    """Statistics of concepts at each hookpoint. Only samples towards the prompt count, not the negative ones.

    Args:
        saes: by hookpoint.
        prompts: per concept, see `prompt_batches`.
        seed: prompt i of every concept starts from the noise of seed + i, so that concepts differ by the words alone.
        batch_size: images generated at once.
        call: arguments of the pipeline.

    Raises:
        ValueError: a concept without prompts, an unknown hookpoint, or an SAE of another width, before anything is
            sampled; activations that are not finite.
    """
    if not prompts or any(len(lines) == 0 for lines in prompts.values()):
        raise ValueError("each concept needs at least one prompt")
    for hookpoint, sae in saes.items():
        check_width(pipe, hookpoint, sae)
    gathered: dict[str, dict[str, _Means]] = {hookpoint: {} for hookpoint in saes}
    for concept, lines in prompts.items():
        means = {hookpoint: _Means(sae) for hookpoint, sae in saes.items()}
        source = {hookpoint: sae.config.reads for hookpoint, sae in saes.items()}
        with hooked(pipe, means, source=source):
            for batch in prompt_batches(lines, batch_size, seed):
                batch.run(pipe, **call)
        for hookpoint, value in means.items():
            gathered[hookpoint][concept] = value
    found = {}
    for hookpoint, concepts in gathered.items():
        times = {tuple(sorted(value.codes, reverse=True)) for value in concepts.values()}
        if len(times) != 1:
            raise ValueError(f"the concepts were sampled at different timesteps: {sorted(times)}")
        found[hookpoint] = ConceptStatistics(
            timesteps=times.pop(),
            means={name: value.stacked(value.codes) for name, value in concepts.items()},
            counts={name: len(prompts[name]) for name in concepts},
            inputs={name: value.stacked(value.inputs) for name, value in concepts.items()},
        )
    return found
