"""LoRA files: each dialect in and out, what is refused, and what the report says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_control import STYLE_TARGETS, flux, lora_file
from typer.testing import CliRunner

from imgdit.apps.commands import lora
from imgdit.lora.dialects import LoraPair, from_diffusers, to_diffusers
from imgdit.lora.files import (
    AdapterInfo,
    active_adapters,
    adapter_pairs,
    attach_adapter,
    read_adapter,
    write_adapter,
)

EVERY = (
    r".*(x_embedder|context_embedder|norm_out\.linear|^proj_out|proj_out|norm1\.linear|norm1_context\.linear|norm\.linear"
    r"|to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.2|proj_mlp|linear_[12])"
)


@pytest.fixture(scope="module")
def model():
    return flux(guidance_embeds=True).transformer


def changes(pairs):
    """What each LoRA adds to its weight."""
    return {name: pair.up @ pair.down for name, pair in pairs.items()}


def assert_same_changes(got, expected):
    got, expected = changes(got), changes(expected)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("targets", [EVERY, STYLE_TARGETS, r"single_.*(to_k|proj_mlp)"])
@pytest.mark.parametrize("dialect", ["peft", "comfyui"])
def test_dialects_round_trip(model, tmp_path, targets, dialect):
    original = read_adapter(lora_file(tmp_path / "a.safetensors", model, targets)).pairs
    again = to_diffusers(from_diffusers(original, dialect))
    assert again.dialect == dialect and again.unused == ()
    assert_same_changes(again.pairs, original)


def test_comfyui_names_are_fluxs_own(model, tmp_path):
    pairs = read_adapter(lora_file(tmp_path / "a.safetensors", model, EVERY)).pairs
    tensors = from_diffusers(pairs, "comfyui")
    assert {"diffusion_model.img_in", "diffusion_model.final_layer.adaLN_modulation.1"} < {
        key.rpartition(".lora_")[0] for key in tensors
    }
    assert tensors["diffusion_model.single_blocks.1.linear1.lora_B.weight"].shape == (32 * 7, 8)
    assert tensors["diffusion_model.double_blocks.0.txt_attn.qkv.lora_A.weight"].shape == (6, 32)
    # FLUX's final modulation has the shift first, diffusers' the scale.
    ours = pairs["norm_out.linear"].up
    theirs = tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"]
    assert torch.equal(theirs, torch.cat([ours[32:], ours[:32]]))


def test_kohya_names_and_alphas():
    """A fused LoRA with one down-projection for query, key and value, as kohya's trainer writes it."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 32, generator=generator), torch.randn(96, 4, generator=generator)
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": down,
        "lora_unet_no_such_module.lora_down.weight": down,
        "lora_unet_single_blocks_0_linear2.lora_down.weight": down,
    }
    read = to_diffusers(tensors)
    assert read.dialect == "kohya"
    assert list(read.pairs) == [f"transformer_blocks.1.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    full = torch.cat([pair.up @ pair.down for pair in read.pairs.values()])
    torch.testing.assert_close(full, up @ down * 0.5)
    assert len(read.unused) == 3


def test_alpha_of_a_peft_header_counts(tmp_path):
    down, up = torch.randn(4, 16), torch.randn(32, 4)
    tensors = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    header = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.alpha_pattern": {}}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(header)})
    pair = read_adapter(tmp_path / "a.safetensors").pairs["x_embedder"]
    torch.testing.assert_close(pair.up, up * 2)


def test_report_ranks_and_inactive_loading(tmp_path):
    model = flux().transformer
    path = lora_file(tmp_path / "mixed.safetensors", model, rank=2)
    tensors = load_file(path)
    tensors["transformer.x_embedder.lora_A.weight"] = torch.randn(5, 16)
    tensors["transformer.x_embedder.lora_B.weight"] = torch.randn(32, 5)
    tensors["transformer.transformer_blocks.0.attn.to_qq.lora_A.weight"] = torch.randn(2, 32)
    tensors["transformer.transformer_blocks.0.attn.to_qq.lora_B.weight"] = torch.randn(32, 2)
    tensors["transformer.lonely.lora_A.weight"] = torch.randn(2, 32)
    save_file(tensors, path)
    report = attach_adapter(model, read_adapter(path), "mixed")
    assert report.ranks == (2, 5)
    assert [key for key, _ in report.unused] == ["transformer.lonely.lora_A.weight", "transformer_blocks.0.attn.to_qq"]
    assert dict(report.unused)["transformer_blocks.0.attn.to_qq"] == "transformer_blocks.0.attn.to_q"
    assert "not used" in str(report) and f"{len(report.matched)} modules of rank 2, 5" in str(report)
    assert active_adapters(model) == []
    assert set(model.x_embedder.scaling.values()) == {1.0}
    pairs = adapter_pairs(model, "mixed")
    assert torch.equal(pairs["x_embedder"].down, tensors["transformer.x_embedder.lora_A.weight"])


def test_settings_travel_in_the_header(tmp_path):
    info = AdapterInfo("FLUX.1-dev", "canny", (0, -4.0), 2.0, "independent", 512, "Apache-2.0")
    pair = LoraPair(torch.randn(2, 16), torch.randn(32, 2))
    path = write_adapter(tmp_path / "a.safetensors", {"x_embedder": pair}, info)
    assert read_adapter(path).info == info
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_file_that_is_there_stays_whole_where_the_disk_is_full(tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "a.safetensors", {"x_embedder": LoraPair(torch.ones(2, 16), torch.ones(32, 2))})
    before = path.read_bytes()

    def half(tensors, place, metadata=None):
        Path(place).write_bytes(before[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imgdit.io.atomic.save_file", half)
    with pytest.raises(ValueError, match="No space left"):
        write_adapter(path, {"x_embedder": LoraPair(torch.zeros(2, 16), torch.zeros(32, 2))})
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


REFUSED = {
    "pickle.bin": (b"x", "pickled weights can run code"),
    "broken.safetensors": (b"\x10\0\0\0\0\0\0\0nonsense", "damaged"),
    "text.safetensors": (b"not a model", "damaged"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "page.safetensors": (b"\n<!DOCTYPE html><html>Log in</html>", "a web page.*download the file again"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / name)


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="pickled weights"):
        read_adapter("someone/repository", weight_name="lora.bin")
    with pytest.raises(ValueError, match=r"no .safetensors file"):
        read_adapter(tmp_path)
    save_file({"transformer.x.lora_A.weight": torch.ones(1)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA of a transformer"):
        read_adapter(tmp_path / "half.safetensors")
    save_file({"transformer.x.lora_magnitude_vector": torch.ones(1)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="DoRA"):
        read_adapter(tmp_path / "dora.safetensors")
    model = flux().transformer
    wide = lora_file(tmp_path / "wide.safetensors", flux(num_attention_heads=4).transformer)
    with pytest.raises(ValueError, match=r"its \S+ is 64x64 \(out x in\), this model's is 32x32"):
        attach_adapter(model, read_adapter(wide), "wide")
    assert not hasattr(model, "peft_config")
    path = write_adapter(tmp_path / "o.safetensors", {"blocks.0.qkv": LoraPair(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(ValueError, match=r"has no module 'blocks\.0\.qkv'"):
        attach_adapter(model, read_adapter(path), "other")
    with pytest.raises(ValueError, match="has no name in FLUX's own repository"):
        from_diffusers(read_adapter(path).pairs, "comfyui")
    good = read_adapter(lora_file(tmp_path / "good.safetensors", model))
    attach_adapter(model, good, "good")
    with pytest.raises(ValueError, match="loaded already"):
        attach_adapter(model, good, "good")
    with pytest.raises(ValueError, match="did you mean 'good'"):
        attach_adapter(model, good, "goad", hotswap=True)


def test_commands(model, tmp_path):
    path = lora_file(tmp_path / "a.safetensors", model, info=AdapterInfo(task="canny", scale=2.0))
    shown = CliRunner().invoke(lora.app, ["inspect", str(path)])
    assert shown.exit_code == 0
    for part in ("peft names", "rank 2", "float32", "2 x transformer_blocks.*.attn.to_q", "task: canny", "scale: 2.0"):
        assert part in shown.stdout
    done = CliRunner().invoke(lora.app, ["convert", str(path), "--to", "comfyui"])
    assert done.exit_code == 0, done.output
    back = read_adapter(tmp_path / "a.comfyui.safetensors")
    assert back.dialect == "comfyui" and back.info.task == "canny"
    assert_same_changes(back.pairs, read_adapter(path).pairs)
    assert CliRunner().invoke(lora.app, ["convert", str(path), "--to", "onnx"]).exit_code == 2
