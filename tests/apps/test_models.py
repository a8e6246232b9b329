"""`imgdit models`: what works with which family, and the memory of a folder by its configurations alone."""

import json

import pytest
import tiny_krea2
import tiny_qwen_image
import tiny_z_image
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from tiny_control import lora_file, with_texts
from tiny_flux2 import flux2
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.doctor import advice
from imgdit.apps.models import family_table
from imgdit.families import MODULES
from imgdit.images import open_image
from imgdit.lora.files import AdapterInfo
from imgdit.pipelines.load_options import LoadOptions


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """Folder of a tiny FLUX.2 with a condition adapter and a style LoRA beside it."""
    folder = tmp_path_factory.mktemp("klein") / "model"
    pipe = with_texts(flux2(Flux2KleinPipeline))
    info = AdapterInfo("canny")
    lora_file(folder / "adapters/canny.safetensors", pipe.transformer, r".*attn\.to_[qkv]", info=info, std=0.5)
    lora_file(folder / "style.safetensors", pipe.transformer, r".*attn\.to_[qkv]", std=0.5)
    pipe.save_pretrained(folder)
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "edges.png")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return folder, {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def test_families_are_listed_with_what_works():
    rows = {row["class"]: row for row in family_table()}
    assert rows.keys() == MODULES.keys() - {"SD3JointModelFlexible"}
    assert rows["Flux2Transformer2DModel"]["conditions"] and not rows["UNet2DConditionModel"]["conditions"]
    said = run("models").output
    assert "Flux2Transformer2DModel" in said and "conditions" in said
    assert json.loads(run("models", "--json").output) == family_table()


def test_memory_is_counted_from_configurations_alone(klein, tmp_path):
    folder, parts = klein
    bare = tmp_path / "bare"
    for file in folder.rglob("*.json"):
        copy = bare / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert json.loads(run("models", bare, "--json").output) == parts
    assert "--quantize int8" in run("models", bare).output
    assert run("models", "nowhere").exit_code == 2


def test_other_families_are_controlled_and_take_loras(klein, tmp_path):
    folder, _ = klein
    made = ["--model", folder, "--steps", "1", "--size", "16"]
    controlled = ["control", "a cube", "--with", f"canny={folder / 'edges.png'}"]
    style = folder / "style.safetensors"
    images = {}
    for name, *command in (
        ["plain", "generate", "a cube"],
        ["controlled", *controlled],
        ["styled", "generate", "a cube", "--lora", f"{style}:0.5"],
        ["off", "generate", "a cube", "--lora", f"{style}:0"],
    ):
        file = tmp_path / f"{name}.png"
        done = run(*command, *made, "--out", file)
        assert done.exit_code == 0, done.output + repr(done.exception)
        images[name] = open_image(file).tobytes()
    assert images["off"] == images["plain"]
    assert len({images["plain"], images["controlled"], images["styled"]}) == 3
    again = run("generate", "--like", tmp_path / "styled.png", "--out", tmp_path / "again.png")
    assert "the same bit for bit" in again.output, again.output
    wrong = run("generate", "a cube", *made, "--lora", tmp_path / "none.safetensors")
    assert wrong.exit_code == 2 and "no LoRA file" in " ".join(wrong.output.split())


@pytest.mark.parametrize("tiny", [tiny_qwen_image, tiny_z_image, tiny_krea2], ids=["qwen", "z", "krea"])
def test_conditions_of_other_families(tiny, klein, tmp_path):
    folder, case = tiny.folder(tmp_path / "model"), next(iter(tiny.CASES.values()))
    info = AdapterInfo("canny")
    lora_file(tmp_path / "adapters/canny.safetensors", case.pipeline().transformer, case.targets, info=info)
    control = ["control", "a cube", "--with", f"canny={klein[0] / 'edges.png'}", "--adapters", tmp_path / "adapters"]
    done = run(*control, "--model", folder, "--steps", "1", "--size", "16", "--out", tmp_path / "a.png")
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert open_image(tmp_path / "a.png").size == (16, 16)


def test_weights_of_loras_are_read_behind_the_last_colon():
    options = LoadOptions(lora=["a.safetensors:0.8", "owner/name", r"C:\\x.safetensors"])
    assert options.loras == [("a.safetensors", 0.8), ("owner/name", 1.0), (r"C:\\x.safetensors", 1.0)]
    assert options.asked == [f"lora={one}" for one in options.lora] and LoadOptions().asked == []


def test_an_unknown_command_names_the_nearest():
    assert "Did you mean 'generate'" in run("genrate").output


def test_doctor_ends_in_advice():
    found = {"problems": [], "devices": {"cpu": "x"}, "extras": {"quantized": None}, "disk_free_gib": 100.0}
    assert any("no GPU" in said for said in advice(found))
    found |= {"devices": {"cpu": "x", "cuda:0": "Some GPU, 16 GiB"}, "disk_free_gib": 5.0}
    said = " ".join(advice(found))
    assert "--offload model" in said and "imgdit[quantized]" in said and "HF_HOME" in said
    assert advice({**found, "problems": ["peft is not installed"]})[0] == "pip install peft"
