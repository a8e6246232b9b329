"""Bulk work in this process and on a local Ray."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import rope_config, tiny_pipeline
from tiny_pictures import write_folder

from imgdit.apps.bulk_jobs import GeneratePictures, cache_all, generate_all
from imgdit.bulk import run_bulk
from imgdit.data.own.rows import open_rows
from imgdit.training.config import parse_recipe
from imgdit.training.own_pictures import OwnPictures

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
    return parse_recipe({"run": run, "model": config, "data": {"name": "own_pictures", "arguments": arguments}}, "own")


def test_caching_as_a_job_is_what_training_does(tmp_path, model):
    write_folder(tmp_path / "data", 10)
    recipe = own_recipe(tmp_path / "job", tmp_path / "data", model)
    assert sum(item["count"] for item in cache_all(recipe)) == 10
    files = sorted((tmp_path / "job" / "latents").iterdir())
    data = OwnPictures(**recipe.data.arguments)
    assert sorted((tmp_path / "job" / "latents").iterdir()) == files  # nothing was missing
    plain = OwnPictures(**{**recipe.data.arguments, "cache": None})
    assert all((data[i].tokens == plain[i].tokens).all() for i in range(5))


@pytest.mark.slow
def test_ray_makes_every_picture_although_a_worker_dies(tmp_path, model):
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
    OwnPictures(**recipe.data.arguments)
    assert sorted((tmp_path / "job" / "latents").iterdir()) == files


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'imgdit\[ray\]'"):
        list(run_bulk([{"n": 1}], GeneratePictures, {}, engine="ray"))
