"""Language models of scene captions, compared at equal size and steps: block diffusion by block size against the next
token (BD3-LM, arXiv 2503.09573, table 1), and embeddings of bidirectional and causal models (DiffEmbed, arXiv
2505.15045, table 1).

Every model is a run of the training loop in its own folder, which goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, T5Config, T5EncoderModel

from imgdit.benchmarks.metrics import Interval
from imgdit.benchmarks.scenes.run import write
from imgdit.benchmarks.scenes.text_to_image import Score, fraction_score
from imgdit.checkpoints import SCENES
from imgdit.models.bd3lm import BD3LM
from imgdit.models.text_embeddings import Pooling, cosines, pool
from imgdit.scenes.caption_parser import ParsedCaption, parse_caption
from imgdit.scenes.texts import SceneTextPairs, SceneTexts, scene_masked_lm, scene_text_tokenizer
from imgdit.scenes.tokenizer import caption_tokenizer
from imgdit.training import load_recipe, train
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.block_diffusion_loss import block_diffusion_loss
from imgdit.training.block_likelihood import block_likelihood
from imgdit.training.build import build_model
from imgdit.training.recipe import Recipe
from imgdit.training.sources import training_batches
from imgdit.training.text_pairs import TextPair, collate_text_pairs, text_features
from imgdit.training.text_rows import TextRows, collate_text_rows
from imgdit.training.trained import load_trained

HELD_OUT_SEED = 100_000
"""Of the first scene that is measured; no held-out loss is measured on these."""
LENGTH = 32
"""Tokens of a row, as of the recipe scenes/block_text."""
BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "autoregressive": ({"block_size": 1, "cross_attn": False, "parameterization": "autoregressive", "causal": True,
                        "adaln": False}, {}),
    "1": ({"block_size": 1}, {}),
    "4": ({"block_size": 4}, {}),
    "8": ({"block_size": 8}, {}),
    "all": ({"block_size": LENGTH, "cross_attn": False}, {}),
}  # fmt: skip
"""By block size: what changes in the model and the objective of scenes/block_text; "all" is MDLM."""


def block_size_scores(out: Path, steps: int, captions: int = 512, draws: int = 8) -> list[Score]:
    """Perplexity on held-out captions by block size; `out` gets a folder per run and block_sizes.json.

    Args:
        steps: of each model.
        captions: that perplexity is measured on.
        draws: of the masks, for the bound of one block for everything; the others need none.
    """
    rows = collate_text_rows([SceneTexts(HELD_OUT_SEED, "heldout", LENGTH, False)[n] for n in range(captions)])
    tokens = rows.counted[:, 1:].sum(1)
    scores: list[Score] = []
    reference = None
    for name in BLOCKS:
        model = _trained(block_recipe(name, out / f"blocks_{name}", steps))
        kind = "autoregressive" if name == "autoregressive" else f"blocks of {name} tokens"
        bar = "≤ 1.05 × autoregressive" if name == "4" else ""
        for metric, nats in caption_nats(model, rows, draws).items():
            found = perplexity(nats, tokens)
            reference = found.value if reference is None else reference
            counts: dict[str, Any] = {"nats": nats.tolist(), "tokens": tokens.tolist(), "parameters": _size(model)}
            counts["over autoregressive"] = found.value / reference
            met = found.value <= 1.05 * reference if bar else None
            scores.append(Score(kind, metric, found, bar, met, counts))
        write(out / "block_sizes.json", scores, {"steps": steps})
    return scores


def block_recipe(name: str, folder: Path, steps: int) -> Recipe:
    """The recipe scenes/block_text with one of `BLOCKS`."""
    model, objective = BLOCKS[name]
    recipe = load_recipe("scenes/block_text")
    return recipe.replace(
        **_run(folder, steps),
        model={"arguments": {**recipe.model.arguments, **model}},
        objective={"arguments": {**recipe.objective.arguments, **objective}},
    )


@torch.no_grad()
def caption_nats(model: BD3LM, rows: TextRows, draws: int, batch_size: int = 64) -> dict[str, torch.Tensor]:
    """Nats (B,) of each text by what they are: its negative log-likelihood, exact for an autoregressive model and for
    what the first-hitting sampler writes in small blocks, and the bound on it.

    End tokens that pad a text's last block are part of what a model of blocks writes, so that their nats are counted;
    tokens are those of the text, up to the first end token.

    Args:
        draws: of the masks, where the bound is estimated.
    """
    found: dict[str, list[torch.Tensor]] = {"perplexity": [], "bound on the perplexity": []}
    exact, bound = found.values()
    generator = torch.Generator().manual_seed(0)
    for ids, counted in zip(rows.ids.split(batch_size), rows.counted.split(batch_size)):
        if model.config.parameterization == "autoregressive":
            exact.append(block_diffusion_loss(model, ids, counted).nlls.sum(1))
        elif model.config.cross_attn:
            likelihood = block_likelihood(model, ids, counted)
            exact.append(likelihood.exact.sum(1))
            if model.config.block_size > 1:
                bound.append(likelihood.bound.sum(1))
        else:
            drawn = [block_diffusion_loss(model, ids, fixed_counts=True, generator=generator) for _ in range(draws)]
            bound.append(torch.stack([one.nlls.sum(1) for one in drawn]).mean(0))
    return {metric: torch.cat(parts) for metric, parts in found.items() if parts}


def perplexity(nats: torch.Tensor, tokens: torch.Tensor, rounds: int = 1000, seed: int = 0) -> Interval:
    """Perplexity per token of texts (B,), with a 95 % bootstrap interval over the texts."""
    sums = np.stack([nats.double().numpy(), tokens.double().numpy()], 1)  # (B, 2)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(rounds, len(sums)))
    totals = sums[drawn].sum(1)
    low, high = np.quantile(np.exp(totals[:, 0] / totals[:, 1]), (0.025, 0.975))
    whole = sums.sum(0)
    return Interval(float(np.exp(whole[0] / whole[1])), float(low), float(high))


def causal_lm(
    hidden_size: int = 96, num_layers: int = 3, num_heads: int = 4, max_length: int = 64
) -> LlamaForCausalLM:
    """`scene_masked_lm` with other weights, whose tokens see no later one."""
    config = scene_masked_lm(hidden_size, num_layers, num_heads, max_length).config
    config.is_causal = True
    return LlamaForCausalLM(config)


def small_t5(hidden_size: int = 96, num_layers: int = 3, num_heads: int = 4) -> T5EncoderModel:
    """A T5 encoder with as many layers and features, and new weights."""
    config = T5Config(
        vocab_size=len(scene_text_tokenizer()), d_model=hidden_size, d_kv=hidden_size // num_heads,
        d_ff=4 * hidden_size, num_layers=num_layers, num_heads=num_heads, dropout_rate=0.0,
        feed_forward_proj="gated-silu",
    )  # fmt: skip
    return T5EncoderModel(config)


def next_token(
    model: torch.nn.Module, scheduler: Any, batch: TextRows, generator: torch.Generator | None
) -> ObjectiveOutput:
    """Cross entropy of the counted tokens, each predicted from those before it."""
    logits = model(input_ids=batch.ids[:, :-1]).logits
    counted = batch.counted[:, 1:]
    return ObjectiveOutput(functional.cross_entropy(logits[counted].float(), batch.ids[:, 1:][counted]), {})


def embedding_scores(out: Path, pretraining: int, steps: int, captions: int = 500) -> list[Score]:
    """Recall@1 of a caption's paraphrase among those of other scenes and of scenes that differ in one thing;
    `out` gets a folder per run and embeddings.json.

    Args:
        pretraining: steps of the masked and of the causal model.
        steps: of contrastive training.
        captions: queries.
    """
    settings = {"pretraining": pretraining, "steps": steps}
    scores: list[Score] = []
    embedded = T5EncoderModel.from_pretrained(SCENES, subfolder="text_encoder").eval()
    right = recall_at_1(embedded, captions, "mean", caption_tokenizer())
    kind = f"embedded T5 encoder ({_size(embedded) / 1e6:.1f} M)"
    scores.append(fraction_score(kind, "recall@1, mean", right))
    for name, pooling in ENCODERS:
        recipe = contrastive_recipe(name, pooling, out, pretraining, steps)
        if recipe.model.start_from is not None:
            _trained(pretraining_recipe(name, out, pretraining))
        model = build_model(recipe).eval()
        kind = f"{name} ({_size(model) / 1e6:.2f} M)"
        if recipe.model.start_from is not None:
            right = recall_at_1(model, captions, pooling)
            scores.append(fraction_score(kind, f"recall@1 before, {pooling}", right))
        right = recall_at_1(_trained(recipe), captions, pooling)
        scores.append(fraction_score(kind, f"recall@1 after {steps} contrastive steps, {pooling}", right))
        write(out / "embeddings.json", scores, settings)
    return scores


ENCODERS: tuple[tuple[str, Pooling], ...] = (
    ("masked", "mean"),
    ("causal", "mean"),
    ("causal", "last_token"),
    ("T5", "mean"),
)
"""Models that are compared, each with how its features are pooled. T5 has no pre-training."""
_KINDS = {
    "masked": "imgdit.scenes.texts:scene_masked_lm",
    "causal": "imgdit.benchmarks.scenes.language:causal_lm",
    "T5": "imgdit.benchmarks.scenes.language:small_t5",
}


def pretraining_recipe(name: str, out: Path, steps: int) -> Recipe:
    """The recipe scenes/text, for the masked or the causal model."""
    recipe = load_recipe("scenes/text")
    recipe = recipe.replace(**_run(out / f"pretraining_{name}", steps), model={"kind": _KINDS[name]})
    if name == "masked":
        return recipe
    return recipe.replace(objective={"name": "imgdit.benchmarks.scenes.language:next_token", "arguments": {}})


def contrastive_recipe(name: str, pooling: Pooling, out: Path, pretraining: int, steps: int) -> Recipe:
    """The recipe own/embed on all weights and pairs of scenes' captions."""
    arguments = dict(load_recipe("scenes/text").model.arguments)
    start = str(out / f"pretraining_{name}")
    if name == "T5":
        arguments.pop("max_length")
    recipe = load_recipe("own/embed")
    return recipe.replace(
        **_run(out / f"contrastive_{name}_{pooling}", steps),
        model={"kind": _KINDS[name], "arguments": arguments, "pretrained": None, "subfolder": "",
               "start_from": None if name == "T5" else start},
        adapter={"rank": 0},
        data={"name": "imgdit.scenes.sources:text_pairs", "arguments": {}},
        objective={"arguments": {"pooling": pooling}},
    )  # fmt: skip


