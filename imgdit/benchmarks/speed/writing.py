"""What caches and thresholds save of writing text by masked diffusion (Fast-dLLM, arXiv 2505.22618, table 1), and what
the cache of finished blocks saves of block diffusion (BD3-LM, arXiv 2503.09573).

How many tokens a threshold reveals at once depends on how certain a model is, so that new weights will not do: the
model of these measurements is the packaged one of captions, trained on for some steps on rows of many captions, and
then made wider and deeper without changing what it computes. Nor is a model more certain than its texts let it be:
the rows hold plain captions, in which other words than those of objects, colours, styles and places follow from the
words around them; paraphrases leave open how a thing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from imgdit.benchmarks.speed.timing import timed
from imgdit.models.bd3lm import BD3LM
from imgdit.pipelines.block_text import BlockTextPipeline
from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.scenes.texts import SceneTexts, scene_text_tokenizer
from imgdit.schedulers.masked_text import MaskedTextScheduler
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.recipe import Recipe
from imgdit.training.sources import Source, training_batches
from imgdit.training.text_rows import TextRow, TextRows, collate_text_rows, text_rows
from imgdit.training.trained import load_trained

PROMPT, NEW, BLOCK = 128, 256, 32
"""Tokens of the prompt, new ones, and of a block."""
WIDTH, LAYERS, HEADS = 768, 8, 8
HELD_OUT_SEED = 200_000
WAYS: dict[str, dict[str, Any]] = {
    "no cache": {"cache": None},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "dual cache, threshold 0.9": {"cache": "dual", "threshold": 0.9},
}
"""Arguments of a call; all but the last reveal a token per pass."""


class Writing(NamedTuple):
    """One way of writing against another that spends a whole pass per token."""

    way: str
    against: str
    seconds: float
    """Median, per new token."""
    faster: float
    """Median of the ratios of a round, the other's seconds over these."""
    low: float
    high: float
    passes: int
    agreement: float
    """Fraction of new tokens that are those of the other."""


class CaptionRows:
    """Endless: sample i is a row of captions with an end token behind each, as texts lie in pre-training.

    Args:
        first_seed: of the scenes.
        split: "train" or "heldout".
        length: tokens of a row.
        plain: as of `SceneTexts`.
    """

    def __init__(
        self, first_seed: int = 0, split: str = "train", length: int = PROMPT + NEW, plain: bool = True
    ):  # fmt: skip
        self.texts, self.length = SceneTexts(first_seed, split, 32, False, plain), length

    def __getitem__(self, index: int) -> TextRows:
        captions = (self.texts[self.length * index + n] for n in range(self.length))  # each has a token or more
        tokens = [scene_text_tokenizer().bos_token_id]
        while len(tokens) < self.length:
            caption = next(captions)
            tokens += caption.ids[caption.counted].tolist()
        return text_rows([TextRow(tokens[:1], tokens[1 : self.length])], self.length, tokens[-1])


caption_rows = Source(CaptionRows, collate_text_rows, held_out=8)


def writer_recipe(folder: Path, steps: int, length: int = PROMPT + NEW, plain: bool = True) -> Recipe:
    """The packaged model of captions, trained on with rows of many, see `CaptionRows`."""
    return load_recipe("scenes/text").replace(
        run={"folder": str(folder), "steps": steps, "batch_size": 8, "checkpoint_every": 50, "evaluate_every": 0,
             "tracker": "none"},
        model={"kind": "masked_lm", "pretrained": "embedded", "subfolder": "text/model", "arguments": {}},
        data={"name": "imgdit.benchmarks.speed.writing:caption_rows", "arguments": {"length": length, "plain": plain}},
        schedule={"warmup": steps // 10},
    )  # fmt: skip


def trained_writer(recipe: Recipe) -> LlamaForCausalLM:
    """The model of `writer_recipe` after its steps; a run that stopped goes on."""
    train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0], resume=True)
    return load_trained(recipe.run.folder)


@torch.no_grad()
def widened(
    model: LlamaForCausalLM, hidden_size: int, num_layers: int, num_heads: int, max_length: int
) -> LlamaForCausalLM:
    """A Llama with more features, layers and heads that computes the same logits: what is new has weights of 0.

    Args:
        hidden_size: a multiple of the heads, whose features are a multiple of the model's heads'.
        max_length: positions, in tokens.
    """
    old = model.config
    config = type(old)(**old.to_dict() | {
        "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": num_heads, "head_dim": hidden_size // num_heads,
        "max_position_embeddings": max_length, "rms_norm_eps": old.rms_norm_eps * old.hidden_size / hidden_size,
    })  # fmt: skip
    if config.head_dim % old.head_dim or num_heads < old.num_attention_heads or num_layers < old.num_hidden_layers:
        raise ValueError(
            f"expected as many layers and heads or more, of a multiple of {old.head_dim} features, got {num_layers} "
            f"layers and {num_heads} heads of {config.head_dim}"
        )
    wide = LlamaForCausalLM(config).to(model.device).eval()
    # The features of a head turn in pairs, at frequencies that depend on their number: the old ones lie apart.
    apart = config.head_dim // old.head_dim
    inside = torch.arange(0, config.head_dim, apart)
    heads = (torch.arange(old.num_attention_heads)[:, None] * config.head_dim + inside).flatten()
    tensors = model.state_dict()
    for name, new in wide.state_dict().items():
        new.zero_()
        if name not in tensors:
            continue
        narrow = tensors[name]
        if name.endswith("norm.weight"):  # the mean of the squares is over more features
            new[: len(narrow)] = narrow * math.sqrt(old.hidden_size / hidden_size)
        elif ".o_proj." in name:
            new[: len(narrow), heads] = narrow
        elif ".q_proj." in name:  # scores are divided by the square root of a head's features
            new[heads, : narrow.shape[1]] = narrow * math.sqrt(apart)
        elif ".k_proj." in name or ".v_proj." in name:
            new[heads, : narrow.shape[1]] = narrow
        else:
            new[: narrow.shape[0], : narrow.shape[1]] = narrow
    return wide


