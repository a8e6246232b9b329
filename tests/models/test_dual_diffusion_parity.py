"""`MMDiT` over the weights of a Dual Diffusion folder, against recorded passes of its transformer."""

import json
from shutil import copytree

import pytest
import torch
from dual_diffusion_cases import META, PIPELINE, assert_near, named, recorded, transformer
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from imgdit import MMDiT


@pytest.mark.parametrize("name", named("forward"))
@torch.no_grad()
def test_images_and_texts_are_predicted_as_recorded(name):
    model, (given, expected) = transformer(), recorded(name)
    tokens = {}
    hook = model.transformer_blocks[-1].register_forward_hook(lambda *args: tokens.update(image=args[2][0]))
    output = model(
        hidden_states=given.get("latents"),
        encoder_hidden_states=given["encoder_hidden_states"],
        pooled_projections=None,
        timestep=given["timestep"],
    )
    hook.remove()
    found = {"image": output.sample, "logits": output.text_logits, "image_tokens": tokens["image"]}
    for key, value in expected.items():
        assert_near(found[key], value, META["tolerances"]["forward"])


def test_every_weight_of_the_folder_is_read():
    weights = load_file(PIPELINE / "transformer/diffusion_pytorch_model.safetensors")
    model = transformer()
    assert sum(p.numel() for p in model.state_dict().values()) == sum(p.numel() for p in weights.values())
    assert torch.equal(model.proj_out.weight, weights["image_proj_out.weight"])
    assert torch.equal(model.norm_out.linear.bias, weights["image_norm_out.linear.bias"])
    assert model.config.text_vocab_size == META["vocab_size"]
    assert model.config.null_image_tokens == META["null_image_tokens"]


def test_a_folder_in_several_files_is_read_alike(tmp_path):
    weights = load_file(PIPELINE / "transformer/diffusion_pytorch_model.safetensors")
    save_torch_state_dict(
        weights, tmp_path, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size="100KB"
    )
    (tmp_path / "config.json").write_text((PIPELINE / "transformer/config.json").read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = MMDiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in transformer().state_dict().items())


def test_it_is_saved_with_our_names(tmp_path):
    transformer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "MMDiT"
    again = MMDiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in transformer().state_dict().items())


def test_a_folder_without_the_size_of_its_vocabulary(tmp_path):
    copytree(PIPELINE / "transformer", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="this SD3JointModelFlexible has no 'vocab_size'"):
        MMDiT.from_pretrained(tmp_path)
