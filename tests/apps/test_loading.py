"""One loader for all commands: precision, device, offloading and bits, and models that are nowhere."""

import re
import shutil
import time

import pytest
import torch
from PIL import Image
from tiny_control import flux, lora_file, sd3, with_texts
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.jobs.png import read_origin
from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.benchmarks.unlearning.labels import classifier
from imgdit.checkpoints import SCENES
from imgdit.hub import find_pipeline
from imgdit.images import open_image
from imgdit.lora.files import AdapterInfo
from imgdit.models.quantized import Int8Linear
from imgdit.pipelines.load_options import LoadOptions
from imgdit.pipelines.loading import load_pipeline
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes.subject_pairs import FeatureScore

HOOKPOINT = "transformer.transformer_blocks.0"


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


@pytest.fixture(scope="module", params=[flux, sd3], ids=["flux", "sd3"])
def model(request, tmp_path_factory):
    """Folder of a pipeline in half precision, as published ones are, with an adapter and an autoencoder."""
    folder = tmp_path_factory.mktemp("half") / "model"
    pipe = with_texts(request.param())
    lora_file(folder / "adapters/canny.safetensors", pipe.transformer, r".*attn\.to_[qkv]", info=AdapterInfo("canny"))
    unlearner = ConceptUnlearner({HOOKPOINT: SparseAutoencoder(SAEConfig(32, 64, 8, hookpoint=HOOKPOINT))})
    call = {"num_inference_steps": 1, "height": 16, "width": 16}
    unlearner.learn(pipe, {"cone": ["a cone"], "cube": ["a cube"]}, top_n=2, **call)
    unlearner.save_pretrained(folder / "sae")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "edges.png")
    return folder


def plain(output):
    """What a command said, without the frame around it."""
    return re.sub(r"[│╭╰─╮╯\s]+", " ", output)


