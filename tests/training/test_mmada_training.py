"""Training MMaDA on people's images and texts: rows, losses, recipes."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmada_cases import FIXTURES, SIZES, make_pipe
from PIL import Image
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.models.masked_lm import load_masked_lm
from imgdit.pipelines.mmada import load_mmada
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.mmada import TASKS, MMaDAData, MMaDASettings
from imgdit.training.objectives.mmada import mmada
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained

LENGTH = 64
LM, VQ = str(FIXTURES / "lm"), str(FIXTURES / "magvitv2")
PARTS = {"model": LM, "image_tokenizer": VQ, "image_sizes": SIZES, "cache": None, "length": LENGTH}


@pytest.fixture
def folder(tmp_path):
    """Images with captions, and a file of all tasks."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for n in range(24):
        image = Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        image.save(tmp_path / f"images/{n}.png")
        (tmp_path / f"images/{n}.txt").write_text(f"a photo of a red cube {n}")
        lines += [
            {"prompt": f"cube {n}", "image": f"images/{n}.png"},
            {"image": f"images/{n}.png", "question": "What is it?", "answer": f"a cube {n}"},
            {"prompt": "Name a colour.", "answer": f"red {n}"},
            {"prompt": f"draw {n}", "reasoning": f"a red cube {n}", "image": f"images/{n}.png"},
        ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def mixed(folder, **changes):
    settings = {"path": str(folder / "tasks.jsonl"), "batch": dict.fromkeys(TASKS, 1)} | PARTS
    return MMaDAData(MMaDASettings(**settings | changes))


def test_a_batch_mixes_tasks_in_rows_of_one_length(folder):
    data, tokens = mixed(folder), make_pipe().tokens
    batch = data[0]
    assert batch.tasks == tuple(TASKS) and batch.tokens.shape == (4, LENGTH + 16 + 3)
    first = [int(row[real.bool()][0]) for row, real in zip(batch.tokens, batch.attention_mask)]
    assert first == [tokens.text_to_image, tokens.understanding, tokens.bos, tokens.reasoning]
    image = batch.learnt[0].nonzero().flatten()
    assert image.tolist() == list(range(LENGTH + 2, LENGTH + 18)) and not batch.learnt[1][:19].any()
    assert batch.learnt[3][-17:-1].all() and not batch.learnt[3][-1] and batch.learnt[3][1:-18].any()
    assert (
        batch.empty[0, LENGTH - 2 : LENGTH + 1] == torch.tensor([tokens.text_to_image, tokens.bos, tokens.eos])
    ).all()
    assert batch.empty_mask[0].sum() == 3 + 18 and torch.equal(batch.empty[1:], batch.tokens[1:])
    codes = make_pipe().encode_images(Image.open(folder / "images/0.png")).flatten(1)
    rows = [data[n].tokens[0, LENGTH + 2 : -1] for n in range(23)]
    assert sum(torch.equal(row, codes[0] + tokens.first_code) for row in rows) == 1  # each image once in an epoch
    again = mixed(folder)
    for n in (0, 7, 30):
        assert torch.equal(again[n].tokens, data[n].tokens)
    assert not torch.equal(data[0].tokens[0], data[1].tokens[0])
    assert len(data.fingerprint()) == 4 * 23


def test_captions_are_prompts_and_answers(folder, tmp_path):
    data = MMaDAData(
        MMaDASettings(
            path=str(folder / "images"), batch={"text_to_image": 2, "understanding": 1},
            **PARTS | {"cache": str(tmp_path / "cache")},
        )
    )  # fmt: skip
    batch = data[0]
    assert batch.tasks == ("text_to_image", "text_to_image", "understanding")
    said = data.tokenizer.decode(batch.tokens[2], skip_special_tokens=True)
    assert "a photo of a red cube" in said and "describe" in said
    kept = MMaDAData(MMaDASettings(**vars(data.settings) | {"split": "heldout"}))
    assert len(kept.entries["text_to_image"]) == 1 and len(data.entries["text_to_image"]) == 23
    assert list((tmp_path / "cache/codes").glob("*.safetensors"))
    kept.image_tokenizer.encode = None  # all codes are read
    assert torch.equal(MMaDAData(data.settings)[0].tokens, batch.tokens) and kept[0].tokens.shape == batch.tokens.shape


def test_only_what_is_learnt_is_masked_and_prompts_are_dropped(folder):
    model, data = load_masked_lm(LM), mixed(folder, batch=dict.fromkeys(TASKS, 2))
    batch, seen = data[0], []
    model.register_forward_pre_hook(lambda module, args, options: seen.append(options), with_kwargs=True)
    with torch.no_grad():
        for dropout in (0.0, 1.0):
            found = mmada(model, None, batch, torch.Generator().manual_seed(0), dropout=dropout)
            assert found.metrics.keys() == TASKS.keys() and torch.isfinite(found.loss)
            weights = {"text_to_image": 1.0, "understanding": 1.0, "language": 0.1, "reasoning": 1.0}
            torch.testing.assert_close(found.loss, sum(weights[k] * v for k, v in found.metrics.items()))
        half = mmada(
            model, None, batch, torch.Generator().manual_seed(0), dropout=1.0, text_to_image=0.5, understanding=0,
            language=0, reasoning=0,
        )  # fmt: skip
    torch.testing.assert_close(half.loss, 0.5 * half.metrics["text_to_image"])
    mask = model.config.mask_token_id
    for options, expected in zip(seen, (batch.tokens, batch.empty)):
        masked = options["input_ids"] == mask
        assert (masked <= batch.learnt).all() and masked[:2].any(1).all()
        assert torch.equal(options["input_ids"][~masked], expected[~masked])
    assert torch.equal(seen[1]["attention_mask"][:2], batch.empty_mask[:2])


def tiny(recipe, folder, **data):
    arguments = recipe.data.arguments
    keep = {"path": arguments["path"].replace("training_images", "images"), "batch": arguments["batch"]}
    return recipe.replace(
        run={"folder": str(folder / "run"), "steps": 40, "log_every": 10, "checkpoint_every": 40, "tracker": "none",
             "mixed_precision": "no"},
        model={"pretrained": data.get("model", LM), "dtype": "float32"},
        data={"arguments": keep | PARTS | data | {"path": str(folder / keep["path"])}},
        optimizer={"lr": 0.02},
        schedule={"warmup": 2},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["own/mmada", "own/mmada_mixture"])
def test_the_recipes_learn(name, folder):
    recipe = tiny(load_recipe(name), folder)
    model, (batches, _) = build_model(recipe), training_batches(recipe)
    assert all("lora" in key for key, parameter in model.named_parameters() if parameter.requires_grad)
    train(recipe, model=model, batches=batches)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    done = CliRunner().invoke(app, ["export", str(folder / "run"), str(folder / "exported")])
    assert done.exit_code == 0, done.output
    options = {"num_inference_steps": 2, "temperature": 0, "order_noise": 0, "output_type": "latent"}
    exported = load_mmada(folder / "exported")
    exported.set_progress_bar_config(disable=True)
    made, pipe = exported("cube 1", **options).codes, make_pipe()
    assert not torch.equal(pipe("cube 1", **options).codes, made)
    pipe.register_modules(model=load_trained(folder / "run"))
    assert torch.equal(pipe("cube 1", **options).codes, made)


def test_a_saved_pipeline_is_trained_whole(folder, tmp_path):
    saved = tmp_path / "saved"
    load_mmada(LM, VQ, sizes=SIZES).save_pretrained(saved)
    recipe = tiny(load_recipe("own/mmada"), folder, model=str(saved), image_tokenizer="", image_sizes={})
    recipe = recipe.replace(
        model={"pretrained": str(saved), "subfolder": "model", "gradient_checkpointing": False},
        adapter={"rank": 0}, run={"steps": 2, "checkpoint_every": 2},
    )  # fmt: skip
    model = build_model(recipe)
    train(recipe, model=model, batches=training_batches(recipe)[0])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"paint": 1}}, "unknown task 'paint'"),
        ({"batch": {"language": 0}}, "batch names no row"),
        ({"batch": {"language": -1}}, "language: -1"),
        ({"model": ""}, r"name the model in data\.arguments\.model"),
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"path": "none.jsonl"}, "no file .* of texts and images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        mixed(folder, **changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, r"line 1: expected texts by the keys of one task .* got \['prompt'\]"),
        ({"prompt": "a", "answer": 3}, r"line 1: expected texts"),
        ({"prompt": "a", "image": "gone.png"}, r"line 1 names the image .*gone\.png', which is not there"),
        ({"prompt": "a", "image": "../up.png"}, "leads out of"),
    ],
)
def test_lines_that_cannot_be_read_are_refused(folder, line, message):
    (folder / "tasks.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        mixed(folder, batch={"text_to_image": 1})


def test_tasks_and_images_that_are_missing_are_refused(folder):
    with pytest.raises(ValueError, match="0 entries for the task 'language', none for the split 'train'"):
        mixed(folder, path=str(folder / "images"))
    Image.new("RGB", (1, 1)).save(folder / "images/0.png")
    with pytest.raises(ValueError, match=r"images/0\.png' has 1x1 pixels"):
        data = mixed(folder, batch={"text_to_image": 23})
        data[0]
    with pytest.raises(ValueError, match=r"images/\d+\.png has a question of 22 tokens, length=20 leaves no answer"):
        mixed(folder, batch={"understanding": 23}, length=20)[0]
    bare = folder / "bare"
    shutil.copytree(LM, bare, ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        mixed(folder, model=str(bare))
