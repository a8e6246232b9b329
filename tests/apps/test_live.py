"""Images that follow: the demo's tab Live, and what `imgdit bench live` measures."""

import json
import re

import pytest
from gradio_client import Client, handle_file
from PIL import Image, ImageDraw
from tiny import tiny_pipeline
from tiny_control import few_step_folder
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.demo import app as demo
from imgdit.apps.jobs.request import Control, Request
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.images import open_image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return few_step_folder(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def served(model):
    page, address, holder = demo.serve(Session(Shelf(model)), results=model / "mup")
    yield Client(address, verbose=False), holder
    page.close(verbose=False)
    holder.close()


def drawing(file, box):
    """White paper, and black lines on a layer of its own, as a browser sends them."""
    lines = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(lines).rectangle(box, None, "black", 4)
    lines.save(file)
    return {"background": None, "layers": [handle_file(file)], "composite": handle_file(file)}


def follow(client, sent, kind="canny", **changes):
    said = {"prompt": "a red cube", "strength": 1.0, "seed": 3, **changes}
    image, status = client.predict(drawing=sent, kind=kind, **said, api_name="/live")
    assert re.fullmatch(r"Follows in \d+\.\d\d s, 4 steps\.", status)
    return open_image(image["path"] if isinstance(image, dict) else image).convert("RGB")


def test_the_image_follows_the_drawing_and_the_prompt(served, tmp_path):
    client, holder = served
    one, other = (drawing(tmp_path / f"{n}.png", box) for n, box in enumerate([(20, 20, 90, 90), (90, 90, 200, 220)]))
    first = follow(client, one)
    assert same_pixels(follow(client, one), first)
    assert not same_pixels(follow(client, other), first)
    alone = Request("a red cube", seed=3, steps=4, turbo=True)
    expected = holder.session.generate(alone).images[0]
    assert same_pixels(follow(client, one, kind=""), expected)
    assert same_pixels(follow(client, None), expected)
    assert not same_pixels(follow(client, None, prompt="a blue cone"), expected)
    black = Image.new("RGB", (256, 256))
    ImageDraw.Draw(black).rectangle((20, 20, 90, 90), None, "white", 4)
    drawn = Request("a red cube", seed=3, steps=4, turbo=True, controls=(Control("canny", black),))
    assert same_pixels(first, holder.session.generate(drawn).images[0])


def test_what_the_tab_does_not_take_is_refused(served):
    with pytest.raises(Exception, match="greater than maximum value 3"):
        follow(served[0], None, strength=9.0)


def test_models_without_a_few_step_lora_have_no_tab(served, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert "Live" in _tabs(served[1])
    assert "Live" not in _tabs(demo.Holder(Session(Shelf(tmp_path)), tmp_path / "results"))


def _tabs(holder):
    blocks = demo.build(holder, holder.folder).config["components"]
    return [block["props"]["label"] for block in blocks if block["type"] == "tabitem"]


def test_the_benchmark(model):
    done = CliRunner().invoke(
        app, ["bench", "live", "--model", str(model), "--seconds", "0.3", "--rounds", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["follows"] for row in rows] == ["prompt", "canny"]
    for row in rows:
        assert row["images_per_second"] > 0
        assert 0 < row["delay"] <= row["delay_95"]
        assert 0 <= row["left_out"] < 1
        assert row["ratio"] > 0
