import importlib.util
from random import Random

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from imgdit.benchmarks.metrics import mean_iou
from imgdit.images import to_image, to_pixels
from imgdit.images.preprocess import HOLE
from imgdit.scenes.geometry import FAR, project
from imgdit.scenes.images import SceneImages
from imgdit.scenes.render import render
from imgdit.scenes.tasks import (
    NEAR,
    PALETTE,
    SCENE_TASKS,
    depth_to_image,
    from_photo,
    from_scene,
    image_to_depth,
    image_to_segmentation,
    segmentation_to_image,
)
from imgdit.scenes.world import OBJECTS, Scene, is_heldout

SIZE = 48
SCENE = Scene.sample(5, objects=2)


@pytest.fixture(scope="module")
def rendering():
    return render([SCENE], SIZE)


@pytest.fixture
def photo():
    noise = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    noise[:, 10:30, 20:40] = 1.0
    return to_image(noise)


@pytest.mark.parametrize("name", SCENE_TASKS)
def test_every_task_makes_a_pair(name, rendering):
    example = from_scene(name, SCENE, Random(1), rendering)
    again = from_scene(name, SCENE, Random(1), rendering)
    assert torch.equal(example.condition, again.condition)
    assert example.condition.min() >= 0 and example.condition.max() <= 1 and example.condition.std() > 0
    assert torch.equal(example.target, rendering.rgb[0])
    small = example.details.get("factor", 1)
    assert example.condition.shape == (3, SIZE // small, SIZE // small)
    assert SCENE_TASKS[name].name == name
    if SCENE_TASKS[name].invertible:
        inverse = from_scene(name, SCENE, Random(1), rendering, inverse=True)
        assert torch.equal(inverse.condition, example.target) and torch.equal(inverse.target, example.condition)
    else:
        with pytest.raises(ValueError, match=r"has no inverse\. These have one: canny, depth"):
            from_scene(name, SCENE, Random(1), rendering, inverse=True)


def test_depth_images_go_back(rendering):
    image = from_scene("depth", SCENE, Random(0), rendering).condition
    torch.testing.assert_close(image_to_depth(image), rendering.depth[0], atol=1e-5, rtol=0)
    assert (image_to_depth(to_pixels(to_image(image))[0]) - rendering.depth[0]).abs().max() < (FAR - NEAR) / 255
    depth = torch.tensor([0.5, NEAR, 4.0, FAR, 99.0]).view(1, 1, 1, 5)
    back = image_to_depth(depth_to_image(depth))
    torch.testing.assert_close(back, torch.tensor([NEAR, NEAR, 4.0, FAR, FAR]).view(1, 1, 1, 5))
    assert depth_to_image(depth)[0, 0, 0, 1] == 1 and depth_to_image(depth)[0, 0, 0, 3] == 0


def test_segmentation_goes_back(rendering):
    example = from_scene("segmentation", SCENE, Random(0), rendering)
    back = image_to_segmentation(example.condition)
    assert mean_iou(back[None], example.details["classes"][None]) > 0.99
    assert back.shape == (SIZE, SIZE) and torch.equal(
        image_to_segmentation(torch.stack([example.condition, 1 - example.condition]))[0], back
    )
    for number, thing in enumerate(SCENE.objects, start=1):
        classes = example.details["classes"][rendering.indices[0] == number]
        assert (classes == OBJECTS.index(thing.kind) + 1).all()
    noise = 0.4 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.2
    assert torch.equal(image_to_segmentation(example.condition + noise), back)
    apart = torch.cdist(torch.tensor(PALETTE), torch.tensor(PALETTE)) + 9 * torch.eye(len(PALETTE))
    assert len(PALETTE) == len(OBJECTS) + 1 and apart.min() > 0.8


@pytest.mark.parametrize("blur", [3, 5])
def test_a_blurred_border_is_no_third_object(blur):
    """Half-way from the ground's black to white lies the palette's grey."""
    classes = torch.zeros(1, 32, 32, dtype=torch.long)
    classes[:, 8:24, 8:24] = PALETTE.index((1.0, 1.0, 1.0))
    image = avg_pool2d(segmentation_to_image(classes), blur, 1, blur // 2, count_include_pad=False)
    back = image_to_segmentation(image)
    assert back.unique().tolist() == [0, PALETTE.index((1.0, 1.0, 1.0))]
    assert mean_iou(back, classes) > 0.9


def test_a_segmentation_of_nothing_but_specks_is_read_by_its_colours():
    classes = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert torch.equal(image_to_segmentation(segmentation_to_image(classes)), classes)


def test_boxes_are_drawn_where_the_objects_are(rendering):
    example = from_scene("boxes", SCENE, Random(0), rendering)
    assert torch.equal(example.details["boxes"], rendering.boxes[0])
    drawn = example.condition.amax(0) > 0
    assert drawn[rendering.indices[0] > 0].all()
    left, top, right, bottom = rendering.boxes[0, 0].int().tolist()
    kind = OBJECTS.index(SCENE.objects[0].kind) + 1
    assert tuple(example.condition[:, top, left].tolist()) == PALETTE[kind]
    assert tuple(example.condition[:, bottom - 1, right - 1].tolist()) == PALETTE[kind]


def test_masks_hide_and_leave_the_rest(rendering):
    seen = set()
    for seed in range(20):
        condition, target, details = from_scene("mask", SCENE, Random(seed), rendering)
        mask = details["mask"]
        assert 0.02 < mask.float().mean() < 0.7
        assert torch.equal(torch.where(mask, HOLE, target), condition)
        seen.add(tuple(mask.nonzero()[0].tolist()))
    assert len(seen) > 5


def test_views_carry_the_cameras(rendering):
    for seed in range(3):
        condition, _, details = from_scene("views", SCENE, Random(seed), rendering)
        there, here = details["cameras"]
        assert here == SCENE.camera and 10 <= abs(there.azimuth - here.azimuth) <= 40
        assert torch.equal(condition, render([SCENE.with_camera(there)], SIZE).rgb[0])
        assert torch.equal(details["poses"][1], rendering.pose[0])
        for pose in details["poses"]:  # both look at the objects
            centre = torch.tensor(SCENE.objects[0].centre)[None, :, None]
            pixel, depth = project(centre, pose[None], SIZE)
            assert depth > 0 and (pixel > 0).all() and (pixel < SIZE).all()


def test_references_share_what_they_should(rendering):
    for seed in range(4):
        subject = from_scene("subject", SCENE, Random(seed), rendering).details["reference"]
        thing = SCENE.objects[0]
        assert [(o.kind, o.colour) for o in subject.objects] == [(thing.kind, thing.colour)]
        style = from_scene("style_reference", SCENE, Random(seed), rendering).details["reference"]
        assert style.style == SCENE.style
        assert not {o.kind for o in style.objects} & {o.kind for o in SCENE.objects}
        for scene in (subject, style):
            assert not any(is_heldout(o.kind, o.colour, scene.style) for o in scene.objects)


def test_heldout_scenes_have_references():
    """A subject whose triple is held out is shown in a style that is trained."""
    for seed in range(3):
        scene = Scene.sample(seed, "heldout_triples")
        reference = from_scene("subject", scene, Random(seed), size=8).details["reference"]
        assert not any(is_heldout(o.kind, o.colour, reference.style) for o in reference.objects)


def test_unknown_tasks_and_wrong_input_are_named(rendering, photo, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'dept'; did you mean 'depth'"):
        from_scene("dept", SCENE, Random(0), rendering)
    with pytest.raises(ValueError, match=r"'segmentation' needs a scene.*Photos can: canny, depth, blur"):
        from_photo("segmentation", photo)
    with pytest.raises(ValueError, match="rendering of 2 scenes"):
        from_scene("grey", SCENE, Random(0), render([SCENE, SCENE], 8))
    with pytest.raises(ValueError, match="needs a model"):
        from_photo("depth", photo)
    with pytest.raises(ValueError, match=r"mask has \(4, 4\) pixels .* photo \(60, 40\)"):
        from_photo("mask", photo, mask=Image.new("L", (4, 4)))
    with pytest.raises(ValueError, match="factor must be a whole number from 2"):
        from_photo("super_resolution", photo, factor=1)
    with pytest.raises(ValueError, match=r"there is no image .*none\.png"):
        from_photo("grey", tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png.* cannot be read"):
        from_photo("grey", tmp_path / "text.png")
    photo.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png.* cannot be read, it is damaged"):
        from_photo("grey", tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"half\.png.* cannot be read, it is damaged"):
        from_photo("grey", Image.open(tmp_path / "half.png"))


def test_photos_are_degraded(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    for name in ("blur", "grey", "mask"):
        example = from_photo(name, tmp_path / "photo.png")
        assert example.condition.shape == example.target.shape == (3, 40, 60)
        assert torch.equal(example.target, to_pixels(photo)[0]) and not torch.equal(example.condition, example.target)
    assert from_photo("super_resolution", photo, factor=4).condition.shape == (3, 10, 15)
    grey = from_photo("grey", photo).condition
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    hidden = from_photo("mask", photo)
    assert hidden.details["mask"].float().mean() == 0.25 and (hidden.condition[:, 20, 30] == HOLE).all()
    assert torch.equal(to_pixels(to_image(hidden.target))[0], hidden.target)


def test_edges_of_photos_need_opencv(photo):
    if importlib.util.find_spec("cv2") is None:
        with pytest.raises(ImportError, match=r"pip install 'imgdit\[vision\]'"):
            from_photo("canny", photo)
    else:
        example = from_photo("canny", photo)
        assert set(example.condition.unique().tolist()) <= {0.0, 1.0} and example.condition.shape == (3, 40, 60)


def test_depth_of_photos_by_a_model(photo, tmp_path):
    from transformers import GLPNConfig, GLPNForDepthEstimation
    from transformers.models.glpn.image_processing_pil_glpn import GLPNImageProcessorPil

    config = GLPNConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    GLPNForDepthEstimation(config).save_pretrained(tmp_path)
    GLPNImageProcessorPil().save_pretrained(tmp_path)
    example = from_photo("depth", photo, model=str(tmp_path), near_is_large=False)
    assert example.condition.shape == (3, 40, 60) and example.details["estimate"].shape == (1, 40, 60)
    assert example.condition.min() == 0 and example.condition.max() == 1
    nearest = example.details["estimate"].flatten().argmin()
    assert example.condition[0].flatten()[nearest] == 1


def test_images_for_an_autoencoder():
    dataset = SceneImages(looks=3, size=32)
    images = dataset[5]
    assert images.shape == (4, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, SceneImages(first_seed=3, looks=3, size=32)[2])
    torch.testing.assert_close(images[0], render([Scene.sample(5)], 32).rgb[0] * 2 - 1)
    assert not torch.equal(images, SceneImages(looks=3, size=32, split="heldout")[5])
