"""The recipes of one_diffusion/ and own/: they build, learn, start from each other, become pipelines or LoRA files."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
from onediffusion_fixtures import TINY
from tiny import randomize
from tiny_images import image, write_folder
from tiny_runs import QUICK, small_cache, small_pipeline
from typer.testing import CliRunner

from imgdit import ImageFrame, ImgDiTPipeline, MMDiT, NextDiT, OneDiffusionPipeline
from imgdit.apps.chores.run_pipeline import run_pipeline
from imgdit.apps.chores.weights import save_adapter
from imgdit.apps.cli import app
from imgdit.cameras import orbit_cameras, scale_positions
from imgdit.io.checkpoints import CheckpointError
from imgdit.lora.files import read_adapter
from imgdit.recipes import packaged_recipes
from imgdit.scenes.training_frames import SceneFrames
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained, trained_recipe
from imgdit.training.user_images import UserImages, UserImagesSettings

RECIPES = [name for name in packaged_recipes() if name.startswith("one_diffusion/")]
RECIPES += ["own/frames", "own/multiview", "own/task_lora", "own/one_diffusion_lora"]
SMALL = {"hidden_size": 24, "num_heads": 2, "num_kv_heads": 1, "depth": 1, "multiple_of": 8, "caption_channels": 32}
STEPS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a pipeline of small random models, the cached scenes of its runs, and images with frames."""
    folder = tmp_path_factory.mktemp("world")
    small_pipeline(folder)
    randomize(MMDiT.from_pretrained(folder / "pipeline", subfolder="transformer")).save_pretrained(
        folder / "pipeline" / "transformer"
    )
    write_folder(folder / "pictures", 8, size=(160, 140))
    poses = scale_positions(orbit_cameras([0.0, 20.0], [0.0, 5.0]))
    lines = (folder / "pictures" / "metadata.jsonl").read_text().splitlines()
    for i, line in enumerate(lines):
        image(100 + i, (150, 150)).save(folder / "pictures" / f"other-{i}.png")
        frames = {"frames_file_names": [f"other-{i}.png"], "cameras": poses.tolist()}
        lines[i] = json.dumps(json.loads(line) | frames)
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    with small_cache():
        yield folder


def small(name, world, folder, **sections):
    """A packaged recipe with small models on small data; its own arguments otherwise."""
    recipe = load_recipe(name)
    data = {**recipe.data.arguments, "model": str(world / "pipeline")}
    if recipe.data.name == "user_images":
        data |= {"path": str(world / "pictures"), "cache": str(folder.parent / "cache"), "samples": 2}
        if "preprocessor" in data:  # edges need OpenCV
            data |= {"condition": "blur", "preprocessor": "blur"}
    else:
        data |= {"latents": str(world / "latents"), "scenes": 4, "tokens": 512}
    model = {"arguments": {**recipe.model.arguments, **SMALL, "mup_base_width": 24}}
    if recipe.model.pretrained:
        model = {"pretrained": str(world / "pipeline")}
    run = {**QUICK, "accumulation": 1, "folder": str(folder), "steps": STEPS, "log_every": 1, "sample_every": 0}
    changes = {
        "run": run,
        "model": {"start_from": None, **model},
        "data": {"arguments": data},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup": 1, "decay": 0},
        "ema": {"decay": 0.5},
    }
    for section, values in sections.items():
        changes[section] |= values
    return recipe.replace(**changes)


def fall(recipe):
    """Train; how much of the loss is left, the last steps against the first."""
    train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0])
    lines = (Path(recipe.run.folder) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == recipe.run.steps
    return mean(losses[-6:]) / mean(losses[:6])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name):
    recipe = load_recipe(name)
    text = packaged_recipes()[name].read_text().splitlines()
    assert text[0] == f"# imgdit train {name}" and any("Cost: " in line or " costs " in line for line in text[:12])
    if recipe.model.pretrained is None:
        with torch.device("meta"):  # without the run to start from, which is not there
            model = build_model(recipe)
        assert isinstance(model, NextDiT) and model.config.caption_channels == 192
        count = sum(p.numel() for p in model.parameters())
        assert f"{count / 1e6:.1f} M parameters" in packaged_recipes()["one_diffusion/stage1_text"].read_text()
    elif recipe.model.pretrained == "embedded":
        assert any(p.requires_grad for p in build_model(recipe).parameters())


