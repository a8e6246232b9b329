"""The scenes' commands from runs to images, with small models: assemble, generate, bench."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny_runs import QUICK, small_cache, small_pipeline
from typer.testing import CliRunner

from imgdit import DiffusionPipeline
from imgdit.adapters.condition import Condition
from imgdit.apps.chores.training_sheet import TrainingSheet
from imgdit.apps.chores.weights import save_adapter, save_probe
from imgdit.apps.cli import app
from imgdit.benchmarks.scenes import run as scene_bench
from imgdit.benchmarks.scenes.any_to_any import DRAWN
from imgdit.lora.files import AdapterInfo, adapter_pairs, write_adapter
from imgdit.recipes import packaged_recipes
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.training_frames import latent_scale
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained, trained_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folders of the runs, of the assembled pipeline and of the probe."""
    folder = tmp_path_factory.mktemp("scenes")
    small_pipeline(folder)
    with small_cache():
        save_probe(folder / "probe", folder / "probe_folder")
        yield folder


def test_the_assembled_pipeline_is_what_was_trained(model):
    pipe = DiffusionPipeline.from_pretrained(model / "pipeline")
    assert pipe.vae.config.scaling_factor == latent_scale(str(model / "latents"))
    trained = load_trained(model / "transformer").state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, trained[name].half().float())
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in (model / "pipeline").rglob("*.safetensors")) < 2**20
    image = pipe("a red cube", num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_training_draws_sheets(model, tmp_path):
    recipe = trained_recipe(model / "transformer").replace(run={"folder": str(tmp_path)})
    backbone = load_trained(model / "transformer")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    TrainingSheet(recipe, backbone)(20)
    (sheet,) = (tmp_path / "samples").iterdir()
    assert sheet.name == "step-00000020.png" and Image.open(sheet).width > 4 * 2 * 128
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert backbone.dtype == torch.float32


CONTROLS = [name for name in sorted(packaged_recipes()) if name.startswith("scenes/control_")]


@pytest.mark.parametrize("name", CONTROLS)
def test_condition_recipes_train_adapters_that_load(name, model, tmp_path):
    recipe = load_recipe(name)
    data = {"model": str(model / "pipeline"), "latents": str(model / "latents"), "scenes": 16, "samples": 2}
    recipe = recipe.replace(
        run={**QUICK, "folder": str(tmp_path / "run")},
        model={"pretrained": str(model / "pipeline")},
        data={"arguments": {**recipe.data.arguments, **data}},
    )
    backbone = build_model(recipe)
    base = {n: p.clone() for n, p in backbone.named_parameters() if not p.requires_grad}
    result = train(recipe, model=backbone, batches=training_batches(recipe)[0], stop_at=2)
    assert result.step == 2 and all(torch.equal(base[n], p) for n, p in backbone.named_parameters() if n in base)
    assert max(f.stat().st_size for f in result.checkpoint.iterdir()) < 2**19  # the frozen model is not in it

    save_adapter(tmp_path / "run", tmp_path / "adapter.safetensors")
    pipe = DiffusionPipeline.from_pretrained(model / "pipeline")
    with torch.no_grad():  # after one step the gates of attention are still shut
        for parameter in pipe.transformer.parameters():
            parameter += 0.02
    report = pipe.load_control(tmp_path / "adapter.safetensors", adapter_name="it")
    assert not report.unused and report.info.task == recipe.data.arguments["task"]
    assert (report.info.mode, report.info.position) == tuple(recipe.data.arguments[k] for k in ("mode", "position"))
    condition = Condition(Image.new("RGB", (128, 128), "white"), "it", position=report.info.position)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    given, plain = (
        pipe("a red cube", conditions=c, generator=torch.Generator().manual_seed(0), **options).images
        for c in ([condition], None)
    )
    assert not torch.equal(given, plain)


def test_only_adapters_are_saved_as_adapters(model, tmp_path):
    with pytest.raises(ValueError, match="trained no adapter"):
        save_adapter(model / "transformer", tmp_path / "x.safetensors")


def test_generate_writes_files(model, tmp_path):
    command = ["generate", "--model", str(model / "pipeline"), "--steps", "2"]
    done = CliRunner().invoke(app, [*command, "a red cube", "--out", str(tmp_path / "one.png"), "--seed", "8"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(
        app, [*command, "a blue cone", "a red cube", "--out", str(tmp_path / "two"), "--seed", "7"]
    )
    assert done.exit_code == 0, done.output
    assert sorted(f.name for f in (tmp_path / "two").iterdir()) == ["000.png", "001.png", "sheet.png"]
    # The second image of a run is the first of a run with the next seed.
    one, two = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("one.png", "two/001.png"))
    assert np.abs(one - two).max() <= 1


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    done = CliRunner().invoke(
        app, ["generate", "x", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "o.png")]
    )
    assert done.exit_code == 2 and "Traceback" not in done.output and not (tmp_path / "o.png").exists()
    done = CliRunner().invoke(app, ["assemble", str(tmp_path), "--out", str(tmp_path / "x")])
    assert done.exit_code == 2 and "holds no checkpoint" in done.output and not (tmp_path / "x").exists()


def test_bench_writes_every_raw_count(model, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_bench, "seconds", lambda maker, model: {"one image": [1.0]})
    assert SceneProbe.from_pretrained(model / "probe_folder").questions
    folders = ["--model", str(model / "pipeline"), "--probe", str(model / "probe_folder"), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "scenes", *folders, "--count", "2", "--steps", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "scenes.json").read_text())
    assert {s["task"] for s in found["scores"]} >= {"image → depth", "depth → image", "view → other view"}
    for score in found["scores"]:
        assert score["counts"] and score["met"] in (None, True, False)
        low, high = score["estimate"][1:]
        assert low <= score["estimate"][0] <= high
    assert "image → depth" in done.output and "missed" in done.output
    names = {f.name for f in tmp_path.glob("*.png")}
    assert {"image-to-depth.png", "depth-to-image.png", "view-to-other-view.png", "failures.png"} <= names


