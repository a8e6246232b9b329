"""Every method of the comparison: the identity with nothing to do, a change, and nothing left behind."""

import dataclasses

import pytest
import torch
from tiny import tiny_pipeline
from tiny_unlearning import CALL, HOOKPOINT, TEXT, images, tiny_material

from imgdit.benchmarks.unlearning.methods.catalogue import METHODS
from imgdit.benchmarks.unlearning.methods.closed_form import edited_in_closed_form
from imgdit.benchmarks.unlearning.methods.features import without_features
from imgdit.benchmarks.unlearning.methods.guidance import safe_latent_guidance
from imgdit.benchmarks.unlearning.prompt_attack import attack_prompt

SETTINGS = {"finetune": {"lr": 1e-2, "steps": 4}, "gem": {"lr": 1e-2, "budget": 3}, "safree": {"alpha": 0.0}}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def material(pipe):
    return tiny_material(pipe)


@pytest.fixture(scope="module")
def plain(pipe):
    return images(pipe)


def prepared(name, pipe, concepts, material):
    settings = {**METHODS[name].grid[0], **SETTINGS.get(name, {})}
    return METHODS[name].prepare(pipe, concepts, material, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_identity_change_removal(name, pipe, material, plain):
    weights = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in pipe.transformer.state_dict().items()}
    required = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    outputs = {}
    for concepts in ((), ("sketch",), ("sketch", "cube")):
        unlearned = prepared(name, pipe, concepts, material)
        with unlearned.attach(pipe) as call:
            outputs[concepts] = images(pipe, **call)
        assert torch.equal(images(pipe), plain)
        assert (unlearned.size > 0) == (bool(concepts) and name not in ("none", "negative", "safe"))
    assert torch.equal(outputs[()], plain)
    one, two = outputs["sketch",], outputs["sketch", "cube"]
    assert one.isfinite().all() and two.isfinite().all()
    if name == "none":
        assert torch.equal(one, plain)
    else:
        assert not torch.equal(one, plain) and not torch.equal(one, two)
    for key, tensor in pipe.transformer.state_dict().items():
        assert tensor.data_ptr() == weights[key][0] and torch.equal(tensor, weights[key][1])
    assert required == [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_nothing_stays_when_sampling_raises(name, pipe, material, plain):
    def stop(*_):
        raise RuntimeError("stopped")

    unlearned = prepared(name, pipe, ["sketch"], material)
    with pytest.raises(RuntimeError, match="stopped"), unlearned.attach(pipe) as call:
        images(pipe, **call, callback_on_step_end=stop)
    assert torch.equal(images(pipe), plain)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_twice_and_for_any_batch(name, pipe, material):
    first, second = (prepared(name, pipe, ["cube"], material) for _ in range(2))
    with first.attach(pipe) as call:
        one = images(pipe, **call)
        again = images(pipe, **call)
    with second.attach(pipe) as call:
        alone = pipe(
            "a blue sphere sketch on the left",
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            **CALL,
            **call,
        ).images
    assert torch.equal(one, again)
    torch.testing.assert_close(alone[0], one[1], atol=2e-4, rtol=2e-4)


def test_safe_guidance_of_nothing_near_is_the_identity(pipe, material, plain):
    """No difference lies under the threshold, so nothing is pushed."""
    unlearned = safe_latent_guidance(pipe, ["sketch"], material, threshold=-1e9, momentum_scale=0.0)
    with unlearned.attach(pipe):
        torch.testing.assert_close(images(pipe), plain, atol=1e-5, rtol=1e-5)


def test_safe_guidance_with_more_words_than_the_prompt(pipe, material):
    unlearned = safe_latent_guidance(pipe, ["sketch", "cube", "sphere", "small", "cone"], material)
    with unlearned.attach(pipe):
        short = pipe("red", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL).images
    assert short.isfinite().all()


def test_closed_form_moves_the_concept_and_keeps_the_rest(pipe, material):
    """With a small ridge the concept's text is projected as the other label's, and a strong `preserve` forbids it."""
    edits = {
        preserve: edited_in_closed_form(pipe, ["sketch"], material, preserve=preserve, ridge=1e-6)
        for preserve in (0.0, 1e6)
    }

    def read(line):
        _, _, pooled, _, _, _ = pipe.encode_prompt(line, do_classifier_free_guidance=False)
        return pipe.transformer.time_text_embed.text_embedder.linear_1(pooled)

    concept, other = material.lines("sketch")[0], material.lines("small")[0]
    with torch.no_grad():
        wanted, kept = read(other), read(concept)
        with edits[0.0].attach(pipe):
            torch.testing.assert_close(read(concept), wanted, atol=1e-3, rtol=1e-3)
        with edits[1e6].attach(pipe):
            distance = (read(other) - wanted).abs().max()
    assert distance < 0.1 * (wanted - kept).abs().max()


def test_random_features_are_others_in_equal_number(pipe, material):
    chosen, lot = (without_features(pipe, ["cube"], material, top_n=3, random_seed=seed) for seed in (None, 0))
    assert chosen.size == lot.size
    with chosen.attach(pipe):
        one = images(pipe)
    with lot.attach(pipe):
        assert not torch.equal(images(pipe), one)


def test_mistakes(pipe, material):
    with pytest.raises(ValueError, match="unknown label 'cub'; did you mean 'cube'"):
        material.lines("cub")
    with pytest.raises(ValueError, match="every other label is unlearned too"):
        material.others("cube", ["sphere", "cone"])
    bare = dataclasses.replace(material, statistics={})
    with pytest.raises(ValueError, match=f"no statistics at '{TEXT}'"):
        prepared("scale", pipe, ["cube"], bare)
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        unguided = dataclasses.replace(material, call={**CALL, "guidance_scale": 1.0})
        prepared("finetune", pipe, ["cube"], unguided)


def test_settings_need_an_autoencoder_of_their_stream(pipe, material):
    assert material.streams(pipe) == {"image": [HOOKPOINT], "text": [TEXT]}
    assert METHODS["scale"].usable(["image", "text"]) == METHODS["scale"].grid
    assert {settings["stream"] for settings in METHODS["scale"].usable(["text"])} == {"text"}
    assert METHODS["negative"].usable([]) == METHODS["negative"].grid
    with pytest.raises(ValueError, match="'SAeUron as published' needs an autoencoder of the image; there are some"):
        METHODS["saeuron"].usable(["text"])


@pytest.mark.parametrize("name", METHODS)
def test_an_attack_lowers_the_loss_through_the_method(name, pipe, material):
    """The gradient reaches the prefix whatever is attached, and the pipeline takes the result."""
    latents = images(pipe)[:1]
    with prepared(name, pipe, ["sketch"], material).attach(pipe) as call:
        attacked = attack_prompt(pipe, "a red cube photo", latents, steps=2, samples=2)
        unchanged = attack_prompt(pipe, "a red cube photo", latents, steps=0, samples=2)
        assert not torch.equal(attacked["prompt_embeds"][:, :3], unchanged["prompt_embeds"][:, :3])
        assert torch.equal(attacked["prompt_embeds"][:, 3:], unchanged["prompt_embeds"][:, 3:])
        generator = torch.Generator().manual_seed(0)
        image = pipe(**attacked, **call, generator=generator, output_type="latent", **CALL).images
    assert image.isfinite().all()
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    with pytest.raises(ValueError, match="one image is attacked at a time"):
        attack_prompt(pipe, "a red cube photo", images(pipe))
