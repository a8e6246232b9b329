"""`imgdit any --generate text`."""

import pytest
from PIL import Image
from tiny_text_frames import save_model
from typer.testing import CliRunner

from imgdit.apps.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = save_model(tmp_path_factory.mktemp("model"))
    Image.new("RGB", (16, 16), "red").save(place / "photo.png")
    return place


def run(model, *arguments):
    given = ["--model", str(model), "--condition", f"image={model / 'photo.png'}", "--size", "16"]
    return CliRunner().invoke(app, ["any", *arguments, *given])


def test_a_caption_an_answer_and_a_filling_are_printed(model):
    for arguments in ((), ("a red",), ("a [?] cube",)):
        result = run(model, *arguments, "--generate", "text")
        assert result.exit_code == 0, result.output
        assert "[?]" not in result.stdout
    assert result.stdout.startswith("a ") and result.stdout.strip().endswith("cube"), result.stdout


def test_images_are_generated_in_a_call_of_their_own(model):
    result = run(model, "--generate", "text", "--generate", "depth")
    assert result.exit_code != 0 and "--generate text is alone" in result.output
    result = run(model, "a [colour] cube", "--generate", "text")
    assert result.exit_code != 0 and "unknown placeholder" in result.output
