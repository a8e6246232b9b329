"""Training of vision-language models on tiny folders: what people bring, the stages, and what is refused."""

import json

import pytest
import torch
from tiny_vision import SPECIAL, make_vision_pipe, noise_image

from imgdit.apps.chores.run_pipeline import run_pipeline
from imgdit.models.image_rows import IMAGE_PLACE
from imgdit.models.vision_language import load_vision_language
from imgdit.pipelines.vision_language import LaViDaPipeline
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.objectives.vision_language import join_batch, visible, vision_language
from imgdit.training.optimizers import optimizer_groups
from imgdit.training.sources import training_batches
from imgdit.training.vision_language import UserDialogues, collate_vision_rows

LENGTH = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline, images with captions, and dialogues."""
    folder = tmp_path_factory.mktemp("vision")
    make_vision_pipe().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    samples = []
    for n in range(22):
        noise_image(28 + 2 * n, 40, n).save(folder / f"images/{n:02}.png")
        (folder / f"images/{n:02}.txt").write_text(f"a photo of cube {n}")
        said = [("human", "What is it?"), ("gpt", f"a cube {n}"), ("human", "The colour?"), ("gpt", "red")]
        turns = [{"from": who, "value": value} for who, value in (said if n % 3 else said[:2])]
        samples.append({"image": f"images/{n:02}.png", "conversations": turns})
    samples[4].pop("image")
    samples[5]["image"] = ["images/05.png", "images/06.png"]
    samples[6]["conversations"][-1]["value"] = "a <|reserved_token_2|><|reserved_token_1|> cube"
    (folder / "dialogues.json").write_text(json.dumps(samples))
    (folder / "dialogues.jsonl").write_text("\n".join(map(json.dumps, samples)))
    return folder


def dialogues(folder, path="dialogues.json", **options):
    return UserDialogues(str(folder / path), str(folder / "model"), **{"length": LENGTH} | options)


def test_dialogues_are_rows(folder):
    data = dialogues(folder)
    assert len(data) == 21 and len(dialogues(folder, split="heldout")) == 1
    lines = dialogues(folder, "dialogues.jsonl")
    assert all(torch.equal(data[n].ids, lines[n].ids) for n in range(7))
    row = data[1]
    words = data.tokenizer.decode(row.ids[0][row.targets[0]])
    assert words.startswith("\n\nred<|eot_id|><|endoftext|>")  # the last answer, and the ends behind it
    assert (row.ids == IMAGE_PLACE).sum() == 1 and row.images == (1,) and row.counts == (len(row.tiles),)
    assert row.turns.max() == 1 and row.turns[0, -1] == 1
    assert data[4].images == (0,) and data[4].tiles.shape == (0, 3, 28, 28)
    assert data[5].images == (2,) and (data[5].ids == IMAGE_PLACE).sum() == 2
    gap = data[6]
    assert (gap.ids == SPECIAL["fim"]).any() and not gap.targets[gap.ids == SPECIAL["fim"]].any()
    assert gap.targets[gap.ids == SPECIAL["fill"]].all()
    every = dialogues(folder, targets="turns")[1]
    assert "a cube 1" in data.tokenizer.decode(every.ids[0][every.targets[0]])


def test_captions_are_rows(folder):
    plain = dialogues(folder, "images", style="caption", length=24)[3]
    data = dialogues(folder, "images")
    assert plain.ids[0, 0] == IMAGE_PLACE
    assert data.tokenizer.decode(plain.ids[0, 1:]).startswith("a photo of cube 3\n<|endoftext|>")
    assert plain.targets[0].tolist() == [False] + [True] * 23
    assert "Describe the image" in data.tokenizer.decode(data[3].ids[0][data[3].ids[0] >= 0])


def test_samples_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        dialogues(folder, "none.json")
    with pytest.raises(ValueError, match="leaves no room for an end token"):
        dialogues(folder, length=20)[0]
    with pytest.raises(ValueError, match="none for the split 'heldout'; it needs 20"):
        (folder / "one.json").write_text(json.dumps([json.loads((folder / "dialogues.json").read_text())[0]]))
        dialogues(folder, "one.json", split="heldout")
    bad = {
        r"entry 0: expected conversations": {"image": "images/00.png"},
        r"entry 0 names the image .*gone.png": {
            "image": "gone.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
        },
        r"leads out of": {
            "image": "../x.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
        },
        r"entry 0: the last of its conversations must be an answer": {
            "conversations": [{"from": "human", "value": "?"}],
        },
    }  # fmt: skip
    for message, sample in bad.items():
        (folder / "bad.json").write_text(json.dumps([sample]))
        with pytest.raises(ValueError, match=message):
            dialogues(folder, "bad.json")


OPTIONS = {
    "lavida": {},
    "llada_v": {"weight": "rate_and_length", "complement": False},
    "prefix": {"attention": "prefix"},
    "dialogue": {"attention": "dialogue", "times": "logit_normal"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_changes_no_loss(folder, name):
    """Of LLaDA-V's loss, whose rows are averaged, and of single rows of the others."""
    data = dialogues(folder, targets="turns")
    model = build_model(recipe_of(folder, "own/vision_instruction")).eval()
    batch = collate_vision_rows([data[0], data[1]])
    joined, targets, turns = join_batch(model, batch)
    assert not joined.real.all() and (joined.images.sum(1) > 0).all()
    seen = visible(joined, targets, turns, OPTIONS[name].get("attention", "full"))
    places = torch.arange(joined.ids.shape[1])[None].expand_as(joined.ids)
    inputs = (joined.images, batch.tiles.split(batch.counts), batch.shown, seen)
    with torch.no_grad():
        logits = model(joined.ids, *inputs, places)
        other = model(joined.ids.masked_fill(~joined.real, 5), *inputs, places)
        assert torch.equal(logits[joined.real], other[joined.real])
        found = vision_language(model, None, batch, torch.Generator().manual_seed(0), **OPTIONS[name])
    assert found.loss > 0 and 0 <= found.metrics["right"] <= 1


