"""Bulk work in this process and on a local Ray."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import rope_config, tiny_pipeline
from tiny_images import image, write_folder

from imgdit.apps.jobs.bulk import GenerateImages, cache_all, collect_all, generate_all
from imgdit.benchmarks.unlearning import labels
from imgdit.benchmarks.unlearning.labels import classifier, label_all
from imgdit.data.sources import open_rows
from imgdit.io.bulk import run_bulk
from imgdit.recipes import parse_as
from imgdit.sae.activations import RecordedActivations
from imgdit.scenes.training_readers import scene_probe
from imgdit.training.recipe import parse_recipe
from imgdit.training.sae_recipe import SAERecipe
from imgdit.training.sae_run import activation_recorder, load_pipeline
from imgdit.training.user_images import UserImages, UserImagesSettings

QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def prompts(count):
    return [f"a {('red', 'green', 'blue')[i % 3]} cube" for i in range(count)]


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in sorted(Path(folder).glob("*.png"))}


def test_a_job_goes_on_where_it_stopped(tmp_path, model):
    whole = list(generate_all(prompts(10), tmp_path / "whole", model, options=QUICK, batch=4))
    assert [item["count"] for item in whole] == [4, 4, 2]
    job = generate_all(prompts(10), tmp_path / "parts", model, options=QUICK, batch=4)
    next(job)
    job.close()
    assert len(pixels(tmp_path / "parts")) == 4 and not (tmp_path / "parts" / "metadata.jsonl").exists()
    rest = list(generate_all(prompts(10), tmp_path / "parts", model, options=QUICK, batch=4))
    assert [item["first"] for item in rest] == [4, 8]
    assert pixels(tmp_path / "parts") == pixels(tmp_path / "whole")
    rows = open_rows(tmp_path / "parts").rows
    assert [row.captions[0] for row in rows] == prompts(10)
    with pytest.raises(ValueError, match="but the job is"):
        list(generate_all(prompts(9), tmp_path / "parts", model, options=QUICK, batch=4))


def test_an_item_that_fails_is_tried_again(tmp_path):
    class Flaky:
        def __init__(self, fails):
            self.fails = fails

        def __call__(self, item):
            if self.fails:
                self.fails -= 1
                raise OSError("the disk was full for a moment")
            return item

    assert list(run_bulk([{"n": 1}, {"n": 2}], Flaky, {"fails": 2})) == [{"n": 1}, {"n": 2}]
    with pytest.raises(OSError, match="for a moment"):
        list(run_bulk([{"n": 1}], Flaky, {"fails": 9}))
    with pytest.raises(ValueError, match="engine must be one of 'local', 'ray', got 'spark'"):
        run_bulk([], Flaky, {}, engine="spark")


def own_recipe(folder, data, model):
    arguments = {"path": str(data), "model": model, "cache": str(folder), "base": 16, "samples": 2}
    run = {"folder": "unused", "steps": 1, "batch_size": 1}
    config = {"arguments": rope_config()}
    return parse_recipe({"run": run, "model": config, "data": {"name": "user_images", "arguments": arguments}}, "own")


def test_caching_as_a_job_is_what_training_does(tmp_path, model):
    write_folder(tmp_path / "data", 10)
    recipe = own_recipe(tmp_path / "job", tmp_path / "data", model)
    assert sum(item["count"] for item in cache_all(recipe)) == 10
    files = sorted((tmp_path / "job" / "latents").iterdir())
    data = UserImages(UserImagesSettings(**recipe.data.arguments))
    assert sorted((tmp_path / "job" / "latents").iterdir()) == files  # nothing was missing
    plain = UserImages(UserImagesSettings(**{**recipe.data.arguments, "cache": None}))
    assert all((data[i].tokens == plain[i].tokens).all() for i in range(5))


HOOKPOINTS = ["transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"]


def sae_recipe(folder, model, count):
    """Activations of `count` prompts, two at a time, into `folder`."""
    values = {
        "run": {"folder": "unused", "steps": 1, "batch_size": 32},
        "pipeline": {"pretrained": model, "batch_size": 2, "call": QUICK},
        "data": {"prompts": prompts(count), "shards": str(folder)},
        "sae": {"hookpoints": HOOKPOINTS, "num_latents": 64, "k": 4},
    }
    return parse_as(SAERecipe, values, "the recipe")


def shards(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).glob("*/shard-*"))}


def test_activations_are_collected_as_training_records_them(tmp_path, model):
    """Stopped and begun again; an autoencoder's training then finds everything."""
    job = collect_all(sae_recipe(tmp_path / "job", model, 7))
    next(job)
    job.close()
    assert len(RecordedActivations(tmp_path / "job", HOOKPOINTS[0])) == 2
    assert [item["prompts"] for item in collect_all(sae_recipe(tmp_path / "job", model, 7))] == [2, 2, 1]
    recipe = sae_recipe(tmp_path / "plain", model, 7)
    activation_recorder(recipe, load_pipeline(recipe)).record_all()
    assert shards(tmp_path / "job") == shards(tmp_path / "plain") and len(shards(tmp_path / "job")) == 2 * 4
    for name in ("job", "plain"):
        assert len(RecordedActivations(tmp_path / name, HOOKPOINTS[1])) == 7
    assert (tmp_path / "job" / "index.json").read_text() == (tmp_path / "plain" / "index.json").read_text()
    with pytest.raises(ValueError, match=r"data\.shards is not set"):
        next(collect_all(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=None))))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A probe of random weights, asked for two labels."""
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    scene_probe(channels=(8, 8, 16, 16)).save_pretrained(folder)
    return {"style": str(folder), "object": str(folder)}


def write_images(folder, count):
    folder.mkdir()
    for i in range(count):
        image(i, (32, 32)).resize((128, 128)).save(folder / f"{i:04d}.png")
    return sorted(folder.iterdir())


def test_labels_are_kept(tmp_path, classifiers, monkeypatch):
    files = write_images(tmp_path / "pictures", 5)
    monkeypatch.setattr(labels, "CHUNK", 2)
    found = label_all(files, classifiers, tmp_path / "labels")
    for domain, source in classifiers.items():
        assert list(found[domain].values()) == list(classifier(source, domain)(files))
    lost = tmp_path / "labels" / "00000002.json"
    before = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir()}
    lost.unlink()
    assert label_all(files, classifiers, tmp_path / "labels") == found
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [lost]
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match="but the job is"):
        label_all(files, classifiers, tmp_path / "labels")


@pytest.mark.slow
def test_ray_collects_and_labels_as_this_process_does(tmp_path, model, classifiers):
    """Two workers, one of them killed in the middle of the collecting."""
    pytest.importorskip("ray")
    list(collect_all(sae_recipe(tmp_path / "local", model, 60)))
    processes = []
    for item in collect_all(sae_recipe(tmp_path / "ray", model, 60), engine="ray", workers=2):
        processes.append(item["process"])
        if len(processes) == 10:
            os.kill(item["process"], signal.SIGKILL)
    assert len(set(processes)) == 3
    assert shards(tmp_path / "ray") == shards(tmp_path / "local")
    assert (tmp_path / "ray" / "index.json").read_text() == (tmp_path / "local" / "index.json").read_text()
    files = write_images(tmp_path / "pictures", 150)
    said = label_all(files, classifiers, tmp_path / "labels", engine="ray", workers=2)
    assert said == label_all(files, classifiers, tmp_path / "here")


@pytest.mark.slow
def test_ray_makes_every_image_although_a_worker_dies(tmp_path, model):
    """500 prompts, two workers, one of them killed in the middle."""
    pytest.importorskip("ray")
    said, options = prompts(500), {"options": QUICK, "batch": 10}
    list(generate_all(said, tmp_path / "local", model, **options))
    processes = []
    for item in generate_all(said, tmp_path / "ray", model, engine="ray", workers=2, **options):
        processes.append(item["process"])
        if len(processes) == 15:
            os.kill(item["process"], signal.SIGKILL)
    assert len(set(processes)) == 3  # two, and the one that took the place
    assert pixels(tmp_path / "ray") == pixels(tmp_path / "local") and len(pixels(tmp_path / "ray")) == 500
    lines = (tmp_path / "ray" / "metadata.jsonl").read_text().splitlines()
    assert len({json.loads(line)["file_name"] for line in lines}) == len(lines) == 500
    assert not list((tmp_path / "ray").glob(".*.png"))


@pytest.mark.slow
def test_ray_fills_caches(tmp_path, model):
    pytest.importorskip("ray")
    write_folder(tmp_path / "data", 100)
    recipe = own_recipe(tmp_path / "job", tmp_path / "data", model)
    assert sum(item["count"] for item in cache_all(recipe, engine="ray", workers=2)) == 100
    files = sorted((tmp_path / "job" / "latents").iterdir())
    UserImages(UserImagesSettings(**recipe.data.arguments))
    assert sorted((tmp_path / "job" / "latents").iterdir()) == files


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'imgdit\[ray\]'"):
        list(run_bulk([{"n": 1}], GenerateImages, {}, engine="ray"))
