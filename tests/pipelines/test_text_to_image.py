import json
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderDC, AutoModel, AutoPipelineForText2Image
from peft import LoraConfig
from safetensors import safe_open
from tiny import rope_config, sincos_config, tiny_pipeline
from tiny_caches import STEP_CACHES

import imgdit
from imgdit.pipelines.text_to_image import pack, unpack

KINDS = {"rope": None, "sincos": sincos_config(), "guidance": rope_config(guidance_embeds=True)}


@pytest.fixture(params=KINDS)
def pipe(request):
    return tiny_pipeline(KINDS[request.param])


def run(pipe, prompt="a red cube", seed=0, **kwargs):
    kwargs = {
        "num_inference_steps": 3,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **kwargs,
    }
    return pipe(prompt, **kwargs).images


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_pack_is_fluxs_and_unpack_returns():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8)
    tokens = pack(latents, 2)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 2, (3, 4)), latents)


def test_outputs(pipe):
    images = run(pipe, ["a red cube", "a blue cone"], output_type="pil", num_images_per_prompt=2)
    assert len(images) == 4 and all(isinstance(p, PIL.Image.Image) and p.size == (16, 16) for p in images)
    array = run(pipe, output_type="np", height=8, width=24)
    assert isinstance(array, np.ndarray) and array.shape == (1, 8, 24, 3) and 0 <= array.min() <= array.max() <= 1
    assert run(pipe, output_type="pt").shape == (1, 3, 16, 16)
    assert run(pipe).shape == (1, 4, 8, 8)
    assert isinstance(pipe("a cube", num_inference_steps=1, return_dict=False), tuple)


def test_a_seed_gives_the_same_image(pipe):
    assert torch.equal(run(pipe), run(pipe))
    assert (run(pipe) - run(pipe, seed=1)).abs().max() > 0.1
    assert (run(pipe) - run(pipe, "a blue sphere")).abs().max() > 1e-4


def test_batch_and_its_order_do_not_matter(pipe):
    """Prompts of unequal lengths are padded; the padding is seen by nobody."""
    prompts = ["a red cube", "a small blue cone right of the large sphere on a photo", ""]
    one = [run(pipe, prompt, seed=i) for i, prompt in enumerate(prompts)]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    close(run(pipe, prompts, generator=generators), torch.cat(one))
    generators = [torch.Generator().manual_seed(i) for i in (2, 0, 1)]
    close(run(pipe, [prompts[i] for i in (2, 0, 1)], generator=generators), torch.cat([one[i] for i in (2, 0, 1)]))


def test_embeddings_in_and_out(pipe):
    guided = not pipe.transformer.config.guidance_embeds
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    names += ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    encoded = dict(zip(names, pipe.encode_prompt("a red cube", "sketch" if guided else None, guided)))
    expected = run(pipe, negative_prompt="sketch" if guided else None)
    close(run(pipe, None, **encoded), expected)
    only = {"prompt_embeds": encoded["prompt_embeds"], "prompt_embeds_mask": encoded["prompt_embeds_mask"]}
    close(run(pipe, None, **only), run(pipe))


def test_pooled_text_is_the_masked_mean(pipe):
    embeds, _, pooled, _, mask, _ = pipe.encode_prompt(["a red cube", "cone"], do_classifier_free_guidance=False)
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    close(pooled, torch.stack([embeds[0].mean(0), embeds[1, :2].mean(0)]), 1e-6)


def test_latents_in(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(pipe, latents=noise, generator=None), run(pipe))


def test_guidance_is_one_batch_and_follows_its_formula():
    pipe = tiny_pipeline()
    batches = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    plain = run(pipe, guidance_scale=1.0, num_inference_steps=1)
    negative = run(pipe, "sketch", guidance_scale=1.0, num_inference_steps=1)
    guided = run(pipe, negative_prompt="sketch", guidance_scale=3.0, num_inference_steps=1)
    assert batches == [1, 1, 2]
    close(guided, negative + 3.0 * (plain - negative))
    handle.remove()
    close(run(pipe, negative_prompt="a red cube", guidance_scale=7.0), run(pipe, guidance_scale=1.0))


