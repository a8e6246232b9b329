import math
import re

import pytest
import yaml
from tiny import rope_config

from imgdit import MMDiT, recipes
from imgdit.training.build import build_model
from imgdit.training.optimizers import optimizer_groups
from imgdit.training.recipe import ScheduleConfig, load_recipe, parse_recipe
from imgdit.training.sae_recipe import load_sae_recipe

RUN = {"folder": "out", "steps": 100, "batch_size": 8}


def parse(**sections):
    return parse_recipe({"run": RUN, **sections}, "made.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimiser": {}}, r"made.yaml: unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"optimizer": {"beta": 1.0}}, r"made.yaml: unknown key in optimizer 'beta'; did you mean 'betas'"),
        ({"optimizer": {"lr": "1e-3"}}, r"optimizer.lr must be a number, got str '1e-3'; YAML takes.*write 0.001"),
        ({"optimizer": {"lr": True}}, r"optimizer.lr must be a number, got bool True"),
        ({"optimizer": {"lr": -1}}, r"made.yaml: optimizer: lr must be positive, got -1"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas must have 2 entries, got 1"),
        ({"run": {**RUN, "steps": 1.5}}, r"run.steps must be a whole number, got float 1.5"),
        ({"run": {**RUN, "steps": 0}}, r"run: steps must be at least 1, got 0"),
        ({"run": {"folder": "out", "steps": 1}}, r"run.batch_size is missing"),
        ({"run": {**RUN, "mixed_precision": "fp8"}}, r"must be one of 'no', 'bf16', 'fp16', got str 'fp8'"),
        ({"run": None}, r"run must be a mapping of keys to values, got nothing"),
        ({"schedule": {"warmup": 80, "kind": "constant", "decay": 30}}, r"take longer than run.steps=100"),
        ({"schedule": {"decay": 30}}, r"schedule: decay belongs to kind 'constant'"),
        ({"objective": {"name": "flow_maching"}}, r"unknown objective 'flow_maching'; did you mean 'flow_matching'"),
        ({"objective": {"arguments": {"text_dropuot": 0.1}}}, r"'text_dropuot'; did you mean 'text_dropout'"),
        ({"objective": {"arguments": {"model": 1}}}, r"unknown key 'model'"),
        ({"objective": {"arguments": {"clean": "much"}}}, r"arguments.clean must be a number, got str 'much'"),
        ({"model": {"arguments": {"num_layer": 2}}}, r"model: arguments has an unknown key 'num_layer'; did you mean"),
        ({"model": {"arguments": {"num_layers": "2"}}}, r"arguments.num_layers must be a whole number"),
        ({"model": {"pretrained": "x", "arguments": {"num_layers": 2}}}, r"remove arguments"),
        ({"scheduler": {"shiftt": 2.0}}, r"unknown key 'shiftt'; did you mean 'shift'"),
    ],
)
def test_mistakes_are_named(sections, message):
    with pytest.raises(ValueError, match=message):
        parse(**sections)


def test_a_bare_no_is_no():
    """YAML takes it for false."""
    assert parse(run={**RUN, "mixed_precision": yaml.safe_load("no")}).run.mixed_precision == "no"
    with pytest.raises(ValueError, match="must be one of 'no', 'bf16', 'fp16', got bool True"):
        parse(run={**RUN, "mixed_precision": True})


def test_a_recipe_file_and_back(tmp_path):
    sections = {
        "run": {**RUN, "evaluate_sigmas": [0.5, 1]},
        "model": {"arguments": rope_config(axes_dims_rope=[4, 6, 6])},
        "optimizer": {"lr": 1, "clip_norm": None},
        "objective": {"name": "condition_lora", "arguments": {"condition_dropout": 0}},
    }
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(sections))
    recipe = load_recipe(path)
    assert recipe.run.evaluate_sigmas == (0.5, 1.0) and recipe.optimizer.clip_norm is None
    assert isinstance(recipe.optimizer.lr, float)
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe
    assert recipe.replace(run={"steps": 7}).run.steps == 7


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(ValueError, match=r"broken.yaml is not a YAML file"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match=r"empty.yaml: a recipe must be a mapping.*got nothing"):
        load_recipe(tmp_path / "empty.yaml")


