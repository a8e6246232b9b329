"""Costs on paper: against torch's own counter, and the recipes of scale/."""

import pytest
import torch
from tiny import rope_config, sincos_config, tiny_mmdit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from imgdit import Frame
from imgdit.apps.cli import app
from imgdit.mup.cost import model_cost
from imgdit.recipes import packaged_recipes
from imgdit.training import load_recipe
from imgdit.training.build import build_model
from imgdit.training.plan import plan, proxy_plan

SCALE = {name.removeprefix("scale/"): name for name in packaged_recipes() if name.startswith("scale/")}
OPTIONS = {"image_tokens": 1024, "text_tokens": 256, "gpus": 64, "flops_per_second": 4e14}


@pytest.mark.parametrize("config", [rope_config(), sincos_config(dual_attention_layers=(0,))])
def test_operations_of_a_forward_pass(config):
    model = tiny_mmdit(config)
    rope = model.config.pos_embed_type == "rope"
    inputs = {"encoder_hidden_states": torch.randn(1, 6, 32), "pooled_projections": torch.randn(1, 32)}
    inputs |= {"hidden_states": torch.randn(1, *((12, 16) if rope else (4, 6, 8))), "timestep": torch.rand(1)}
    if rope:
        inputs |= {"img_ids": Frame((3, 4)).ids(), "txt_ids": torch.zeros(6, 3)}
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    cost = model_cost(model, image_tokens=12, text_tokens=6)
    assert cost.forward_flops == counter.get_total_flops()
    assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SCALE)
def test_scale_recipes_have_the_size_in_their_names(name):
    recipe = load_recipe(SCALE[name])
    with torch.device("meta"):
        model = build_model(recipe)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(float(name.removesuffix("b")) * 1e9, rel=0.05)
    stated = next(line for line in packaged_recipes()[SCALE[name]].read_text().splitlines() if "parameters" in line)
    assert float(stated.split(" of ")[1].split("B")[0]) == pytest.approx(count / 1e9, rel=0.005)
    assert model.config.mup_base_width == 512 and {p.device.type for p in model.parameters()} == {"meta"}
    assert plan(name, recipe, **OPTIONS).memory < 80e9


def test_scale_recipes_differ_in_width_alone():
    def rest(recipe):
        values = recipe.to_dict()
        del values["model"]["arguments"]["num_attention_heads"], values["run"]["folder"], values["run"]["accumulation"]
        return values

    recipes = [rest(load_recipe(name)) for name in SCALE.values()]
    assert all(recipe == recipes[0] for recipe in recipes) and len(recipes) >= 5


def test_a_proxy_for_a_target():
    found = proxy_plan(load_recipe("scale/0.18b"), 5e9, 7, **OPTIONS)
    target, proxy = found.target.cost, found.proxy.cost
    assert target.parameters == pytest.approx(5e9, rel=0.05) and proxy.width <= target.width / 2
    assert found.target_recipe.model.arguments["mup_base_width"] == proxy.width
    expected = 7 * proxy.parameters * 30_000 / (target.parameters * 200_000)
    assert found.fraction == pytest.approx(expected)


def test_the_command():
    done = CliRunner().invoke(app, ["mup", "plan", "scale/18b", "--gpus", "64"])
    assert done.exit_code == 0 and "18,537,231,424" in done.output
    done = CliRunner().invoke(app, ["mup", "plan", "--target-params", "5e9"])
    assert done.exit_code == 0 and "tune optimizer.lr with 7 runs" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale/18b", "--gpus", "48"], "run.batch_size=1024 does not divide by 48 GPUs"),
        (["scenes/autoencoder"], "costs are known for model.kind 'mmdit'"),
        (["--target-params", "5"], "counts parameters, such as 5e9; got 5"),
    ],
)
def test_plans_that_cannot_be_made(arguments, message):
    done = CliRunner().invoke(app, ["mup", "plan", *arguments], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and message in done.output
