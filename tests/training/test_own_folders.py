"""The packaged recipes of own/ on FLUX and SD3 folders in diffusers' layout, and what comes of their runs."""

import json
from statistics import mean

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_control import flux, folder_of, image, make, sd3
from tiny_images import write_folder

from imgdit import CardDetails, Condition, OmniControl
from imgdit.apps.chores.run_pipeline import run_pipeline
from imgdit.apps.chores.sharing import card_folder
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained

FAMILIES = {"flux": flux, "sd3": sd3}


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request, tmp_path_factory):
    """A pipeline's folder as diffusers writes it."""
    return folder_of(FAMILIES[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder, 6, size=(16, 16))
    return str(folder)


def recipe(name, model, data, folder, **changes):
    """The packaged recipe with its own objective and adapter, on this folder; edges would need OpenCV."""
    made = load_recipe(name)
    own = {"path": data, "model": model, "cache": str(folder / "cache"), "base": 16, "samples": 6, "ratio": 1.0}
    grey = {"condition": "grey", "preprocessor": "grey"}
    return made.replace(
        run={"folder": str(folder / "run"), "steps": 24, "mixed_precision": "no", "log_every": 1, "tracker": "none"},
        model={"pretrained": model, "subfolder": "transformer"},
        data={"arguments": {**made.data.arguments, **own, **grey}},
        optimizer={"lr": 0.02},
        schedule={"warmup": 1},
        **changes,
    )


def test_a_condition_adapter(model, data, tmp_path):
    """The loss falls, the file acts through OmniControl in the stock pipeline, and nothing is left of it."""
    made = recipe("own/condition_lora", model, data, tmp_path)
    network = build_model(made)
    frozen = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    train(made, model=network, batches=training_batches(made)[0])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert mean(losses[-6:]) < mean(losses[:6])
    now = dict(network.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    plain = make(pipe)
    control = OmniControl(pipe)
    card_folder(tmp_path / "run", tmp_path / "card", CardDetails(licence="mit"), "me/grey")
    card = (tmp_path / "card/README.md").read_text()
    assert "condition_lora" in card and f"| loss | {losses[-1]:.4g} |" in card and "license: mit" in card
    report = control.load(tmp_path / "card", adapter_name="grey")
    assert not report.unused and (report.info.task, report.info.mode) == ("grey", "independent")
    assert torch.equal(make(pipe), plain)
    with control.use([Condition(image(), "grey")]):
        assert control.run.cached
        controlled = make(pipe)
    assert (controlled - plain).abs().max() > 1e-3
    control.remove()
    pipe.unload_lora_weights()
    assert torch.equal(make(pipe), plain)


def test_a_whole_model_stays_in_diffusers_pipeline(model, data, tmp_path):
    made = recipe(
        "own/condition_lora", model, data, tmp_path, adapter={"rank": 0}, objective={"name": "flow_matching"}
    )
    arguments = {**made.data.arguments, "condition": None, "preprocessor": None}
    made = made.replace(data={"arguments": arguments}, run={"steps": 2}, objective={"arguments": {}})
    train(made, model=build_model(made), batches=training_batches(made)[0])
    pipe, before = run_pipeline(tmp_path / "run"), DiffusionPipeline.from_pretrained(model)
    assert type(pipe) is type(before) and type(pipe.transformer) is type(before.transformer)
    trained = load_trained(tmp_path / "run").to_diffusers().state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in before.transformer.state_dict().items())
    pipe.save_pretrained(tmp_path / "pipeline")
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(make(again), make(pipe))
