"""The packaged recipes of own/ for sparse autoencoders, on tiny folders of their families."""

import dataclasses
import json
import re

import pytest
import tiny_folders
from diffusers import DiffusionPipeline
from tiny_control import flux, folder_of, sd3
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.training.sae_plan import sae_plan
from imgdit.training.sae_recipe import load_sae_recipe
from imgdit.training.sae_run import train_saes

FOLDERS = {
    "sae_flux": lambda path: folder_of(flux(), path),
    "sae_flux2": tiny_folders.FOLDERS["FLUX.2"],
    "sae_qwen": tiny_folders.FOLDERS["Qwen-Image"],
    "sae_z_image": tiny_folders.FOLDERS["Z-Image"],
    "sae_sd3": lambda path: folder_of(sd3(), path),
}


def small(name, folder):
    """The packaged recipe on a tiny folder: images of 16 pixels, blocks that the model has, few steps and concepts."""
    recipe = load_sae_recipe(f"own/{name}")
    call = {**recipe.pipeline.call, "height": 16, "width": 16, "num_inference_steps": 2}
    hookpoints = tuple(re.sub(r"\d+$", lambda n: str(min(int(n[0]), 1)), point) for point in recipe.sae.hookpoints)
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, folder=str(folder / "run"), steps=2, batch_size=16),
        pipeline=dataclasses.replace(recipe.pipeline, pretrained=str(folder), dtype="float32", call=call),
        data=dataclasses.replace(recipe.data, held_out=1, buffer=64),
        sae=dataclasses.replace(recipe.sae, hookpoints=hookpoints, k=4),
        concepts=dataclasses.replace(recipe.concepts, prompts={"cube": ["a cube"], "cone": ["a cone"]}),
    )


QUICK = ("sae_flux", "sae_z_image")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FOLDERS]
)
def test_a_recipe_from_prompts_to_concepts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red cube\na cone\na sphere\n")
    FOLDERS[name](tmp_path)
    recipe = small(name, tmp_path)
    planned = sae_plan(recipe)
    result = train_saes(recipe)
    assert result.step == 2 and result.metrics.keys() == set(recipe.sae.hookpoints)
    assert all(0 < values["fvu"] < 2 and values["picture_distance"] > 0 for values in result.metrics.values())
    unlearner = ConceptUnlearner.from_pretrained(result.folder)
    assert unlearner.concepts == ["cube", "cone"]
    configs = {point: sae.config for point, sae in unlearner.saes.items()}
    assert planned.widths == {point: config.d_in for point, config in configs.items()}
    assert planned.features == {point: config.num_latents for point, config in configs.items()}
    assert planned.sae_bytes == 16 * sum(p.numel() for sae in unlearner.saes.values() for p in sae.parameters())
    assert (planned.vectors, planned.prompts) == (16 * 2, 2) and planned.buffer_bytes == 4 * 64 * sum(
        planned.widths.values()
    )
    transformer = DiffusionPipeline.from_pretrained(tmp_path).transformer
    assert planned.parameters == sum(p.numel() for p in transformer.parameters())
    matrices = sum(p.numel() for p in transformer.parameters() if p.ndim == 2)
    assert planned.model_flops > 2 * 16 * planned.calls * planned.prompts * 0.2 * matrices


def test_the_command_prints_the_plan(tmp_path):
    tiny_folders.FOLDERS["Qwen-Image"](tmp_path)
    values = small("sae_qwen", tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values.to_dict()))  # which is YAML too
    done = CliRunner().invoke(app, ["sae", "train", str(tmp_path / "recipe.yaml"), "--plan", "--teraflops", "1"])
    assert done.exit_code == 0, done.output
    assert "32 vectors per prompt (16x16 pixels, 4 calls of the transformer)" in done.output
    assert "hours at 1 TFLOP/s" in done.output and "256 features of activations of width 32" in done.output
    call = {**values.pipeline.call}
    del call["height"]
    values = dataclasses.replace(values, pipeline=dataclasses.replace(values.pipeline, call=call))
    with pytest.raises(ValueError, match=r"give pipeline\.call\.height"):
        sae_plan(values)
