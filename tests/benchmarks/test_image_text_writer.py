"""`imgdit bench text` on a tiny pipeline: what is asked of it, and what is written."""

import json

import pytest
import torch
from tiny import rope_config, tiny_mmdit, tiny_pipeline, tiny_tokenizer
from tiny_text_frames import save_model
from typer.testing import CliRunner

from imgdit import ImageTextPipeline
from imgdit.apps.cli import app
from imgdit.benchmarks.scenes.image_text import HOLE
from imgdit.benchmarks.scenes.image_text_writer import PipelineWriter


@pytest.fixture(scope="module")
def pipe():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = rope_config(text_vocab_size=len(tokenizer), text_rope_axis=0, joint_attention_dim=32)
    parts = tiny_pipeline().components
    parts["text_encoder"].resize_token_embeddings(len(tokenizer))
    return ImageTextPipeline(**{**parts, "transformer": tiny_mmdit(config)}, text_tokenizer=tokenizer, text_length=24)


def test_rows_do_not_depend_on_the_batch(pipe):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    writers = [PipelineWriter(pipe, text_steps=4, steps=1, batch=batch) for batch in (1, 3)]
    assert set(writers[0].can) == {"captions", "answers", "fillings", "round trips", "judge", "schedules", "cache"}
    texts = ["a red " + HOLE] * 3
    for found in zip(*(
        (w.caption(images, 0), w.answer(images, ["a cube?"] * 3, 0), w.fill(texts, images, 0), w.joint(3, 0)[1])
        for w in writers
    )):  # fmt: skip
        assert found[0] == found[1] and len(found[0]) == 3
    choices = [["red", "blue"], ["cube", "sphere"], ["red", "blue"]]
    chosen = [writer.choose(images, ["a cube?"] * 3, choices) for writer in writers]
    assert chosen[0] == chosen[1] == [pipe.choose(images[i], "a cube?", choices[i]).best[0] for i in range(3)]
    drawn = [writer.images(["a red cube"] * 3, 0) for writer in writers]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


def test_a_schedule_is_of_one_call(pipe, monkeypatch):
    asked, own = [], pipe.text_scheduler
    caption = pipe.caption

    def watched(images, **options):
        asked.append(
            (pipe.text_scheduler.config.reveal, pipe.text_scheduler.config.shift, options["num_inference_steps"])
        )
        return caption(images, **options)

    monkeypatch.setattr(pipe, "caption", watched)
    PipelineWriter(pipe, text_steps=3, steps=1).caption(torch.rand(2, 3, 16, 16), 0, steps=2, shift=3.0)
    PipelineWriter(pipe, text_steps=3, steps=1).caption(torch.rand(2, 3, 16, 16), 0)
    assert asked == [("shift", 3.0, 2), (own.config.reveal, own.config.shift, 3)] and pipe.text_scheduler is own


def test_the_command_writes_scores_and_sheets(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--count", "2", "--steps", "1", "--text-steps", "2"]
    done = CliRunner().invoke(
        app, ["bench", "text", *options, "--out", str(tmp_path / "out"), "--only", "captions,round trips"]
    )
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "out/text.json").read_text())
    assert kept["model"] == "model" and kept["text steps"] == 2
    tasks = [score["task"] for score in kept["scores"]]
    assert len(tasks) == 15 and tasks[-3:] == ["text → image → text", "image → text → image", "image and text at once"]
    assert all(score["counts"]["of"] == 2 for score in kept["scores"])
    assert {"caption-one-object.png", "joint.png"} <= {file.name for file in (tmp_path / "out").iterdir()}
    wrong = CliRunner().invoke(app, ["bench", "text", *options, "--only", "poems"])
    assert wrong.exit_code == 2 and "part of the benchmark" in wrong.output


def test_a_kept_image_gives_the_same_texts(pipe):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    writer = PipelineWriter(pipe, text_steps=4, steps=1)
    assert writer.caption(images, 0, cache=False) == writer.caption(images, 0, cache=True) == writer.caption(images, 0)


def test_text_frames_are_written_before_their_images(tmp_path):
    model = save_model(tmp_path / "model")
    options = ["--model", str(model), "--count", "1", "--steps", "1", "--text-steps", "1", "--only", "round trips"]
    done = CliRunner().invoke(app, ["bench", "text", *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "text without an image → image" in done.output, done.output


def test_a_model_that_writes_nothing_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["bench", "text", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "text head" in done.output and not (tmp_path / "out").exists()
