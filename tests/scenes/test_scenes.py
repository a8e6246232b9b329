import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from imgdit.scenes import geometry as geometry_module
from imgdit.scenes.geometry import FAR, back_project, camera_to_world, edges, geometry, intrinsics, project
from imgdit.scenes.preview import preview
from imgdit.scenes.render import boxes, render
from imgdit.scenes.shading import COLOUR_VALUES, shade
from imgdit.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    HELDOUT_TRIPLES,
    OBJECTS,
    SOLIDS,
    SPLITS,
    STYLES,
    Camera,
    Scene,
    SceneObject,
    is_heldout,
)

SIZE = 48
RECORDED = {
    "objects": [{"kind": "pyramid", "colour": "purple", "x": -0.0309, "y": 0.0779, "size": 0.9977, "yaw": 2.0968}],
    "camera": {"azimuth": -28.4172, "elevation": 21.9295, "distance": 4.4697, "height": 0.527},
    "style": "sepia",
    "background": "studio",
}


def triples(scene):
    return [(thing.kind, thing.colour, scene.style) for thing in scene.objects]


def poses(scenes):
    return camera_to_world([scene.camera for scene in scenes])


def one_of_each():
    """A scene per kind of object, and two with two."""
    scenes = [
        Scene((SceneObject(kind, colour, 0.1, -0.1, 0.95, 30.0),), Camera(azimuth=15.0 * i - 50, height=0.8))
        for i, (kind, colour) in enumerate(zip(OBJECTS, COLOURS))
    ]
    return scenes + [Scene.sample(seed, objects=2) for seed in (0, 1)]


# Scenes as data


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_is_a_scene(split):
    assert [Scene.sample(seed, split) for seed in range(20)] == [Scene.sample(seed, split) for seed in range(20)]
    assert len({Scene.sample(seed, split) for seed in range(200)}) == 200


def test_scenes_are_the_same_everywhere():
    """Recorded: a change of these breaks every number that was measured on held-out seeds."""
    scene = Scene.sample(7, "heldout")
    assert scene.to_dict() == RECORDED


def test_splits_share_no_scene():
    drawn = [{Scene.sample(seed, split) for seed in range(300)} for split in SPLITS]
    assert len(set.union(*drawn)) == 900


def test_heldout_triples_are_never_trained():
    for seed in range(1500):
        assert not any(is_heldout(*triple) for triple in triples(Scene.sample(seed)))
        assert not any(is_heldout(*triple) for triple in triples(Scene.sample(seed, "heldout")))
    for seed in range(500):
        assert all(is_heldout(*triple) for triple in triples(Scene.sample(seed, "heldout_triples")))


def test_a_tenth_is_held_out_evenly():
    assert len(HELDOUT_TRIPLES) == 38  # of 384
    for i, names in enumerate((OBJECTS, COLOURS, STYLES)):
        counts = [sum(triple[i] == name for triple in HELDOUT_TRIPLES) for name in names]
        assert min(counts) >= 3 and max(counts) <= 7


