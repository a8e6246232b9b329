"""Training of language models: rows of tokens, objectives, recipes."""

import json

import pytest
import torch
from tiny_text import EOS, make_model, make_tokenizer

from imgdit.models.bd3lm import BD3LM
from imgdit.scenes.texts import SceneTexts, scene_text_tokenizer
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.objectives.block_text import block_text
from imgdit.training.objectives.masked_text import masked_text
from imgdit.training.recipe import parse_recipe
from imgdit.training.sources import training_batches
from imgdit.training.text_rows import TextRow, UserTexts, collate_text_rows, text_rows
from imgdit.training.trained import load_trained


def test_rows_are_padded_with_ends_that_count_or_do_not():
    row = TextRow([5], [6, 7])
    rows = text_rows([row], 6, EOS)
    assert rows.ids.tolist() == [[5, 6, 7, EOS, EOS, EOS]]
    assert rows.prompt.tolist() == [[True] + [False] * 5] and rows.counted.tolist() == [[False] + [True] * 5]
    short = text_rows([row], 6, EOS, count_padding=False)
    assert short.counted.tolist() == [[False, True, True, True, False, False]]
    assert text_rows([TextRow([], [1, 2, 3, 4])], 3, EOS).ids.tolist() == [[1, 2, EOS]]


@pytest.fixture
def words(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    make_model().save_pretrained(tmp_path / "model")
    lines = [{"prompt": "w1 w2", "answer": f"w{n}"} if n % 2 else {"text": f"w{n} w3"} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "lines.txt").write_text("\n".join(f"w{n} w5" for n in range(30)))
    return tmp_path


def test_user_texts_are_read_from_lines_and_objects(words):
    texts = UserTexts(str(words / "texts.jsonl"), str(words / "tokenizer"), length=6)
    assert (
        len(texts) == 38 and len(UserTexts(str(words / "texts.jsonl"), str(words / "tokenizer"), split="heldout")) == 2
    )
    assert texts[1].ids.tolist() == [[1, 2, 1, EOS, EOS, EOS]] and texts[1].prompt.sum() == 2
    assert texts[0].ids.tolist() == [[0, 3, EOS, EOS, EOS, EOS]] and not texts[0].prompt.any()
    assert UserTexts(str(words / "lines.txt"), str(words / "tokenizer"), length=4)[2].ids.tolist() == [
        [2, 5, EOS, EOS]
    ]


def test_texts_that_do_not_fit_are_refused(words):
    with pytest.raises(ValueError, match="no file"):
        UserTexts(str(words / "none.txt"), str(words / "tokenizer"))
    with pytest.raises(ValueError, match="at least 20"):
        (words / "few.txt").write_text("w1\nw2")
        UserTexts(str(words / "few.txt"), str(words / "tokenizer"), split="heldout")
    with pytest.raises(ValueError, match="leaves no answer"):
        UserTexts(str(words / "texts.jsonl"), str(words / "tokenizer"), length=2)[1]
    (words / "bad.jsonl").write_text('{"prompt": "w1"}')
    with pytest.raises(ValueError, match=r"line 1: expected prompt and answer"):
        UserTexts(str(words / "bad.jsonl"), str(words / "tokenizer"))


def test_objectives_leave_prompts_out():
    """What is said of a prompt's tokens changes no loss."""
    model = make_model().train()
    rows = text_rows([TextRow([1, 2, 3], [4, 5])], 8, EOS)
    changed = text_rows([TextRow([1, 2, 3], [4, 5])], 8, EOS)
    seen = []
    model.register_forward_pre_hook(lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True)
    for complement in (False, True):
        found = masked_text(model, None, rows, torch.Generator().manual_seed(0), complement=complement)
        again = masked_text(model, None, changed, torch.Generator().manual_seed(0), complement=complement)
        assert found.loss == again.loss and found.loss > 0
    assert all(torch.equal(ids[:, :3], torch.tensor([[1, 2, 3]]).expand(len(ids), -1)) for ids in seen)
    assert len(seen[-1]) == 2 and ((seen[-1] == model.config.mask_token_id).sum(0)[3:] == 1).all()


def test_block_text_is_clipped_while_training_only():
    torch.manual_seed(0)
    model = BD3LM(40, 4, 16, hidden_dim=16, n_blocks=1, n_heads=2, cond_dim=4)
    rows = text_rows([TextRow([38], list(range(14)))] * 8, 16, 38)
    shares = []
    for training in (True, False):
        output = block_text(model.train(training), None, rows, torch.Generator().manual_seed(1), low=0.45, high=0.55)
        shares.append(float(output.metrics["masked"]))
    assert shares[0] == pytest.approx(0.5 * 15 / 16, abs=0.05)


def small(name, folder, **arguments):
    recipe = load_recipe(name)
    return recipe.replace(
        run={"folder": str(folder), "steps": 60, "batch_size": 16, "log_every": 30, "checkpoint_every": 60,
             "evaluate_every": 0, "tracker": "none"},
        model={"arguments": {**recipe.model.arguments, **arguments}},
        schedule={"warmup": 5},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("scenes/text", {"hidden_size": 32, "num_layers": 1}),
        ("scenes/block_text", {"hidden_dim": 32, "n_blocks": 1, "cond_dim": 8}),
    ],
)
def test_the_recipes_of_the_scenes_learn(name, arguments, tmp_path):
    recipe = small(name, tmp_path / "run", **arguments)
    batches, _ = training_batches(recipe)
    result = train(recipe, model=build_model(recipe), batches=batches)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.85 * losses[0]
    assert result.step == 60 and not load_trained(tmp_path / "run").training


def test_a_lora_is_trained_on_user_texts(words):
    recipe = parse_recipe(
        {
            "run": {"folder": str(words / "run"), "steps": 2, "batch_size": 4, "tracker": "none"},
            "model": {"kind": "masked_lm", "pretrained": str(words / "model")},
            "adapter": {"rank": 2, "targets": [r"model\.layers\.\d+\.self_attn\.[qv]_proj"]},
            "data": {
                "name": "user_texts",
                "arguments": {
                    "path": str(words / "texts.jsonl"), "tokenizer": str(words / "tokenizer"), "length": 8,
                },
            },
            "objective": {"name": "masked_text"},
        },
        "test",
    )  # fmt: skip
    model = build_model(recipe)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(recipe, model=model, batches=training_batches(recipe)[0])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= trained


def test_captions_of_scenes_are_rows():
    tokenizer = scene_text_tokenizer()
    rows = collate_text_rows([SceneTexts()[n] for n in range(3)])
    assert rows.ids.shape == (3, 32) and (rows.ids[:, 0] == tokenizer.bos_token_id).all()
    assert rows.prompt.sum(1).tolist() == [1, 1, 1] and (rows.ids[:, -1] == tokenizer.eos_token_id).all()
    assert torch.equal(SceneTexts()[1].ids, rows.ids[1:2])