def test_the_stages_start_from_one_another():
    stages = [load_recipe(f"one_diffusion/{name}") for name in ("stage1_text", "stage2_tasks", "stage3_resolution")]
    for before, after in pairwise(stages):
        assert after.model.start_from == before.run.folder
        assert before.model.arguments == after.model.arguments | {"input_size": before.model.arguments["input_size"]}
    tasks = stages[1].data.arguments
    kinds, pairs = tasks["probabilities"], tasks["pairs"]
    each = [kinds[kind] / sum(kinds.values()) for kind in ("images", "views")]
    fraction = kinds["pairs"] / sum(kinds.values()) / sum(pairs.values())
    each += [fraction * pairs[name] / (5 if name == "other" else 1) for name in pairs]
    assert len(pairs) == 6 and each == pytest.approx([1 / 12] * 8)  # twelve tasks with equal probability


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory):
    """Folders of the three stages' runs, each from the one before, and what was left of their losses."""
    folder, left = tmp_path_factory.mktemp("stages"), {}
    with small_cache():
        for name, start in (("stage1_text", None), ("stage2_tasks", "stage1_text"), ("multiview", "stage2_tasks")):
            start = None if start is None else str(folder / start)
            recipe = small(f"one_diffusion/{name}", world, folder / name, model={"start_from": start})
            left[name] = fall(recipe)
    return folder, left


def test_each_stage_learns_and_begins_where_the_last_one_ended(stages):
    folder, left = stages
    assert left["stage1_text"] < 0.8 and left["stage2_tasks"] < 1.0 and left["multiview"] < 1.0
    before = load_trained(folder / "stage1_text").state_dict()
    begun = build_model(trained_recipe(folder / "stage2_tasks")).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in begun.items())
    (folder / "stage1_text").rename(folder / "elsewhere")  # a run that is trained needs it no more
    own = load_trained(folder / "stage2_tasks").state_dict()
    (folder / "elsewhere").rename(folder / "stage1_text")
    assert any(not torch.equal(before[name], tensor) for name, tensor in own.items())


def test_higher_resolution_has_its_own_latents(world, stages, tmp_path):
    """The third stage at twice the side of the second; here 128 is the larger one's."""
    folder, _ = stages
    data = {
        "latents": str(tmp_path / "latents"),
        "size": 64,
        "scenes": 2,
        "tokens": 64,
        "probabilities": {"images": 1.0},
    }
    recipe = small("one_diffusion/stage3_resolution", world, tmp_path / "run")
    model = {"start_from": str(folder / "stage2_tasks")}
    recipe = recipe.replace(
        model=model, data={"arguments": {**recipe.data.arguments, **data}}, run={"steps": 2}, schedule={"warmup": 0}
    )
    batches, _ = training_batches(recipe)
    assert batches.dataset.size == (4, 4) and batches.dataset[0].tokens.shape == (4, 16, 64)
    assert (
        batches.dataset.scale
        == SceneFrames(**small("one_diffusion/stage1_text", world, tmp_path).data.arguments).scale
    )
    train(recipe, model=build_model(recipe), batches=batches)
    other = {**recipe.data.arguments, "latents": str(world / "latents")}
    with pytest.raises(ValueError, match=r"index.json says .* but the autoencoder is .*'size': 64.*another folder"):
        SceneFrames(**other)


def test_a_trained_nextdit_becomes_a_pipeline(stages, tmp_path):
    folder, _ = stages
    done = CliRunner().invoke(app, ["export", str(folder / "stage2_tasks"), str(tmp_path / "pipeline")])
    assert done.exit_code == 0, done.output
    pipe = OneDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    trained = load_trained(folder / "stage2_tasks").state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert pipe.scheduler.config.shift == 3.0 and pipe.default_size == 128
    out = pipe("a red cube", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert out.images[0].size == (128, 128)
    frames = [ImageFrame.clean(out.images[0]), ImageFrame.generate("depth")]
    assert pipe("", frames, num_inference_steps=2).depth.shape == (1, 128, 128)


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory):
    """Folder of a LoRA's run on the world's pipeline."""
    recipe = small("one_diffusion/task_lora", world, tmp_path_factory.mktemp("lora") / "run")
    assert fall(recipe) < 1.0
    return recipe.run.folder


def made(pipe, **options):
    """Latents of depth and image, from one seed."""
    frames = [ImageFrame.generate(), ImageFrame.generate("canny")]
    options |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe("a red cube", frames, height=64, width=64, **options).latents


