"""A step of sampling reads nothing from the device, copies nothing to it and builds nothing that a run builds once."""

import numpy as np
import pytest
import tiny_control
import tiny_flux2
import tiny_krea2
import tiny_z_image
import torch
from onediffusion_fixtures import TINY
from PIL import Image
from tiny import rope_config, sincos_config, tiny_mmdit, tiny_pipeline
from tiny_control import SD3_TARGETS, TARGETS, image, lora_file, make
from tiny_families import loaded
from tiny_families import make as make_latents
from tiny_sae import flux, flux_guided, ours, sd3, selection, tiny_sae, unlearner_of
from tiny_sae import run as run_sae
from waits import Waits

from imgdit import Condition, ImageFrame, OmniControl, OneDiffusionPipeline
from imgdit.layout import FrameLayout

CONFIGS = {
    "rope": rope_config(),
    "guidance-distilled": rope_config(guidance_embeds=True),
    "sincos": sincos_config(dual_attention_layers=(0,)),
}
HALF = torch.zeros(4, 4, dtype=torch.bool)
HALF[:2] = True


def condition(**options):
    return Condition(image(), "canny", **options)


FEW, MANY = 2, 5


def steps_of(run):
    """What three further steps wait for."""
    counted = []
    for steps in (FEW, MANY):
        with Waits() as waits:
            run(steps)
        counted.append(waits)
    return counted[1].where - counted[0].where


USES = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "a cone"},
    "guided between levels": {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.9)},
    "conditioned": {"conditions": [condition()], "guidance_scale": 3.0},
    "of two images": {"conditions": [Condition([image(0), image(1)], "canny")]},
    "weak": {"conditions": [condition(strength=0.5)]},
    "cached": {
        "conditions": [condition(), condition(position="subject")],
        "mode": "independent",
        "guidance_scale": 3.0,
    },
    "image guidance": {"conditions": [condition()], "mode": "independent", "image_guidance_scale": 1.5},
    "completed": {"conditions": [condition(mask=HALF, complement=True)], "guidance_scale": 3.0},
    "in some steps": {"conditions": [condition(end=0.6)]},
}


@pytest.fixture(scope="module", params=CONFIGS)
def pipe(request, tmp_path_factory):
    pipe = tiny_pipeline(CONFIGS[request.param], shift=3.0)
    targets = SD3_TARGETS if request.param == "sincos" else TARGETS
    file = lora_file(tmp_path_factory.mktemp("lora") / "canny.safetensors", pipe.transformer, targets=targets)
    pipe.load_control(file, adapter_name="canny")
    return pipe


def sample(pipe, steps, **options):
    call = {"prompt": ["a red cube", "the blue sphere left"], "height": 16, "width": 16, "output_type": "latent"}
    call |= {"guidance_scale": 1.0, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(3)}
    if pipe.transformer.config.guidance_embeds and "negative_prompt" in options:
        options = {**options, "true_cfg_scale": 2.0}
    elif pipe.transformer.config.guidance_embeds:
        options = {**options, "guidance_interval": (0.0, 1.0)}
    return pipe(**call | options)


@pytest.mark.parametrize("use", USES)
def test_steps_of_mmdit(pipe, use):
    assert not steps_of(lambda steps: sample(pipe, steps, **USES[use]))


HOOKED = {
    "plain": (None, {}, 0),
    "conditioned": (condition(), {}, 0),
    "weak": (condition(strength=0.5), {}, 0),
    "cached": (condition(), {"mode": "independent"}, 0),
    "completed": (condition(mask=HALF, complement=True), {}, 0),
    "in some steps": (condition(end=0.6), {}, 1),  # the timestep, to know that it is the scheduler's
}


@pytest.mark.parametrize("use", HOOKED)
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_steps_of_stock_pipelines(kind, use, tmp_path):
    pipe = getattr(tiny_control, kind)()
    control = OmniControl(pipe)
    targets = SD3_TARGETS if kind == "sd3" else TARGETS
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, targets=targets))
    given, options, allowed = HOOKED[use]

    def run(steps):
        if given is None:
            return make(pipe, num_inference_steps=steps)
        with control.use(given, **options):
            return make(pipe, num_inference_steps=steps)

    assert steps_of(run).total() == (MANY - FEW) * allowed