def test_guidance_interval():
    pipe = tiny_pipeline()
    batches = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    run(pipe, num_inference_steps=5, guidance_interval=(0.35, 0.85))
    assert {1, 2} == set(batches)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert batches == [2 if 0.35 <= s <= 0.85 else 1 for s in sigmas]
    close(run(pipe, guidance_interval=(0.0, 0.0)), run(pipe, guidance_scale=1.0), 0)


def test_guidance_of_a_distilled_model_is_an_input():
    pipe = tiny_pipeline(KINDS["guidance"])
    assert (run(pipe, guidance_scale=2.0) - run(pipe, guidance_scale=5.0)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no use for a negative prompt"):
        run(pipe, negative_prompt="sketch")


def test_callbacks_see_change_and_interrupt(pipe):
    seen = []

    def stop_at_1(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape, pipe.num_timesteps))
        pipe._interrupt = step == 1
        return tensors

    run(pipe, num_inference_steps=4, callback_on_step_end=stop_at_1)
    assert [s[0] for s in seen] == [0, 1] and seen[0][1:] == (1000.0, (1, 4, 8, 8), 4)
    zeros = run(pipe, callback_on_step_end=lambda p, i, t, x: {"latents": torch.zeros_like(x["latents"])})
    assert not zeros.any()
    assert torch.equal(run(pipe, callback_on_step_end=lambda *_: None), run(pipe))


def test_a_cut_prompt_is_said(pipe, caplog):
    import logging

    logging.getLogger("diffusers").propagate = True
    run(pipe, "a red cube on a blue sphere", max_sequence_length=4)
    assert "the prompt has 8 tokens, 4 are read; cut off: 'on a blue sphere'" in caplog.text