def test_packaged_recipes_have_names(tmp_path, monkeypatch):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "small.yaml").write_text(yaml.safe_dump({"run": RUN}))
    monkeypatch.setattr(recipes, "files", lambda package: tmp_path)
    assert load_recipe("scenes/small").run.steps == 100
    with pytest.raises(ValueError, match=r"no file and no packaged recipe 'scenes/smal'; did you mean 'scenes/small'"):
        load_recipe("scenes/smal")


def test_every_packaged_recipe_is_valid():
    """By the rules of the command that reads it."""
    for name in recipes.packaged_recipes():
        read = load_sae_recipe if name.rpartition("/")[2].startswith("sae") else load_recipe
        read(name)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (ScheduleConfig(), {0: 1.0, 50: 0.5, 100: 0.0}),
        (ScheduleConfig(warmup=4), {0: 0.2, 3: 0.8, 4: 1.0, 52: 0.5, 100: 0.0}),
        (ScheduleConfig(floor=0.1), {0: 1.0, 25: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 100: 0.1}),
        (ScheduleConfig(kind="constant", warmup=1), {0: 0.5, 1: 1.0, 99: 1.0}),
        (ScheduleConfig(kind="constant", decay=20), {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0, 110: 0.0}),
        (ScheduleConfig(kind="constant", decay=20, floor=0.5), {90: 0.75, 100: 0.5}),
    ],
)
def test_schedule(schedule, factors):
    assert {step: schedule.factor(step, 100) for step in factors} == pytest.approx(factors, abs=1e-12)


def test_model_of_a_recipe():
    recipe = parse(model={"arguments": rope_config(mup_base_width=16), "gradient_checkpointing": True})
    first, second = build_model(recipe), build_model(recipe)
    assert isinstance(first, MMDiT) and first.training and first.gradient_checkpointing
    assert all((a == b).all() for a, b in zip(first.parameters(), second.parameters()))
    assert not first.proj_out.weight.any()  # μP's initialisation
    groups = {group["role"]: group["lr"] for group in optimizer_groups(first, recipe.optimizer)}
    assert groups["hidden"] == 0.5 * groups["input"]  # twice the base width


def test_autoencoder_of_a_recipe():
    arguments = {"block_out_channels": [8], "norm_num_groups": 2, "latent_channels": 4}
    recipe = parse(model={"kind": "autoencoder_kl", "arguments": arguments}, objective={"name": "autoencoder"})
    model = build_model(recipe)
    groups = optimizer_groups(model, recipe.optimizer)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_model_that_is_nowhere_is_told_at_once(tmp_path):
    """A misspelt name is never looked for on the Hub, and being offline is said without retries."""
    told = {
        "embeded": "there is no folder 'embeded' here.*did you mean 'embedded'",
        str(tmp_path): "is no model: the folder holds no transformer/config.json",
        "nobody/nothing": "there is no folder 'nobody/nothing' here, and the Hub cannot be reached",
    }
    for name, message in told.items():
        run = {"folder": "x", "steps": 1, "batch_size": 1}
        made = parse_recipe({"run": run, "model": {"pretrained": name, "subfolder": "transformer"}}, "recipe")
        with pytest.raises(ValueError, match=message):
            build_model(made)


@pytest.mark.parametrize("name", sorted(recipes.packaged_recipes()))
def test_packaged_recipes_name_nothing_of_the_checkout(name):
    """They run in any folder: what comes along is called "embedded"."""
    text = recipes.packaged_recipes()[name].read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert not re.search(r"(imgdit|configs|docs|tests)/", yaml.safe_dump(values))
