"""Where concepts are seen in an image."""

import pytest
import torch
from tiny import tiny_pipeline

from imgdit.sae.concept_maps import concept_maps, own_features
from imgdit.sae.concepts import ConceptSelection
from imgdit.sae.config import SAEConfig
from imgdit.sae.hooks import hooked
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner

HOOKPOINT = "transformer.transformer_blocks.1"
CALL = {"num_inference_steps": 2, "height": 16, "width": 24, "guidance_scale": 3.0}
PROMPTS = {"cube": ["a red cube"], "cone": ["a green cone"], "sphere": ["a blue sphere"]}


@pytest.fixture(scope="module")
def learned():
    """A pipeline, an autoencoder and its concepts."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    sae = SparseAutoencoder(SAEConfig(32, 64, 4, hookpoint=HOOKPOINT), generator=torch.Generator().manual_seed(0))
    learner = ConceptUnlearner({HOOKPOINT: sae.requires_grad_(False)})
    learner.learn(pipe, PROMPTS, top_n=4, **CALL)
    return pipe, sae, learner.books[HOOKPOINT]


def selection(means, thresholds):
    count = len(means)
    return ConceptSelection(
        "cone", (500.0,), torch.arange(count), torch.ones(1, count, dtype=torch.bool),
        torch.tensor([means]), torch.tensor([thresholds]), torch.zeros(1, 32),
    )  # fmt: skip


def test_features_that_other_concepts_have_as_well_are_none_of_its_own():
    # Means over three concepts, so the others have (3 * 1 - 3) / 2 = 0, (3 * 2 - 3) / 2 = 1.5 and (3 * 3 - 3) / 2 = 3.
    assert own_features(selection([3.0, 3.0, 3.0], [1.0, 2.0, 3.0]), 3).tolist() == [[True, True, False]]
    assert own_features(selection([3.0, 0.0], [3.0, 1.0]), 3).tolist() == [[True, False]]  # rather than none


def test_a_map_is_the_mean_activation_in_units_of_the_concepts_images(learned):
    pipe, sae, book = learned
    found = concept_maps(pipe, sae, book, ["cone", "cube"], ["a green cone", "a red cube"], seed=5, **CALL)
    assert found.concepts == ("cone", "cube") and found.maps.shape == (2, 2, 4, 6)
    chosen, seen = book.selections["cone"], []

    def read(tokens):
        step = chosen.timesteps.index(tokens.call.timestep)
        own = own_features(chosen, 3)[step]
        acts = sae.encode(tokens.values[tokens.call.conditional].flatten(0, 1)).dense()[:, chosen.features[own]]
        seen.append(acts.sum(1) / chosen.means[step][own].sum())

    with hooked(pipe, {HOOKPOINT: read}):
        pipe("a green cone", output_type="latent", generator=torch.Generator().manual_seed(5), **CALL)
    torch.testing.assert_close(found.maps[0, 0], torch.stack(seen).mean(0).view(4, 6))


def test_looking_changes_nothing_and_leaves_nothing(learned):
    pipe, sae, book = learned

    def run():
        generator = torch.Generator().manual_seed(1)
        return pipe("a red cube", output_type="latent", generator=generator, **CALL).images

    before = run()
    concept_maps(pipe, sae, book, ["cube"], ["a red cube"], **CALL)
    assert torch.equal(run(), before)


def test_what_has_no_place_in_the_image_is_refused(learned):
    pipe, sae, book = learned
    with pytest.raises(ValueError, match="reads the text"):
        concept_maps(pipe, sae, book, ["cube"], ["a cube"], hookpoint="transformer.context_embedder", **CALL)
    with pytest.raises(ValueError, match="cone"):
        concept_maps(pipe, sae, book, ["cohne"], ["a cube"], **CALL)
