import json
import shutil

import pytest
import torch
from diffusers import AutoencoderDC

from imgdit.images.latents import decode_latents, encode_images
from imgdit.io import atomic as files
from imgdit.io.fingerprints import weights_hash
from imgdit.scenes import latents
from imgdit.scenes.latents import (
    LOOKS,
    MAPS,
    OTHERS,
    VIEWS,
    SceneLatents,
    cache_latents,
    encode_scene,
    scene_views,
)
from imgdit.scenes.world import is_trained


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    stages = {"block_out_channels": (8, 8, 8, 16), "qkv_multiscales": ((),) * 4, "block_types": "ResBlock"}
    return AutoencoderDC(
        latent_channels=16,
        attention_head_dim=8,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in stages.items()},
    ).eval()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)


def test_looks_share_geometry_and_views_share_looks():
    for seed in range(60):
        views = scene_views(seed)
        assert len(views.looks) == VIEWS and {len(looks) for looks in views.looks} == {LOOKS}
        assert all(task in OTHERS for task in views.others)
        first, second = views.looks
        assert [look.with_camera(first[0].camera) for look in second] == list(first)
        turn = abs(second[0].camera.azimuth - first[0].camera.azimuth)
        assert 10 <= turn <= 40 and second[0].camera.distance == first[0].camera.distance
        for look in first:
            assert [(o.kind, o.x, o.y) for o in look.objects] == [(o.kind, o.x, o.y) for o in first[0].objects]
            assert all(is_trained(o.kind, o.colour, look.style) for o in look.objects)
            assert len({o.colour for o in look.objects}) == len(look.objects)
        assert [o.colour for o in first[1].objects] == [o.colour for o in first[0].objects]
    assert scene_views(7) == scene_views(7) != scene_views(7, "heldout")


def test_cache_holds_what_is_encoded_and_is_made_once(vae, tmp_path, small_shards):
    cache_latents(vae, tmp_path, 3)
    cached = SceneLatents(tmp_path, autoencoder=weights_hash(vae, dtype=torch.float16))
    assert len(cached) == 4  # whole shards
    row = encode_scene(vae, 3)
    assert row["pictures"].shape[:2] == (VIEWS, LOOKS) and row["maps"].shape[:2] == (VIEWS, len(MAPS))
    assert torch.equal(cached.read(3, "pictures", 1, 2), row["pictures"][1, 2].float())
    assert torch.equal(cached.read(3, "maps", 0, 1), row["maps"][0, 1].float())
    assert torch.equal(cached.read(3, "others", 1), row["others"][1].float())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cache_latents(vae, tmp_path, 3)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_parts_make_the_same_cache(vae, tmp_path, small_shards):
    cache_latents(vae, tmp_path / "whole", 4)
    cache_latents(vae, tmp_path / "parts", 4, part=(2, 2))
    with pytest.raises(ValueError, match="holds no cached latents of the split 'train'"):
        SceneLatents(tmp_path / "parts")  # its first shard is missing
    cache_latents(vae, tmp_path / "parts", 4, part=(1, 2))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    with pytest.raises(ValueError, match=r"part k of n"):
        cache_latents(vae, tmp_path / "parts", 4, part=(3, 2))


def test_latents_of_another_autoencoder_are_refused(vae, tmp_path, small_shards):
    cache_latents(vae, tmp_path, 2)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "autoencoder": "0123"}))
    for use in (
        lambda: cache_latents(vae, tmp_path, 4),
        lambda: SceneLatents(tmp_path, autoencoder=weights_hash(vae, dtype=torch.float16)),
    ):
        with pytest.raises(ValueError, match=r"0123.*choose another folder"):
            use()


def test_a_full_disk_costs_one_shard(vae, tmp_path, small_shards, monkeypatch):
    cache_latents(vae, tmp_path, 2)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(ValueError, match=r"train-00001.*No space left.*before it are complete"):
        cache_latents(vae, tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "train-00000.safetensors"]
    assert len(SceneLatents(tmp_path)) == 2
    shutil.rmtree(tmp_path)


def test_scaling_is_undone(vae):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = encode_images(vae, pixels)
        made = decode_latents(vae, plain)
        vae.register_to_config(scaling_factor=0.5)
        try:
            assert torch.allclose(encode_images(vae, pixels), plain * 0.5)
            assert torch.allclose(decode_latents(vae, plain * 0.5), made, atol=1e-5)
        finally:
            vae.register_to_config(scaling_factor=1.0)


def test_fingerprint_tells_weights_apart(vae):
    before = weights_hash(vae, dtype=torch.float16)
    assert weights_hash(vae, dtype=torch.float16) == before
    weight = next(vae.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
        assert weights_hash(vae, dtype=torch.float16) != before
        weight[0, 0, 0, 0] -= 1
