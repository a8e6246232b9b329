"""The unlearning benchmark from a pipeline's folder to its table, with tiny models; resuming; images of others."""

import functools
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from dual_diffusion_cases import PIPELINE
from tiny_unlearning import HOOKPOINT, benchmark_folders
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from typer.testing import CliRunner

from imgdit import ImageTextPipeline
from imgdit.apps.cli import app
from imgdit.benchmarks.unlearning import images, learning
from imgdit.benchmarks.unlearning import run as unlearn_bench
from imgdit.benchmarks.unlearning.captions import chosen_cells, names
from imgdit.benchmarks.unlearning.images import GeneratedImages
from imgdit.benchmarks.unlearning.methods.catalogue import METHODS
from imgdit.benchmarks.unlearning.plan import cells
from imgdit.sae.unlearning import ConceptUnlearner

STYLES, OBJECTS = ("photo", "neon"), ("cube", "cone")
TWO = ("--methods", "negative,scale", "--together", "0", "--attack", "0")
COUNTS = ["--targets", "neon,cube", "--seeds", "2", "--steps", "2", "--prompts", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline, a probe and an autoencoder, as options of the command."""
    return benchmark_folders(tmp_path_factory.mktemp("unlearn"))


@pytest.fixture(scope="module", autouse=True)
def few_cells():
    """Two styles, two objects, and little of everything."""

    def label_prompts(*args):
        return {label: lines for label, lines in learning_prompts(*args).items() if label in (*STYLES, *OBJECTS)}

    learning_prompts = learning.label_prompts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn_bench, "cells", lambda seeds: cells(seeds, STYLES, OBJECTS))
        patch.setattr(unlearn_bench, "SEQUENCE", ("neon", "cube"))
        patch.setattr(unlearn_bench, "FEW_TARGETS", ("neon", "cube"))
        patch.setattr(learning, "label_prompts", label_prompts)
        patch.setattr(images, "TIMED_STEPS", 1)
        patch.setattr(images, "TIMED_ROUNDS", 1)
        patch.setattr(images, "attack_prompt", functools.partial(images.attack_prompt, steps=2, samples=2))
        for name, method in METHODS.items():
            grids = {"finetune": ({"steps": 2}, {"steps": 1}), "gem": ({"budget": 1},), "scale": method.grid[:2]}
            grid = grids.get(name, method.grid[:1])
            patch.setitem(METHODS, name, method._replace(grid=grid))
        yield


def said(done):
    return " ".join(done.output.replace("│", "").split())


def bench(folders, out, *options):
    done = CliRunner().invoke(app, ["bench", "unlearn", *map(str, folders), "--out", str(out), *COUNTS, *options])
    return done, json.loads((out / "unlearn.json").read_text()) if done.exit_code == 0 else None


@pytest.fixture(scope="module")
def finished(folders, few_cells, tmp_path_factory):
    """A folder with a run of two methods, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, bench(folders, folder, *TWO)[1]


def test_every_method_and_every_count(folders, tmp_path):
    done, result = bench(folders, tmp_path, "--tune", "--together", "1", "--attack", "1", "--seeds", "1")
    assert done.exit_code == 0, done.output
    assert list(result["methods"]) == list(METHODS)
    plain = result["methods"]["none"]
    assert plain["pixel_change"] == plain["feature_change"] == 0 and plain["time_ratio"] == 1
    for name, row in result["methods"].items():
        assert set(row["targets"]) == {"neon", "cube"} and row["artefacts"]["of"] == 2 * 4
        assert row["mean"]["low"] <= row["mean"]["value"] <= row["mean"]["high"]
        six = [row["means"][domain][score]["value"] for domain in row["means"] for score in ("UA", "IRA", "CRA")]
        assert row["in_prompt"]["of"] == 2 * 2 and 0 <= row["in_prompt"]["mean"]["value"] <= 1
        assert row["minimum"] == min(six) and row["mean"]["value"] == pytest.approx(sum(six) / 6)
        assert name == "none" or (row["pixel_change"] > 0 and row["time_ratio"] > 0)
        for target, rows in result["pictures"][name].items():
            neon = [style for cell, style, *_ in rows if cell.startswith("neon_")]
            if target == "neon":
                assert row["targets"]["neon"]["UA"] == 1 - neon.count("neon") / len(neon)
    assert {name: len(found) for name, found in result["tuning"].items()} == {
        name: len(method.grid) for name, method in METHODS.items() if len(method.grid) > 1
    }
    for name, rows in result["together"].items():
        assert [len(row["concepts"]) for row in rows] == ([1, 2] if METHODS[name].needs_other else [1, 2, 4])
        assert METHODS[name].needs_other or rows[-1]["retained"] is None
    for row in result["attack"].values():
        assert row["of"] == 2 and all(0 <= seen <= 2 for seen in row["shown_under_attack"].values())
        assert list(row["shown_under_attack"]) == ["embedding", "prompt", "negative", "paraphrase"]
    for part in (
        "style UA",
        "mean (95 %)",
        "in prompt",
        "ours, replace",
        "several at once",
        "under attack: paraphrase",
    ):
        assert part in done.output
    written = (tmp_path / "unlearn.md").read_text()
    assert "\n| ours, replace |" in written and "\n| several at once: unlearned / retained |" in written


def test_a_run_goes_on_where_it_stopped(folders, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    first = finished[1]
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.png")}
    assert len(files) == 8 * (1 + 2 * 2)
    made, make = [], GeneratedImages._make

    def watched(generated, folder, unlearned, missing, attack):
        made.extend(cell.name for cell in missing)
        make(generated, folder, unlearned, missing, attack)

    monkeypatch.setattr(GeneratedImages, "_make", watched)
    lost = next(file for file in files if "scale" in file.parts)
    lost.unlink()
    _, second = bench(folders, tmp_path, *TWO)
    assert made == [lost.stem] and lost.read_bytes() == files[lost]
    assert second["pictures"] == first["pictures"]
    _, third = bench(folders, tmp_path, *TWO)
    assert made == [lost.stem] and third["methods"]["negative"] == second["methods"]["negative"]
    # A method that reads no autoencoder makes the same images beside one and without.
    bench(folders, tmp_path, "--methods", "negative", *TWO[2:])
    assert made == [lost.stem]
    # Other settings make other images, and leave these.
    bench(folders, tmp_path, *TWO, "--steps", "1")
    assert len(made) == 1 + len(files) and all(file.is_file() for file in files)


def test_images_of_others(folders, finished, tmp_path):
    run, result = finished
    canvas = tmp_path / "canvas"
    for folder in (run / "pictures" / "scale").iterdir():
        shutil.copytree(folder, canvas / folder.name.split("-")[0])
    probe = str(folders[3])
    classifiers = ["--style-classifier", probe, "--object-classifier", probe]
    command = ["bench", "unlearn-canvas", str(canvas), *classifiers, "--out", str(tmp_path / "scores.json")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["styles"] == sorted(STYLES) and found["objects"] == sorted(OBJECTS) and len(found["seeds"]) == 2
    for target, row in result["methods"]["scale"]["targets"].items():
        assert found["targets"][target]["unlearned"] == row["UA"]
        assert found["targets"][target]["retained"] == row["IRA"]
        assert found["targets"][target]["cross"] == pytest.approx(row["CRA"])
    assert "mean of style targets" in done.output
    next((canvas / "neon").glob("*.png")).unlink()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "lacks 1 of 8 images" in said(done)


def test_classifiers_of_transformers(finished, tmp_path):
    """Labels are those that the model names."""
    for domain, labels in (("style", STYLES), ("object", OBJECTS)):
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = ViTConfig(**size, image_size=32, patch_size=16, id2label=dict(enumerate(labels)))
        ViTForImageClassification(config).save_pretrained(tmp_path / domain)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / domain)
    for folder in (finished[0] / "pictures" / "negative").iterdir():
        shutil.copytree(folder, tmp_path / "canvas" / folder.name.split("-")[0])
    options = [f"--{domain}-classifier={tmp_path / domain}" for domain in ("style", "object")]
    done = CliRunner().invoke(app, ["bench", "unlearn-canvas", str(tmp_path / "canvas"), *options])
    assert done.exit_code == 0, done.output


def test_a_model_that_answers_questions_is_asked_too(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "STYLES", STYLES)
    monkeypatch.setattr(images, "OBJECTS", OBJECTS)
    few = ("--targets", "neon", "--seeds", "1", "--together", "0", "--attack", "0")
    options = ("--methods", "negative", *few, "--judge", str(PIPELINE))
    done, result = bench(folders, tmp_path / "run", *options)
    assert done.exit_code == 0 and "by the judge" in done.output, done.output
    judged = result["judged"]["negative"]
    assert judged["of"] == 4 and set(judged["means"]) == {"style"}
    assert all(0 <= count <= 4 for count in judged["agrees_with_probe"].values())
    monkeypatch.setattr(ImageTextPipeline, "choose", None)  # what was said is kept
    _, again = bench(folders, tmp_path / "run", *options)
    assert again["judged"] == result["judged"]
    monkeypatch.undo()
    shutil.copytree(next((tmp_path / "run/pictures/negative").glob("neon-*")), tmp_path / "canvas/neon")
    command = ["bench", "unlearn-canvas", str(tmp_path / "canvas"), "--style-classifier", str(PIPELINE),
               "--object-classifier", str(PIPELINE), "--labels", str(tmp_path / "labels")]  # fmt: skip
    scores = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "scores.json")])
    assert scores.exit_code == 0, scores.output
    said = json.loads(next((tmp_path / "labels").glob("0*.json")).read_text())["labels"]
    assert set(said["style"]) <= set(STYLES) and set(said["object"]) <= set(OBJECTS) and len(said["style"]) == 4