def test_every_name_is_drawn():
    scenes = [Scene.sample(seed) for seed in range(400)]
    assert {thing.kind for scene in scenes for thing in scene.objects} == set(OBJECTS)
    assert {thing.colour for scene in scenes for thing in scene.objects} == set(COLOURS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert 0.5 < sum(len(scene.objects) == 1 for scene in scenes) / len(scenes) < 0.7


def test_json_and_back():
    for seed in range(10):
        scene = Scene.sample(seed)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_bad_input_is_named():
    thing = SceneObject("cube", "red")
    with pytest.raises(ValueError, match=r"unknown object 'cubes'; did you mean 'cube'\?"):
        SceneObject("cubes", "red")
    with pytest.raises(ValueError, match="unknown colour 'rad'; did you mean 'red'"):
        SceneObject("cube", "rad")
    with pytest.raises(ValueError, match="size must be in"):
        SceneObject("cube", "red", size=0.0)
    with pytest.raises(ValueError, match="did you mean 'cartoon'"):
        Scene((thing,), style="cartoons")
    with pytest.raises(ValueError, match="unknown background 'beach'"):
        Scene((thing,), background="beach")
    with pytest.raises(ValueError, match="one or two objects, got 3"):
        Scene((thing,) * 3)
    with pytest.raises(ValueError, match="one or two objects, got objects=3"):
        Scene.sample(0, objects=3)
    with pytest.raises(ValueError, match="did you mean 'heldout'"):
        Scene.sample(0, "held_out")
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        Scene.sample(-1)
    with pytest.raises(ValueError, match="elevation must be between 0 and 90"):
        Camera().orbit(elevation=-40.0)
    with pytest.raises(ValueError, match="distance must be positive"):
        Camera(distance=math.nan)
    with pytest.raises(ValueError, match="unknown key of a SceneObject 'color'; did you mean 'colour'"):
        Scene.from_dict({"objects": [{"kind": "cube", "color": "red"}]})
    with pytest.raises(ValueError, match="a Scene needs the key 'objects'"):
        Scene.from_dict({"style": "photo"})
    with pytest.raises(ValueError, match="no scenes"):
        geometry([])
    with pytest.raises(ValueError, match="at least 8 pixels"):
        geometry([Scene((thing,))], 4)
    with pytest.raises(ValueError, match="oversample must be 1 or 2"):
        geometry([Scene((thing,))], 16, oversample=3)
    with pytest.raises(ValueError, match="got 2 scenes for the geometry of 1"):
        shade(geometry([Scene((thing,))], 16), [Scene((thing,))] * 2)


# Geometry


def test_depth_and_camera_give_the_positions():
    scenes = one_of_each()
    buffers = geometry(scenes, SIZE)
    torch.testing.assert_close(back_project(buffers.depth, poses(scenes)), buffers.positions, atol=1e-4, rtol=0)
    pixels, depth = project(buffers.positions.flatten(2), poses(scenes), SIZE)
    steps = torch.arange(SIZE) + 0.5
    torch.testing.assert_close(pixels[:, 0].unflatten(1, (SIZE, SIZE)), steps.expand(len(scenes), SIZE, SIZE))
    torch.testing.assert_close(depth, buffers.depth.flatten(1), atol=1e-4, rtol=0)
    ground = (buffers.indices == 0) & (buffers.depth[:, 0] < FAR)
    assert buffers.positions[:, 2][ground].abs().max() < 1e-4
    assert buffers.depth.max() == FAR


def test_what_is_seen_lies_on_the_surface():
    for scene in one_of_each()[: len(OBJECTS)]:
        buffers = geometry([scene], SIZE)
        placed = geometry_module._place([scene], "cpu")[0]
        seen = buffers.indices[0] == 1
        assert seen.float().mean() > 0.15
        own = placed.local(buffers.positions[:, :, seen])[0]
        distance = geometry_module.DISTANCES[scene.objects[0].kind]
        assert distance(own).abs().max() < 3e-3
        # A step along the normal leaves the surface by its length, but where faces meet.
        normal = placed.turn[0] @ buffers.normals[0][:, seen]
        assert distance(own + 0.02 * normal).sub(0.02).abs().median() < 2e-3
        torch.testing.assert_close(buffers.normals.norm(dim=1), torch.ones(1, SIZE, SIZE), atol=1e-4, rtol=0)


def test_sphere_against_the_closed_form():
    thing = SceneObject("sphere", "red", 0.2, -0.1, size=0.9)
    scene = Scene((thing,), Camera(azimuth=20.0, elevation=25.0))
    buffers = geometry([scene], SIZE)
    eye = torch.tensor(scene.camera.position, dtype=torch.float64)
    steps = torch.arange(SIZE, dtype=torch.float64) + 0.5
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1)
    rays = poses([scene])[0, :3, :3].double() @ intrinsics(SIZE).double().inverse() @ pixels  # one unit of z-depth
    offset = eye - torch.tensor(thing.centre, dtype=torch.float64)
    a, b, c = rays.square().sum(0), offset @ rays, offset @ offset - thing.size**2
    root = b * b - a * c
    depth = ((-b - root.sqrt()) / a).view(SIZE, SIZE)
    inside = root.view(SIZE, SIZE) > 0.02  # within the rim, where a march may end early
    assert (buffers.indices[0] == 1)[inside].all()
    torch.testing.assert_close(buffers.depth[0, 0][inside].double(), depth[inside], atol=1e-3, rtol=0)
    point = eye[:, None] + depth[inside] * rays[:, inside.flatten()]
    expected = (point - torch.tensor(thing.centre)[:, None]) / thing.size
    torch.testing.assert_close(buffers.normals[0][:, inside].double(), expected, atol=5e-3, rtol=0)


