"""Captions and images through other pipelines' components."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny import tiny_text_encoder, tiny_tokenizer, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel

from imgdit.images.latents import cell_size, encode_images
from imgdit.io.fingerprints import folder_hash
from imgdit.training.user_images.encoder import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A FLUX folder without a transformer."""
    torch.manual_seed(0)
    config = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
    clip = CLIPTextModel(
        CLIPTextConfig(**config, num_attention_heads=4, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    ).eval()
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        tiny_vae(),
        clip,
        tiny_tokenizer(),
        tiny_text_encoder(),
        tiny_tokenizer(),
        None,
    )
    path = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(path)
    return path, pipe


def test_a_flux_folder_gives_what_its_pipeline_gives(folder):
    path, pipe = folder
    encoder = Encoder(str(path))
    embeddings, pooled, _ = pipe.encode_prompt("a red cube", "a red cube")
    encoded = encoder.text("a red cube")
    assert encoded.embeddings.shape == (512, 32)
    torch.testing.assert_close(encoded.embeddings, embeddings[0].detach(), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(encoded.pooled, pooled[0].detach(), atol=1e-5, rtol=1e-5)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encode_images(pipe.vae, image[None] * 2 - 1)[0]
    assert torch.equal(encoder.latents(image), expected.half())
    assert encoder.cell == cell_size(pipe.vae) == 2


def test_a_hash_notices_any_change(tmp_path):
    part = tmp_path / "vae"
    part.mkdir()
    (part / "large").write_bytes(bytes(5 << 20))
    seen = {folder_hash([part])}
    with open(part / "large", "r+b") as file:
        file.seek(20)  # a name in the header
        file.write(b"x")
    seen.add(folder_hash([part]))
    (part / "config.json").write_text("{}")
    seen.add(folder_hash([part]))
    (part / "config.json").write_text("[]")
    seen.add(folder_hash([part]))
    assert len(seen) == 4