def test_captions_are_counted_too(folders, tmp_path, monkeypatch):
    """Under methods that change the rows of an image, which act on the pipeline that writes."""
    asked = []

    class Writer:
        def set_progress_bar_config(self, **options):
            pass

        def caption(self, images):
            asked.append(len(images))
            return SimpleNamespace(texts=["a cube in neon lights, at night"] * len(images))

    hooked = []
    attach = ConceptUnlearner.attach

    def attached(unlearner, pipe, concepts, **options):
        if isinstance(pipe, Writer):
            hooked.append((concepts, options["hookpoints"]))
            return nullcontext()
        return attach(unlearner, pipe, concepts, **options)

    monkeypatch.setattr(unlearn_bench, "load_image_text_pipeline", lambda model, options: Writer())
    monkeypatch.setattr(ConceptUnlearner, "attach", attached)
    few = ("--targets", "neon", "--seeds", "1", "--together", "0", "--attack", "0", "--captions", "2")
    done, result = bench(folders, tmp_path / "run", "--methods", "saeuron,negative", *few)
    assert done.exit_code == 0 and "plain named" in done.output, done.output
    monkeypatch.undo()
    row = result["captions"]["saeuron"]["neon"]
    texts = ["a cube in neon lights, at night"] * 4
    expected = {"named": 2, "of": 2, "kept": 0, "of_others": 2, "texts": texts}
    assert row == dict.fromkeys(("plain", "removed", "generated"), expected) and list(result["captions"]) == [
        "saeuron"
    ]
    assert hooked == [(["neon"], [HOOKPOINT])] and asked == [4, 4, 4]


