"""Published condition adapters: settings by their keys, and what is refused by name."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_control import flux, lora_file
from tiny_flux2 import flux2
from tiny_krea2 import krea2
from typer.testing import CliRunner

from imgdit import OmniControl
from imgdit.apps.cli import app
from imgdit.lora.files import AdapterInfo, load_adapter, read_adapter, read_info
from imgdit.lora.guess import family_of

ALL = {"level": "image", "acts_on": "all"}
FILES = {
    "FLUX.2": (
        "diffusion_model.single_blocks.0.linear1.lora_A.weight",
        (288, 32),
        AdapterInfo(index=10.0, **ALL),
    ),
    "Qwen-Image": (
        "transformer_blocks.0.img_mlp.net.2.lora_A.default.weight",
        (32, 128),
        AdapterInfo(index=1.0, prompt_prefix="Context_Control. ", **ALL),
    ),
    "Krea 2": (
        "diffusion_model.blocks.0.attn.wq.lora_A.weight",
        (64, 64),
        AdapterInfo(index=1.0, level="clean", acts_on="all"),
    ),
    "Z-Image": (
        "transformer.noise_refiner.0.attention.to_q.lora_A.weight",
        (32, 32),
        AdapterInfo(position="subject", acts_on="all"),
    ),
    "FLUX.1": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (32, 32), AdapterInfo()),
}


def write(path, key, shape, **metadata):
    tensors = {key: torch.ones(2, shape[1]), key.replace("lora_A", "lora_B"): torch.ones(shape[0], 2)}
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("family", FILES)
def test_files_without_a_header_have_the_settings_of_what_is_published(family, tmp_path):
    key, shape, info = FILES[family]
    path = write(tmp_path / "a.safetensors", key, shape)
    file = read_adapter(path)
    assert family in file.family and file.info == read_info(path) == info
    assert (file.preset is None) == (info == AdapterInfo())
    told = CliRunner().invoke(app, ["lora", "inspect", str(path)]).output
    assert f"of {family}" in told and all(f"{name}: {value}" in told for name, value in vars(info).items() if value)
    path = write(tmp_path / "b.safetensors", key, shape, imgdit='{"task": "depth"}')
    assert read_adapter(path).info == AdapterInfo(task="depth")


def test_adapters_of_the_same_keys_are_told_by_name_or_header(tmp_path):
    key, shape, edit = FILES["Krea 2"]
    identity = AdapterInfo(index=1.0, position="centred", **ALL)
    assert read_info(write(tmp_path / "krea2_identity_edit_v1_2.safetensors", key, shape)) == identity
    assert read_info(write(tmp_path / "a.safetensors", key, shape, ss_base_model_version="krea2_edit")) == identity
    assert read_info(write(tmp_path / "b.safetensors", key, shape, ss_base_model_version="krea2")) == edit


NAMES = {
    "layers.0.attention.to_q": "Z-Image or Ideogram 4",
    "layers.0.adaln_modulation": "Ideogram 4",
    "layers.0.self_attention.to_q": "ERNIE-Image",
    "txt_mode_blocks.0.attn.to_q": "FLUX.3",
    "layers.0.mlp.up_proj": "a language model",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_families_share_are_said_to_be_of_any_of_them(name):
    assert family_of([name]) == NAMES[name]


def test_settings_of_a_preset_act(tmp_path):
    control = OmniControl(flux2())
    key, _, info = FILES["FLUX.2"]
    report = control.load(write(tmp_path / "a.safetensors", key, (288, 32)))
    assert report.info == control.infos["a"] == info
    settings = "index=10.0, level='image', acts_on='all'"
    assert f"does not say how it was trained; taken for a {report.preset}: {settings}" in str(report)
    said = write(tmp_path / "b.safetensors", key, (288, 32), imgdit='{"task": "depth"}')
    assert "taken for" not in str(control.load(said))


def test_loras_of_further_channels_are_refused(tmp_path):
    for build, layer in ((krea2, "img_in"), (flux2, "x_embedder")):
        pipe = build()
        inner = pipe.transformer.get_submodule(layer).weight.shape
        path = write(tmp_path / "a.safetensors", f"transformer.{layer}.lora_A.weight", (inner[0], 2 * inner[1]))
        with pytest.raises(ValueError, match="as further channels"):
            OmniControl(pipe).load(path)
        assert not hasattr(pipe.transformer, "peft_config")


BESIDE = (
    "control_layers.0.attention.to_q.weight",
    "control_transformer_blocks.0.attn.to_q.weight",
    "control_img_in.weight",
    "controlnet_blocks.0.weight",
    "control_all_x_embedder.2-1.weight",
)


@pytest.mark.parametrize("key", BESIDE)
def test_networks_beside_the_transformer_are_refused(key, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "union.safetensors")
    with pytest.raises(ValueError, match="is a ControlNet, a network beside the transformer"):
        read_adapter(tmp_path / "union.safetensors")


def test_files_of_other_families_are_refused_by_both_names(tmp_path):
    flux1, other = flux(), flux2()
    path = lora_file(tmp_path / "flux2.safetensors", other.transformer, r".*to_qkv_mlp_proj|.*attn\.to_q")
    with pytest.raises(ValueError, match=r"names of FLUX\.2; the model is a FluxTransformer2DModel \(FLUX\.1\)"):
        load_adapter(flux1, path)
    path = lora_file(tmp_path / "flux1.safetensors", flux1.transformer, r".*norm1\.linear|.*attn\.to_q|.*proj_mlp")
    with pytest.raises(ValueError, match=r"for another base model.*Flux2Transformer2DModel \(FLUX\.2\)"):
        load_adapter(other, path)