@torch.no_grad()
def published_loop(model: Any, prompt: torch.Tensor, new: int, block: int, mask_token_id: int) -> torch.Tensor:
    """LLaDA's sampler at temperature 0 with a token per step: each step a pass over all places, and probabilities of
    all of them. Returns the new tokens (1, new)."""
    grid = torch.cat([prompt, torch.full((1, new), mask_token_id)], 1)
    first = prompt.shape[1]
    for start in range(first, first + new, block):
        for _ in range(min(block, first + new - start)):
            logits = model(grid).logits.clone()
            logits[..., mask_token_id] = -math.inf
            found = logits.softmax(-1).max(-1)
            confidence = found.values.masked_fill(grid != mask_token_id, -1.0)
            place = start + confidence[:, start : start + block].argmax(1)
            grid[0, place] = found.indices[0, place]
    return grid[:, first:]


def writing_comparisons(
    model: LlamaForCausalLM, *, rounds: int = 1, prompt: int = PROMPT, new: int = NEW, block: int = BLOCK,
    plain: bool = True,
) -> Iterator[Writing]:  # fmt: skip
    """Each of `WAYS` against the published loop, on a held-out row of captions, see `CaptionRows`."""
    ids = CaptionRows(HELD_OUT_SEED, "heldout", prompt + new, plain)[0].ids[:, :prompt]
    mask = model.config.mask_token_id

    def call(threshold: float = 2.0, cache: Any = None) -> torch.Tensor:
        scheduler = MaskedTextScheduler(reveal="threshold" if threshold < 1 else "even", threshold=threshold)
        pipe = MaskedTextPipeline(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        found: Any = pipe(
            input_ids=ids, gen_length=new, block_length=block, num_inference_steps=block, threshold=threshold,
            cache=cache, eos_early_stop=False, output_type="seq",
        )  # fmt: skip
        return found.sequences

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "published loop": partial(published_loop, model, ids, new, block, mask),
        **{way: partial(call, **options) for way, options in WAYS.items()},
    }
    yield from _written(calls, model, new, rounds)


def block_writing_comparison(
    *, rounds: int = 1, new: int = NEW, block_size: int = 16, width: int = WIDTH, layers: int = LAYERS, heads: int = 12
) -> Writing:
    """Block diffusion with its cache against without, from the first token on; weights are new."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BD3LM(1024, block_size, new, width, layers, heads).eval()
        for parameter in model.parameters():  # the head and the modulations begin at 0, which would predict nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    pipe = BlockTextPipeline(model)
    pipe.set_progress_bar_config(disable=True)

    def call(cache: bool) -> torch.Tensor:
        found: Any = pipe(
            input_ids=torch.zeros(1, 1, dtype=torch.long), gen_length=new - 1, cache=cache, eos_early_stop=False,
            output_type="seq", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return found.sequences

    calls = {"block diffusion without a cache": partial(call, False), "block diffusion, cached": partial(call, True)}
    return next(_written(calls, model, new - 1, rounds))


def _written(
    calls: Mapping[str, Callable[[], torch.Tensor]], model: torch.nn.Module, new: int, rounds: int
) -> Iterator[Writing]:
    """A row per call but the first, which is what they are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    tokens: dict[str, torch.Tensor] = {}
    passes = dict.fromkeys(calls, 0)
    for _ in range(rounds):
        for name, call in calls.items():

            def count(*_: Any, name: str = name) -> None:
                passes[name] += 1

            def keep(name: str = name, call: Callable[[], torch.Tensor] = call) -> None:
                tokens[name] = call()

            hook = model.register_forward_pre_hook(count)
            seconds[name].append(timed(keep, torch.device("cpu")) / new)
            hook.remove()
    against, *others = calls
    for name in others:
        ratios = [theirs / ours for theirs, ours in zip(seconds[against], seconds[name])]
        agreement = (tokens[name] == tokens[against]).float().mean().item()
        yield Writing(
            name, against, median(seconds[name]), median(ratios), min(ratios), max(ratios), passes[name] // rounds,
            agreement,
        )  # fmt: skip
