"""`imgdit caption`, `imgdit answer` and `imgdit data caption`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dual_diffusion_cases import PIPELINE
from dual_diffusion_cases import pipeline as dual
from PIL import Image
from tiny import tiny_pipeline
from tiny_vision import noise_image
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.jobs.captions import CaptionImages, caption_all
from imgdit.data.sources import open_rows

HERE = Path(__file__).parent
QUICK = {"num_inference_steps": 2}


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 18, 22, 3), dtype=np.uint8)
    for n, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{n:03d}.png")
    return folder


def captions(folder):
    return {path.name: path.read_text() for path in sorted(folder.rglob("*.txt"))}


def test_captions_of_images_by_their_own_seeds(tmp_path):
    folder = write_images(tmp_path, 2)
    files = sorted(folder.glob("*.png"))
    both = run("caption", *files, "--model", PIPELINE, "--steps", 2, "--seed", 4, "--json")
    assert both.exit_code == 0, both.output
    lines = [json.loads(line) for line in both.stdout.splitlines()]
    assert [line["image"] for line in lines] == list(map(str, files))
    alone = run("caption", files[1], "--model", PIPELINE, "--steps", 2, "--seed", 5)
    assert alone.stdout.rstrip("\n") == lines[1]["text"].rstrip("\n")


def test_answers_to_questions(tmp_path):
    (tmp_path / "folder").mkdir()
    file = next(write_images(tmp_path / "folder", 1).glob("*.png"))
    found = run("answer", file, "What is it?", "Is it red?", "--model", PIPELINE, "--steps", 2, "--json")
    assert found.exit_code == 0, found.output
    assert [json.loads(line)["question"] for line in found.stdout.splitlines()] == ["What is it?", "Is it red?"]


def test_a_folder_is_captioned_and_a_stopped_job_goes_on(tmp_path):
    whole, parts = (write_images(tmp_path / name / "inner", 5).parent for name in ("whole", "parts"))
    assert [item["written"] for item in caption_all(whole, str(PIPELINE), options=QUICK, length=8, batch=2)] == [
        2,
        2,
        1,
    ]
    job = caption_all(parts, str(PIPELINE), options=QUICK, length=8, batch=2)
    next(job)
    job.close()
    assert len(captions(parts)) == 2
    assert [item["written"] for item in caption_all(parts, str(PIPELINE), options=QUICK, length=8, batch=3)] == [3]
    assert captions(parts) == captions(whole) and len(captions(whole)) == 5
    assert not list(caption_all(parts, str(PIPELINE), options=QUICK, length=8))
    rows = open_rows(str(whole)).rows
    assert [row.captions[0] for row in rows] == [text.strip() for text in captions(whole).values()]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_command_goes_on_without_loss(tmp_path):
    """`imgdit data caption` of 60 images in a process of its own, killed at moments that nobody chose."""
    whole, parts = (write_images(tmp_path / name, 60) for name in ("whole", "parts"))
    list(caption_all(whole, str(PIPELINE), options=QUICK, batch=4))
    command = [sys.executable, "-m", "imgdit.apps.cli", "data", "caption", str(parts), "--model", str(PIPELINE),
               "--steps", "2", "--batch", "4"]  # fmt: skip
    kills, draw = 0, random.Random(0)
    while len(captions(parts)) < 60:
        before = len(captions(parts))
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            wanted = before + draw.randrange(1, 12)
            while job.poll() is None and (len(captions(parts)) < wanted or kills >= 5):
                time.sleep(0.01)
            if job.poll() is None:
                job.kill()
                kills += 1
    assert kills >= 3 and captions(parts) == captions(whole)


@pytest.mark.slow
def test_ray_writes_the_captions_of_this_process_although_a_worker_dies(tmp_path):
    pytest.importorskip("ray")
    here, there = (write_images(tmp_path / name, 60) for name in ("here", "there"))
    list(caption_all(here, str(PIPELINE), options=QUICK, batch=4))
    processes = []
    for item in caption_all(there, str(PIPELINE), options=QUICK, batch=2, engine="ray", workers=2):
        processes.append(item["process"])
        if len(processes) == 5:
            os.kill(item["process"], signal.SIGKILL)
    assert len(set(processes)) == 3 and captions(there) == captions(here)


def test_captions_of_people_are_kept_and_damaged_images_named(tmp_path):
    folder = write_images(tmp_path, 2)
    (folder / "000.txt").write_text("mine")
    (folder / "zzz.png").write_bytes(b"no image")
    Image.new("RGB", (1, 300)).save(folder / "narrow.png")
    found = run("data", "caption", folder, "--model", PIPELINE, "--steps", 2)
    assert found.exit_code == 1 and "zzz.png: " in found.stdout and "wrote 1 captions" in found.stdout
    assert "narrow.png" in found.stdout
    assert captions(folder)["000.txt"] == "mine" and captions(folder).keys() == {"000.txt", "001.txt"}


def test_captions_that_appear_while_a_job_runs_are_kept(tmp_path, monkeypatch):
    """Of a person, or of a second process on the same folder."""
    folder = write_images(tmp_path, 3)
    job = CaptionImages(str(PIPELINE), str(folder), dict(QUICK), 0, {})
    caption = job.pipe.caption
    (folder / "000.txt").write_text("before")

    def meanwhile(images, **options):
        (folder / "001.txt").write_text("during")
        return caption(images, **options)

    monkeypatch.setattr(job.pipe, "caption", meanwhile)
    assert job({"files": ["000.png", "001.png", "002.png"]})["written"] == 1
    found = captions(folder)
    assert (found["000.txt"], found["001.txt"]) == ("before", "during") and found["002.txt"].strip()


def test_an_image_that_a_pipeline_refuses_does_not_stop_the_others(tmp_path):
    folder = write_images(tmp_path, 3)
    job = CaptionImages(str(PIPELINE), str(folder), dict(QUICK), 0, {})
    caption = job.pipe.caption

    def refuses_green(images, **options):
        if any(image.getpixel((0, 0)) == (0, 255, 0) for image in images):
            raise ValueError("no green")
        return caption(images, **options)

    job.pipe.caption = refuses_green
    Image.new("RGB", (32, 32), (0, 255, 0)).save(folder / "001.png")
    found = job({"files": ["000.png", "001.png", "002.png"]})
    assert found["broken"] == ["001.png: no green"] and captions(folder).keys() == {"000.txt", "002.txt"}
    Image.new("RGB", (32, 32), (0, 255, 0)).save(folder / "002.png")
    (folder / "002.txt").unlink()
    with pytest.raises(ValueError, match="no green"):
        job({"files": ["001.png", "002.png"]})


def test_what_is_refused(tmp_path):
    folder = write_images(tmp_path / "images", 1)
    file = folder / "000.png"
    plain = tmp_path / "plain"
    tiny_pipeline().save_pretrained(plain)
    for words, message in (
        (("caption", file, "--model", plain), "has no text head"),
        (("caption", folder / "none.png", "--model", PIPELINE), "there is no image"),
        (("caption", file, folder, "--model", PIPELINE), "is a folder; `imgdit data caption"),
        (("answer", folder, "What is it?", "--model", PIPELINE), "is a folder; name an image file"),
        (("answer", file, "", "--model", PIPELINE), "is empty; write something"),
        (("data", "caption", tmp_path / "nowhere"), "there is no folder"),
        (("data", "caption", plain), "holds no images"),
    ):
        found = run(*words)
        assert found.exit_code == 2 and message in " ".join(found.output.replace("│", " ").split()), found.output
    shutil.copytree(PIPELINE, tmp_path / "lacking", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(ValueError, match=r"lacking has no folder 'tokenizer' .*model_index.json names"):
        list(caption_all(folder, str(tmp_path / "lacking")))
    noise_image(20_000, 10).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip.png' has 20000x10 pixels"):
        dual().answer(Image.open(tmp_path / "strip.png"), "What is it?")
    (folder / "000.jpg").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"000.jpg and 000.png would have one caption file"):
        list(caption_all(folder, str(PIPELINE)))
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has metadata.jsonl, whose texts count"):
        list(caption_all(folder, str(PIPELINE)))