@torch.no_grad()
def recall_at_1(model: Any, captions: int, pooling: Pooling, tokenizer: Any = None) -> list[bool]:
    """Whether the text nearest to each query means the same, among all positives and hard negatives.

    Args:
        tokenizer: of the model; `None`: that of the scenes' language models.
    """
    tokenizer = scene_text_tokenizer() if tokenizer is None else tokenizer
    data = SceneTextPairs(HELD_OUT_SEED, "heldout")
    texts = [data.texts(n) for n in range(captions)]
    ids = [[tokenizer(text)["input_ids"] for text in row] for row in texts]
    batch = collate_text_pairs([TextPair(query, positive, (negative,)) for query, positive, negative in ids])
    parsed = [list(map(parse_caption, row)) for row in texts]
    vectors = pool(text_features(model, batch), batch.mask, pooling)
    queries, others = vectors.tensor_split([captions])
    meanings = [_meaning(positive) for _, positive, _ in parsed] + [_meaning(negative) for _, _, negative in parsed]
    nearest = cosines(queries, others).argmax(1).tolist()
    return [meanings[found] == _meaning(query) for found, (query, _, _) in zip(nearest, parsed)]


def _meaning(parsed: ParsedCaption | None) -> Any:
    assert parsed is not None
    return parsed if parsed.relation else parsed._replace(objects=tuple(sorted(parsed.objects)))


def _run(folder: Path, steps: int) -> dict[str, dict[str, Any]]:
    run = {"folder": str(folder), "steps": steps, "checkpoint_every": 100, "evaluate_every": 0, "tracker": "none"}
    return {"run": run, "schedule": {"warmup": steps // 20}}


def _trained(recipe: Recipe) -> Any:
    """The model of a recipe after its steps; a run that stopped goes on."""
    train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0], resume=True)
    return load_trained(recipe.run.folder)


def _size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
