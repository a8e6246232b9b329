"""Scenes rendered while a backbone trains, in several shapes, and the renderer's maps as a target."""

import dataclasses
from random import Random

import pytest
import torch
from tiny import rope_config

from imgdit import MultiFrameFlowMatchScheduler
from imgdit.apps.chores.weights import scene_pipeline, taught_by
from imgdit.io.order import Batches
from imgdit.models.functional import unpack
from imgdit.scenes.geometry import geometry
from imgdit.scenes.map_alignment import CELLS, SURFACE, map_alignment, with_maps
from imgdit.scenes.render import render
from imgdit.scenes.sources import stream as stream_source
from imgdit.scenes.tasks import SCENE_TASKS, from_scene
from imgdit.scenes.training_stream import SceneFramesAndStream, SceneStream
from imgdit.scenes.world import STYLES, Scene
from imgdit.training import load_recipe
from imgdit.training.batches import Batch
from imgdit.training.build import build_model
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.recipe import parse_recipe
from imgdit.training.sources import only_batch

SMALL = {"fresh": 1, "sizes": (64, 96), "tokens": 48}


@pytest.fixture(scope="module")
def stream():
    return SceneStream(**SMALL)


def test_a_batch_is_the_same_wherever_it_is_made(stream):
    """In another process too, which renders ahead."""
    order = Batches(stream, only_batch, seed=0, workers=1, whole=True)
    ahead = order.stream(2, 1)
    for index in (2, 3):
        batch, again = next(ahead).batch, stream[index]
        torch.testing.assert_close(batch.tokens, again.tokens, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.text.pooled, again.text.pooled) and batch.layout.lengths == again.layout.lengths
    assert not torch.equal(stream[2].tokens[0], stream[3].tokens[0])


