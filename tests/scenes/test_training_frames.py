"""The chain of the scenes' recipes: autoencoder and text encoder, cached latents, backbone."""

import pickle

import pytest
import torch
from tiny_runs import small_backbone, small_cache, small_runs

from imgdit.io.checkpoints import CheckpointError
from imgdit.scenes.training_frames import FAINTEST, FRAMES, SceneFrames, latent_scale, scene_rays
from imgdit.scenes.world import Scene
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Arguments of `SceneFrames` that name one-step runs of small models."""
    with small_cache():
        yield small_runs(tmp_path_factory.mktemp("runs"))


def kinds(runs):
    return {kind: SceneFrames(**runs, probabilities={kind: 1.0})[0] for kind in FRAMES}


def test_every_kind_of_batch_fits_its_layout(runs):
    found = kinds(runs)
    drawn = SceneFrames(**runs)
    assert sorted({len(drawn[i].layout.frames) for i in range(40)}) == [1, 2, 4]
    for kind, batch in found.items():
        frames = FRAMES[kind]
        assert batch.tokens.shape == (4096 // 64 // frames, 64 * frames, 64)
        assert batch.text.embeddings.shape == (len(batch.tokens), batch.layout.text_length, 32)
        assert batch.text.mask.any(1).all() and batch.empty.embeddings.shape[1] == batch.layout.text_length
        assert batch.empty.mask.sum() == 1  # nothing but the end
        assert torch.isfinite(batch.tokens).all()
        assert [frame.index for frame in batch.layout.frames] == list(range(frames))
    views = found["views"]
    assert [frame.is_clean for frame in views.layout.frames] == [False, True, False, False]
    rays = views.tokens[:, 64:128]
    assert torch.allclose(rays, rays[:1].expand_as(rays), atol=1e-6)  # the first camera is the identity
    assert not torch.allclose(views.tokens[0, 192:], views.tokens[1, 192:])


def test_a_camera_is_looked_for_in_heavy_noise_alone(runs):
    batch = kinds(runs)["cameras"]
    assert [frame.is_clean for frame in batch.layout.frames] == [True, True, True, False]
    assert not batch.sigmas[:, :3].any()
    assert batch.sigmas[:, 3].min() >= FAINTEST and batch.sigmas[:, 3].max() <= 1 and batch.sigmas[:, 3].std() > 0
    assert all(found.sigmas is None for kind, found in kinds(runs).items() if kind != "cameras")


def test_a_sample_is_the_same_wherever_it_is_made(runs):
    dataset = SceneFrames(**runs)
    first = dataset[5]
    again = pickle.loads(pickle.dumps(dataset))[5]
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.text.embeddings, again.text.embeddings)
    assert not torch.equal(first.tokens, SceneFrames(**runs, split="heldout")[5].tokens)


def test_latents_are_scaled_to_one(runs):
    dataset = SceneFrames(**runs)
    cached = torch.stack(list(dataset.latents.images(2)))
    assert latent_scale(runs["latents"]) == pytest.approx(1 / float(cached.std()), abs=0.006)


def test_rays_tell_the_cameras_apart():
    camera = Scene.sample(3).camera
    other = camera.orbit(azimuth=25.0)
    rays = scene_rays([camera, other], 16)
    assert rays.shape == (2, 16, 16, 16) and rays.abs().amax() < 4
    assert torch.allclose(rays[0], scene_rays([other, camera], 16)[0], atol=1e-5)
    assert (rays[0] - rays[1]).abs().mean() > 0.1


def test_the_backbone_trains_on_what_the_other_runs_made(runs, tmp_path):
    recipe = load_recipe("scenes/transformer")
    recipe = small_backbone(recipe, runs).replace(run={"folder": str(tmp_path), "evaluate_every": 1})
    batches, held_out = training_batches(recipe)
    assert len(held_out) == 8
    result = train(recipe, model=build_model(recipe), batches=batches, held_out=held_out, stop_at=2)
    assert result.step == 2 and 0 < result.metrics["loss"] < 5


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; train it first"):
        load_trained(tmp_path)
