"""Looking at features: the data, the sheets, the page, and the commands."""

import dataclasses
import json
import re

import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_pipeline
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.sae.config import SAEConfig
from imgdit.sae.features import contrast_features, heat_maps, survey_features
from imgdit.sae.hooks import hooked
from imgdit.sae.model import SparseAutoencoder, save_sae
from imgdit.sae.report import write_report

HOOKPOINT = "transformer.transformer_blocks.1"
PROMPTS = ["a red cube", "the blue <sphere>", "a green cone"]
CALL = {"num_inference_steps": 3, "height": 16, "width": 24, "guidance_scale": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def sae():
    config = SAEConfig(32, 64, k=4, hookpoint=HOOKPOINT)
    return SparseAutoencoder(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)


def codes(pipe, sae, prompt, seed):
    """Dense codes (steps, n, L) of one image."""
    found = []

    def read(tokens):
        found.append(sae.encode(tokens.values[tokens.call.conditional].flatten(0, 1)).dense())

    with hooked(pipe, {HOOKPOINT: read}):
        options = {name: value for name, value in CALL.items() if name != "seed"}
        pipe(prompt, **options, output_type="latent", generator=torch.Generator().manual_seed(seed))
    return torch.stack(found)


def test_features_of_the_text(pipe, tmp_path):
    """They have no place in the image: the pages show the images alone."""
    config = SAEConfig(32, 64, k=4, hookpoint="transformer.context_embedder")
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    survey = survey_features(pipe, sae, PROMPTS, batch_size=2, **CALL)
    feature = int(survey.strongest.amax(0).argmax())
    shown = heat_maps(pipe, sae, PROMPTS, [feature], batch_size=2, output_type="pil", **CALL)
    assert shown.maps is None and len(shown.images) == 3
    write_report(tmp_path, survey, shown, PROMPTS)
    best = survey.top_images(feature)
    assert not list((tmp_path / "tiles").glob("heat-*"))
    entry = json.loads((tmp_path / "features.json").read_text())["features"][0]["top"][0]
    assert entry["token"] == best[0][2] and (tmp_path / "tiles" / entry["image"]).is_file()


def test_survey_and_heat_maps_are_the_codes(pipe, sae):
    survey = survey_features(pipe, sae, PROMPTS, batch_size=2, **CALL)
    dense = torch.stack([codes(pipe, sae, prompt, 5 + i) for i, prompt in enumerate(PROMPTS)])  # (P, S, n, L)
    torch.testing.assert_close(survey.means, dense.mean((0, 2)), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(survey.strongest, dense.amax((1, 2)), atol=1e-2, rtol=1e-2)
    assert (survey.density - (dense > 0).float().mean((0, 1, 2))).abs().max() < 0.02
    feature = int(survey.density.argmax())
    image, value, place = survey.top_images(feature, 1)[0]
    assert value == pytest.approx(float(dense[image, :, place, feature].max()), rel=1e-2)
    counts, edges, dead = survey.histogram()
    assert counts.sum() + dead == 64 and len(edges) == len(counts) + 1

    maps = heat_maps(pipe, sae, PROMPTS, [feature, 3], batch_size=2, **CALL)
    assert maps.maps.shape == (3, 2, 4, 6)
    torch.testing.assert_close(maps.maps[:, 0].flatten(1), dense.mean(1)[..., feature], atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="features 0 to 63, got 64"):
        heat_maps(pipe, sae, PROMPTS, [64], **CALL)
    with pytest.raises(ValueError, match="names no hookpoint"):
        survey_features(pipe, SparseAutoencoder(dataclasses.replace(sae.config, hookpoint=None)), PROMPTS, **CALL)


def test_contrast(pipe, sae):
    found = contrast_features(pipe, sae, PROMPTS[:1], PROMPTS[1:], **CALL)
    same = contrast_features(pipe, sae, PROMPTS[:1], PROMPTS[:1], **CALL)
    assert same.scores("prompts").abs().max() < 1e-6
    assert found.scores("prompts").abs().max() > 1e-4


def test_report(pipe, sae, tmp_path):
    survey = survey_features(pipe, sae, PROMPTS, **CALL)
    shown = heat_maps(pipe, sae, PROMPTS, survey.density.topk(3).indices.tolist(), output_type="pil", **CALL)
    captions = ["a <b>red</b> cube", "a sphere & more", 'a "green" cone']
    write_report(tmp_path, survey, shown, PROMPTS, captions=captions, title="<i>x</i>", top=2)
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) == 4
    for page in pages:
        text = page.read_text()
        assert "http" not in text and not re.search(r"<(b|i|sphere)>", text)  # needs nothing else; escaped
        for name in re.findall(r'(?:src|href)="([^"]*)"', text):
            assert (tmp_path / name).is_file(), name
    index = (tmp_path / "index.html").read_text()
    assert "&lt;sphere&gt;" in index and index.count('class="card"') == 3
    data = json.loads((tmp_path / "features.json").read_text())
    assert [entry["feature"] for entry in data["features"]] == list(shown.features)
    assert all(0 < entry["density"] <= 1 and len(entry["top"]) <= 2 for entry in data["features"])
    for one in (one for entry in data["features"] for one in entry["top"]):
        for name in ("image", "heat", "patch"):
            with Image.open(tmp_path / "tiles" / one[name]) as tile:
                assert tile.width == (96 if name == "patch" else 192)


def test_commands(pipe, sae, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    recipe = {
        "run": {"folder": str(tmp_path / "run"), "steps": 2, "batch_size": 48},
        "pipeline": {"pretrained": str(tmp_path / "pipe"), "call": {"num_inference_steps": 2, "guidance_scale": 3.0}},
        "data": {"prompts": PROMPTS, "buffer": 200},
        "sae": {"hookpoints": [HOOKPOINT], "num_latents": 64, "k": 4},
    }
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(recipe))
    runner = CliRunner()
    done = runner.invoke(app, ["sae", "train", str(tmp_path / "sae.yaml")])
    assert done.exit_code == 0, done.output
    assert "fvu" in done.output
    again = runner.invoke(app, ["sae", "train", str(tmp_path / "sae.yaml")])
    assert again.exit_code == 2 and "holds a run" in again.output
    trained = str(tmp_path / "run" / "saes" / HOOKPOINT)
    options = ["--prompt", "a red cube", "--against", "a cone", "--steps", "2", "--count", "2"]
    site = tmp_path / "site"
    words = ["sae", "features", trained, str(tmp_path / "pipe"), *options, "--out", str(site)]
    assert runner.invoke(app, words).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in site.rglob("parts/**/*") if path.is_file()}
    (site / "index.html").unlink()
    assert runner.invoke(app, words).exit_code == 0 and (site / "index.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing is generated again
    (tmp_path / "none.txt").write_text("\n")
    refused = runner.invoke(app, [*words[:4], "--prompts", str(tmp_path / "none.txt")])
    assert refused.exit_code == 2 and "give --prompt TEXT or --prompts FILE" in refused.output


def test_sdxl_unbox_files(sae, tmp_path):
    """Published as pickles: refused, converted once by torch's restricted reader, and then the same numbers."""
    source = tmp_path / "unbox"
    source.mkdir()
    config = {"d_model": 32, "n_dirs_local": 64, "k": 4, "auxk": 8, "dead_steps_threshold": 10}
    (source / "config.json").write_text(json.dumps(config))
    state = {
        "encoder.weight": sae.encoder.weight,
        "latent_bias": sae.encoder.bias,
        "decoder.weight": sae.W_dec.t(),
        "pre_bias": sae.b_dec,
    }
    torch.save(state, source / "state_dict.pth")
    with pytest.raises(ValueError, match=r"state_dict.pth instead of .* pickles can run code"):
        SparseAutoencoder.from_pretrained(source)
    done = CliRunner().invoke(app, ["sae", "convert", str(source), str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    converted = SparseAutoencoder.from_pretrained(tmp_path / "ours")
    assert converted.config.source == "update"
    x = torch.randn(7, 32)
    torch.testing.assert_close(converted(x), sae(x))


def test_files(sae, tmp_path):
    folder = tmp_path / HOOKPOINT
    config = dataclasses.replace(sae.config, activation="batch_topk", threshold=0.25)
    trained = SparseAutoencoder(config)
    save_sae(trained, folder)
    values = json.loads((folder / "cfg.json").read_text())
    # What SAeUron's reader knows.
    assert {"expansion_factor", "normalize_decoder", "num_latents", "k", "batch_topk", "d_in"} <= values.keys()
    assert values["batch_topk"] is True and values["sample_topk"] is False
    again = SparseAutoencoder.from_pretrained(tmp_path, HOOKPOINT)
    assert again.config == config and again.threshold == 0.25  # a load and a save keep the training mode
    assert again.fingerprint() == trained.fingerprint() != sae.fingerprint()
    with pytest.raises(ValueError, match="name one as subfolder"):
        SparseAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no folder 'elsewhere'"):
        SparseAutoencoder.from_pretrained(tmp_path, "elsewhere")
    values["d_in"] = 48
    (folder / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"must be \(64, 48\)"):
        SparseAutoencoder.from_pretrained(folder)
    (folder / "sae.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        SparseAutoencoder.from_pretrained(folder)
