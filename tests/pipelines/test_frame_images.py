"""Images into frames, against recorded numbers, and out of them."""

import numpy as np
import pytest
import torch
from onediffusion_fixtures import assert_near, case, named, tensors
from PIL import Image

from imgdit.pipelines.frame_images import (
    BUCKETS,
    bucket_size,
    depth_of_images,
    labels_of_images,
    pixels_of_images,
)


@pytest.mark.parametrize("name", named("preprocess"))
def test_pixels_are_the_recorded_ones(name):
    it = case(name)
    options = it["options"]
    arrays = [image.numpy() for image in tensors(it, "inputs").values()]
    size = (options["height"], options["width"])
    for images in (arrays, [Image.fromarray(array) for array in arrays]):
        got = pixels_of_images(images, *size, crop=options["do_crop"], stretch_bright=True)
        assert_near(got, tensors(it, "outputs")["pixels"], 2e-5, "pixels")


def test_bright_images_stay_bright_unless_asked():
    bright = np.full((8, 8, 3), 204, np.uint8)
    assert torch.allclose(pixels_of_images([bright], 8, 8), torch.tensor(0.6), atol=1e-6)
    assert torch.allclose(pixels_of_images([bright], 8, 8, stretch_bright=True), torch.tensor(0.2), atol=1e-6)


@pytest.mark.parametrize("name", named("bucket"))
def test_buckets_are_the_recorded_ones(name):
    options = case(name)["options"]
    assert {f"{round(h / w, 2)}": [h, w] for h, w in BUCKETS} == options["ratios_512"]
    for row in options["rows"]:
        assert bucket_size(row["image_height"], row["image_width"]) == (row["height"], row["width"])


def test_depth_is_luminance():
    image = torch.zeros(1, 3, 2, 2)
    image[..., 0, 0] = 1.0
    image[:, 1, 1, 1] = 1.0
    assert np.allclose(depth_of_images(image), [[[1.0, 0.0], [0.0, 0.587]]], atol=1e-6)


def test_labels_are_the_nearest_colours():
    image = torch.tensor([[0.1, 0.9, 0.0, 0.05]]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    image[:, 0, 0, 1] = 0.1  # cyan
    image[:, :, 1, 0] = torch.tensor([0.8, 0.6, 0.1])  # orange
    assert labels_of_images(image, {"cat": "cyan", "sofa": "#FFA500"}).tolist() == [[[0, 1], [2, 0]]]


def test_a_blurred_border_is_no_object():
    legend = {"cat": "#FFFFFF", "sofa": "#808080"}
    image = torch.zeros(2, 3, 8, 400)
    image[0, ..., 6:] = 1.0
    image[0, ..., 4:6] = torch.tensor([0.4, 0.6])  # two shades of grey, as wide as a border
    image[1, ..., ::2] = torch.rand(3, 8, 200)  # nothing but speckles: pixel by pixel
    labels = labels_of_images(image, legend)
    assert (labels[0, :, 6:] == 1).all() and (labels[0, :, :4] == 0).all() and (labels[0] < 2).all()
    assert np.array_equal(labels[1:], labels_of_images(image[1:], legend))


def test_a_colour_spreads_over_any_distance():
    image = torch.zeros(1, 3, 8, 400)
    image[..., :8] = 1.0
    image[..., 8::2] = 1.0  # stripes of one pixel are not sure
    assert (labels_of_images(image, {"cat": "#FFFFFF"}) == 1).all()


def test_images_of_every_kind_are_the_same_frame():
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    clear = np.dstack([np.where(ramp[..., None] > 100, ramp[..., None], 0).repeat(3, 2), np.where(ramp > 100, 255, 0)])
    kinds = [ramp.astype(np.uint16) * 257, Image.fromarray(ramp.astype(np.uint16) * 257), ramp / 255]
    expected = pixels_of_images([Image.fromarray(ramp)], 8, 8)
    for image in kinds:
        torch.testing.assert_close(pixels_of_images([image], 8, 8), expected)
    white = Image.fromarray(np.where(ramp > 100, ramp, 255).astype(np.uint8))
    seen = pixels_of_images([Image.fromarray(clear.astype(np.uint8))], 8, 8)
    torch.testing.assert_close(seen, pixels_of_images([white], 8, 8))
    with pytest.raises(ValueError, match="one image; give several as a list"):
        pixels_of_images([np.zeros((2, 4, 4, 3), np.uint8)], 8, 8)


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4, 5), np.uint8), np.full((4, 4, 3), 9.5), np.full((4, 4), np.nan), "photo.png"]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match=r"\(H, W, 3\)|values in \[0, 1\]|not finite|got str"):
        pixels_of_images([image], 4, 4)
