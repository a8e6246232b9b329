"""Autoencoders on folders of FLUX and SD3 as diffusers writes them: every command, and the pipelines with
`conditions=`."""

import inspect

import pytest
import torch
import yaml
from PIL import Image
from tiny_control import STYLE_TARGETS, flux, folder_of, lora_file, sd3, with_texts
from tiny_sae import tiny_sae
from typer.testing import CliRunner

from imgdit import Condition, FluxOmniControlPipeline, StableDiffusion3OmniControlPipeline
from imgdit.apps.cli import app
from imgdit.sae.features import contrast_features, heat_maps, survey_features
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.training.sae_run import reconstruction_distance

HOOKPOINT = "transformer.transformer_blocks.1"
PROMPTS = ["a red cube", "the blue sphere", "a green cone", "the red cone"]
CALL = {"num_inference_steps": 2, "height": 16, "width": 16}
OURS = {"flux": FluxOmniControlPipeline, "sd3": StableDiffusion3OmniControlPipeline}
MAKERS = {"flux": flux, "sd3": sd3}


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


def test_the_signature_is_that_of_the_call(name):
    theirs = inspect.signature(type(MAKERS[name]()).__call__).parameters
    ours = inspect.signature(OURS[name].__call__).parameters
    assert list(ours)[: len(theirs)] == list(theirs) and list(ours)[len(theirs)] == "conditions"
    assert ours["prompt"] == theirs["prompt"]
    assert (
        next(iter(inspect.signature(OURS[name].from_pipe(with_texts(MAKERS[name]())).__call__).parameters)) == "prompt"
    )


def test_pipelines_with_conditions_learn_as_the_ones_they_extend(name):
    found = []
    for extended in (False, True):
        pipe = with_texts(MAKERS[name]())
        pipe = (OURS[name] if extended else type(pipe)).from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
        sae = tiny_sae(HOOKPOINT)
        unlearner = ConceptUnlearner({HOOKPOINT: sae})
        unlearner.learn(pipe, {"cube": PROMPTS[:1], "sphere": PROMPTS[1:2]}, top_n=2, **CALL)
        scores = contrast_features(pipe, sae, PROMPTS[:1], PROMPTS[1:], **CALL).scores("prompts")
        shown = heat_maps(pipe, sae, PROMPTS, [1, 2], **CALL)
        distance = reconstruction_distance(pipe, {HOOKPOINT: sae}, PROMPTS[:2], **CALL)
        selected = unlearner.books[HOOKPOINT].selections["cube"].means
        found.append([selected, scores, survey_features(pipe, sae, PROMPTS, **CALL).means, shown.maps, distance])
        with unlearner.attach(pipe, ["cube"], multiplier=-20.0):
            found[-1].append(pipe(PROMPTS[0], **CALL, output_type="latent", generator=generator()).images)
    for plain, extended in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(extended))


def generator():
    return torch.Generator().manual_seed(0)


def test_statistics_under_conditions(name, tmp_path):
    """What a concept's features do while a condition steers."""
    pipe = OURS[name].from_pipe(with_texts(MAKERS[name]()))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control(lora_file(tmp_path / "edges.safetensors", pipe.transformer, STYLE_TARGETS), adapter_name="edges")
    conditions = [Condition(torch.rand(3, 16, 16, generator=generator()), adapter="edges")]
    sae = tiny_sae(HOOKPOINT)
    means = [
        contrast_features(pipe, sae, PROMPTS[:1], PROMPTS[1:], **CALL, **more).means["prompts"]
        for more in ({}, {"conditions": conditions})
    ]
    assert means[0].shape == means[1].shape and not torch.equal(*means)


def run(*command):
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    return done.output


def test_commands_on_a_folder(name, tmp_path, monkeypatch):
    """Train, look, unlearn: FLUX in bfloat16, SD3 in float32."""
    monkeypatch.chdir(tmp_path)
    pipe = MAKERS[name]()
    if name == "flux":
        pipe = with_texts(pipe).to(torch.bfloat16)
    folder_of(pipe, tmp_path / "model")
    dtype = "bfloat16" if name == "flux" else "float32"
    recipe = {
        "run": {"folder": "run", "steps": 3, "batch_size": 32},
        "pipeline": {"pretrained": "model", "dtype": dtype, "call": CALL},
        "data": {"prompts": PROMPTS, "held_out": 1, "buffer": 200},
        "sae": {"hookpoints": [HOOKPOINT, "transformer.context_embedder"], "num_latents": 64, "k": 4},
        "concepts": {"prompts": {"cube": PROMPTS[:1], "sphere": PROMPTS[1:2]}, "top_n": 2},
    }
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(recipe))
    assert "fvu" in run("sae", "train", "sae.yaml")
    options = ["--prompt", PROMPTS[0], "--against", PROMPTS[1], "--steps", "2", "--count", "2", "--out", "page"]
    for precision in ("fp32", "bf16"):
        run("sae", "features", f"run/saes/{HOOKPOINT}", "model", *options, "--dtype", precision)
        assert (tmp_path / "page/index.html").is_file()
    run("unlearn", PROMPTS[0], "--concept", "cube", "--model", "model", "--sae", "run/saes", "--dtype", "bf16",
        "--steps", "2", "--size", "16", "--out", "without.png")  # fmt: skip
    with Image.open("without.png") as image:
        assert image.size == (16, 16)
