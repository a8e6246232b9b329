"""Contrastive training of text embeddings: pairs, the objective, a LoRA from its run to `imgdit embed`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import make_model, make_tokenizer
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.models.text_embeddings import contrastive_loss, embed_texts, encode, pool
from imgdit.pipelines.text_loading import load_text_pipeline
from imgdit.scenes.caption_parser import parse_caption
from imgdit.scenes.texts import SceneTextPairs
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.objectives.contrastive import contrastive
from imgdit.training.sources import source_of, training_batches
from imgdit.training.text_pairs import TextPair, UserTextPairs, collate_text_pairs
from imgdit.training.trained import load_trained

PAIRS = [
    TextPair([1, 2], [3, 4, 5], ([6],)),
    TextPair([7, 8, 9], [10]),
    TextPair([11], [12, 13], ([14, 15], [16, 17, 18, 19])),
]


def test_the_objective_is_the_loss_of_each_text_encoded_alone():
    model, batch = make_model(), collate_text_pairs(PAIRS)
    assert batch.ids.shape == (9, 4) and batch.pairs == 3 and batch.mask.sum(1).tolist() == [2, 3, 1, 3, 1, 2, 1, 2, 4]

    def vectors(rows):
        return torch.cat([pool(encode(model, torch.tensor([row]))) for row in rows])

    negatives = [row for pair in PAIRS for row in pair.negatives]
    alone = [vectors([pair.query for pair in PAIRS]), vectors([pair.positive for pair in PAIRS]), vectors(negatives)]
    output = contrastive(model, None, batch, None, scale=10.0)
    torch.testing.assert_close(output.loss, contrastive_loss(*alone, scale=10.0), rtol=0, atol=1e-5)
    easier = contrastive(model, None, collate_text_pairs([p._replace(negatives=()) for p in PAIRS]), None, scale=10.0)
    torch.testing.assert_close(easier.loss, contrastive_loss(*alone[:2], scale=10.0), rtol=0, atol=1e-5)
    assert easier.loss < output.loss
    same = contrastive(model, None, collate_text_pairs([TextPair(p.query, p.query) for p in PAIRS]), None)
    assert same.metrics["right"] == 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and pairs (w_n, w_{n+15}) with a negative that shares a word."""
    folder = tmp_path_factory.mktemp("pairs")
    make_model(initializer_range=0.2).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [
        {"query": f"w{n} w35", "positive": f"w{n + 15} w34", "negative": [f"w{n} w34"] if n % 2 else f"w{n} w34"}
        for n in [*range(15)] * 4
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipe_in(folder, tmp_path, **changes):
    recipe = load_recipe("own/embed")
    arguments = {"path": str(folder / "pairs.jsonl"), "tokenizer": str(folder / "model"), "length": 8}
    return recipe.replace(
        run={"folder": str(tmp_path / "run"), "steps": 40, "batch_size": 15, "tracker": "none", "log_every": 40},
        model={"pretrained": str(folder / "model"), "subfolder": ""},
        data={"arguments": arguments}, optimizer={"lr": 0.02}, schedule={"warmup": 2}, **changes,
    )  # fmt: skip


def test_a_lora_learns_which_texts_belong_together_and_imgdit_embed_reads_it(folder, tmp_path):
    recipe = recipe_in(folder, tmp_path)
    model = build_model(recipe)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    train(recipe, model=model, batches=training_batches(recipe)[0])
    run = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "small"), "--half"])
    stored = load_file(tmp_path / "small" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    queries, positives = [f"w{n} w35" for n in range(15)], [f"w{n + 15} w34" for n in range(15)]

    def recall(source):
        pipe = load_text_pipeline(source)
        scores = (
            embed_texts(pipe.model, pipe.tokenizer, queries) @ embed_texts(pipe.model, pipe.tokenizer, positives).T
        )
        return (scores.argmax(1) == torch.arange(15)).float().mean()

    assert recall(tmp_path / "out") == 1.0 and recall(folder / "model") < 0.5
    merged, adapted = load_text_pipeline(tmp_path / "out").model, load_trained(tmp_path / "run")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(encode(merged, ids), encode(adapted, ids), rtol=0, atol=1e-5)
    shown = CliRunner().invoke(app, ["embed", "w3 w35", "w18 w34", "w3 w34", "--model", str(tmp_path / "out")])
    close, far = (float(value) for value in shown.stdout.splitlines()[0].split()[1:3])
    assert close > far


def test_all_weights_can_be_trained(folder, tmp_path):
    recipe = recipe_in(folder, tmp_path, adapter={"rank": 0}).replace(
        run={"steps": 2}, optimizer={"weight_decay": 0.0}
    )
    for stop_at in (1, 2):  # and a run goes on, though its head has learned nothing
        train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0], resume=True, stop_at=stop_at)
    before = load_text_pipeline(folder / "model").model.state_dict()
    changed = {
        name for name, value in load_trained(tmp_path / "run").state_dict().items() if (value != before[name]).any()
    }
    assert before.keys() - changed == {"lm_head.weight"}  # which embeddings do not use


def test_pairs_are_split_and_what_are_none_is_refused(folder, tmp_path):
    arguments = {"tokenizer": str(folder / "model"), "length": 2}
    pairs = UserTextPairs(str(folder / "pairs.jsonl"), **arguments)
    assert len(pairs) == 57 and len(UserTextPairs(str(folder / "pairs.jsonl"), split="heldout", **arguments)) == 3
    assert pairs[1] == TextPair([1, 35], [16, 34], ([1, 34],))
    (tmp_path / "bad.jsonl").write_text('{"query": "w1", "positive": ["w2"]}')
    with pytest.raises(ValueError, match="line 1: expected texts query and positive"):
        UserTextPairs(str(tmp_path / "bad.jsonl"), **arguments)
    with pytest.raises(ValueError, match="no file"):
        UserTextPairs(str(tmp_path / "none.jsonl"), **arguments)
    (tmp_path / "few.jsonl").write_text('{"query": "w1", "positive": "w2"}')
    with pytest.raises(ValueError, match="at least 20"):
        UserTextPairs(str(tmp_path / "few.jsonl"), split="heldout", **arguments)
    (tmp_path / "empty.jsonl").write_text('{"query": "", "positive": "w2"}')
    with pytest.raises(ValueError, match="has no token"):
        UserTextPairs(str(tmp_path / "empty.jsonl"), **arguments)[0]


def test_captions_of_scenes_are_pairs_whose_negative_differs_in_one_thing():
    data = SceneTextPairs(split="heldout")
    for n in range(60):
        query, positive, negative = map(parse_caption, data.texts(n))
        assert (set(query.objects), *query[1:]) == (set(positive.objects), *positive[1:])
        kept = [getattr(query, name) == getattr(negative, name) for name in ("style", "background")]
        kept.append(sorted(query.objects) == sorted(negative.objects))
        assert kept.count(False) == 1
    recipe = load_recipe("own/embed").replace(data={"name": "imgdit.scenes.sources:text_pairs", "arguments": {}})
    batch = source_of(recipe).collate([data[0], data[1]])
    assert batch.pairs == 2 and len(batch.ids) == 6
