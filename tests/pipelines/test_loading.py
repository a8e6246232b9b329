"""Which loader reads which pipeline folder."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from tiny import tiny_pipeline
from tiny_control import flux, folder_of, sd3, with_texts

import imgdit


@pytest.mark.parametrize("make", [flux, sd3], ids=["flux", "sd3"])
def test_pipelines_of_diffusers_are_loaded_as_they_are(make, tmp_path):
    pipe = make()
    folder_of(pipe, tmp_path)
    loaded = imgdit.DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is type(pipe) and loaded.transformer.dtype == torch.bfloat16
    exact = imgdit.DiffusionPipeline.from_pretrained(str(tmp_path))
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, exact.transformer.get_parameter(name))


def test_parts_may_be_passed_and_pickles_are_refused(tmp_path):
    pipe = flux()
    folder_of(pipe, tmp_path / "safe")
    loaded = imgdit.DiffusionPipeline.from_pretrained(tmp_path / "safe", transformer=pipe.transformer)
    assert loaded.transformer is pipe.transformer
    with pytest.raises(ValueError, match="pickled weights can run code"):
        imgdit.DiffusionPipeline.from_pretrained(tmp_path / "safe", use_safetensors=False)
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        imgdit.DiffusionPipeline.from_pretrained(tmp_path / "pickled")


def test_a_class_that_nobody_has(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "SomebodysPipeline"}))
    with pytest.raises(ValueError, match=r"'SomebodysPipeline', which neither diffusers .* nor imgdit .* has"):
        imgdit.DiffusionPipeline.from_pretrained(tmp_path)


AFTER_IMPORT = """
import sys, diffusers
from imgdit import FluxOmniControlPipeline, ImgDiTPipeline
from imgdit.checkpoints import SCENES
for loader in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
    assert type(loader.from_pretrained(SCENES)) is ImgDiTPipeline, loader
    assert type(loader.from_pretrained(sys.argv[1])) is FluxOmniControlPipeline, loader
"""


def test_diffusers_reads_ours_once_the_class_is_imported(tmp_path):
    """In a process of its own: importing the class is all that it takes."""
    imgdit.FluxOmniControlPipeline.from_pipe(with_texts(flux())).save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", AFTER_IMPORT, str(tmp_path)], check=True, capture_output=True, text=True)


def test_names_of_diffusers_are_not_replaced():
    import imgdit.pipelines.omni_control
    import imgdit.pipelines.one_diffusion

    for name in ("FluxPipeline", "StableDiffusion3Pipeline", "DiffusionPipeline"):
        assert getattr(diffusers, name).__module__.startswith("diffusers.")
    assert diffusers.OneDiffusionPipeline is imgdit.OneDiffusionPipeline