def test_no_march_is_longer_than_the_distance():
    """Each signed distance is nowhere larger than to the nearest point of the surface; the solids fit their room."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 3000, generator=generator) * 4 - 2
    for kind, distance in geometry_module.DISTANCES.items():
        inside = points[:, distance(points) < 0]
        solid = SOLIDS[kind]
        assert inside.norm(dim=0).max() <= solid.reach
        assert inside[2].abs().max() <= solid.half_height
        assert torch.hypot(inside[0], inside[1]).max() <= solid.footprint
        other = points + 0.1 * F.normalize(torch.randn(3, 3000, generator=generator), dim=0)
        assert (distance(points) - distance(other)).abs().max() <= 0.1 + 1e-5


def test_boxes_hold_the_index_map():
    scenes = one_of_each()
    rendering = render(scenes, SIZE)
    for row, scene in enumerate(scenes):
        for number in (1, 2):
            left, top, right, bottom = rendering.boxes[row, number - 1].int().tolist()
            seen = rendering.indices[row] == number
            assert seen.any() == (number <= len(scene.objects))
            assert seen.sum() == seen[top:bottom, left:right].sum()
            if seen.any():
                inside = seen[top:bottom, left:right]
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    assert torch.equal(boxes(torch.zeros(1, 9, 9, dtype=torch.long)), torch.zeros(1, 2, 4))


def test_edges_surround_the_objects():
    buffers = geometry(one_of_each(), SIZE)
    found = edges(buffers)[:, 0]
    assert torch.equal(found[:, :-1] & (buffers.indices[:, :-1] != buffers.indices[:, 1:]),
                       buffers.indices[:, :-1] != buffers.indices[:, 1:])  # fmt: skip
    assert 0.01 < found.float().mean() < 0.2
    sphere, cube = found[0].sum(), found[1].sum()
    assert cube > sphere * 0.8 and edges(geometry(one_of_each()[:1], SIZE))[0].sum() == sphere


def test_objects_fill_the_image_and_do_not_hide_each_other():
    ones = [Scene.sample(seed, objects=1) for seed in range(60)]
    seen = geometry(ones, SIZE).indices > 0
    fraction = seen.flatten(1).float().mean(1)
    assert fraction.min() > 0.18 and fraction.max() < 0.58 and 0.28 < fraction.mean() < 0.42
    border = torch.cat([seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]], dim=1)
    assert not border.any()
    twos = [Scene.sample(seed, objects=2) for seed in range(40)]
    both = geometry(twos, 32)
    for number in (0, 1):
        alone = geometry([dataclasses.replace(scene, objects=(scene.objects[number],)) for scene in twos], 32)
        whole = (alone.indices == 1).flatten(1).sum(1)
        left = (both.indices == number + 1).flatten(1).sum(1)
        assert whole.min() > 0.04 * 32 * 32
        assert (left / whole).min() > 0.85


def test_left_and_right_are_true_in_the_image():
    scenes = [Scene.sample(seed, objects=2) for seed in range(40)]
    found = boxes(geometry(scenes, 32).indices)
    middle = (found[:, :, 0] + found[:, :, 2]) / 2
    for scene, (first, second) in zip(scenes, middle.tolist()):
        assert scene.relation == ("left" if first < second else "right")
        assert scene.order == ((0, 1) if first < second else (1, 0))
        behind = scene.with_camera(scene.camera.orbit(azimuth=180.0))
        assert {scene.relation, behind.relation} == {"left", "right"}
        # From the side they stand behind each other, and neither is left.
        assert scene.with_camera(dataclasses.replace(scene.camera, azimuth=_in_line(scene))).relation is None


def _in_line(scene):
    (x, y, _), (u, v, _) = (thing.centre for thing in scene.objects)
    return math.degrees(math.atan2(v - y, u - x)) - 90.0


def test_a_point_is_found_in_another_view():
    scene = Scene.sample(3, objects=1)
    other = scene.with_camera(scene.camera.orbit(azimuth=12.0, elevation=5.0, distance=1.05))
    here, there = geometry([scene], 64), geometry([other], 64)
    seen = here.indices[0] == 1
    pixels, depth = project(here.positions[:, :, seen], poses([other]), 64)
    found = F.grid_sample(there.depth, (pixels / 32 - 1).mT[:, None], align_corners=False)[0, 0, 0]
    agree = (found - depth[0]).abs() < 0.03
    assert agree.float().mean() > 0.75  # the rest is hidden there, or at a rim
    assert (found - depth[0]).max() < 8.0 and (depth[0] > 0).all()


def test_batches_are_the_same_as_single_scenes():
    scenes = one_of_each()
    together = geometry_module._geometry(scenes, 24, "cpu", 1)  # what a GPU does; the CPU goes one by one
    single = geometry(scenes, 24)
    assert torch.equal(together.indices, single.indices)
    for name in ("depth", "normals", "shadow", "positions"):
        torch.testing.assert_close(getattr(together, name), getattr(single, name), atol=1e-4, rtol=0)
    torch.testing.assert_close(shade(single, scenes)[4:5], shade(single.one(4), scenes[4:5]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_sees_the_same():
    scenes = [Scene.sample(seed) for seed in range(36)]
    here, there = render(scenes, 32), render(scenes, 32, "cuda")
    same = here.indices == there.indices.cpu()
    assert same.float().mean() > 0.999
    assert (here.depth[:, 0] - there.depth[:, 0].cpu())[same].abs().max() < 5e-3
    assert (here.rgb - there.rgb.cpu()).abs().mean() < 2e-3


def test_samples_between_pixels_change_no_pixel():
    scenes = one_of_each()[2:4]
    fine, coarse = geometry(scenes, 24, oversample=2), geometry(scenes, 24)
    assert torch.equal(fine.at_pixels().indices, coarse.indices)
    torch.testing.assert_close(fine.at_pixels().depth, coarse.depth, atol=1e-4, rtol=0)


def test_shadows_fall_away_from_the_light():
    scene = Scene((SceneObject("sphere", "red"),), Camera(elevation=35.0))
    buffers = geometry([scene], SIZE)
    assert buffers.shadow.min() >= 0 and buffers.shadow.max() <= 1
    dark = (buffers.shadow[:, 0] > 0.8) & (buffers.indices == 0)
    assert dark.any() and buffers.positions[:, 0][dark].mean() > 0.3  # the light stands left
    half = (buffers.shadow > 0.2) & (buffers.shadow < 0.8)
    assert half.sum() > 10


# Images


def test_style_colour_and_background_leave_the_geometry():
    scene = Scene.sample(11, objects=2)
    recoloured = dataclasses.replace(
        scene, objects=tuple(dataclasses.replace(thing, colour="green") for thing in scene.objects)
    )
    first = geometry([scene], 24)
    for other in (dataclasses.replace(scene, style="neon", background="wood"), recoloured):
        for a, b in zip(first, geometry([other], 24)):
            assert a == b if isinstance(a, int) else torch.equal(a, b)


def test_every_look_is_another_image():
    scene = Scene.sample(11, objects=1)
    buffers = geometry([scene], 32, oversample=2)
    looks = [dataclasses.replace(scene, style=s, background=b) for s in STYLES for b in BACKGROUNDS]
    images = torch.cat([shade(buffers, [look]) for look in looks])
    assert images.shape == (36, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    apart = torch.cdist(images.flatten(1), images.flatten(1)) / math.sqrt(3 * 32 * 32)
    assert apart[~torch.eye(36, dtype=torch.bool)].min() > 0.01
    # Between the styles far more so, on any background.
    across = apart.view(6, 6, 6, 6).diagonal(dim1=1, dim2=3)
    assert across[~torch.eye(6, dtype=torch.bool)].min() > 0.06


@pytest.mark.parametrize("style", STYLES)
def test_colours_can_be_told_in_every_style(style):
    """The eight mean colours of the object's pixels lie apart, and in the hues they should have."""
    scene = dataclasses.replace(Scene.sample(2, objects=1), style=style)
    buffers = geometry([scene], 48, oversample=2)
    seen = buffers.at_pixels().indices[0] == 1
    hues = []
    for colour in COLOURS:
        thing = dataclasses.replace(scene.objects[0], colour=colour)
        hues.append(shade(buffers, [dataclasses.replace(scene, objects=(thing,))])[0][:, seen].mean(1))
    measured = torch.stack(hues)
    apart = torch.cdist(measured, measured) + torch.eye(8)
    assert apart.min() > 0.05
    true = torch.tensor([COLOUR_VALUES[colour] for colour in COLOURS])
    offsets = (measured - measured.mean(0), true - true.mean(0))
    tints, truth = (F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in offsets)
    assert (tints * truth).sum(1).min() > 0.8


def test_sizes_need_not_be_even():
    for size in (8, 33, 50):
        assert render([Scene.sample(seed) for seed in range(6)], size).rgb.shape == (6, 3, size, size)


def test_preview_writes_a_sheet(tmp_path):
    path = preview(tmp_path / "new", 3, size=32, columns=2, task="depth")
    assert path == tmp_path / "new" / "scenes.png" and path.stat().st_size > 1000
    assert preview(tmp_path / "sheet.jpg", 1, size=16).name == "sheet.jpg"
    with pytest.raises(ValueError, match="at least one image"):
        preview(tmp_path, 0)