def pipeline_of_scenes(owner=imgdit.ImgDiTPipeline):
    """A tiny pipeline with the tokenizer of scenes."""
    from transformers import T5Config, T5EncoderModel

    from imgdit.scenes.tokenizer import caption_tokenizer

    tokenizer = caption_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_heads=4, num_layers=1)
    parts = {**tiny_pipeline().components, "tokenizer": tokenizer, "text_encoder": T5EncoderModel(config).eval()}
    pipe = owner(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_of_people_are_read_as_captions(caplog):
    import logging

    logging.getLogger("diffusers").propagate = True
    pipe = pipeline_of_scenes()
    caption = run(pipe, "a red sphere at night")
    assert torch.equal(run(pipe, "at night: one Red BALL!"), caption) and not caplog.text
    for _ in range(2):
        assert torch.equal(run(pipe, ["a white zebra, ball red, night"]), caption)
    assert caplog.text.count('never taught "white" (nearest: yellow), "zebra"') == 1
    pipe.prompt_words = None
    assert torch.equal(run(pipe, "a red sphere at night"), caption)
    assert not torch.equal(run(pipe, "at night: one Red BALL!"), caption)
    assert imgdit.ImgDiTPipeline(**tiny_pipeline().components).prompt_words is None


def test_instructions_and_prompts_with_a_token_are_taken_as_they_are(monkeypatch):
    pipe = pipeline_of_scenes(imgdit.OneDiffusionPipeline)
    said = []

    def encode(self, texts, options):
        said.append(texts.prompt)
        raise RuntimeError

    monkeypatch.setattr(imgdit.OneDiffusionPipeline, "_encode_texts", encode)
    image = PIL.Image.new("RGB", (32, 32))
    for prompt, task in (("a blue ball", None), ("[[text2image]] a blue ball", None), ("a blue ball", "editing")):
        with pytest.raises(RuntimeError):
            pipe(prompt, task=task, height=32, width=32, **({"images": [image]} if task else {}))
    assert [one[0].removeprefix("[[text2image]]").strip() for one in said[:2]] == ["a blue sphere", "a blue ball"]
    assert said[2][0].endswith("a blue ball")


def test_unknown_words_are_said_once(caplog):
    import logging

    logging.getLogger("diffusers").propagate = True
    pipe = pipeline_of_scenes()
    pipe.prompt_words = None
    for _ in range(2):
        run(pipe, "a red zebra left of a cube")
    assert caplog.text.count("never seen, spelled in bytes: zebra") == 1
    run(pipe, "a quokka")
    assert "spelled in bytes: quokka" in caplog.text


@pytest.mark.parametrize("load", [imgdit.ImgDiTPipeline, imgdit.DiffusionPipeline, AutoPipelineForText2Image])
def test_save_and_load(pipe, load, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["imgdit", "MMDiT"]
    assert index["scheduler"] == ["imgdit", "MultiFrameFlowMatchScheduler"]
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is imgdit.ImgDiTPipeline
    loaded.set_progress_bar_config(disable=True)
    close(run(loaded), run(pipe))
    half = load.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == torch.bfloat16
    assert (run(half) - run(pipe)).norm() / run(pipe).norm() < 0.05


@pytest.mark.parametrize("load", [imgdit.ImgDiTPipeline, imgdit.DiffusionPipeline])
def test_loads_from_the_hub_without_trusting_its_code(load, tmp_path):
    """The Hub's calls are replaced by a folder: which files are asked for and how they are read is diffusers'."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "repo")
    files = sorted(str(p.relative_to(tmp_path / "repo")) for p in (tmp_path / "repo").rglob("*") if p.is_file())
    info = mock.Mock(siblings=[mock.Mock(rfilename=name) for name in files], sha="0" * 40)
    base = "diffusers.pipelines.pipeline_utils"

    def snapshot(repo, allow_patterns=None, **kwargs):
        return str(tmp_path / "repo")

    with (
        mock.patch(f"{base}.model_info", return_value=info) as asked,
        mock.patch(f"{base}.hf_hub_download", return_value=str(tmp_path / "repo" / "model_index.json")),
        mock.patch(f"{base}.snapshot_download", side_effect=snapshot),
        mock.patch(
            "diffusers.configuration_utils.hf_hub_download", return_value=str(tmp_path / "repo/model_index.json")
        ),
    ):
        loaded = load.from_pretrained("someone/pictures", local_files_only=False)
    assert asked.called and type(loaded) is imgdit.ImgDiTPipeline
    loaded.set_progress_bar_config(disable=True)
    close(run(loaded), run(pipe))


def test_auto_model_and_from_pipe(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")) is imgdit.MMDiT
    again = AutoPipelineForText2Image.from_pipe(pipe)
    assert again.transformer is pipe.transformer
    assert imgdit.ImgDiTPipeline.from_pipe(pipe).vae is pipe.vae


def test_vae_slicing_and_tiling(pipe):
    expected = run(pipe, ["a cube", "a cone"], output_type="pt", height=32, width=32)
    pipe.vae.enable_slicing()
    close(run(pipe, ["a cube", "a cone"], output_type="pt", height=32, width=32), expected)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    tiled = run(pipe, ["a cube", "a cone"], output_type="pt", height=32, width=32)
    assert tiled.shape == expected.shape and (tiled - expected).abs().mean() < 0.1


def lora(pipe, adapter="red", seed=1):
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "net.2"]), adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if f"lora_A.{adapter}" in name or f"lora_B.{adapter}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def save_lora(pipe, folder, adapter="red", **kwargs):
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.transformer, adapter_name=adapter)
    metadata = {"transformer_lora_adapter_metadata": pipe.transformer.peft_config[adapter].to_dict()}
    pipe.save_lora_weights(folder, transformer_lora_layers=layers, **{**metadata, **kwargs})


def test_lora_round_trip_with_metadata(pipe, tmp_path):
    plain = run(pipe)
    lora(pipe)
    expected = run(pipe)
    assert (expected - plain).abs().max() > 1e-3
    save_lora(pipe, tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert all(key.startswith("transformer.") for key in opened.keys())  # noqa: SIM118
    assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == 8
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), plain)
    for source in (tmp_path, file):
        pipe.load_lora_weights(source, adapter_name="again")
        assert pipe.transformer.peft_config["again"].lora_alpha == 8
        close(run(pipe), expected)
        close(run(pipe, joint_attention_kwargs={"scale": 0.0}), plain)
        pipe.set_adapters("again", 0.5)
        half = run(pipe)
        assert (half - plain).abs().max() > 1e-4 and (half - expected).abs().max() > 1e-4
        pipe.set_adapters("again", 1.0)
        pipe.fuse_lora()
        close(run(pipe), expected)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    close(run(pipe), plain)  # fusing and unfusing rounds


def test_a_pickled_lora_is_refused(pipe, tmp_path):
    lora(pipe)
    save_lora(pipe, tmp_path, safe_serialization=False, transformer_lora_adapter_metadata=None)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".bin"
    for call in (
        lambda: pipe.load_lora_weights(tmp_path, weight_name=file.name),
        lambda: pipe.load_lora_weights(file),
        lambda: pipe.load_lora_weights(tmp_path, use_safetensors=False),
    ):
        with pytest.raises(ValueError, match=r"expected a \.safetensors file: pickled weights can run code"):
            call()
    with pytest.raises(OSError):
        pipe.load_lora_weights(tmp_path)


def test_pickled_model_weights_are_refused(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(
        OSError, match=r"_model\.safetensors found .* holds pickled weights \(diffusion_pytorch_model\.bin\)"
    ):
        imgdit.MMDiT.from_pretrained(tmp_path / "model")
    pipe.transformer.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(OSError, match=r"there are diffusion_pytorch_model\.fp16\.safetensors: pass variant="):
        imgdit.MMDiT.from_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="pickled weights can run code"):
        imgdit.MMDiT.from_pretrained(tmp_path / "model", use_safetensors=False)
    pipe.save_pretrained(tmp_path / "pipe", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        imgdit.DiffusionPipeline.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("cache", STEP_CACHES)
def test_step_caches(cache):
    """With nothing skipped they change nothing; with something they do; removed, all is bitwise as before."""
    pipe = tiny_pipeline()
    configs = STEP_CACHES[cache](pipe)
    plain = run(pipe, num_inference_steps=6)
    for config, changes in zip(configs, (False, True)):
        pipe.transformer.enable_cache(config)
        got = [run(pipe, num_inference_steps=6) for _ in range(2)]
        assert torch.equal(*got), "a second run starts afresh"
        assert ((got[0] - plain).abs().max() > 1e-6) == changes
        pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, num_inference_steps=6), plain)


def test_an_autoencoder_of_another_kind(tmp_path):
    """AutoencoderDC: a latent without a distribution, its own compression ratio, no shift factor."""
    torch.manual_seed(0)
    blocks = {"block_types": "ResBlock", "block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1)}
    blocks["qkv_multiscales"] = ((), (), ())
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=8, downsample_block_type="conv", **sides)
    pipe = tiny_pipeline()
    pipe = imgdit.ImgDiTPipeline(**{**pipe.components, "vae": vae.eval()})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae_scale_factor == 4 and pipe.default_size == 32
    assert run(pipe, output_type="pt").shape == (1, 3, 32, 32)
    pipe.save_pretrained(tmp_path)
    loaded = imgdit.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    close(run(loaded, output_type="pt"), run(pipe, output_type="pt"))


def test_offload_and_other_homes(pipe):
    expected = run(pipe, output_type="pt")
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1,
    )  # fmt: skip
    close(run(pipe, output_type="pt"), expected, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 18}, r"multiples of 4 pixels, got 18x16; try 16x16"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 3, 32)}, "give either prompt or prompt_embeds, not both"),
        ({"prompt": 3}, "prompt must be a string or a list of strings, got int"),
        ({"prompt": []}, "empty list"),
        ({"negative_prompt": ["a", "b"]}, "got 2 negative prompts for 1 prompts"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 8)}, r"must be \(1, tokens, 32\), got \(1, 3, 8\)"),
        ({"guidance_scale": -1.0}, "must not be negative"),
        ({"guidance_interval": (0.8, 0.2)}, "0 <= low <= high <= 1"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents must be \(1, 4, 8, 8\), got \(1, 4, 4, 4\)"),
        ({"output_type": "jpeg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent', got 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"callbacks may ask for .*, got \['noise'\]"),
        ({"joint_attention_kwargs": {"scales": 1}}, r"knows only 'scale', got \['scales'\]"),
    ],
)
def test_bad_input(kwargs, message):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"prompt": "a cube", **kwargs})


def test_an_image_larger_than_the_position_table():
    pipe = tiny_pipeline(sincos_config())
    with pytest.raises(ValueError, match="52x16 pixels are 13x4 tokens, the model's positions end at 12"):
        run(pipe, height=52)


def test_unknown_keywords_are_refused():
    pipe = tiny_pipeline()
    with pytest.raises(TypeError, match="num_steps"):
        pipe("a cube", num_steps=3)
    with pytest.raises(TypeError, match="image_rotary"):
        pipe.transformer(image_rotary=1)
