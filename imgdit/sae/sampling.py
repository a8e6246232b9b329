"""Running a pipeline over a list of prompts, each from its own seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch


class PromptBatch(NamedTuple):
    """Prompts that are sampled at once."""

    first: int
    """Number of its first prompt."""
    prompts: list[Any]
    seeds: list[int]

    def run(self, pipe: Any, **call: Any) -> Any:
        """The pipeline's output. Each image has its own generator, so the batch size changes nothing.

        Args:
            call: arguments of the pipeline; images are not decoded unless `output_type` asks for it.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        options = {"generator": generators, "output_type": "latent", **call}
        if isinstance(self.prompts[0], dict):
            return pipe(**_stacked(self.prompts), **options)
        if isinstance(self.prompts[0], str):
            return pipe(prompt=self.prompts, **options)
        return pipe(self.prompts, **options)  # DiT's pipeline takes class labels, as its first argument


def prompt_batches(prompts: Sequence[Any], batch_size: int, seed: int, start: int = 0) -> Iterator[PromptBatch]:
    """Batches of prompts from number `start` on; prompt i has seed + i.

    Args:
        prompts: texts; class labels, or what else a pipeline without text takes as its first argument; or dictionaries
            of embeddings, as the pipeline takes them for one image.
    """
    for first in range(start, len(prompts), batch_size):
        lines = list(prompts[first : first + batch_size])
        yield PromptBatch(first, lines, [seed + first + i for i in range(len(lines))])


def _stacked(prompts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