def test_bench_any_measures_every_task(model, tmp_path):
    folders = ["--model", str(model / "pipeline"), "--probe", str(model / "probe_folder"), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "any", *folders, "--count", "2", "--steps", "1"])
    assert done.exit_code == 0, done.output
    tasks = {score["task"] for score in json.loads((tmp_path / "any.json").read_text())["scores"]}
    assert tasks >= {f"{task} → image" for task in ("blur", "super_resolution", "grey", "mask", *DRAWN)}
    assert tasks >= {"image → boxes", "editing", "subject", "view → other view", "two images → camera"}


def test_bench_control_measures_the_adapters(model, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(model / "pipeline")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "any")
    for name in ("depth", "canny", "inpainting", "subject"):
        position = "subject" if name == "subject" else "aligned"
        info = AdapterInfo(task=name, mode="independent", position=position)
        write_adapter(tmp_path / "adapters" / f"{name}.safetensors", adapter_pairs(pipe.transformer, "any"), info)
    folders = ["--model", model / "pipeline", "--probe", model / "probe_folder", "--adapters", tmp_path / "adapters"]
    command = ["bench", "control", *map(str, folders), "--out", str(tmp_path / "out"), "--count", "2", "--steps", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "out" / "control.json").read_text())["scores"]
    assert {score["task"] for score in scores} == {
        "no condition",
        "depth",
        "canny",
        "inpainting",
        "depth + canny",
        "subject",
    }
    hole = [score for score in scores if score["task"] == "inpainting"]
    assert sum("around the hole" in score["metric"] for score in hole) == 2  # of what is given, apart from the hole
    (tmp_path / "adapters" / "canny.safetensors").unlink()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "needs canny as well" in done.output
