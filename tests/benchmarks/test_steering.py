"""Detection and steering by directions: the numbers, what is added, and the command with its page."""

import json

import pytest
import torch
from tiny_sae import tiny_sae
from tiny_unlearning import HOOKPOINT, TEXT, benchmark_folders
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.benchmarks.unlearning import steering
from imgdit.benchmarks.unlearning.detection import DIRECTIONS, Recorded, auc, detection, learn_directions
from imgdit.benchmarks.unlearning.steering import STEERED, SteeringPlan, _Edit
from imgdit.benchmarks.unlearning.steering_page import effect, summarize, verdict
from imgdit.sae.calls import DenoiserCall
from imgdit.sae.streams import Tokens


def recorded(sae, seed, shift=4.0):
    """Activations of "neon", which lie along the decoder row of feature 5, and of "photo"."""
    generator = torch.Generator().manual_seed(seed)
    rows = {label: torch.randn(6, 2, 32, generator=generator) for label in ("neon", "photo", "sepia")}
    rows["neon"] = rows["neon"] + shift * sae.W_dec[5]
    codes = {label: sae.encode(x.flatten(0, 1)).dense().view(6, 2, -1) for label, x in rows.items()}
    return Recorded((900.0, 100.0), rows, codes, torch.tensor([6.0, 3.0]))


def test_auc_counts_pairs_and_halves_ties():
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auc(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])) == 0.25


def test_planted_concepts_are_found_and_noise_is_not():
    sae = tiny_sae()
    learned = learn_directions(recorded(sae, 0), sae, "neon", top_n=1, seed=0)
    assert learned.selection.features.tolist() == [5]
    for name in ("features", "difference"):
        assert (learned.units[name] @ sae.W_dec[5]).min() > 0.7, name
    found = detection(recorded(sae, 1), learned)
    assert found.keys() == set(DIRECTIONS)
    assert min(found["features"]) > 0.95 and min(found["difference"]) > 0.95 and min(found["pca"]) > 0.8
    nothing = detection(recorded(sae, 1, shift=0.0), learned)
    assert max(nothing["difference"]) < 0.9


@pytest.mark.parametrize("name", STEERED)
def test_all_directions_add_the_same_norm(name):
    sae, lessons = tiny_sae(), recorded(tiny_sae(), 0)
    learned = learn_directions(lessons, sae, "neon", top_n=2, seed=0)
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(2))  # two guidance parts of two images
    x[:, 0] += 5 * sae.W_dec[5]
    call = DenoiserCall(880.0, 4, slice(2, 4), slice(0, 2), (slice(0, 5),), ((1, 5),), 0)
    edit = _Edit("transformer", sae, learned, lessons, name, (0.5, -0.25))
    change = edit.function(edit.strengths)(Tokens(x, ((1, 5),), call)) - x
    norms = change.square().sum(2).mean(1).sqrt()
    torch.testing.assert_close(norms, 6.0 * torch.tensor([0.5, 0.25, 0.5, 0.25]))
    along = change[:, 0] @ learned.units["features"][0]
    if name in ("features", "difference", steering.SCALED):
        assert (along[::2] > 0).all() and (along[1::2] < 0).all()


def test_effects_that_cost_the_rest_do_not_count():
    curve = {"concept": [0.1, 0.5, 0.9], "kept": [1.0, 0.8, 0.7]}
    assert effect(curve, "up") == pytest.approx(0.4)
    assert effect({**curve, "kept": [1.0, 1.0, 1.0]}, "up") == pytest.approx(0.8)
    assert effect(curve, "down") == 0.0


def made_up(area, up):
    """Two concepts whose features have an AUC and an effect, where differences of means move nothing."""
    still = {"concept": [0.0, 0.0], "kept": [1.0, 1.0]}
    curves = {name: {**still, "concept": [0.0, up if name == "features" else 0.0]} for name in STEERED}
    one = {
        "timesteps": {TEXT: [1000.0]},
        "auc": {TEXT: {name: [area] for name in DIRECTIONS}},
        "steered": {"up": {TEXT: curves}, "down": {TEXT: dict.fromkeys(STEERED, still)}},
    }
    return {"hookpoints": [TEXT], "concepts": {"neon": one, "cube": one}}


def test_the_verdict_follows_the_numbers():
    (line,) = verdict(made_up(0.99, 0.9))
    assert "features detect the concepts (mean AUC 0.99" in line
    assert "; they bring a concept into the image" in line and "better than the difference of means (+0.90" in line
    assert "they do not take it out" in line and "about as well as" in line
    (line,) = verdict(made_up(0.6, 0.1))
    assert "do not detect" in line and "they do not bring" in line
    mixed = made_up(0.99, 0.9)
    mixed["concepts"]["cube"] = made_up(0.99, 0.0)["concepts"]["cube"]
    assert "not clearly better or worse than the difference of means (+0.45, +0.00 to +0.90)" in verdict(mixed)[0]
    assert summarize(made_up(0.6, 0.1)).effects["up"][TEXT]["features"].value == pytest.approx(0.1)


def test_the_command_writes_page_and_curves_and_goes_on(tmp_path, monkeypatch):
    few = {"style": ("photo", "neon"), "object": ("cube", "cone")}
    lines = steering.label_prompts
    monkeypatch.setattr(steering, "LABELS", few)
    monkeypatch.setattr(
        steering,
        "label_prompts",
        lambda count, seed, kind: {label: lines(count, seed, kind)[label] for label in few[kind]},
    )
    options = [*benchmark_folders(tmp_path), "--concepts", "neon", "--prompts", 1, "--images", 1]
    options += ["--strengths", "0.5", "--steps", 2, "--out", tmp_path / "out"]
    words = ["bench", "sae-steering", *map(str, options)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out/steering.md").read_text()
    assert all(f"`{place}`" in page for place in (HOOKPOINT, TEXT)) and "| neon |" in page
    assert all(line in page for line in done.output.splitlines() if line.startswith("At "))
    assert (tmp_path / "out/steering.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "out/steering.json").read_text())
    curve = result["concepts"]["neon"]["steered"]["up"][TEXT]["random"]
    assert len(curve["concept"]) == 2 and curve["concept"][0] != curve["concept"][1]
    monkeypatch.setattr(steering, "record", None)  # nothing is measured again
    assert CliRunner().invoke(app, words).exit_code == 0
    for wrong, said in ((["--strengths", "0"], "positive"), (["--concepts", "dog"], "style or object")):
        refused = CliRunner().invoke(app, [*words, *wrong])
        assert refused.exit_code == 2 and said in refused.output
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        SteeringPlan(images=0)
