"""Autoencoders and concepts with a model card: saved, uploaded to a Hub in a folder, and read back."""

import json

import pytest
import torch
import yaml
from hub_stub import HubStub
from PIL import Image
from tiny import tiny_pipeline
from tiny_sae import selection, tiny_sae, unlearner_of
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.cards import CardDetails
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner

PLACE = "transformer.transformer_blocks.1"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def unlearner(pipe):
    return unlearner_of(pipe, PLACE, [selection("neon", [3, 7], [2.0, 1.0]), selection("pop | art", [5], [1.0])])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return HubStub(tmp_path / "cache", monkeypatch)


def latents(pipe, unlearner, concepts):
    options = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "latent"}
    with unlearner.attach(pipe, concepts):
        return pipe("a red cube", generator=torch.Generator().manual_seed(0), **options).images


def test_an_unlearner_comes_back_from_the_hub(pipe, unlearner, hub):
    details = CardDetails(
        licence="apache-2.0", image=Image.new("RGB", (8, 4)), recipe="run: {}", metrics={"fvu": 0.25}
    )
    assert unlearner.push_to_hub("me/saes", card=details, private=True) == "https://huggingface.co/me/saes"
    assert hub.private == {"me/saes": True}
    card = (hub.snapshot("me/saes") / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    for part in (
        "ConceptUnlearner.from_pretrained('me/saes')",
        "| fvu | 0.25 |",
        "run: {}",
        "64 features",
        "card.png",
    ):
        assert part in card
    assert f"| concept pop \\| art at {PLACE} |" in card
    again = ConceptUnlearner.from_pretrained("me/saes")
    assert again.concepts == unlearner.concepts
    assert torch.equal(latents(pipe, again, ["neon"]), latents(pipe, unlearner, ["neon"]))


def test_a_selection_alone_is_kilobytes_and_finds_its_autoencoders(pipe, unlearner, hub):
    unlearner.saes[PLACE].push_to_hub("me/saes")
    assert "load_sae('me/saes', " in (hub.snapshot("me/saes") / "README.md").read_text()
    assert torch.equal(SparseAutoencoder.from_pretrained("me/saes", PLACE).W_dec, unlearner.saes[PLACE].W_dec)
    unlearner.push_to_hub("me/neon", concepts=["neon"], saes="me/saes")
    files = {path.name: path.stat().st_size for path in (hub.snapshot("me/neon") / PLACE).iterdir()}
    assert files.keys() == {"concepts.json", "concepts.safetensors"} and sum(files.values()) < 4096
    again = ConceptUnlearner.from_pretrained("me/neon")
    assert again.concepts == ["neon"]
    assert torch.equal(latents(pipe, again, ["neon"]), latents(pipe, unlearner, ["neon"]))


def test_selections_of_nothing_or_of_another_autoencoder_are_refused(unlearner, tmp_path):
    with pytest.raises(ValueError, match="unknown concept 'cube'"):
        unlearner.save_pretrained(tmp_path, concepts=["cube"])
    with pytest.raises(ValueError, match=r"saes must be a folder or a Hub repository \(owner/name\)"):
        unlearner.save_pretrained(tmp_path, saes="nowhere")
    with pytest.raises(ValueError, match="no concept was selected"):
        ConceptUnlearner(unlearner.saes).save_pretrained(tmp_path, saes="me/saes")
    other = tiny_sae(PLACE)
    other.W_dec.data.mul_(2)
    ConceptUnlearner({PLACE: other}).save_pretrained(tmp_path / "others")
    unlearner.save_pretrained(tmp_path / "alone", saes=str(tmp_path / "others"))
    with pytest.raises(ValueError, match="selected with another SAE"):
        ConceptUnlearner.from_pretrained(tmp_path / "alone")
    file = tmp_path / "alone" / PLACE / "concepts.json"
    values = json.loads(file.read_text())
    for wrong, said in ((7, "saes must be str, got 7"), (None, "nor the place of their autoencoder")):
        file.write_text(json.dumps({**values, "saes": wrong}))
        with pytest.raises(ValueError, match=said):
            ConceptUnlearner.from_pretrained(tmp_path / "alone")


def test_the_command_says_what_the_run_says(pipe, tmp_path, hub):
    pipe.save_pretrained(tmp_path / "pipe")
    recipe = {
        "run": {"folder": str(tmp_path / "run"), "steps": 1, "batch_size": 24},
        "pipeline": {"pretrained": str(tmp_path / "pipe"), "call": {"num_inference_steps": 1}},
        "data": {"prompts": ["a red cube", "a blue cone"], "buffer": 100},
        "sae": {"hookpoints": [PLACE], "num_latents": 64, "k": 4},
        "concepts": {"top_n": 2, "prompts": {"cube": ["a red cube"], "cone": ["a blue cone"]}},
    }
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(recipe))
    run = CliRunner().invoke
    assert run(app, ["sae", "train", str(tmp_path / "sae.yaml")]).exit_code == 0
    saes = str(tmp_path / "run/saes")
    done = run(app, ["sae", "push", saes, "me/mine", "--license", "mit", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out/README.md").read_text()
    assert "num_latents: 64" in card and f"| unexplained variance, {PLACE} |" in card and "license: mit" in card
    assert "ConceptUnlearner.from_pretrained('me/mine')" in card and str(tmp_path) not in card
    done = run(app, ["sae", "push", saes, "me/cone", "--concept", "cone", "--selection", saes])
    assert done.exit_code == 0 and "https://huggingface.co/me/cone" in done.output
    assert ConceptUnlearner.from_pretrained("me/cone").concepts == ["cone"]