def test_turns_and_prefixes_are_hidden_from_what_comes_before(folder):
    data = dialogues(folder, targets="turns")
    model = build_model(recipe_of(folder, "own/vision_instruction")).eval()
    batch = data[1]
    joined, targets, turns = join_batch(model, batch)
    places = torch.arange(joined.ids.shape[1])[None]
    for attention, before in (("dialogue", turns[0] == 0), ("prefix", targets[0].long().cumsum(0) == 0)):
        seen = visible(joined, targets, turns, attention)
        with torch.no_grad():
            found = [
                model(ids, joined.images, batch.tiles.split(batch.counts), batch.shown, seen, places)[0]
                for ids in (joined.ids, joined.ids.masked_fill(~before, 7))
            ]
        same = (found[0] == found[1]).all(-1)
        assert same[before].all() and not same[~before].any()


def recipe_of(folder, name, **changes):
    """A packaged recipe for the tiny model."""
    recipe = load_recipe(name)
    arguments = {**recipe.data.arguments, "model": str(folder / "model"), "length": LENGTH}
    arguments["path"] = str(folder / ("images" if "projector" in name else "dialogues.json"))
    small = {
        "run": {"folder": str(folder / name), "steps": 3, "batch_size": 2, "tracker": "none", "mixed_precision": "no"},
        "model": {"pretrained": str(folder / "model"), "subfolder": "model", "dtype": "float32"},
        "data": {"arguments": arguments},
        "schedule": {"warmup": 1},
    }
    return recipe.replace(**small | changes)


STAGES = {
    "own/vision_projector": ("projector.",),
    "own/vision_instruction": ("projector.", "language_model."),
    "own/vision_lora": ("language_model.",),
}
"""Recipe -> beginnings of the names of trained parameters."""


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_trains_its_parts(folder, name):
    recipe = recipe_of(folder, name)
    if name == "own/vision_lora":  # as it stands, frozen weights are in bfloat16
        recipe = recipe.replace(model={"dtype": "bfloat16"}, run={"mixed_precision": "bf16"})
    model = build_model(recipe)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all(key.startswith(STAGES[name]) for key in trained)
    assert {key.split(".")[0] + "." for key in trained} == set(STAGES[name])
    assert all(("lora" in key) == (name == "own/vision_lora") for key in trained)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train(recipe, model=model, batches=training_batches(recipe)[0])
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed and changed <= trained
    pipe = run_pipeline(folder / name)
    assert type(pipe) is LaViDaPipeline
    pipe.save_pretrained(folder / f"{name}_exported")
    exported = dict(load_vision_language(folder / f"{name}_exported").named_parameters())
    base = dict(load_vision_language(folder / "model").named_parameters())
    other = {key for key, p in base.items() if not torch.equal(exported[key], p)}
    learnt = {key for key in exported if key.startswith(STAGES[name])}
    assert other and other <= learnt


def test_the_projector_learns_one_caption(folder):
    """A miniature of the first stage: the loss of one image's caption falls."""
    recipe = recipe_of(folder, "own/vision_instruction", optimizer={"lr": 3e-3})
    model, batch = build_model(recipe), dialogues(folder)[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(12):
        output = vision_language(model, None, batch, torch.Generator().manual_seed(step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_tower_has_a_rate_of_its_own(folder):
    recipe = recipe_of(folder, "own/vision_instruction").replace(
        model={"kind": "vision_language_whole"},
        optimizer={"lr": 1e-3, "weight_decay": 0.1, "rates": {r"vision_tower\..*": 2e-4}},
    )
    model = build_model(recipe)
    groups = optimizer_groups(model, recipe.optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (group["lr"], group["weight_decay"] > 0) for group in groups for p in group["params"]}
    assert all(rate == (2e-4 if name.startswith("vision_tower.") else 1e-3) for name, (rate, _) in rates.items())
    assert all(decays == (model.get_parameter(name).ndim > 1) for name, (_, decays) in rates.items())
    unused = {name for name in names.values() if "post_layernorm" in name}
    assert unused and rates.keys() == set(names.values()) - unused
    batch = collate_vision_rows([dialogues(folder)[0]])
    vision_language(model, None, batch, torch.Generator().manual_seed(0)).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in rates)
    for wrong, message in (({"tower.*": 1e-4}, "is no parameter that is trained"), ({".*": 0.0}, "must be positive")):
        with pytest.raises(ValueError, match=message):
            optimizer_groups(model, recipe.replace(optimizer={"rates": wrong}).optimizer)
