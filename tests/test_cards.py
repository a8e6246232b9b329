"""Model cards and what is pushed with them."""

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imgdit.cards import CardDetails, ModelCard, write_card
from imgdit.hub import push_folder


def card(**details) -> ModelCard:
    return ModelCard("edges", "A condition adapter.", "import imgdit", CardDetails(**details), relation="adapter")


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_a_card_has_all_that_it_is_given(tmp_path):
    image = Image.new("RGBA", (8, 8), "red")
    path = write_card(
        tmp_path,
        card(
            description="For **edges**.",
            licence="Apache-2.0",
            image=image,
            recipe="run:\n  steps: 10",
            metrics={"loss": 0.123456, "steps": 10},
            base_model="black-forest-labs/FLUX.1-dev",
        ),
    )
    text = path.read_text()
    for part in ("# edges", "For **edges**.", "```python\nimport imgdit\n```", "| loss | 0.1235 |", "steps: 10"):
        assert part in text
    known = metadata(text)
    assert known["license"] == "apache-2.0" and known["library_name"] == "imgdit"
    assert (known["base_model"], known["base_model_relation"]) == ("black-forest-labs/FLUX.1-dev", "adapter")
    assert "(card.png)" in text and Image.open(tmp_path / "card.png").size == (8, 8)


def test_licences_that_the_hub_does_not_know_have_names():
    known = metadata(card(licence="FLUX.1 [dev] Non-Commercial").text())
    assert (known["license"], known["license_name"]) == ("other", "flux.1-dev-non-commercial")
    text = card().text()
    assert "license" not in metadata(text) and "No licence is stated" in text


def test_values_cannot_break_out_of_their_places(tmp_path):
    text = ModelCard(
        "a <script>",
        "x",
        "y = 1",
        CardDetails(recipe="```\n# title", metrics={"a|b": "<b>\n| c |"}, base_model="../../etc\n- tags: x"),
    ).text()
    assert "<script>" not in text and "<b>" not in text
    assert "````yaml\n```\n# title\n````" in text
    assert "| a\\|b | &lt;b> \\| c \\| |" in text
    assert "base_model" not in metadata(text)


def test_the_image_says_nothing_but_its_pixels(tmp_path):
    info = PngInfo()
    info.add_text("imgdit", "a private prompt")
    Image.new("RGB", (4, 4)).save(tmp_path / "made.png", pnginfo=info)
    write_card(tmp_path / "out", card(image=tmp_path / "made.png"))
    assert not Image.open(tmp_path / "out/card.png").info
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"card's image .*text\.png' cannot be read"):
        write_card(tmp_path / "out", card(image=tmp_path / "text.png"))


def test_a_card_that_somebody_wrote_stays(tmp_path):
    write_card(tmp_path, card(description="first"))
    write_card(tmp_path, card(description="second"))
    assert "second" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, card())
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing was uploaded to me/mine, the Hub cannot be reached") as raised:
        push_folder(tmp_path, "me/mine")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="owner/name, got 'mine'"):
        push_folder(tmp_path, "mine")
    with pytest.raises(ValueError, match="no folder"):
        push_folder(tmp_path / "nowhere", "me/mine")

    def refuse(*args, **options):
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(error, "403 Forbidden")
        error.response = type("Response", (), {"status_code": 403})()
        raise error

    monkeypatch.setattr(HfApi, "model_info", lambda *args, **options: None)
    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="the token may not write there"):
        push_folder(tmp_path, "me/mine")