def dtypes(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {tensor.dtype for part in parts for tensor in part.parameters() if tensor.is_floating_point()}


@pytest.mark.parametrize(("asked", "got"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_all_parts_of_a_half_precision_folder_get_one_dtype(model, asked, got):
    assert dtypes(load_pipeline(model, LoadOptions(dtype=asked, device="cpu"))) == {got}


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_commands_run_on_a_half_precision_folder(model, dtype, tmp_path):
    made = ["--model", model, "--dtype", dtype, "--device", "cpu", "--steps", "1"]
    sized = [*made, "--size", "16"]
    for name, *command in (
        ["plain", "generate", "a cube", *sized],
        ["control", "control", "a cube", "--with", f"canny={model / 'edges.png'}", *sized],
        ["unlearned", "unlearn", "a cone", "--concept", "cone", *sized],
    ):
        done = run(*command, "--out", tmp_path / f"{name}.png")
        assert done.exit_code == 0, f"{command}\n{done.output}{done.exception!r}"
    told = read_origin(tmp_path / "plain.png").made_with
    assert told["dtype"] == {"auto": "float32", "bf16": "bfloat16"}[dtype]
    again = run("generate", "--like", tmp_path / "plain.png", "--out", tmp_path / "again.png", "--device", "cpu")
    assert again.exit_code == 0 and "the same bit for bit" in again.output  # in the precision it was made in


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloading_changes_no_bit(model, tmp_path, offload):
    sized = ["--model", model, "--steps", "2", "--size", "32"]
    for name, *command in (
        ["control", "control", "a cube", "--with", f"canny={model / 'edges.png'}"],
        ["unlearned", "unlearn", "a cone", "--concept", "cone"],
    ):
        for kind in ("none", offload):
            done = run(*command, *sized, "--offload", kind, "--out", tmp_path / f"{name}-{kind}.png")
            assert done.exit_code == 0, f"{command}\n{done.output}{done.exception!r}"
        plain, offloaded = (open_image(tmp_path / f"{name}-{kind}.png") for kind in ("none", offload))
        assert same_pixels(plain, offloaded)
    assert read_origin(tmp_path / f"control-{offload}.png").made_with["dtype"] == "bfloat16"  # auto


def test_features_come_from_any_pipeline(model, tmp_path):
    out = tmp_path / "features"
    done = run("sae", "features", model / "sae" / HOOKPOINT, model, "--prompt", "a cube", "--count", 1, "--out", out,
               "--steps", 1, "--dtype", "bf16")  # fmt: skip
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    assert (out / "index.html").is_file()


def test_training_data_comes_from_any_pipeline(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cube\na cone\n")
    made = tmp_path / "made"
    done = run("data", "generate", tmp_path / "prompts.txt", made, "--model", model, "--steps", 1, "--dtype", "bf16")
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    assert len(list(made.glob("*.png"))) == 2


def test_matrices_in_eight_bits_draw_nearly_the_same(tmp_path):
    plain, rounded = (Session(Shelf(SCENES), LoadOptions(quantize=kind)) for kind in ("none", "int8"))
    assert any(isinstance(module, Int8Linear) for module in rounded.pipe.transformer.modules())
    request = Request("a red cube", steps=2, height=64, width=64)
    one, other = (session.generate(request).images[0] for session in (plain, rounded))
    difference = torch.tensor(list(one.convert("L").tobytes())) - torch.tensor(list(other.convert("L").tobytes()))
    assert 0 < difference.float().abs().mean() < 16
    assert rounded.made_with["quantize"] == "int8" and "quantize" not in plain.made_with
    # What an image is unlearned by is written into its file, so that another default changes nothing later.
    for asked, mode in (({"mode": None}, "replace"), ({"mode": None, "multiplier": -1.0}, "scale"), ({}, "scale")):
        assert plain.settled(Request("a red cube", concepts=("neon",), **asked)).mode == mode
    assert Request.from_dict({"prompt": "a red cube", "concepts": ["neon"]}).mode == "scale"  # files of version 0.1


def test_what_the_machine_cannot_do_is_said_before_loading(tmp_path):
    there = run("generate", "a cube", "--out", tmp_path / "a.png", "--steps", 1, "--size", 32)
    assert there.exit_code == 0
    for options, said in (
        (["--device", "cuda:7"], "no device 'cuda:7'"),
        (["--device", "gpu"], "must be auto, cpu, cuda"),
        (["--offload", "model", "--device", "cpu"], "leave it out"),
        (["--quantize", "nf4", "--device", "cpu"], "works on CUDA only"),
        (["--quantize", "int8", "--dtype", "fp32"], "shows something else"),
    ):
        out = tmp_path / ("a.png" if "int8" in options else "b.png")
        done = run("generate", "a cube", *options, "--out", out, "--steps", 1, "--size", 32)
        assert done.exit_code == 2 and said in plain(done.output), done.output


def test_a_model_that_is_nowhere_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"")
    start = time.perf_counter()
    for source, said in (
        ("nowhere", "no folder 'nowhere' here"),
        ("./models/mine", "no folder './models/mine' here"),
        ("nobody/nothing", "Hub cannot be reached"),
        ("empty", "holds no model_index.json"),
        ("weights.safetensors", "it is a file"),
    ):
        with pytest.raises(ValueError, match=said):
            find_pipeline(source)
    for reader in (FeatureScore, lambda model: classifier(model, "style")):
        with pytest.raises(ValueError, match="Hub cannot be reached"):
            reader("nobody/nothing")
    assert time.perf_counter() - start < 5


def test_a_model_in_the_cache_is_found_without_a_network(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--somebody--scenes/snapshots/abc"
    snapshot.mkdir(parents=True)
    shutil.copy(SCENES / "model_index.json", snapshot)
    (cache / "models--somebody--scenes/refs").mkdir()
    (cache / "models--somebody--scenes/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert find_pipeline("somebody/scenes") == str(snapshot)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(SCENES, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    assert find_pipeline("~/mine") == str(tmp_path / "mine")
