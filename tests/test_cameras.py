"""Rays and cameras against recorded numbers, against each other, and against the scenes' cameras."""

import math

import pytest
import torch
from onediffusion_fixtures import assert_near, case, named, tensors

from imgdit import cameras
from imgdit.scenes.geometry import camera_to_world
from imgdit.scenes.world import FIELD_OF_VIEW, Camera

# The recorded matrices have x right, y up, z backward, and their world's axes turned once more.
RECORDED_WORLD = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
TURN = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
SCENES_FOCAL = 1 / (2 * math.tan(math.radians(FIELD_OF_VIEW / 2)))


@pytest.mark.parametrize("name", named("rays"))
def test_rays_are_the_recorded_ones(name):
    it = case(name)
    options, given, want = it["options"], tensors(it, "inputs"), tensors(it, "outputs")
    if "c2ws" in given:
        matrices = cameras.opencv_cameras(given["c2ws"])
    else:
        matrices = cameras.orbit_cameras(options["azimuths"], options["elevations"], options["distances"])
        assert_near(cameras.opencv_cameras(matrices), want["c2ws"], 2e-5, "c2ws")
    assert_near(torch.linalg.inv(RECORDED_WORLD @ matrices), want["w2cs_opencv"], 2e-5, "w2cs_opencv")
    rays = cameras.relative_rays(matrices, options["grid"], given["intrinsics"])
    assert_near(rays, want["rays"], 2e-5, "rays")
    assert_near(cameras.ray_frames(rays), want["frames"], 2e-5, "frames")


@pytest.mark.parametrize("name", named("rays_train"))
def test_training_rays_are_the_recorded_ones(name):
    it = case(name)
    options, want = it["options"], tensors(it, "outputs")
    matrices = cameras.opencv_cameras(tensors(it, "inputs")["transform_matrix"])
    matrices = cameras.scale_positions(matrices, options["normalize_scale"])
    focal = options["focal_px"][0] / min(options["image_size_hw"])
    rays = cameras.relative_rays(matrices, options["grid"], focal)
    assert_near(rays, want["rays"], 5e-5, "rays")
    assert_near(cameras.ray_frames(rays), want["frames"], 5e-5, "frames")


@pytest.mark.parametrize("name", named("rays_inverse"))
def test_cameras_of_noisy_rays_are_the_recorded_ones(name):
    it = case(name)
    options, want = it["options"], tensors(it, "outputs")
    got = cameras.cameras_of_rays(tensors(it, "inputs")["rays"], options["focal_length"])
    rotation, centre = TURN @ got.rotation @ TURN, got.centre @ TURN
    assert_near(rotation, want["R"], 5e-4, "R")
    assert_near(centre, want["centres"], 5e-4, "centres")
    assert_near(-(centre[:, None] @ rotation)[:, 0], want["T"], 5e-4, "T")

    orbit = cameras.orbit_cameras(options["azimuths"], options["elevations"], options["distances"])
    clean = cameras.cameras_of_rays(cameras.relative_rays(orbit, options["grid"]))
    assert_near(TURN @ clean.rotation @ TURN, want["true_R"], 2e-5, "true_R")
    assert_near(clean.centre @ TURN, want["true_centres"], 2e-5, "true_centres")


@pytest.mark.parametrize("size", [2, 16])
def test_scenes_cameras_come_back(size):
    first = Camera()
    matrices = cameras.scale_positions(camera_to_world([first, first.orbit(35.0, -8.0, 1.2), first.orbit(-140.0)]))
    frames = cameras.ray_frames(cameras.relative_rays(matrices, size, SCENES_FOCAL))
    assert frames.shape == (3, 16, size, size)
    got = cameras.cameras_of_rays(cameras.rays_of_frames(frames), SCENES_FOCAL).camera_to_world
    want = torch.linalg.inv(matrices[:1]) @ matrices
    assert cameras.rotation_error(got, want).max() < 0.01
    assert (got[:, :3, 3] - want[:, :3, 3]).abs().max() < 1e-4
    assert (got[0] - torch.eye(4)).abs().max() < 1e-5


def side_by_side():
    matrices = torch.eye(4).repeat(2, 1, 1)
    matrices[1, 0, 3] = 1.0
    return matrices


def test_positions_scale_to_where_the_axes_meet():
    first = Camera()
    scaled = cameras.scale_positions(camera_to_world([first, first.orbit(40.0)]), 1.7)
    aim = scaled[0, :3, 3] + 1.7 * scaled[0, :3, 2]
    assert torch.allclose(scaled[1, :3, 3] + 1.7 * scaled[1, :3, 2], aim, atol=1e-5)
    one = camera_to_world([first])
    assert torch.equal(cameras.scale_positions(one), one)
    same = one.repeat(3, 1, 1)  # a turning camera, or the same view again: nothing to scale
    assert torch.equal(cameras.scale_positions(same), same)


def test_the_worlds_frame_does_not_matter():
    orbit = cameras.orbit_cameras([10.0, 50.0], [5.0, 60.0], 2.0)
    moved = cameras.orbit_cameras([77.0], [33.0], 3.0) @ orbit
    assert torch.allclose(cameras.relative_rays(moved, 4), cameras.relative_rays(orbit, 4), atol=1e-5)


def test_looking_straight_down_has_a_frame():
    above = cameras.orbit_cameras([0.0, 0.0], [90.0, -90.0], 1.0)
    assert torch.allclose(above[:, :3, :3].mT @ above[:, :3, :3], torch.eye(3).expand(2, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(above[:, :3, :3]), torch.ones(2))


def test_small_angles_are_told():
    angle = math.radians(0.001)
    turned = torch.eye(3, dtype=torch.float64)
    turned[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert cameras.rotation_error(torch.eye(3), turned).item() == pytest.approx(0.001, rel=1e-3)
    assert cameras.rotation_error(torch.eye(3), torch.diag(torch.tensor([-1.0, -1.0, 1.0]))).item() == 180.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cameras.orbit_cameras([0.0, 1.0], [0.0]), "2 azimuths, 1 elevations"),
        (lambda: cameras.relative_rays(torch.eye(4), 4), r"\(views, 4, 4\), got \(4, 4\)"),
        (lambda: cameras.relative_rays(torch.eye(4)[None], 0), "at least one ray"),
        (lambda: cameras.ray_frames(torch.zeros(1, 4, 4, 3)), r"\(views, n, n, 6\)"),
        (lambda: cameras.rays_of_frames(torch.zeros(1, 4, 8, 8)), r"\(views, 16, n, n\)"),
        (lambda: cameras.cameras_of_rays(torch.zeros(2, 6)), r"\(views, n, n, 6\)"),
        (lambda: cameras.scale_positions(side_by_side()), "parallel"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