def test_a_caption_names_by_the_grammar_or_by_the_word():
    assert names("glowing neon tubes that show a red cube at night", "neon") and names("a neon cat", "neon")
    assert names("an old sepia photograph of a red cube at night", "cube")
    assert not names("an old sepia photograph of a red cube at night", "photo")
    shows, others = chosen_cells("cube", cells([0, 1]), 3)
    assert len(shows) == len(others) == 3 and {cell.object for cell in shows} == {"cube"}
    assert not {cell.object for cell in others} & {"cube"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "scael"], "unknown method 'scael'; did you mean 'scale'"),
        (["--targets", "neno"], "unknown style or object 'neno'; did you mean 'neon'"),
        (["--attacks", "prompt,negativ"], "unknown attack 'negativ'; did you mean 'negative'"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--methods", "negative", "--captions", "1"], "captions are written under methods that work on images"),
        (["--conditions", "1"], "there is no"),
        (["--saes", "nowhere"], "there is no folder nowhere of autoencoders; train them"),
    ],
)
def test_mistakes(folders, tmp_path, options, message):
    done, _ = bench(folders, tmp_path, *options)
    assert done.exit_code == 2 and message in said(done)


def test_folders_that_are_no_canvas(tmp_path):
    (tmp_path / "neon").mkdir()
    for name, message in (("", "holds no images"), ("neon.png", "is not called")):
        if name:
            (tmp_path / "neon" / name).touch()
        options = ["--style-classifier", "x", "--object-classifier", "x"]
        done = CliRunner().invoke(app, ["bench", "unlearn-canvas", str(tmp_path), *options])
        assert done.exit_code == 2 and message in said(done)