def test_shapes():
    """Sides are drawn apart; batches with cameras are square."""
    stream = SceneStream(**SMALL, probabilities={"images": 0.6, "cameras": 0.4})
    found = [stream[index] for index in range(8)]
    for batch in found:
        frames = batch.layout.frames
        rows, columns = frames[0].size
        assert {rows, columns} <= {4, 6} and (len(frames) == 1 or rows == columns)
        assert len(batch.tokens) == max(1, 48 // (len(frames) * rows * columns))
        assert batch.tokens.shape[1] == len(frames) * rows * columns and batch.tokens.isfinite().all()
    assert {len(batch.layout.frames) for batch in found} == {1, 4}
    assert any(batch.layout.frames[0].size[0] != batch.layout.frames[0].size[1] for batch in found)


def test_time_shift_by_resolution():
    """With `use_dynamic_shifting` larger images are trained at more noise, by their number of tokens."""
    scheduler = MultiFrameFlowMatchScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    levels = [
        scheduler.sample_sigmas(4096, num_tokens=n, generator=torch.Generator().manual_seed(0)).mean() for n in (4, 64)
    ]
    assert levels[1] > levels[0] + 0.05


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_an_image_with_two_sides_is_the_middle_of_a_square_and_more(size):
    """The shorter side has the field of view: along the longer one more is seen, and nothing else changes."""
    scene = Scene.sample(3)
    square, wide = geometry([scene], 24), geometry([scene], size)
    rows, columns = ((side - 24) // 2 for side in size)
    for name in ("depth", "normals", "indices"):
        middle = getattr(wide, name)[..., rows : rows + 24, columns : columns + 24]
        torch.testing.assert_close(middle, getattr(square, name), rtol=1e-3, atol=1e-3)
    seen = render([scene], size)
    assert seen.rgb.shape == (1, 3, *size)
    for number in range(len(scene.objects)):
        left, top, right, bottom = seen.boxes[0, number].long().tolist()
        own = seen.indices[0] == number + 1
        assert own[top:bottom, left:right].sum() == own.sum()
        assert own.any(0).nonzero()[0, 0] == left and own.any(1).nonzero()[-1, 0] + 1 == bottom


def test_every_style_and_task_has_two_sides():
    for style in STYLES:
        scene = dataclasses.replace(Scene.sample(5), style=style)
        assert render([scene], (16, 24)).rgb.isfinite().all()
    for task in SCENE_TASKS:
        example = from_scene(task, scene, Random(0), size=(16, 24))
        assert example.target.shape == (3, 16, 24)
        if task != "super_resolution":
            assert example.condition.shape == (3, 16, 24)


def test_in_turn_with_cached_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr("imgdit.scenes.latents.SHARD", 2)
    monkeypatch.setattr("imgdit.scenes.training_frames.HELD_OUT", 2)
    frames = {"latents": str(tmp_path), "scenes": 2, "size": 64, "tokens": 16}
    both = SceneFramesAndStream(frames, {**SMALL, "sizes": (64, 64)})
    cached, alone = both.sets
    assert torch.equal(both[6].tokens, cached[3].tokens)
    assert both[7].layout.lengths == alone[3].layout.lengths
    with pytest.raises(ValueError, match=r"data.arguments.stream has an unknown key 'fres'"):
        SceneFramesAndStream(frames, {"fres": 1})


def test_maps_are_what_the_renderer_knows():
    batch = SceneStream(**SMALL, maps=True, probabilities={"images": 1.0})[0]
    rows, columns = batch.layout.frames[0].size
    assert batch.surface.shape == (len(batch.tokens), rows * columns, CELLS * SURFACE) and batch.images == (True,)
    scene = Scene.sample(7)
    size = (2 * rows, 2 * columns)
    one = Batch(batch.tokens[:1], batch.layout, batch.text.rows(slice(0, 1)))
    mapped, seen = with_maps(one, [(scene,)]), geometry([scene], size)
    planes = unpack(mapped.surface, 2, (rows, columns))
    torch.testing.assert_close(planes[:, 1:], seen.normals)
    near = planes[:, 0].argmax()
    assert near == seen.depth.argmin() and planes[:, 0].min() >= 0 and planes[:, 0].max() <= 1
    kinds = unpack(mapped.classes.float(), 2, (rows, columns))[0, 0]
    assert torch.equal(kinds > 0, seen.indices[0] > 0)


def test_map_alignment_learns_the_maps(tmp_path):
    """Held-out loss as of flow matching; while it trains, the maps' error falls and comes on top."""
    values = {"run": {"folder": str(tmp_path), "steps": 1, "batch_size": 1}}
    size = rope_config(in_channels=64, joint_attention_dim=192, pooled_projection_dim=192)
    values |= {"model": {"arguments": size}, "objective": {"name": "imgdit.scenes.map_alignment:map_alignment"}}
    model = build_model(parse_recipe(values, "test"))
    scheduler = MultiFrameFlowMatchScheduler()
    for kind, weighted in (("images", 1), ("pairs", 2)):
        batch = SceneStream(**SMALL, maps=True, probabilities={kind: 1.0})[0]
        assert len(batch.layout.frames) == weighted
        first = map_alignment(model, scheduler, batch, torch.Generator().manual_seed(0), weight=0.5)
        velocity = flow_matching(model, scheduler, batch, torch.Generator().manual_seed(0)).loss
        torch.testing.assert_close(first.metrics["velocity"], velocity.detach())
        torch.testing.assert_close(first.loss, velocity + 0.5 * first.metrics["alignment"])
        # A head of zeros: the mean of smooth L1 over numbers, and the cross-entropy of nine equal classes.
        assert first.metrics["alignment"] > torch.tensor(9.0).log()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        output = map_alignment(model, scheduler, batch, torch.Generator().manual_seed(0))
        optimizer.zero_grad(), output.loss.backward(), optimizer.step()
    assert output.metrics["alignment"] < 0.6 * first.metrics["alignment"]
    model.eval()
    held_out = map_alignment(model, scheduler, batch, torch.Generator().manual_seed(0)).loss
    assert torch.equal(held_out, flow_matching(model, scheduler, batch, torch.Generator().manual_seed(0)).loss)
    model.train()
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    with pytest.raises(ValueError, match=r"needs batches with maps; set data.arguments.maps: true"):
        map_alignment(model, scheduler, Batch(**fields), None)


def test_a_run_on_the_stream_is_exported_with_its_sizes():
    recipe = load_recipe("scenes/transformer")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, name="imgdit.scenes.sources:stream", arguments={"sizes": [96, 192]}),
    )
    assert stream_source.whole_batches
    assert taught_by(recipe).sizes[:2] == ((96, 96), (96, 128)) and len(taught_by(recipe).sizes) == 16
    assert scene_pipeline(recipe, None).vae.config.scaling_factor > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (72, 96)}, "multiples of 32 pixels"),
        ({"sizes": (32, 64)}, "from 64 on"),
        ({"sizes": (96, 64)}, "sizes are the least and the greatest side"),
        ({"fresh": 0}, "a batch needs a scene"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"probabilities": {"image": 1.0}}, "unknown name in probabilities"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        SceneStream(**{**SMALL, **change})
