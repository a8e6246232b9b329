"""Hooks and sparse autoencoders on language models that write about images, and LoRA on the tokens of an answer."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_text import make_model
from tiny_vision import SPECIAL, make_vision_pipe, noise_image
from transformers import Qwen2Config, Qwen2ForCausalLM

from imgdit.family import find_family
from imgdit.lora import AdapterRows, acting_on
from imgdit.models.masked_lm import masked_logits
from imgdit.sae.config import SAEConfig
from imgdit.sae.hooks import find_hookpoints, hooked
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import steer

POINT = "model.model.layers.0"
CALL = {"gen_length": 4, "num_inference_steps": 2, "output_type": "seq"}


@pytest.fixture(scope="module")
def pipe():
    found = make_vision_pipe()
    found.set_progress_bar_config(disable=True)
    return found


def said(pipe, **options):
    return pipe(noise_image(30, 40, 1), "What is it?", **{**CALL, **options}).sequences


@pytest.mark.parametrize("point", [POINT, "model.model.layers.0.self_attn", "model.model.layers.0.mlp.down_proj"])
@pytest.mark.parametrize("cache", [None, "prompt"])
def test_identity_change_removal(pipe, point, cache):
    plain, shapes, levels = said(pipe, cache=cache), [], []

    def same(tokens):
        shapes.append(tokens.values.shape)
        levels.append(tokens.call.timestep)
        return tokens.values

    with hooked(pipe, {point: same}):
        assert torch.equal(said(pipe, cache=cache), plain)
    assert shapes[-1][2] == 32 and tuple(find_hookpoints(pipe, [point])) == (point,)
    masked = [level for level in levels if level]
    assert masked == sorted(masked, reverse=True) and masked[0] <= 1000 and len(masked) == 2
    with hooked(pipe, {point: lambda tokens: -3 * tokens.values}):
        changed = pipe.choose(noise_image(30, 40, 1), "Red?", ["yes", "no"]).log_likelihoods
    assert not torch.equal(changed, pipe.choose(noise_image(30, 40, 1), "Red?", ["yes", "no"]).log_likelihoods)
    assert torch.equal(said(pipe, cache=cache), plain)


def test_features_are_steered(pipe):
    sae = SparseAutoencoder(SAEConfig(32, 64, k=8, hookpoint=POINT), generator=torch.Generator().manual_seed(0))
    sae.requires_grad_(False)
    plain = pipe.choose(noise_image(30, 40, 1), "Red?", ["yes", "no"]).log_likelihoods
    with steer(pipe, sae, {3: 1.0}):
        found = pipe.choose(noise_image(30, 40, 1), "Red?", ["yes", "no"]).log_likelihoods
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    with steer(pipe, sae, dict.fromkeys(range(64), 8.0)):
        assert not torch.equal(pipe.choose(noise_image(30, 40, 1), "Red?", ["yes", "no"]).log_likelihoods, plain)


def test_the_level_is_the_fraction_of_masks():
    model = make_vision_pipe().model
    family, mask = find_family(model), SPECIAL["mask"]
    ids = torch.tensor([[5, mask, 6, mask], [5, 7, 6, mask]])
    embeds = model.get_input_embeddings()(ids)
    assert family.timestep(model, {"input_ids": ids}) == 375.0 == family.timestep(model, {"inputs_embeds": embeds})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_key_value_heads=2, **sizes))
    assert find_family(qwen) is family and family.timestep(qwen, {"input_ids": ids % 20}) == 0.0


@torch.no_grad()
def test_a_lora_acts_on_the_tokens_of_the_answer():
    model = make_model()
    ids = torch.arange(10, 18)[None]
    plain = masked_logits(model, ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, model, "answers")
    everywhere = masked_logits(model, ids)

    def rows(*parts):
        return AdapterRows(tuple(parts), frozenset({"answers"}), None)

    with acting_on(model, rows((slice(0, 8), None))):
        assert torch.equal(masked_logits(model, ids), plain)
    with acting_on(model, rows((slice(0, 8), "answers"))):
        torch.testing.assert_close(masked_logits(model, ids), everywhere, rtol=0, atol=1e-5)
    with acting_on(model, rows((slice(0, 5), None), (slice(5, 8), "answers"))):
        layer, seen = model.model.layers[0].mlp.down_proj, []
        handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        some = masked_logits(model, ids)
        handle.remove()
    given, output = seen[0]
    torch.testing.assert_close(output[:, :5], layer.base_layer(given[:, :5]), rtol=0, atol=1e-4)
    torch.testing.assert_close(output[:, 5:], layer(given[:, 5:]), rtol=0, atol=1e-4)
    assert not torch.allclose(some, plain, atol=1e-3) and not torch.allclose(some, everywhere, atol=1e-3)
    assert torch.equal(masked_logits(model, ids), everywhere)
