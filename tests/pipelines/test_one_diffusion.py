"""OneDiffusionPipeline with NextDiT and with MMDiT: what must hold whatever the weights, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from onediffusion_fixtures import TINY
from PIL import Image
from tiny import rope_config, tiny_mmdit

import imgdit
from imgdit import FrameLayout, ImageFrame, OneDiffusionPipeline
from imgdit.cameras import orbit_cameras

CAMERAS = orbit_cameras([0.0, 30.0], [0.0, 10.0])


def build(backbone: str) -> OneDiffusionPipeline:
    pipe = OneDiffusionPipeline.from_pretrained(TINY)
    if backbone == "mmdit":
        pipe.register_modules(transformer=tiny_mmdit(rope_config(in_channels=64)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["nextdit", "mmdit"])
def pipe(request) -> OneDiffusionPipeline:
    return build(request.param)


@pytest.fixture(scope="module")
def nextdit() -> OneDiffusionPipeline:
    return build("nextdit")


def image(seed=0, size=(32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def run(pipe, prompt="a cat", seed=0, **options):
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np", **options}
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(prompt, **options)


def near(a, b, atol=1e-4):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=atol)


def test_each_frame_comes_out_as_what_it_is(pipe):
    out = run(pipe)
    assert out.images.shape == (1, 32, 32, 3) and out.latents.shape == (1, 1, 16, 4, 4) and out.depth is None
    out = run(pipe, task="depth", images=image(), inverse=True)
    assert len(out.images) == 0 and out.depth.shape == (1, 32, 32) and 0 <= out.depth.min() <= out.depth.max() <= 1
    assert out.maps["depth"].shape == (1, 32, 32, 3) and list(out.maps) == ["depth"]
    legend = {"cat": "cyan", "sofa": "gold"}
    out = run(pipe, task="segmentation", images=image(), inverse=True, legend=legend)
    assert out.labels.shape == (1, 32, 32) and set(np.unique(out.labels)) <= {0, 1, 2} and out.legend == legend
    out = run(pipe, task="views", images=[image(), image(1)], cameras=[CAMERAS[0], None])
    assert out.cameras.shape == (1, 2, 4, 4) and len(out.images) == 0 and out.maps is None
    assert near(out.cameras[0, 0], torch.eye(4))


def test_all_frames_may_be_made(pipe):
    frames = [ImageFrame.generate(), ImageFrame.generate("depth")]
    out = run(pipe, frames=frames, num_images_per_prompt=2)
    assert out.images.shape == (2, 32, 32, 3) and out.depth.shape == (2, 32, 32)
    out = run(pipe, task="views", cameras=list(CAMERAS))
    assert out.images.shape == (2, 32, 32, 3) and near(out.cameras[0], torch.linalg.inv(CAMERAS[:1]) @ CAMERAS, 1e-3)


def test_three_ways_to_say_the_same(pipe):
    by_task = run(pipe, task="depth", images=image())
    by_frames = run(pipe, frames=[ImageFrame.generate(), ImageFrame.clean(image(), "depth")])
    raw = run(pipe, "[[depth2image]] a cat", denoise_mask=[1, 0], images=[image()])
    assert np.array_equal(by_task.images, by_frames.images) and np.array_equal(by_task.images, raw.images)


def test_given_frames_stay_as_they_are(pipe):
    steps = []

    def keep(pipe, step, timestep, tensors):
        steps.append(tensors["latents"].clone())
        return {}

    out = run(pipe, task="canny", images=image(), callback_on_step_end=keep)
    assert all(torch.equal(x[:, 1], out.latents[:, 1]) for x in steps)
    assert not torch.equal(steps[0][:, 0], steps[1][:, 0])


def test_given_frames_matter(pipe):
    assert not near(run(pipe, task="depth", images=image()).images, run(pipe, task="depth", images=image(1)).images)


def test_latents_stand_for_images(pipe):
    whole = run(pipe, task="depth", images=image())
    noise = torch.randn(1, 2, 16, 4, 4)
    given = whole.latents[0, 1]
    again = run(pipe, frames=[ImageFrame.generate(), ImageFrame.clean(given, "depth")], latents=noise)
    from_noise = run(pipe, task="depth", images=image(), latents=noise)
    assert near(again.images, from_noise.images)


def test_scenes_do_not_depend_on_their_batch(pipe):
    """One generator per scene: each is what it would be alone, given images of its own and all."""
    images = [image(0), image(1)]
    frames = [ImageFrame.generate(), ImageFrame.clean(images, "depth")]
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    both = run(pipe, ["a cat", "a dog on the table"], frames=frames, num_images_per_prompt=2, generator=seeds)
    assert both.images.shape[0] == 4
    for i in range(4):
        alone = run(pipe, ["a cat", "a dog on the table"][i // 2], i, task="depth", images=images[i // 2])
        assert near(both.images[i : i + 1], alone.images)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_seed_tells_the_image(pipe, stochastic):
    pipe = OneDiffusionPipeline(**pipe.components)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=stochastic)
    first, again, other = (run(pipe, task="depth", images=image(), seed=seed).images for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("pil", list, None), ("np", np.ndarray, (1, 32, 32, 3)), ("pt", torch.Tensor, (1, 3, 32, 32)),
     ("latent", torch.Tensor, (1, 16, 4, 4))],
)  # fmt: skip
def test_output_types(nextdit, output_type, kind, shape):
    images = run(nextdit, output_type=output_type).images
    assert isinstance(images, kind) and (images[0].size == (32, 32) if shape is None else images.shape == shape)


def test_tuples_have_images_and_latents_first(nextdit):
    out = run(nextdit, task="depth", images=image(), return_dict=False)
    assert isinstance(out, tuple) and out[0].shape == (1, 32, 32, 3) and out[1].shape == (1, 2, 16, 4, 4)


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for cls in (OneDiffusionPipeline, imgdit.DiffusionPipeline):
        again = cls.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert type(again.transformer) is type(pipe.transformer)
        options = {"task": "depth", "images": image()}
        assert near(run(again, **options).images, run(pipe, **options).images)


def test_callbacks_change_latents_and_prompts(pipe):
    def swap(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1) + 1} if step == 0 else {}

    plain = run(pipe, guidance_scale=1.0)
    changed = run(
        pipe, guidance_scale=1.0, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert not near(plain.images, changed.images)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert run(pipe, callback_on_step_end=stop).latents.abs().max() == 0


def test_guidance_acts_in_its_interval(pipe):
    whole = run(pipe, num_inference_steps=3)
    assert near(run(pipe, num_inference_steps=3, guidance_interval=(0.0, 1.0)).images, whole.images)
    plain = run(pipe, num_inference_steps=3, guidance_scale=1.0)
    assert near(run(pipe, num_inference_steps=3, guidance_interval=(0.0, 0.0)).images, plain.images)
    part = run(pipe, num_inference_steps=3, guidance_interval=(0.9, 1.0))
    assert not near(part.images, whole.images) and not near(part.images, plain.images)


def test_conditioning_levels_are_selectable(pipe):
    levels = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: levels.append(kwargs["layout"].frames[1].sigma), with_kwargs=True
    )
    try:
        for level in (None, "last", "clean"):
            run(pipe, task="depth", images=image(), conditioning_level=level, num_inference_steps=1)
        last = float(pipe.scheduler.timesteps[-1]) / 1000
    finally:
        hook.remove()
    assert levels == [last if pipe.follows_reference else 0.0, last, 0.0]


def test_frozen_frames_are_computed_once(pipe, monkeypatch):
    """A conditioning frame that sees only itself is read from a cache; without the cache the images are the same."""
    lengths = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    frames = [ImageFrame.generate(), ImageFrame.clean(image(), "depth", sees="self")]
    try:
        cached = run(pipe, frames=frames, num_inference_steps=3)
        monkeypatch.setattr(FrameLayout, "frozen", frozenset())
        plain = run(pipe, frames=frames, num_inference_steps=3)
    finally:
        hook.remove()
    assert lengths == [8, 4, 4, 8, 8, 8]
    assert near(cached.images, plain.images)
    assert not near(cached.images, run(pipe, task="depth", images=image(), num_inference_steps=3).images)


def test_frozen_frames_are_computed_anew_where_the_positions_change(pipe, monkeypatch):
    """At `scale_watershed`, and in every step where `scale_factor` turns positions as the step before did."""
    if not pipe.follows_reference:
        pytest.skip("scale_factor is NextDiT's")
    lengths = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    frames = [ImageFrame.generate(), ImageFrame.clean(image(), "depth", sees="self")]
    call = {"frames": frames, "num_inference_steps": 4, "scale_factor": 1.5}
    try:
        cached = run(pipe, **call, scale_watershed=700.0)
        run(pipe, **call)
        monkeypatch.setattr(FrameLayout, "frozen", frozenset())
        plain = run(pipe, **call, scale_watershed=700.0)
    finally:
        hook.remove()
    assert sorted(lengths[:4]) == [4, 4, 8, 8] and lengths[0] == 8 and lengths[4:8] == [8, 4, 4, 4]
    assert near(cached.images, plain.images)


def test_a_long_prompt_says_what_was_cut(pipe, caplog):
    import logging

    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            run(pipe, "a cat on the table " * 4, max_sequence_length=12)
    finally:
        diffusers_logging.disable_propagation()
    assert "12 are read; cut off:" in caplog.text


def test_mmdit_composes_a_task_with_a_conditions_adapter():
    """Image to depth under a subject condition that its own LoRA reads."""
    from peft import LoraConfig

    pipe = build("mmdit")
    task = [ImageFrame.clean(image()), ImageFrame.generate("depth")]
    plain = run(pipe, frames=task)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), "subject")
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    condition = ImageFrame.clean(image(2), adapter="subject", sees="joint", index=0, offset=(0, 2))
    steered = run(pipe, frames=[*task, condition])
    assert steered.depth.shape == (1, 32, 32) and not near(steered.depth, plain.depth)
    other = dataclasses.replace(condition, content=image(3))
    assert not near(run(pipe, frames=[*task, other]).depth, steered.depth)
    assert near(run(pipe, frames=[*task, condition]).depth, steered.depth)


def test_cameras_come_back_through_the_pipeline(pipe):
    moved = torch.linalg.inv(CAMERAS[:1]) @ CAMERAS
    out = run(pipe, task="views", images=[image()], cameras=CAMERAS)
    assert near(out.cameras[0], moved, 1e-3) and out.images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "dept", "images": image()}, "'dept'; did you mean 'depth'"),
        ({"task": "depth", "images": [image(), image()]}, "takes 1 given image.* got 2"),
        ({"task": "identity", "images": [image()] * 4}, "takes 1 to 3 given"),
        ({"images": image()}, "add task="),
        ({"frames": [ImageFrame.generate(), ImageFrame.clean(image())]}, "could be of several tasks"),
        ({"frames": [ImageFrame.clean(image())]}, "nothing to generate"),
        ({"frames": []}, "frames is empty"),
        ({"frames": [ImageFrame.generate()], "images": image()}, "leave out images"),
        ({"task": "views", "cameras": list(CAMERAS), "width": 48}, "views are square, got 32x48"),
        ({"height": 40}, "multiples of 16 pixels, got 40x32; try 32x32"),
        ({"task": "depth", "images": image(), "item": "cat"}, "item names"),
        ({"denoise_mask": [1, 0], "images": [image()] * 2, "task": "depth"}, "1 places for images, got 2"),
        ({"denoise_mask": [1, 0, 0], "images": [image()], "task": "depth"}, "2 places for images, got 1"),
        ({"denoise_mask": [1, 0], "images": [image()], "captions": ["a"]}, "go with task="),
        ({"latents": torch.zeros(1, 2, 16, 4, 4)}, r"latents must be \(1, 1, 16, 4, 4\)"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 scenes"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"conditioning_level": "first"}, "conditioning_level must be one of"),
        ({"output_type": "png"}, "output_type must be one of"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks may ask for"),
        (
            {"frames": [ImageFrame.generate(), ImageFrame.clean([image()] * 3, "depth")]},
            r"3 images for 1 prompt\(s\)",
        ),
        (
            {
                "prompt": "[[image_editing]] x",
                "frames": [
                    ImageFrame.clean(image(size=(32, 48))),
                    ImageFrame.clean(image(), "depth"),
                    ImageFrame.generate("canny"),
                ],
            },
            "must be of one size, got 32x32, 32x48",
        ),
        (
            {"frames": [ImageFrame.generate(), ImageFrame.clean(torch.zeros(16, 2, 2), "depth")]},
            r"grids of \(16, 2, 2\)",
        ),
    ],
)
def test_bad_input_is_refused(pipe, options, message):
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        run(pipe, options.pop("prompt", "a cat"), **options)


def test_misspelt_keywords_are_refused(nextdit):
    with pytest.raises(TypeError, match="NEGATIVE_PROMPT"):
        nextdit("a cat", NEGATIVE_PROMPT="blurry")


def test_more_frames_than_positions_are_refused(nextdit):
    assert nextdit.transformer.max_frames == 12
    with pytest.raises(ValueError, match="got 14 frames, the model's positions end at 12"):
        run(nextdit, task="views", cameras=list(orbit_cameras([0.0] * 7, [0.0] * 7)))


def test_scaled_positions_are_nextdits_alone(nextdit):
    plain = run(nextdit).images
    assert not near(run(nextdit, scale_factor=1.5).images, plain)
    with pytest.raises(ValueError, match="change NextDiT's positions"):
        run(build("mmdit"), scale_factor=1.5)


def test_what_would_be_ignored_is_refused(nextdit):
    with pytest.raises(ValueError, match="prompt_embeds hold it already"):
        run(nextdit, None, prompt_embeds=torch.zeros(1, 3, 32), task="subject", images=image(), item="cat")
    dynamic = nextdit.scheduler
    try:
        nextdit.scheduler = type(dynamic).from_config(dynamic.config, use_dynamic_shifting=False)
        with pytest.raises(ValueError, match=r"noise_scale=0\.5 changes a dynamic shift"):
            run(nextdit, noise_scale=0.5)
    finally:
        nextdit.scheduler = dynamic


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ((1, 96, 96), [(48, 84), (64, 64), (96, 96), (6, 4)]),  # published: buckets of about 512 x 512 pixels
        ((1, 8, 8), [(8, 8), (8, 8), (8, 8), (6, 4)]),
    ],
)
def test_sizes_follow_the_first_image(trained, expected):
    """In cells of 8 pixels; a model of smaller images has its own size for everything but latents."""
    pipe = build("nextdit")
    pipe.transformer.register_to_config(input_size=trained)
    sizes = []

    class Enough(Exception):
        pass

    def stop(frames, samples, cells, *rest):
        sizes.append(cells)
        raise Enough

    pipe.prepare_latents = stop
    for options in (
        {"task": "depth", "images": image(size=(720, 1280))},
        {"task": "views", "cameras": list(CAMERAS)},
        {},
        {"frames": [ImageFrame.generate(), ImageFrame.clean(torch.zeros(16, 6, 4), "depth")]},
    ):
        with pytest.raises(Enough):
            pipe("a cat", **options)
    assert sizes == expected
