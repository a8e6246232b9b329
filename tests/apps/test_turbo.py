"""`--turbo`: the few-step LoRA of a model's folder, in requests, on the command line and in the files of images."""

import dataclasses
import re

import pytest
from PIL import Image
from tiny import tiny_pipeline
from tiny_control import few_step_folder
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.jobs.png import read_origin
from imgdit.apps.jobs.request import Control, Request
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session

FAST = Request("a red cube", steps=4, height=16, width=16, turbo=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return few_step_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def session(model):
    return Session(Shelf(model))


def pixels(session, request):
    return session.generate(request).images[0]


def test_a_request_uses_it_and_the_next_one_does_not(session):
    plain = dataclasses.replace(FAST, turbo=False, guidance=1.0)
    before, fast = pixels(session, plain), pixels(session, FAST)
    assert not same_pixels(before, fast)
    assert same_pixels(pixels(session, plain), before)
    edges = (Control("canny", Image.effect_noise((16, 16), 80).convert("RGB")),)
    controlled = dataclasses.replace(FAST, controls=edges)
    assert not same_pixels(pixels(session, controlled), fast)
    assert not same_pixels(pixels(session, controlled), pixels(session, dataclasses.replace(plain, controls=edges)))
    assert session.settled(FAST).guidance == 1.0
    assert same_pixels(pixels(session, FAST), fast)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 28}, "steps=28"),
        ({"guidance": 3.0}, r"guidance=3\.0"),
        ({"negative_prompt": "a cone"}, "negative_prompt='a cone'"),
        ({"features": ((1, 0.0),)}, "features"),
    ],
)
def test_what_it_was_not_trained_for_is_refused(session, changes, named):
    with pytest.raises(ValueError, match=rf"in 4 steps with a guidance of 1.*{named}"):
        session.generate(dataclasses.replace(FAST, **changes))


def test_a_request_keeps_it_and_older_requests_are_unchanged():
    assert Request.from_dict(FAST.to_dict()) == FAST
    assert "turbo" not in Request("a red cube").to_dict()


def test_the_command(model, tmp_path):
    def generate(*options, folder=model):
        command = ["generate", "a red cube", "--size", "16", "--model", str(folder), *map(str, options)]
        return CliRunner().invoke(app, command)

    file = tmp_path / "fast.png"
    done = generate("--turbo", "--out", file)
    assert done.exit_code == 0, done.output
    origin = read_origin(file)
    assert (origin.request.steps, origin.request.guidance, origin.request.turbo) == (4, 1.0, True)
    again = CliRunner().invoke(app, ["generate", "--like", str(file), "--out", str(tmp_path / "again.png")])
    assert again.exit_code == 0, again.output
    refused = generate("--turbo", "--steps", 28, "--out", tmp_path / "slow.png")
    assert refused.exit_code == 2
    assert "steps=28" in refused.output
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    without = generate("--turbo", "--out", tmp_path / "none.png", folder=tmp_path / "plain")
    assert without.exit_code == 2
    assert "has no few-step LoRA" in re.sub(r"[│╭╰─╮╯\s]+", " ", without.output)
