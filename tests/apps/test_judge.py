"""Choices among answers about images, and `imgdit judge`."""

import json

import numpy as np
import pytest
import torch
from dual_diffusion_cases import PIPELINE
from dual_diffusion_cases import pipeline as dual
from mmada_cases import FIXTURES, image_tokenizer, make_pipe
from PIL import Image
from tiny import tiny_pipeline
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.jobs.judge import read_questions
from imgdit.models.masked_lm import masked_logits
from imgdit.pipelines.mmada_rows import question_rows

PIPES = {"mmada": make_pipe, "dual": dual}
QUESTIONS = ["Is it red?", "What is the ball?"]
CHOICES = ["yes", "no", "a red cube"]


def images(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


@pytest.fixture(params=PIPES)
def pipe(request):
    found = PIPES[request.param]()
    found.set_progress_bar_config(disable=True)
    return found


def test_a_batch_is_scored_as_one_by_one(pipe):
    shown = images(2)
    together = pipe.choose(shown, QUESTIONS, CHOICES)
    alone = [pipe.choose(image, question, CHOICES) for image, question in zip(shown, QUESTIONS)]
    expected = torch.cat([one.log_likelihoods for one in alone])
    torch.testing.assert_close(together.log_likelihoods, expected, rtol=0, atol=1e-4)
    assert together.best == [one.best[0] for one in alone] == together.log_likelihoods.argmax(1).tolist()
    assert together.log_likelihoods.dtype == torch.float64 and (together.log_likelihoods < 0).all()
    swapped = pipe.choose(shown, QUESTIONS, CHOICES[::-1]).log_likelihoods
    torch.testing.assert_close(swapped.flip(1), together.log_likelihoods, rtol=0, atol=1e-6)
    one = pipe.choose(shown, QUESTIONS[0], CHOICES).log_likelihoods
    torch.testing.assert_close(one[:1], together.log_likelihoods[:1], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least two choices"):
        pipe.choose(shown, QUESTIONS, ["yes"])


@torch.no_grad()
def test_the_most_probable_token_is_revealed_first():
    pipe = make_pipe()
    tokens, image = pipe.tokens, images(1)[0]
    answer = [*pipe._ids("red"), tokens.eos]
    ids = question_rows(tokens, pipe._chats(QUESTIONS[:1]), tokens.image_ids(pipe.encode_images(image).flatten(1)))[0]
    grid = torch.cat([ids, torch.full((1, len(answer)), tokens.mask)], 1)
    total, left = 0.0, list(range(len(answer)))
    while left:
        known = masked_logits(pipe.model, grid)[0, ids.shape[1] :].double().log_softmax(-1)
        best = max(left, key=lambda n: float(known[n, answer[n]]))
        total += float(known[best, answer[best]])
        grid[0, ids.shape[1] + best] = answer[best]
        left.remove(best)
    found = pipe.choose(image, QUESTIONS[0], ["red", "no"]).log_likelihoods[0, 0]
    assert float(found) == pytest.approx(total, abs=1e-4) and len(answer) > 2


def run(*words):
    return CliRunner().invoke(app, ["judge", *map(str, words)])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for n, image in enumerate(images(3)):
        image.save(tmp_path / f"images/{n}.png")
    lines = [
        {"question": "Is it red?", "expected": "no"},
        {"question": "What is it?", "choices": ["a cube", "a ball"]},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make_pipe().save_pretrained(tmp_path / "mmada")
    return tmp_path


@pytest.mark.parametrize("model", ["mmada", PIPELINE])
def test_the_report_has_all_answers(folder, model):
    place, out = folder / model, folder / "reports/judge.json"
    done = run(folder / "images", "--questions", folder / "questions.jsonl", "--ask", "Is it blue?", "--model", place,
               "--batch", 2, "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [one["question"] for one in report["questions"]] == ["Is it red?", "What is it?", "Is it blue?"]
    assert len(report["rows"]) == 9 and {row["image"] for row in report["rows"]} == {
        str(folder / f"images/{n}.png") for n in range(3)
    }
    red, what, blue = report["questions"]
    assert red["images"] == 3 and sum(red["answers"].values()) == 3 and red["right"] == red["answers"]["no"]
    assert (
        what["answers"].keys() == {"a cube", "a ball"}
        and "right" not in what
        and blue["answers"].keys() == {"yes", "no"}
    )
    for row in report["rows"]:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["best"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["right"] == (row["best"] == "no" if row["question"] == "Is it red?" else None)
    assert "Is it red? yes" in done.output and f"wrote {out}" in done.output
    printed = run(folder / "images/1.png", "--ask", "Is it red?", "--model", place)
    one = json.loads(printed.stdout)["rows"][0]
    (same,) = (
        row for row in report["rows"] if row["image"].endswith("1.png") and row["question"] == "Is it red?"
    )  # fmt: skip
    assert one["probabilities"] == pytest.approx(same["probabilities"], abs=1e-4)


def test_questions_of_one_text_are_counted_apart_and_images_that_cannot_be_read_named(folder):
    file, images = folder / "questions.jsonl", folder / "images"
    lines = [{"question": "Is it red?"}, {"question": "Is it red?", "choices": ["no", "maybe"]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (1, 300)).save(images / "narrow.png")
    (images / "zzz.png").write_bytes(b"no image")
    done = run(images, "--questions", file, "--model", folder / "mmada", "--out", folder / "judge.json")
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "judge.json").read_text())
    assert [one["images"] for one in report["questions"]] == [3, 3]
    assert [list(one["answers"]) for one in report["questions"]] == [["yes", "no"], ["no", "maybe"]]
    assert ["narrow" in line or "zzz" in line for line in report["broken"]] == [True, True]
    done = run(images, "--questions", file, "--ask", "Is it red?", "--model", folder / "mmada")
    assert done.exit_code and "asked twice" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing is asked"),
        (("--questions", "none.jsonl"), "there is no file 'none.jsonl' of questions"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, words, message):
    done = run(folder / "images", "--model", folder / "mmada", *words)
    assert done.exit_code and message in done.output


def test_published_folders_are_judges(folder):
    out, images = folder / "judge.json", FIXTURES / "magvitv2"
    image_tokenizer().save_pretrained(folder / "magvitv2")
    words = (folder / "images/0.png", "--ask", "Is it red?")
    done = run(*words, "--model", FIXTURES / "lm", "--image-tokenizer", folder / "magvitv2", "--out", out)
    assert done.exit_code == 0, done.output
    saved = run(*words, "--model", folder / "mmada")
    assert json.loads(out.read_text())["rows"] == json.loads(saved.stdout)["rows"]
    done = run(*words, "--model", FIXTURES / "lm", "--image-tokenizer", images)
    assert done.exit_code and "says no sizes" in " ".join(done.output.replace("│", " ").split())


def test_models_that_do_not_write_and_folders_without_images_are_refused(folder):
    tiny_pipeline().save_pretrained(folder / "plain")
    done = run(folder / "images", "--ask", "Is it red?", "--model", folder / "plain")
    assert done.exit_code and "writes no text" in done.output
    (folder / "empty").mkdir()
    done = run(folder / "empty", "--ask", "Is it red?", "--model", folder / "mmada")
    assert done.exit_code and "there is no image in" in done.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"choices": ["a", "b"]}, "line 1: expected question"),
        ({"question": "a", "choices": ["a"]}, "two texts or more"),
        ({"question": "a", "choices": ["a", "b", "a"]}, "none twice"),
        ({"question": "a", "answer": "b"}, "line 1: expected question"),
        ({"question": "a", "expected": "maybe"}, "'maybe', none of the choices yes, no"),
    ],
)
def test_questions_that_cannot_be_read_are_refused(tmp_path, line, message):
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "questions.jsonl")
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(tmp_path / "questions.jsonl")
