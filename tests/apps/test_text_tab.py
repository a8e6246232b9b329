"""The demo's Text tab: what it writes, in which order, and what it refuses."""

import shutil

import pytest
from gradio_client import Client
from tiny_runs import small_pipeline

from imgdit.apps.demo import app
from imgdit.apps.demo.text import Revealed, drawn, history, reveal
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.checkpoints import SCENES
from imgdit.pipelines.text_loading import load_text_pipeline


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    model = small_pipeline(folder)
    shutil.copytree(SCENES / "text", model / "text")
    page, address, holder = app.serve(Session(Shelf(model)), results=folder / "mup")
    yield Client(address, verbose=False)
    page.close(verbose=False)
    holder.close()


def write(client, prompt, **changes):
    said = {"prompt": prompt, "length": 24, "block": 4, "temperature": 0.7, "seed": 0, **changes}
    return client.predict(api_name="/write", **said)


def test_a_beginning_is_continued_and_holes_are_filled(client):
    text, order, status = write(client, "a cartoon of")
    assert text.startswith("a cartoon of a ") and status.startswith("Done in ")
    assert order.count("given") == 3 and "<li>a cartoon of _" in order and f"<li>{text}</li></ol>" in order
    assert write(client, "a cartoon of") == (text, order, status) != write(client, "a cartoon of", seed=1)
    filled = write(client, "a _ of a red cube left of a blue _", temperature=0)[0].split()
    assert "_" not in filled and filled[2:10] == ["of", "a", "red", "cube", "left", "of", "a", "blue"]


def test_what_is_out_of_bounds_is_refused(client):
    for changes in ({"block": 0}, {"temperature": 9}, {"length": 99}):
        with pytest.raises(Exception, match="imum value"):
            write(client, "a cartoon of", **changes)
    with pytest.raises(Exception, match="positions"):
        write(client, "zebra " * 40)


def test_the_order_is_that_of_the_blocks():
    pipe = load_text_pipeline("embedded")
    found = reveal(pipe, "a sketch of", 12, 1, 1.0, 3)
    assert found.order[:3] == [0, 0, 0] and found.order[3:] == sorted(found.order[3:]) and found.order[3] == 1
    free = reveal(pipe, "a _ of a red _ left of a _ _", 12, 1, 0.0, 0)
    assert sorted(free.order) == [0] * 7 + [1, 2, 3, 4] and free.steps == 4
    assert free.text == " ".join(free.tokens)


def test_tokens_are_drawn_with_their_steps():
    found = Revealed("a <b>, c", ["a", "<b>", ",", "c"], [0, 2, 1, 3], 3)
    assert history(found) == ["a _ _ _", "a _, _", "a <b>, _", "a <b>, c"]
    page = drawn(found)
    assert "&lt;b&gt;<br><small>2</small>" in page and "<b>" not in page and page.count("given") == 1
