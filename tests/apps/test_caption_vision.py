"""`imgdit caption`, `imgdit answer` and `imgdit data caption` with LLaDA-V and LaViDa."""

import json
import shutil

import pytest
from tiny_vision import make_vision_pipe, noise_image
from typer.testing import CliRunner
from vision_cases import FIXTURES

from imgdit.apps.cli import app
from imgdit.apps.jobs.captions import caption_all
from imgdit.pipelines.image_text_loading import load_image_text_pipeline
from imgdit.pipelines.load_options import LoadOptions
from imgdit.pipelines.vision_language_loading import is_published


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.mark.parametrize("name", ["lavida", "llada_v"])
def test_published_folders_answer_and_caption(name, tmp_path):
    noise_image(40, 30).save(tmp_path / "a.png")
    model = FIXTURES / name / "model"
    assert is_published(model) and not is_published(tmp_path) and not is_published("nowhere at all")
    asked = run("answer", tmp_path / "a.png", "What is it?", "Red?", "--model", model, "--steps", 1, "--json")
    assert asked.exit_code == 0, asked.output
    assert [json.loads(line)["question"] for line in asked.stdout.splitlines()] == ["What is it?", "Red?"]
    with pytest.raises(ValueError, match="quantize must be one of 'none'"):
        load_image_text_pipeline(model, LoadOptions(quantize="int8"))


def test_a_folder_is_captioned_and_a_stopped_job_goes_on(tmp_path):
    make_vision_pipe().save_pretrained(tmp_path / "model")
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for folder in (whole, parts):
        folder.mkdir()
        for n in range(3):
            noise_image(40 + n, 30, n).save(folder / f"{n}.png")
    options = {"num_inference_steps": 2, "gen_length": 6, "temperature": 1.0}
    assert [item["written"] for item in caption_all(whole, str(tmp_path / "model"), options=options, batch=3)] == [3]
    job = caption_all(parts, str(tmp_path / "model"), options=options, batch=1)
    next(job)
    job.close()
    list(caption_all(parts, str(tmp_path / "model"), options=options, batch=2))
    found = [{file.name: file.read_text() for file in folder.glob("*.txt")} for folder in (whole, parts)]
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize("part", ["vision_tower", "tokenizer"])
def test_saved_folders_without_a_part_are_refused(part, tmp_path):
    make_vision_pipe().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=rf"has no folder '{part}' \(\w+\), which its model_index.json names"):
        load_image_text_pipeline(tmp_path)
