"""Conditions of another size than the image they lie over, in every pipeline that takes them."""

import logging

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from tiny_control import SD3_TARGETS, SIZE, flux, lora_file, make, sd3
from tiny_control import image as sample_image

from imgdit import Condition, FluxOmniControlPipeline, OmniControl, StableDiffusion3OmniControlPipeline
from imgdit.images import fit, fit_pixels, to_image
from imgdit.lora.files import AdapterInfo

OURS = {"prompt": "a red cube", "height": SIZE, "width": SIZE, "num_inference_steps": 1, "output_type": "latent"}


def stock(pipe, file):
    control = OmniControl(pipe)
    control.load(file, adapter_name="canny")

    def call(*conditions, size=None, **options):
        height, width = size or (SIZE, SIZE)
        with control.use(conditions, **options):
            return make(pipe, num_inference_steps=1, height=height, width=width)

    return call


def with_conditions(cls, pipe, file):
    pipe = cls.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control(file, adapter_name="canny")

    def call(*conditions, size=None, **options):
        height, width = size or (SIZE, SIZE)
        return make(pipe, num_inference_steps=1, height=height, width=width, conditions=list(conditions), **options)

    return call


def ours(pipe, file):
    pipe.load_control(file, adapter_name="canny")

    def call(*conditions, size=None, **options):
        height, width = size or (SIZE, SIZE)
        given = OURS | {"height": height, "width": width, "conditions": list(conditions)} | options
        return pipe(**given, generator=torch.Generator().manual_seed(5)).images

    return call


ROUTES = {
    "stock FLUX": lambda file: stock(flux(), file),
    "stock SD3": lambda file: stock(sd3(), file),
    "FLUX with conditions": lambda file: with_conditions(FluxOmniControlPipeline, flux(), file),
    "SD3 with conditions": lambda file: with_conditions(StableDiffusion3OmniControlPipeline, sd3(), file),
    "ours": lambda file: ours(tiny_pipeline(), file),
}


@pytest.fixture(params=list(ROUTES))
def route(request, tmp_path):
    makers = {"SD3": (sd3, SD3_TARGETS), "FLUX": (flux, None), "ours": (tiny_pipeline, None)}
    maker, targets = next(value for name, value in makers.items() if name in request.param)
    options = {} if targets is None else {"targets": targets}
    file = lora_file(tmp_path / "canny.safetensors", maker().transformer, **options)
    return ROUTES[request.param](file)


