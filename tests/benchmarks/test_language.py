"""The comparison of language models measures what it says, and goes on where it stopped."""

import json
import math

import pytest
import torch
from transformers import T5EncoderModel

from imgdit.benchmarks.scenes import language
from imgdit.benchmarks.scenes.language import (
    BLOCKS,
    ENCODERS,
    block_recipe,
    block_size_scores,
    caption_nats,
    contrastive_recipe,
    embedding_scores,
    perplexity,
    pretraining_recipe,
    recall_at_1,
)
from imgdit.checkpoints import SCENES
from imgdit.io.checkpoints import find_checkpoint
from imgdit.models.bd3lm import BD3LM
from imgdit.scenes.texts import SceneTexts
from imgdit.scenes.tokenizer import caption_tokenizer
from imgdit.training import train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches
from imgdit.training.text_rows import collate_text_rows


def test_perplexity_is_of_all_tokens_with_an_interval_over_texts():
    nats, tokens = torch.tensor([2.0, 9.0, 4.0]), torch.tensor([2, 3, 4])
    found = perplexity(nats, tokens)
    assert found.value == pytest.approx(math.exp(15 / 9))
    assert math.exp(1.0) <= found.low < found.value < found.high <= math.exp(3.0)
    same = perplexity(3.0 * tokens, tokens)
    assert same.low == pytest.approx(same.high) == pytest.approx(math.exp(3.0))


@pytest.mark.parametrize("name", ["autoregressive", "1", "4", "all"])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(name):
    rows = collate_text_rows([SceneTexts(0, "heldout", 32, False)[n] for n in range(4)])
    arguments = block_recipe(name, "unused", 40).model.arguments
    model = BD3LM(**{**arguments, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 4}).eval()
    for p in model.output_layer.linear.parameters():
        torch.nn.init.zeros_(p)
    size = model.config.block_size
    nats = caption_nats(model, rows, draws=2)
    assert list(nats) == {"4": ["perplexity", "bound on the perplexity"], "all": ["bound on the perplexity"]}.get(
        name, ["perplexity"]
    )
    # All tokens of a block are written, those behind the text's end too; the first token of a row is given.
    written = rows.counted.unflatten(1, (-1, size)).any(-1).sum(1) * size - int(size > 1)
    each = math.log(model.config.vocab_size - 1)  # the mask is never predicted
    for found in nats.values():
        torch.testing.assert_close(found.double(), each * written.double(), rtol=1e-4, atol=0)


def test_block_sizes_are_compared_and_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "BLOCKS", {name: BLOCKS[name] for name in ("autoregressive", "4")})
    recipe = block_recipe("4", tmp_path / "blocks_4", 2)
    train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0], stop_at=1)
    scores = block_size_scores(tmp_path, 2, captions=4, draws=1)
    assert [score.task for score in scores] == ["autoregressive", "blocks of 4 tokens", "blocks of 4 tokens"]
    assert [score.metric for score in scores[1:]] == ["perplexity", "bound on the perplexity"]
    assert find_checkpoint(tmp_path / "blocks_4").name.endswith("2")
    kept = json.loads((tmp_path / "block_sizes.json").read_text())
    assert kept["steps"] == 2 and len(kept["scores"][1]["counts"]["nats"]) == 4
    assert [score.met for score in scores[1:]] == [
        score.estimate.value <= 1.05 * scores[0].estimate.value for score in scores[1:]
    ]
    again = block_size_scores(tmp_path, 2, captions=4, draws=1)
    assert [score.estimate for score in again] == [score.estimate for score in scores]


def test_embeddings_are_compared_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "ENCODERS", (("causal", "last_token"), ("T5", "mean")))
    scores = embedding_scores(tmp_path, 2, 2, captions=6)
    assert [(score.task.split(" (")[0], score.metric) for score in scores] == [
        ("embedded T5 encoder", "recall@1, mean"),
        ("causal", "recall@1 before, last_token"),
        ("causal", "recall@1 after 2 contrastive steps, last_token"),
        ("T5", "recall@1 after 2 contrastive steps, mean"),
    ]
    assert len(json.loads((tmp_path / "embeddings.json").read_text())["scores"]) == 4
    model = build_model(pretraining_recipe("causal", tmp_path, 2)).eval()
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, -1] = 9
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[:, :-1], model(input_ids=changed).logits[:, :-1])
        masked = build_model(pretraining_recipe("masked", tmp_path, 2)).eval()
        assert not torch.equal(masked(input_ids=ids).logits[:, 0], masked(input_ids=changed).logits[:, 0])


def test_models_of_embeddings_are_of_equal_size(tmp_path):
    recipes = [pretraining_recipe(name, tmp_path, 2) for name in ("masked", "causal")]
    recipes.append(contrastive_recipe("T5", "mean", tmp_path, 2, 2))
    sizes = [sum(p.numel() for p in build_model(recipe).parameters()) for recipe in recipes]
    assert max(sizes) < 1.1 * min(sizes) and {name for name, _ in ENCODERS} == {"masked", "causal", "T5"}


def test_recall_is_of_the_meaning():
    """The embedded encoder knows what captions say; one that was never trained does not."""
    tokenizer = caption_tokenizer()
    knows = T5EncoderModel.from_pretrained(SCENES, subfolder="text_encoder").eval()
    assert sum(recall_at_1(knows, 30, "mean", tokenizer)) >= 27
    torch.manual_seed(0)
    new = T5EncoderModel(knows.config).eval()
    assert sum(recall_at_1(new, 30, "last_token", tokenizer)) < 20
