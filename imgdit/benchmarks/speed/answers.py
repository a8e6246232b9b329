"""What a cached prompt and a shifted schedule save of answering about an image (LaViDa, arXiv 2505.16839, table 4)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from imgdit.benchmarks.speed.timing import Comparison, compare
from imgdit.models.masked_lm import new_masked_lm
from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler

MASK, EOS, VOCABULARY = 1, 0, 1024
WAYS: dict[str, dict[str, Any]] = {
    "cached prompt": {"cache": "prompt"},
    "half the steps, shift 1/3": {"half": True},
    "cached prompt, half the steps, shift 1/3": {"cache": "prompt", "half": True},
}


def answer_comparisons(
    *,
    rounds: int = 3,
    prompt: int = 832,
    answer: int = 32,
    hidden_size: int = 512,
    num_layers: int = 2,
    device: torch.device | str = "cpu",
) -> Iterator[Comparison]:
    """Each way against neither: a step per token, all computed in every step. Weights are new; an image's vectors cost
    what as many tokens of the prompt do.

    Args:
        prompt: tokens; LaViDa's images are 700 to 1000.
        answer: tokens, in one block.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_masked_lm(VOCABULARY, MASK, EOS, hidden_size, num_layers, 8, prompt + answer).eval().to(device)
        ids = torch.randint(2, VOCABULARY, (1, prompt))

    def call(cache: Any = None, half: bool = False) -> torch.Tensor:
        scheduler = MaskedTextScheduler(reveal="shift" if half else "even", threshold=2.0)
        pipe = MaskedTextPipeline(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        found: Any = pipe(
            input_ids=ids, gen_length=answer, block_length=answer, cache=cache, eos_early_stop=False,
            num_inference_steps=max(1, answer // 2) if half else answer,
        )  # fmt: skip
        return found.sequences.float()

    for work, options in WAYS.items():
        against = f"neither ({answer} steps)"
        yield compare(work, against, partial(call, **options), call, rounds=rounds, device=device)
