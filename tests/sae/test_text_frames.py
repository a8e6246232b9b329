"""Activations while texts about images are generated: the image that is read, and the text's rows."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sae import all_features, unlearner_of
from tiny_text_frames import LENGTH, pipeline, save_model

from imgdit import ImageTextPipeline
from imgdit.sae.fingerprints import is_fingerprint_of, model_fingerprint
from imgdit.sae.hooks import hooked

IMAGE, TEXT = "transformer.transformer_blocks.0", "transformer.context_embedder"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    loaded = ImageTextPipeline.from_pretrained(save_model(tmp_path_factory.mktemp("model")))
    loaded.set_progress_bar_config(disable=True)
    loaded.check_text_head()
    return loaded


def captions(pipe, count=1):
    """Texts about copies of one image, and the probabilities of all their tokens."""
    found = []

    def keep(pipe, step, timestep, tensors):
        found.append(tensors["sampled_probs"])
        return {}

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    texts = pipe.caption(
        [Image.fromarray(pixels)] * count,
        resolution=16,
        num_inference_steps=3,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["sampled_probs"],
    ).texts
    return texts, torch.stack(found)


def test_hooks_read_the_image_once_and_the_text_in_every_step(pipe):
    seen = {IMAGE: [], TEXT: []}
    before = captions(pipe, 2)
    functions = {place: lambda tokens, place=place: seen[place].append(tokens) for place in seen}
    with hooked(pipe, functions):
        during = captions(pipe, 2)
    assert before[0] == during[0] and torch.equal(before[1], during[1]), "nothing was changed"
    (image,) = seen[IMAGE]
    assert image.values.shape[:2] == (2, np.prod(image.grids[0])) and image.call.timestep == 0.0
    assert len(seen[TEXT]) == 3 and all(text.values.shape[:2] == (2, LENGTH) for text in seen[TEXT])
    for tokens in (image, *seen[TEXT]):  # equal images are no halves of guidance
        assert tokens.call.conditional == slice(0, 2) and tokens.call.unconditional is None


def test_a_concept_is_removed_from_the_image_that_is_read(pipe):
    unlearner = unlearner_of(pipe, IMAGE, [all_features()])
    before = captions(pipe)
    with unlearner.attach(pipe, ["everything"], mode="remove"):
        assert not torch.allclose(before[1], captions(pipe)[1])
    after = captions(pipe)
    assert before[0] == after[0] and torch.equal(before[1], after[1])


def test_a_text_head_makes_no_other_model(pipe):
    plain = pipeline().transformer
    known = model_fingerprint(plain)
    assert is_fingerprint_of(known, pipe.transformer) and is_fingerprint_of(model_fingerprint(pipe.transformer), plain)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    assert not is_fingerprint_of(known, plain)
