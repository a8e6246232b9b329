"""The demo's tab Caption & Ask: its own model, others by their folders, and what it refuses."""

import types

import pytest
import torch
from gradio_client import Client, handle_file
from tiny import tiny_pipeline
from tiny_text_frames import save_model
from tiny_vision import noise_image
from vision_cases import FIXTURES

from imgdit.apps.demo import app, ask
from imgdit.apps.demo.holder import Holder
from imgdit.apps.demo.limits import Refused
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.images import open_image, to_rgb
from imgdit.pipelines.image_text_loading import load_image_text_pipeline

QUESTION = "a red cube on the left"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("ask") / "model")


@pytest.fixture(scope="module")
def served(model):
    page, address, holder = app.serve(Session(Shelf(model)), results=model / "mup")
    yield address, holder
    page.close(verbose=False)
    holder.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served[0], verbose=False)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    noise_image(40, 30).save(file)
    return file


def call(client, name, photo, **changes):
    image = None if photo is None else handle_file(photo)
    return client.predict(api_name=name, **{"image": image, "model": "", "length": 0, "seed": 0, **changes})


def asked(client, photo, **changes):
    return call(client, "/ask", photo, **{"question": QUESTION, "choices": "", **changes})


def test_captions_answers_and_chances_are_the_pipelines(client, served, model, photo):
    pipe = load_image_text_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    shown = to_rgb(open_image(photo))
    said, status = call(client, "/caption", photo, seed=3)
    assert said == pipe.caption([shown], generator=[torch.Generator().manual_seed(3)]).texts[0] and status == "Done."
    answer, likely, _ = asked(client, photo)
    assert answer == pipe.answer([shown], [QUESTION]).texts[0] and not likely.get("label")
    answer, likely, _ = asked(client, photo, choices="red, blue ,green")
    chances = pipe.choose([shown], QUESTION, ["red", "blue", "green"]).log_likelihoods.softmax(1)[0].tolist()
    assert answer == likely["value"]["label"] == max(zip(chances, ["red", "blue", "green"]))[1]
    assert [one["confidence"] for one in likely["value"]["confidences"]] == pytest.approx(sorted(chances)[::-1])
    assert not hasattr(served[1].session.pipe.transformer, "peft_config")  # images stay what they are


def test_other_models_are_named_by_their_folders(client, photo):
    folder = str(FIXTURES / "lavida/model")
    said, status = call(client, "/caption", photo, model=folder, length=4)
    pipe = load_image_text_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    assert said == " ".join(pipe.caption([to_rgb(open_image(photo))], gen_length=4).texts[0].split())
    assert status in ("Done.", "The model wrote nothing.")


def test_what_cannot_be_answered_is_refused(client, photo, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    for changes, message in (
        ({"question": " "}, "write a question"),
        ({"choices": "red"}, "two answers or more"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"model": str(tmp_path / "plain")}, "has no text head"),
        ({"length": 2}, "max_length"),
        ({"question": "a" * 501}, "500 letters"),
    ):
        with pytest.raises(Exception, match=message):
            asked(client, photo, **changes)
    with pytest.raises(Exception, match="upload an image first"):
        asked(client, None)


def test_only_this_machine_names_models(model, photo, tmp_path):
    session = Session(Shelf(model))
    for takes_models, host, allowed in (
        (True, "127.0.0.1:7860", True),
        (True, "[::1]:7860", True),
        (True, "demo.example.org", False),
        (False, "localhost:7860", False),
    ):
        handlers = ask._Handlers(Holder(session, tmp_path), True, takes_models)
        person = types.SimpleNamespace(headers={"host": host})
        if allowed:
            assert handlers._given(str(photo), "folder", 0, 0, person)[1] == "folder"
        else:
            with pytest.raises(Refused, match="by its own model alone"):
                handlers._given(str(photo), "folder", 0, 0, person)
            assert handlers._given(str(photo), "", 0, 0, person)[1] == ""


def test_a_model_that_does_not_write_has_the_tab_for_others_only(tmp_path, photo):
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    session = Session(Shelf(tmp_path / "plain"))
    assert not ask.writes(session)
    holder = Holder(session, tmp_path / "results")
    labels = [
        [block["props"].get("label") for block in app.build(holder, tmp_path, takes).config["components"]]
        for takes in (False, True)
    ]
    assert [ask.TITLE in found for found in labels] == [False, True]
    handlers = ask._Handlers(holder, False, True)
    with pytest.raises(Refused, match="writes no texts"):
        handlers._given(str(photo), "", 0, 0, types.SimpleNamespace(headers={"host": "localhost"}))