def test_an_aligned_condition_is_fitted_to_the_image(route, caplog):
    image = to_image(sample_image(size=SIZE))
    sizes = [(SIZE // 2, SIZE // 2), (SIZE * 2, SIZE * 2), (SIZE + 3, SIZE + 3)]
    for size in sizes:  # smaller, larger, and no whole number of tokens
        other = image.resize(size)
        fitted = fit(other, (SIZE, SIZE))
        assert torch.equal(route(Condition(other, "canny")), route(Condition(fitted, "canny"))), size
    smooth = sample_image(size=SIZE // 2)
    expected = route(Condition(fit_pixels(smooth, (SIZE, SIZE))[0], "canny"))
    assert torch.equal(route(Condition(smooth, "canny")), expected)
    assert not caplog.records
    wide = image.resize((SIZE * 3, SIZE))
    with caplog.at_level(logging.WARNING, "imgdit"):
        cut = route(Condition(wide, "canny"))
    assert "67 % of its area lies outside" in caplog.text
    assert torch.equal(cut, route(Condition(wide.crop((SIZE, 0, 2 * SIZE, SIZE)), "canny")))


def test_a_compact_condition_is_fitted_to_the_image_divided_by_its_scale(route):
    whole = to_image(sample_image(size=SIZE))
    half = fit(whole, (SIZE // 2, SIZE // 2))
    assert torch.equal(route(Condition(whole, "canny", scale=2.0)), route(Condition(half, "canny", scale=2.0)))


def test_what_is_placed_by_numbers_or_beside_the_image_keeps_its_size(route):
    small = sample_image(size=SIZE // 2)
    large = fit_pixels(small, (SIZE, SIZE))[0]
    for position in ((0, 0), (0, 4), "subject"):
        as_it_is = route(Condition(small, "canny", position=position))
        assert (as_it_is - route(Condition(large, "canny", position=position))).abs().max() > 1e-4, position
    twice = to_image(sample_image(size=2 * SIZE))
    shrunk = fit(twice, (SIZE, SIZE))
    subject = [route(Condition(image, "canny", position="subject")) for image in (twice, shrunk)]
    assert torch.equal(*subject)
    with pytest.raises(ValueError, match=r"multiple of 4 pixels.*got 18x16; resize it to 16x16"):
        route(Condition(torch.rand(3, 18, 16), "canny", position=(0, 4)))


def test_masks_and_regions_are_fitted_with_their_image(route):
    image = to_image(sample_image(size=2 * SIZE)).resize((4 * SIZE, 2 * SIZE))
    mask = np.zeros((2 * SIZE, 4 * SIZE), bool)
    mask[:, SIZE : 2 * SIZE] = True  # of the middle that stays, the left half
    tokens = torch.tensor([[True, True, False, False]]).expand(4, 4)
    middle = fit(image, (SIZE, SIZE))
    for complement in (False, True):
        call = {"size": (SIZE, SIZE)}
        expected = route(Condition(middle, "canny", mask=tokens, complement=complement), **call)
        for given in (mask, Image.fromarray(mask), Image.fromarray(mask.astype(np.uint16) * 65535)):
            got = route(Condition(image, "canny", mask=given, complement=complement), **call)
            assert torch.equal(got, expected)
    region = torch.zeros(SIZE // 2, SIZE // 2)
    region[:, SIZE // 4 :] = 1  # half the pixels' number
    got = route(Condition(middle, "canny", mask=tokens, complement=True), region=region)
    assert torch.equal(got, expected)


def test_one_use_serves_calls_of_several_sizes(tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer), adapter_name="canny")
    image = sample_image(size=SIZE)
    expected = []
    for width in (SIZE, 2 * SIZE):
        with control.use([Condition(fit_pixels(image, (width, SIZE))[0], "canny")]):
            expected.append(make(pipe, width=width))
    with control.use([Condition(image, "canny")]):
        for _ in range(2):
            for width, one in zip((SIZE, 2 * SIZE), expected):
                assert torch.equal(make(pipe, width=width), one)


def test_a_condition_is_not_encoded_again_in_the_middle_of_an_offloaded_run(tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer), adapter_name="canny")
    small = Condition(sample_image(size=SIZE // 2), "canny")
    with control.use([small]):
        expected = make(pipe)
    accelerate.cpu_offload_with_hook(pipe.vae, execution_device="cpu")
    with pytest.raises(ValueError, match=f"pass height={SIZE} and width={SIZE} to use"), control.use([small]):
        make(pipe)
    with control.use([small], height=SIZE, width=SIZE):
        assert torch.equal(make(pipe), expected)


def test_colours_that_mean_something_are_not_blended(tmp_path):
    pipe = tiny_pipeline()
    info = AdapterInfo(task="segmentation")
    call = ours(pipe, lora_file(tmp_path / "canny.safetensors", pipe.transformer, info=info))
    image = to_image(sample_image(size=SIZE // 2))
    blocks = image.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    assert torch.equal(call(Condition(image, "canny")), call(Condition(blocks, "canny")))


def test_images_of_a_list_are_fitted_one_by_one(route):
    one, other = to_image(sample_image(size=SIZE)), to_image(sample_image(1, size=SIZE)).resize((2 * SIZE, 2 * SIZE))
    with pytest.raises(ValueError, match="holds 2 images for"):
        route(Condition([one, other], "canny"))
    with pytest.raises(ValueError, match="empty list"):
        route(Condition([], "canny"))
    assert torch.equal(route(Condition([one], "canny")), route(Condition(one, "canny")))
