"""The scripts of docs/examples on tiny folders, as they stand."""

import runpy
import sys
from pathlib import Path

import pytest
import tiny_folders
import yaml
from tiny_control import image, lora_file
from tiny_flux2 import TARGETS, reference
from tiny_images import write_folder

from imgdit.images import to_image
from imgdit.lora.files import AdapterInfo
from imgdit.sae.unlearning import ConceptUnlearner

SCRIPTS = Path(__file__).resolve().parent.parent / "docs/examples"

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path, monkeypatch):
    tiny_folders.FOLDERS["FLUX.2"](tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def run(name, monkeypatch, **options):
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def different(folder, *names):
    images = [(folder / f"{name}.png").read_bytes() for name in names]
    return len(set(images)) == len(images)


def test_control_flux2(model, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    transformer = DiffusionPipeline.from_pretrained(model).transformer
    info = AdapterInfo(task="depth", index=10, level="image", acts_on="all")
    lora_file(tmp_path / "depth.safetensors", transformer, TARGETS, info=info)
    reference().save(tmp_path / "reference.png")
    to_image(image()).save(tmp_path / "depth.png")
    run(
        "control_flux2.py", monkeypatch, model=model, adapter="depth.safetensors", depth="depth.png",
        reference="reference.png", size=32, steps=2, out="out",
    )  # fmt: skip
    assert different(tmp_path / "out", "plain", "depth-0.5", "depth-1.0", "reference-0.3", "reference-1.0")


def test_unlearn_in_your_pipeline(model, tmp_path, monkeypatch):
    recipe = {
        "run": {"folder": "run", "steps": 2, "batch_size": 16},
        "pipeline": {
            "pretrained": str(model),
            "call": {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16},
        },
        "data": {"prompts": ["a red cube", "a cone", "a sphere"], "held_out": 1, "buffer": 64},
        "sae": {"hookpoints": ["transformer.transformer_blocks.1"], "num_latents": 64, "k": 4},
        "concepts": {"prompts": {"cube": ["a red cube"], "cone": ["a cone"]}, "top_n": 4},
    }
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(recipe))
    options = {"recipe": "sae.yaml", "concept": "cube", "prompt": "a red cube", "out": "out"}
    run("unlearn_in_your_pipeline.py", monkeypatch, **options)
    assert set(ConceptUnlearner.from_pretrained("run/saes").concepts) == {"cube", "cone"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "with.png",
        "without-scale.png",
        "without-remove.png",
    }
    first = (tmp_path / "out/with.png").read_bytes()
    run("unlearn_in_your_pipeline.py", monkeypatch, **options)  # trains nothing again
    assert (tmp_path / "out/with.png").read_bytes() == first


def test_train_a_condition(model, tmp_path, monkeypatch):
    write_folder(tmp_path / "images", 3, size=(32, 32))
    options = {"images": "images", "model": model, "size": 32, "out": "out"}
    run("train_a_condition.py", monkeypatch, **options, steps=1)
    run("train_a_condition.py", monkeypatch, **options, steps=2)
    assert (tmp_path / "out/adapter.safetensors").is_file() and (tmp_path / "out/controlled.png").is_file()