def changes_the_image(pipe, run, file):
    """Write a run's LoRA, load it, take it away again."""
    pipe.set_progress_bar_config(disable=True)
    before = made(pipe)
    save_adapter(Path(run), file)
    pipe.load_lora_weights(file)
    layers = {name.split(".lora_")[0] for name, _ in pipe.transformer.named_modules() if ".lora_A." in name}
    assert not torch.allclose(made(pipe), before, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(made(pipe), before)
    return layers


def test_a_lora_for_one_task(world, lora, tmp_path):
    pipe = OneDiffusionPipeline(**ImgDiTPipeline.from_pretrained(world / "pipeline").components)
    layers = changes_the_image(pipe, lora, tmp_path / "canny.safetensors")
    assert {"x_embedder", "single_transformer_blocks.0.attn.to_q"} <= layers
    info = read_adapter(tmp_path / "canny.safetensors").info
    assert (info.task, info.mode, info.position) == ("canny", None, None)
    with pytest.raises(ValueError, match="trained a LoRA, which is a file: imgdit lora export"):
        run_pipeline(lora)


@pytest.mark.parametrize("name", ["own/frames", "own/multiview", "own/task_lora"])
def test_user_images(name, world, tmp_path):
    recipe = small(name, world, tmp_path / "run")
    assert fall(recipe) < 1.0
    if name == "own/task_lora":
        pipe = OneDiffusionPipeline(**ImgDiTPipeline.from_pretrained(world / "pipeline").components)
        changes_the_image(pipe, recipe.run.folder, tmp_path / "canny.safetensors")
        return
    pipe = run_pipeline(recipe.run.folder)
    assert type(pipe) is ImgDiTPipeline
    trained = load_trained(recipe.run.folder).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_a_lora_of_one_diffusion_on_user_images(world, tmp_path):
    """The published folder's layout, in small: its model_index.json names no transformer."""
    recipe = small("own/one_diffusion_lora", world, tmp_path / "run", model={"pretrained": str(TINY)})
    arguments = {**recipe.data.arguments, "model": str(TINY), "base": 32, "preprocessor": "grey", "condition": "grey"}
    recipe = recipe.replace(data={"arguments": arguments}, model={"gradient_checkpointing": False})
    assert fall(recipe) < 1.0
    layers = changes_the_image(
        OneDiffusionPipeline.from_pretrained(TINY), recipe.run.folder, tmp_path / "a.safetensors"
    )
    assert {"layers.0.attention.wq", "layers.0.feed_forward.w2"} <= layers


def test_images_are_encoded_as_the_reference_does(world):
    """OneDiffusion's reference ignores an autoencoder's shift; a pipeline with `MMDiT` does not."""
    dataset = UserImages(UserImagesSettings(str(world / "pictures"), str(TINY), None, base=32, samples=1))
    assert dataset.row_encoder.encoder.pipe.vae.config.shift_factor is None
    pipe = OneDiffusionPipeline.from_pretrained(TINY)
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = pipe.vae.encode(pixels[None] * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    latents = dataset.row_encoder.encoder.latents(pixels).float()
    torch.testing.assert_close(latents, expected[0].detach(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probabilities": {"image": 1.0}}, "unknown name in probabilities 'image'; did you mean 'images'"),
        ({"pairs": {"dpeth": 1.0}}, "unknown name in pairs 'dpeth'; did you mean 'depth'"),
        (
            {"probabilities": {"views": 0.0}},
            "probabilities must be 0 or more, and one of them positive, got {'views': 0.0}",
        ),
        ({"probabilities": {}}, "probabilities must be 0 or more"),
        ({"pairs": {"depth": 1.0, "canny": -1.0}}, "pairs must be 0 or more"),
    ],
)
def test_probabilities_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneFrames(**arguments)


def test_runs_to_start_from(world, stages, tmp_path):
    folder, _ = stages
    recipe = small("one_diffusion/stage2_tasks", world, tmp_path, model={"start_from": str(tmp_path / "nothing")})
    with pytest.raises(CheckpointError, match="nothing holds no checkpoint; train it first"):
        build_model(recipe)
    other = {"start_from": str(folder / "stage1_text"), "arguments": {**recipe.model.arguments, "depth": 2}}
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        build_model(recipe.replace(model=other))
    with pytest.raises(ValueError, match="weights come from pretrained or from start_from"):
        recipe.replace(model={"pretrained": "embedded", "arguments": {}})
    with pytest.raises(ValueError, match="task of views without cameras 'none'"):
        UserImages(
            UserImagesSettings(str(world / "pictures"), str(world / "pipeline"), None, views=2, task_token=True)
        )