@pytest.mark.parametrize("name", ["FLUX.2 klein", "Z-Image", "Krea 2"])
def test_steps_of_other_families(name, tmp_path):
    """Conditions add no wait to those of the stock pipeline."""
    case = (tiny_flux2.CASES | tiny_z_image.CASES | tiny_krea2.CASES)[name]
    control = loaded(case, case.pipeline(), tmp_path)
    plain = steps_of(lambda steps: make_latents(case, control.pipe, steps=steps)).total()
    for mode in ("joint", "independent"):
        with control.use([condition(), condition(position="subject")], mode=mode):
            assert steps_of(lambda steps: make_latents(case, control.pipe, steps=steps)).total() == plain


SCENES = {
    "plain": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 3.0},
    "given": {"task": "depth"},
    "cached": {"frames": [ImageFrame.generate("image"), "given"]},
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("backbone", ["nextdit", "mmdit"])
def test_steps_of_frames(backbone, scene):
    pipe = OneDiffusionPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    if backbone == "mmdit":
        pipe.register_modules(transformer=tiny_mmdit(rope_config(in_channels=64)))
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    options = {"height": 32, "width": 32, "output_type": "latent", "guidance_scale": 3.0, **SCENES[scene]}
    if scene == "given":
        options["images"] = shown
    if "frames" in options:
        options["frames"] = [options["frames"][0], ImageFrame.clean(shown, "depth", sees="self")]
    assert not steps_of(
        lambda steps: pipe("a cat", **options, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    )


HOOKPOINTS = [f"transformer.transformer_blocks.{i}" for i in (0, 1)]


@pytest.mark.parametrize("hookpoints", [HOOKPOINTS[:1], HOOKPOINTS], ids=["one hook", "two hooks"])
@pytest.mark.parametrize(
    "build,threshold,allowed",
    [
        (ours, 0.01, 2),  # the timestep, and whether all was finite
        (ours, None, 2),
        (flux, 0.01, 2),
        (flux_guided, 0.01, 4),  # it calls the model twice in a step
        (sd3, 0.01, 3),  # and whether the batch is two guidance halves
    ],
    ids=["ours", "ours, top-k", "flux", "flux, guided", "sd3"],
)
def test_steps_of_hooked_pipelines(build, threshold, allowed, hookpoints):
    pipe, inputs = build()
    unlearners = []
    for hookpoint in hookpoints:
        sae = tiny_sae(hookpoint)
        sae.threshold = threshold
        unlearners.append(unlearner_of(pipe, hookpoint, [selection("x", [3, 5, 9, 11], [0.5, 0.2, 0.3, 0.1])], sae))
    unlearner = unlearners[0]
    for other in unlearners[1:]:
        unlearner.saes |= other.saes
        unlearner.books |= other.books
    with unlearner.attach(pipe, ["x"]):
        for steps in (FEW, MANY):  # what is done at each timestep is found once
            run_sae(pipe, inputs, steps)
        waits = steps_of(lambda steps: run_sae(pipe, inputs, steps))
    if threshold is None:  # which rows are among the k largest is decided at each hook
        allowed += len(hookpoints)
    assert waits.total() == (MANY - FEW) * allowed, waits


@pytest.mark.parametrize("use", USES)
def test_builds_of_a_run_do_not_grow_with_its_steps(pipe, use, monkeypatch):
    built = []
    kept, init = FrameLayout.kept, FrameLayout.__init__

    def counted(self, key, build):
        return kept(self, key, lambda: built.append(key) or build())

    def made(self, *args, **kwargs):
        built.append("layout")
        init(self, *args, **kwargs)

    monkeypatch.setattr(FrameLayout, "kept", counted)
    monkeypatch.setattr(FrameLayout, "__init__", made)
    numbers = []
    for steps in (4, 8):
        built.clear()
        sample(pipe, steps, **USES[use])
        numbers.append(len(built))
    assert 0 < numbers[0] == numbers[1] <= 32
