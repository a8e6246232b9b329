"""Adapters trained on the stock transformer of every family: against the dense reference, and from a folder of images
to a file that the family's pipeline loads."""

import dataclasses
import json
import re
from unittest import mock

import pytest
import tiny_flux2
import tiny_flux_kin
import tiny_krea2
import tiny_qwen_image
import tiny_z_image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_families import FamilyCase, differs, loaded, near, passes, random, trained_model
from tiny_folders import CALLS, FOLDERS
from tiny_images import write_folder

from imgdit import Condition, Frame, FrameLayout, OmniControl
from imgdit.adapters.stock_frames import StockFrames
from imgdit.apps.chores.training_plan import training_plan
from imgdit.apps.chores.weights import save_adapter
from imgdit.family import NoisyImages, find_family
from imgdit.io.checkpoints import find_checkpoint, read_tensors
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler, mix
from imgdit.training import load_recipe, train
from imgdit.training.batches import Batch, Text
from imgdit.training.build import build_model, build_scheduler
from imgdit.training.objectives.condition_lora import condition_lora
from imgdit.training.objectives.frames import predict_velocity
from imgdit.training.recipe import ADAPTER
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained
from imgdit.training.user_images.encoder import Encoder

TINY = (tiny_flux2, tiny_flux_kin, tiny_qwen_image, tiny_z_image, tiny_krea2)
CASES = {name: case for tiny in TINY for name, case in tiny.CASES.items()}
GRID = (4, 4)


KIN = ("Chroma", "LongCat-Image")
"""Whose blocks are FLUX.1's; their tests wait for the slow ones."""


def marked(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.fixture(scope="module", params=marked([n for n in CASES if "Edit" not in n and "klein" not in n], KIN))
def case(request) -> FamilyCase:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    return trained_model(case)


def batch_of(model, samples=2):
    """Two images, each with a condition, and texts of unequal lengths."""
    family = find_family(model)
    channels, width = family.tokens.channels(model), family.training.text_width(model)
    frames = [Frame(GRID), Frame(GRID, sigma=0.0, adapter=ADAPTER, sees="joint")]
    mask = torch.ones(samples, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    text = Text(random(samples, 6, width), torch.empty(samples, 0), mask)
    empty = Text(random(1, 6, width, seed=8), torch.empty(1, 0))
    return Batch(random(samples, 32, channels, seed=6), FrameLayout.build(frames, 6), text, empty)


def predicted(model, batch, sigma=0.6):
    """Velocity of the images of a batch at one noise level."""
    sigmas = batch.at(sigma).sigmas
    noisy = mix(batch.tokens, random(*batch.tokens.shape, seed=7), sigmas, batch.layout.lengths)
    return predict_velocity(model, noisy, batch.text, sigmas, batch.layout, 1.5)


def weights(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, out):
    return torch.autograd.grad((out * random(*out.shape, seed=11)).sum(), weights(model), allow_unused=True)


def near_gradients(ours, theirs, tolerance):
    """Relative to each weight's largest, or to a hundredth of the largest of all."""
    assert [one is None for one in ours] == [one is None for one in theirs]
    largest = max(one.abs().max() for one in theirs if one is not None)
    assert largest > 1e-2
    for one, other in zip(ours, theirs, strict=True):
        assert one is None or (one - other).abs().max() <= tolerance * max(other.abs().max(), 0.01 * largest)


def seen_arguments(model, run):
    """Arguments of the stock forward, its conditions and the result of `run`."""
    seen = {}
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs, riding=StockFrames.of(module).owner.run.conditions),
        with_kwargs=True,
    )
    try:
        out = run()
    finally:
        handle.remove()
    return {name: value for name, value in seen.items() if name not in ("riding", "return_dict")}, seen["riding"], out


def test_gradients_equal_those_of_the_dense_reference(case, model):
    """And those with gradient checkpointing equal those without."""
    batch = batch_of(model)
    arguments, riding, out = seen_arguments(model, lambda: predicted(model, batch))
    assert [len(item.tokens) for item in riding] == [2] and out.shape == batch.tokens[:, :16].shape
    dense = case.dense(model, arguments, riding)
    dense = find_family(model).training.velocity(list(dense) if dense.ndim == 5 else dense)  # Z-Image's are a list
    near(out, dense)
    ours, theirs = gradients(model, out), gradients(model, dense)
    near_gradients(ours, theirs, 2e-5)
    model.enable_gradient_checkpointing()
    near_gradients(gradients(model, predicted(model, batch)), ours, 1e-6)


