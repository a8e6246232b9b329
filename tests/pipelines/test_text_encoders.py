"""A diffusion language model as the text encoder of an image pipeline."""

import pytest
import torch
from tiny import rope_config, tiny_pipeline
from transformers import LlamaConfig, LlamaModel

from imgdit import DiffusionPipeline, ImgDiTPipeline


@pytest.fixture
def pipe():
    plain = tiny_pipeline(rope_config())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(plain.tokenizer), hidden_size=plain.transformer.config.joint_attention_dim,
        intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, is_causal=False, use_cache=False, bos_token_id=None,
        eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    pipe = ImgDiTPipeline(**{**plain.components, "text_encoder": LlamaModel(config).eval()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts):
    generators = [torch.Generator().manual_seed(1) for _ in prompts]
    return pipe(prompts, num_inference_steps=2, output_type="latent", generator=generators).images


def test_every_token_sees_the_words_behind_it(pipe):
    embeds = [pipe._encode_text([text], 16, torch.device("cpu"))[0] for text in ("a red cube", "a red cone")]
    assert not torch.allclose(embeds[0][0, 0], embeds[1][0, 0])


def test_a_prompt_does_not_depend_on_its_batch(pipe):
    together = draw(pipe, ["a red cube", "a blue cone on a wooden floor"])
    torch.testing.assert_close(draw(pipe, ["a red cube"])[0], together[0], rtol=2e-5, atol=2e-5)


def test_it_is_saved_and_loaded_with_the_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.text_encoder.config.is_causal is False
    torch.testing.assert_close(draw(again, ["a red cube"]), draw(pipe, ["a red cube"]), rtol=2e-5, atol=2e-5)
