"""Features of many prompts in parts on disk, and their names."""

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from tiny_sae import tiny_sae

from imgdit.sae import feature_parts
from imgdit.sae.feature_labels import feature_labels
from imgdit.sae.feature_parts import FeatureParts
from imgdit.sae.features import heat_maps, survey_features
from imgdit.sae.report import patch

PROMPTS = ["a red cube", "a blue sphere", "a green cone", "the blue sphere left", "a cube"]
CALL = {"num_inference_steps": 1, "height": 16, "width": 24, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_parts, "PART", 2)


def test_parts_are_the_whole(pipe, tmp_path):
    sae = tiny_sae()
    parts = FeatureParts(pipe, sae, PROMPTS, tmp_path, seed=3, **CALL)
    found, whole = parts.survey(), survey_features(pipe, sae, PROMPTS, seed=3, **CALL)
    assert found.timesteps == whole.timesteps
    for one, other in zip(found[1:4], whole[1:4]):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    features = whole.density.topk(2).indices.tolist()
    shown = parts.heat_maps(features, {0, 4})
    assert [image is not None for image in shown.images] == [True, True, False, False, True]
    expected = heat_maps(pipe, sae, PROMPTS, features, seed=3, output_type="pil", **CALL)
    torch.testing.assert_close(shown.maps[[0, 1, 4]], expected.maps[[0, 1, 4]], atol=1e-4, rtol=1e-3)
    assert not shown.maps[2:4].any()
    scores = parts.contrast(["a cone"])
    assert scores.shape == (1, 64) and torch.equal(parts.contrast(["a cone"]), scores)


def test_a_killed_run_goes_on_where_it_was(pipe, tmp_path, monkeypatch):
    sae, done = tiny_sae(), []

    def killed(*args, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(options["seed"])
        return survey_features(*args, **options)

    monkeypatch.setattr(feature_parts, "survey_features", killed)
    with pytest.raises(KeyboardInterrupt):
        FeatureParts(pipe, sae, PROMPTS, tmp_path, **CALL).survey()
    done.clear()
    again = FeatureParts(pipe, sae, PROMPTS, tmp_path, **CALL)
    assert again.survey().strongest.shape == (5, 64) and done == [4]
    done.clear()
    again.survey()
    assert not done
    with pytest.raises(KeyboardInterrupt):  # another seed is another run
        FeatureParts(pipe, sae, PROMPTS, tmp_path, seed=1, **CALL).survey()
    assert not list(tmp_path.rglob(".*"))


def test_captions_are_asked_once(pipe, tmp_path):
    parts = FeatureParts(pipe, tiny_sae(), PROMPTS, tmp_path, **CALL)
    shown, asked = parts.heat_maps([1], {0}), []

    def caption(images):
        asked.append(len(images))
        return [f"image {image.size}" for image in images]

    for _ in range(2):
        texts = parts.captions(shown, caption, "somebody")
        assert texts[0].startswith("image (24, 16)") and texts[1] is not None and texts[2:] == [None] * 3
    assert asked == [2]


def test_labels_are_words_that_others_lack():
    texts = ["a red cube", "the red cone", "a blue cube", None, "a blue cone, at night"]
    labels = feature_labels(texts, {7: [0, 1], 8: [4], 9: [3], 10: [0, 4]})
    assert labels[7] == "red" and labels[8].split(", ")[0] == "night"
    assert labels[9] == "" and "a" not in labels[8].split(", ")


def test_patches_are_around_the_token():
    image = Image.new("RGB", (60, 40))
    image.paste((255, 0, 0), (50, 30, 60, 40))
    corner = patch(image, 4 * 6 - 1, 4, 6)
    assert corner.getpixel((corner.width - 1, corner.height - 1)) == (255, 0, 0)
    assert max(patch(image, 0, 4, 6).getextrema()[0]) == 0
