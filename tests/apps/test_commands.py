"""What commands say: versions, addresses, names and files; one prompt where something is wrong."""

import inspect
import json
import re
import shutil
import socket
import urllib.request
from pathlib import Path

import gradio
import pytest
from PIL import Image
from tiny_runs import small_pipeline
from typer.main import get_command
from typer.testing import CliRunner

import imgdit
from imgdit.apps import session
from imgdit.apps.cli import app
from imgdit.apps.commands.options import ImageOptions
from imgdit.apps.demo import widgets
from imgdit.apps.demo.app import serve
from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.checkpoints import SCENES
from imgdit.defaults import GUIDANCE, STEPS
from imgdit.images import open_image

QUICK = ["--steps", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty folder to work in, with a photo."""
    monkeypatch.chdir(tmp_path)
    Image.merge("RGB", [Image.effect_noise((128, 128), 80) for _ in range(3)]).save("photo.png")
    return tmp_path


def images(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*.png")}


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


def said(done):
    """What a command said, without the frame around it."""
    return re.sub(r"[│╭╰─╮╯\s]+", " ", done.output)


def test_the_version_is_told():
    assert run("--version").output == f"imgdit {imgdit.__version__}\n"


def test_addresses_that_cannot_be_listened_at_are_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, what in (
            (["--port", port], "give another --port"),
            (["--port", 80808], "65535"),
            (["--host", "256.0.0.1", "--port", 1024], "cannot listen at 256.0.0.1"),
            (["--root-path", "imgdit"], "begins with a slash"),
        ):
            done = run("demo", "--model", "nowhere", *options)
            assert done.exit_code == 2 and what in said(done), done.output


def test_the_demo_behind_a_path(model, tmp_path):
    page, address, holder = serve(Session(Shelf(model)), results=tmp_path, root_path="/imgdit")
    try:
        with urllib.request.urlopen(f"{address}config") as answer:
            assert json.load(answer)["root"].endswith("/imgdit")
    finally:
        page.close(verbose=False)
        holder.close()


DEFAULTS = (
    (["control", "--with", "depth=photo.png"], ["control.png"]),
    (["control", "--with", "grey=photo.png", "--find"], ["control.png", "control-grey.png"]),
    (["any", "--generate", "image", "--generate", "depth"], ["any.png", "any-2.png"]),
)


@pytest.mark.parametrize(("command", "files"), DEFAULTS, ids=["control", "find", "any"])
def test_files_are_all_named_and_the_next_command_leaves_them(model, desk, command, files):
    name, *options = command
    written = []
    for prompt in ("a red cube", "a cone", "a cone"):
        before = {file: Path(file).read_bytes() for file in images(desk)}
        done = run(name, prompt, *options, "--model", model, *QUICK)
        assert done.exit_code == 0, done.output
        new = images(desk) - before.keys()
        assert new == set(re.findall(r"wrote (\S+)", done.output))
        assert all(Path(file).read_bytes() == was for file, was in before.items())
        written.append(new)
    first, second, again = written
    assert first == {f"outputs/{file}" for file in files}
    assert len(second) == len(files) and again == set()


def test_programs_are_told_every_file(model, desk):
    told = []
    for command in (DEFAULTS[1][0], DEFAULTS[2][0]):
        done = run(command[0], "a cone", *command[1:], "--model", model, "--json", *QUICK)
        told += [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["file"] for one in told} == images(desk) - {"photo.png"}
    assert [one["kind"] for one in told] == ["image", "grey", "image", "depth"]


def test_many_files_are_counted(model, desk):
    done = run("generate", "a cone", "--num-images", 9, "--out", "many", "--model", model, "--no-sheet", *QUICK)
    assert "wrote 9 images to many" in done.output and "008.png" not in done.output


def test_nothing_of_others_is_overwritten(model, desk):
    for folder in ("several", "outputs"):
        Path(folder).mkdir()
        shutil.copy("photo.png", f"{folder}/{'sheet' if folder == 'several' else 'control-grey'}.png")
    done = run("generate", "a cone", "a cube", "--out", "several", "--model", model, *QUICK)
    assert done.exit_code == 0 and "several/sheet-2.png" in done.output
    done = run("control", "a cone", *DEFAULTS[1][0][1:], "--model", model, *QUICK)
    assert done.exit_code == 0 and "outputs/control-2-grey.png" in done.output
    for command in (
        ["generate", "--like", "several/000.png", "--out", "photo.png"],
        ["control", "a cone", *DEFAULTS[1][0][1:], "--model", model, "--out", "outputs/control.png", *QUICK],
        ["any", *DEFAULTS[2][0][1:], "--model", model, "--out", "photo.png", *QUICK],
    ):
        done = run(*command)
        assert done.exit_code == 2 and "shows something else" in said(done), done.output
    assert all(same_pixels(open_image(file), open_image("photo.png")) for file in ("several/sheet.png", "photo.png"))
    assert run("generate", "--like", "several/000.png").exit_code == 0
    assert run("generate", "--like", "several/001.png", "--out", "again.jpg").exit_code == 2


@pytest.mark.parametrize(
    ("command", "as_sentence"),
    [
        (["generate", "x", "--control", "deepth=photo.png"], "did you mean 'depth'"),
        (["control", "x", "--with", "deepth=photo.png", "--find"], "did you mean 'depth'"),
        (["any", "--condition", "image=photo.png", "--generate", "dept"], "did you mean 'depth'"),
        (["any", "--condition", "imagee=photo.png"], "did you mean 'image'"),
        (["any", "--generate", "pose"], "unknown kind of frame 'pose'"),
        (["any"], "say what to condition on"),
        (["unlearn", "x", "--concept", "neonn"], "did you mean 'neon'"),
        (["unlearn", "x", "--concept", "neon", "--mode", "replac"], "did you mean 'replace'"),
        (["unlearn", "x", "--concept", "neon", "--sae", "nowhere"], "no folder 'nowhere'"),
        (["control", "x", "--with", "depth=photo.png", "--adapters", "nowhere"], "no folder 'nowhere'"),
        (["lora", "convert", "photo.png", "--to", "comfyiu"], "did you mean 'comfyui'"),
        (["data", "convert", "photo.png", "out", "--to", "shard"], "did you mean 'shards'"),
        (["generate", "--prompts", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["generate", "--prompts", "empty.txt"], "the prompts are empty"),
        (["data", "generate", "empty.txt", "out"], "holds no prompt"),
        (["data", "generate", "nowhere.txt", "out"], "no file or folder 'nowhere.txt'"),
        (["generate", "x", "y", "--out", "many.jpg"], "leave out .jpg"),
        (["generate", "x", "--out", "one.webp"], "PNG"),
        (["generate", "x", "--model", "nowhere"], "no folder 'nowhere' here"),
        (["bench", "scenes", "--model", "nowhere"], "no folder 'nowhere' here"),
        (["bench", "control", "--model", "nobody/nothing"], "the Hub cannot be reached"),
        (["bench", "caches", "--model", "nowhere"], "no folder 'nowhere' here"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(desk, monkeypatch, command, as_sentence):
    Path("empty.txt").write_text("\n \n")
    monkeypatch.setattr(session, "load_pipeline", None)
    done = run(*command)
    assert done.exit_code == 2 and as_sentence in said(done), done.output + repr(done.exception)


def test_words_are_said_once_for_a_command(desk):
    for file in ("model_index.json", "taught.json"):
        assert (SCENES / file).is_file()
    done = run("generate", "a white cube", "a white torus", "--out", "many", *QUICK)
    assert done.exit_code == 0 and done.stderr.count('"white" (nearest: yellow)') == 1 and "bytes" not in done.stderr
    assert "white" not in run("generate", "a white cube", "a white torus", "--out", "many", *QUICK).stderr


def test_a_size_that_was_never_taught_is_told_before(desk):
    done = run("generate", "a red cube", "--size", "160x128", "--out", "a.png", *QUICK)
    assert "was taught 128x128" in done.stderr and "It takes at least" in done.stderr
    assert run("generate", "a red cube", "--out", "b.png", *QUICK).stderr == ""
    assert "got 250x128; try 240x128" in said(run("generate", "a red cube", "--size", "250x128", "--out", "c.png"))


def test_steps_and_guidance_are_the_same_everywhere():
    def defaults(function):
        return {name: one.default for name, one in inspect.signature(function).parameters.items()}

    api = defaults(imgdit.ImgDiTPipeline.__call__)
    assert (api["num_inference_steps"], api["guidance_scale"]) == (STEPS, GUIDANCE) == (28, 3.0)
    assert Request().steps == STEPS
    with gradio.Blocks():
        shown = widgets.sampling()
    assert (shown.steps.value, shown.guidance.value) == (STEPS, GUIDANCE)
    texts = {"write", "caption", "answer"}  # steps of texts depend on their length
    images = {name: one for name, one in get_command(app).commands.items() if name not in texts}
    for name, command in images.items():
        found = {one.name: one.default for one in command.params}
        assert found.get("steps", STEPS) in (None, STEPS) and found.get("guidance") in (None, GUIDANCE), name
        if found.get("steps", STEPS) is None:  # those of the model's few-step LoRA, where --turbo asks for it
            assert ImageOptions().request("a cube").steps == STEPS, name


def test_an_installed_package_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(imgdit.checkpoints, "SCENES", tmp_path / "site-packages/imgdit/checkpoints/scenes")
    done = run("assemble", "nowhere")
    assert done.exit_code == 2 and "--out" in said(done) and not (tmp_path / "site-packages").exists()
