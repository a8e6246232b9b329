"""The comparison of text encoders: what is fitted, what is found, and the encoder that the model was trained with."""

import json

import pytest
import torch
from transformers import T5EncoderModel

from imgdit import DiffusionPipeline
from imgdit.benchmarks.scenes import text_encoders
from imgdit.benchmarks.scenes.language import small_t5
from imgdit.benchmarks.scenes.text_encoders import (
    Shown,
    least_squares,
    retrieval,
    text_features,
    unexplained,
    with_encoder,
)
from imgdit.benchmarks.scenes.text_to_image import expected
from imgdit.checkpoints import SCENE_PROBE, SCENES
from imgdit.scenes.captions import plain_caption
from imgdit.scenes.world import Scene


@pytest.fixture(scope="module")
def pipe():
    return DiffusionPipeline.from_pretrained(SCENES)


@pytest.fixture(scope="module")
def texts():
    return [plain_caption(Scene.sample(n, "train")) for n in range(96)]


def test_least_squares_finds_a_linear_map():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 2
    y = x[:, :3] @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]) + torch.tensor([4.0, -1.0])
    found = least_squares(x, y)
    assert unexplained(found(x), y) < 1e-4
    assert unexplained(y.mean(0).expand_as(y), y) == pytest.approx(1.0)


def test_the_model_reads_its_own_encoder_as_before(pipe, texts):
    same, lost = with_encoder(pipe, pipe.text_encoder, texts[:64], texts[64:])
    assert lost < 0.02
    given = text_features(pipe.text_encoder, pipe.tokenizer, texts[:8])
    for part, features in zip(("context_embedder", "time_text_embed.text_embedder.linear_1"), given):
        old, new = (model.get_submodule(part)(features) for model in (pipe.transformer, same.transformer))
        assert unexplained(new, old) < 0.05


def test_another_encoder_is_saved_and_loaded_with_the_model_that_reads_it(pipe, texts, tmp_path):
    torch.manual_seed(0)
    encoder = small_t5().eval()
    changed, lost = with_encoder(pipe, encoder, texts[:64], texts[64:])
    assert 0.05 < lost < 1 and changed.transformer.config.joint_attention_dim == encoder.config.d_model
    assert pipe.transformer.config.joint_attention_dim == 192  # as it was
    changed.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    images = []
    for one in (changed, again):
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {
            "height": 32,
            "width": 32,
            "num_inference_steps": 1,
            "output_type": "latent",
            "generator": generator,
        }
        images.append(one("a red cube", **options).images)
    torch.testing.assert_close(*images, rtol=2e-5, atol=2e-5)
    assert isinstance(again.text_encoder, T5EncoderModel)


def test_captions_find_images_by_an_encoder_that_knows_what_they_say(pipe):
    """The images' answers are the truth here: one number per choice."""

    def truth(scenes):
        said = [expected(scene) for scene in scenes]
        choices = sorted({item for one in said for item in one.items()})
        return Shown(
            [plain_caption(scene) for scene in scenes],
            torch.tensor([[float(one[q] == choice) for q, choice in choices] for one in said]),
        )

    both = truth([Scene.sample(n, "train") for n in range(256)])
    known, unknown = (Shown(both.captions[part], both.answers[part]) for part in (slice(0, 224), slice(224, 256)))
    assert sum(retrieval(pipe.text_encoder, pipe.tokenizer, known, unknown)) >= 24
    shuffled = Shown(unknown.captions, unknown.answers.flip(0))
    assert sum(retrieval(pipe.text_encoder, pipe.tokenizer, known, shuffled)) <= 8


def test_every_encoder_is_measured(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "_answers", lambda probe, scenes: torch.rand(len(scenes), 5))
    monkeypatch.setattr(text_encoders.PipelineMaker, "images", lambda self, prompts, seed: torch.rand(2, 3, 128, 128))
    scores = text_encoders.encoder_scores(tmp_path, SCENE_PROBE, 1, 64, 2, 1, 1.0)
    assert [score.task.split(" (")[0] for score in scores[::4]] == [
        "embedded T5 encoder", "masked language model", "masked language model, 1 contrastive steps",
        "T5 encoder, 1 contrastive steps",
    ]  # fmt: skip
    assert len(json.loads((tmp_path / "text_encoders.json").read_text())["scores"]) == 16