def test_without_conditions_the_adapter_acts_on_everything(case, model):
    batch = batch_of(model)
    alone = Batch(batch.tokens[:, :16], FrameLayout.build([Frame(GRID)], 6), batch.text)
    with torch.no_grad():
        adapted, base = predicted(model, alone), case.pipeline().transformer
        StockFrames(base)
        differs(adapted, predicted(base, alone))


def test_one_batch_is_learned(model):
    batch, scheduler = batch_of(model), MultiFrameFlowMatchScheduler()
    optimizer = torch.optim.Adam(weights(model), lr=0.05)
    losses = []
    for _ in range(3):
        generator = torch.Generator().manual_seed(0)
        loss = condition_lora(model, scheduler, batch, generator, text_dropout=0.0, condition_dropout=0.0).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.99 * losses[0]


def images_of(model, given):
    """The images of a call that a pipeline made."""
    family = find_family(model)
    if "x" in given:  # Z-Image
        tokens, grid = -family.training.velocity(given["x"]), GRID
        (text,) = given["cap_feats"]
        return NoisyImages(tokens, grid, 1 - given["t"], text[None])
    mask = given.get("encoder_hidden_states_mask", given.get("encoder_attention_mask"))
    if given.get("attention_mask") is not None:  # Chroma
        mask = given["attention_mask"][:, : given["encoder_hidden_states"].shape[1]].bool()
    text = given["encoder_hidden_states"].flatten(2)
    return NoisyImages(given["hidden_states"], GRID, given["timestep"], text, mask, given.get("guidance"))


def test_the_transformer_is_called_as_its_pipeline_calls_it(case, tmp_path):
    control = loaded(case, case.pipeline(), tmp_path)
    alone = {"guidance_scale": 0.0} if "ZImage" in type(control.pipe).__name__ else {}  # else both in one batch
    training = find_family(control.transformer).training
    for given, out in passes(case, control, call={"steps": 1, **alone})[0]:
        images = images_of(control.transformer, given)
        arguments = training.arguments(control.transformer, images)
        left_out = {name for name, value in given.items() if value is not None} - arguments.keys()
        assert left_out <= {"return_dict", "joint_attention_kwargs", "attention_kwargs"}
        for name, value in arguments.items():
            _same(value, given.get(name))
        assert training.velocity(out).shape == images.tokens.shape


def _same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape and torch.allclose(ours.double(), theirs.double(), atol=1e-5)
    elif isinstance(ours, list) and isinstance(ours[0], torch.Tensor):
        for one, other in zip(ours, theirs, strict=True):
            _same(one, other)
    else:
        assert ours == theirs


# From a folder of images to a file


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("QwenImageEditPlusPipeline", "Qwen/Qwen-Image"),
        ("LongCatImageEditPipeline", "meituan-longcat/LongCat-Image"),
    ],
)
def test_folders_of_editing_pipelines_are_refused(name, instead, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"of a {name}, which is not trained: .*Train on {instead},"):
        Encoder(str(tmp_path))


@pytest.fixture(scope="module", params=marked(FOLDERS, (*KIN, "FLUX.2", "Krea 2")))
def folder(request, tmp_path_factory):
    """Family, and the folder of a tiny pipeline."""
    path = tmp_path_factory.mktemp("pipeline")
    FOLDERS[request.param](path)
    return request.param, path


def recipe_on(path, data, run):
    made = load_recipe("own/condition_lora")
    own = {"path": str(data), "model": str(path), "cache": str(data / "cache"), "base": 16, "samples": 2, "ratio": 1.0}
    return made.replace(
        run={"folder": str(run), "steps": 2, "mixed_precision": "no", "checkpoint_every": 1, "keep": 2,
             "log_every": 1, "tracker": "none"},
        model={"pretrained": str(path)},
        data={"arguments": {**made.data.arguments, **own, "condition": "grey", "preprocessor": "grey"}},
        optimizer={"lr": 0.05},
        schedule={"warmup": 0},
        ema={"decay": 0.0},
    )  # fmt: skip


def test_the_plan_is_made_of_configurations(folder, tmp_path):
    """Nothing is loaded; more is kept without checkpointing; weights in 8 bits run under bfloat16."""
    _, path = folder
    write_folder(tmp_path / "data", 2, size=(16, 16))
    recipe = recipe_on(path, tmp_path / "data", tmp_path / "run")
    small = recipe.replace(model={"quantize": "int8", "dtype": "bfloat16"}, run={"mixed_precision": "bf16"})
    with mock.patch.object(DiffusionPipeline, "from_pretrained", side_effect=AssertionError):
        first, *parts, other, most, _, hours = training_plan(small, gigabytes=24)
    model = build_model(recipe)
    counts = [sum(p.numel() for p in parameters) for parameters in (model.parameters(), weights(model))]
    assert first.startswith("{:,} parameters, {:,} trained; 2 samples at once of 32 image".format(*counts))
    tokens = int(re.search(r"and (\d+) text tokens", first)[1]) + 32
    assert f", {2 * tokens:,} tokens a step; 1 GPU" in first and "fits into 24.0 GB" in most
    gigabytes = {line.split()[0]: float(re.search(r"[\d.]+(?= GB)", line)[0]) for line in parts}
    assert gigabytes["weights"] < 3e-9 * counts[0] and gigabytes["optimizer"] == round(8e-9 * counts[1], 3)
    less = re.search(r"step is ([\d.]+) GB with model.gradient_checkpointing: true", other)
    assert float(less[1]) < gigabytes["step"]
    assert float(hours.split()[0]) > 0.1 * 3 * 2 * counts[0] * tokens * small.run.batch_size * small.run.steps


def test_noise_levels_are_drawn_as_the_pipeline_shifts_its_steps(tmp_path):
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    recipe = recipe_on(tmp_path, tmp_path, tmp_path)
    assert build_scheduler(recipe).config.shift == 2.0  # the recipe's
    assert build_scheduler(dataclasses.replace(recipe, scheduler={})).config.shift == 3.0


def test_from_images_to_a_file(folder, tmp_path):
    """A run that goes on equals one that did not stop, and the pipeline with the file predicts what the trained model
    predicts."""
    name, path = folder
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        pixels = (random(16, 16, 3, seed=number).sigmoid() * 255).byte().numpy()
        Image.fromarray(pixels).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a red cube")
    whole, parts = (recipe_on(path, data, tmp_path / run) for run in ("whole", "parts"))
    batches = training_batches(whole)[0]
    train(whole, model=build_model(whole), batches=batches)
    train(parts, model=build_model(parts), batches=batches, stop_at=1)
    train(parts, model=build_model(parts), batches=batches, resume=True)
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    whole_losses, parts_losses = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert whole_losses == parts_losses
    ends = [read_tensors(find_checkpoint(tmp_path / run) / "model.safetensors") for run in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[1][key], one) for key, one in ends[0].items())

    file = tmp_path / "grey.safetensors"
    save_adapter(tmp_path / "whole", file)
    trained = load_trained(tmp_path / "whole")
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    control = OmniControl(pipe)
    report = control.load(file)
    assert not report.unused and report.info.mode == "independent"
    shown = Condition(Image.open(data / "0.png").convert("L"), "grey")
    call = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent", **CALLS[name]}
    ((given, out),), riding = passes(
        None, control, [shown], run=lambda _, pipe: pipe(prompt="a red cube", **call)
    )  # fmt: skip
    batch, images, (condition,) = batches.dataset[0], images_of(trained, given), riding
    length = batch.text.embeddings.shape[1]
    shown_text = images.text[0] if images.text.shape[1] == length else images.text[0][images.mask[0]]  # or padded
    near(batch.text.embeddings[0], shown_text, 1e-4)
    held = min(batch.tokens[:, 16:], key=lambda tokens: (tokens - condition.tokens[0]).abs().max())
    near(held, condition.tokens[0], 2e-3)  # caches keep half precision
    velocity = find_family(trained).training.velocity
    with torch.no_grad():
        ours = StockFrames.of(trained).velocity(trained, images, [(batch.layout.frames[1], condition.tokens)])
        near(ours, velocity(out), 2e-3)  # the file has half precision
        differs(ours, velocity(control.transformer(**given)[0]))
