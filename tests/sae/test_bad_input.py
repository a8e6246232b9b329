"""What SAE readers refuse before the model is called, with one sentence, and that no hook is left behind."""

import dataclasses

import pytest
import torch
from tiny_sae import ours, run, selection, tiny_sae, unlearner_of

from imgdit.sae.concept_maps import concept_maps
from imgdit.sae.concepts import ConceptBook
from imgdit.sae.config import SAEConfig
from imgdit.sae.features import contrast_features, heat_maps, survey_features
from imgdit.sae.hooks import hooked
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner, steer

HOOKPOINT = "transformer.transformer_blocks.1"
PROMPTS = ["a red cube"]
CALL = {"num_inference_steps": 2, "height": 16, "width": 16}


@pytest.fixture
def pipe():
    """A pipeline whose model must not be called."""
    pipe, _ = ours()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    return pipe


def hooks_of(pipe):
    """Hooks on modules of the denoiser and of the text encoder."""
    parts = [part for part in (pipe.transformer, pipe.text_encoder) if isinstance(part, torch.nn.Module)]
    found = [getattr(module, "_diffusers_hook", None) for part in parts for module in part.modules()]
    return [name for registry in found if registry is not None for name in registry.hooks]


def steered(pipe, sae, hookpoint=None):
    with steer(pipe, sae, {0: 2.0}, hookpoint=hookpoint):
        pytest.fail("not reached")


def mapped(pipe, sae, hookpoint=None):
    book = ConceptBook.empty(sae.fingerprint(), pipe.transformer).with_selections([selection("one", [3], [1.0])])
    concept_maps(pipe, sae, book, ["one"], PROMPTS, hookpoint=hookpoint, **CALL)


def learned(pipe, sae, hookpoint=None):
    place = hookpoint or sae.config.hookpoint
    ConceptUnlearner({place: sae}).learn(pipe, {"one": PROMPTS, "two": ["a cone"]}, top_n=2, **CALL)


def attached(pipe, sae, hookpoint=None):
    place = hookpoint or sae.config.hookpoint
    book = ConceptBook.empty(sae.fingerprint(), pipe.transformer)
    chosen = dataclasses.replace(selection("one", [3], [1.0]), replacement=torch.ones(3, sae.config.d_in), mean=None)
    unlearner = ConceptUnlearner({place: sae}, {place: book.with_selections([chosen])})
    with unlearner.attach(pipe, ["one"]):
        pytest.fail("not reached")


READERS = {
    "steer": steered,
    "attach": attached,
    "learn": learned,
    "concept_maps": mapped,
    "survey_features": lambda pipe, sae, hookpoint=None: survey_features(
        pipe, sae, PROMPTS, hookpoint=hookpoint, **CALL
    ),
    "heat_maps": lambda pipe, sae, hookpoint=None: heat_maps(pipe, sae, PROMPTS, [0], hookpoint=hookpoint, **CALL),
    "contrast_features": lambda pipe, sae, hookpoint=None: contrast_features(
        pipe, sae, PROMPTS, ["a cone"], hookpoint=hookpoint, **CALL
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_an_autoencoder_that_does_not_fit_the_model(name, pipe):
    wide = SparseAutoencoder(SAEConfig(48, 64, k=4, hookpoint=HOOKPOINT)).requires_grad_(False)
    with pytest.raises(ValueError, match=f"width 48, no weight of {HOOKPOINT} .* it is for another model"):
        READERS[name](pipe, wide)
    with pytest.raises(ValueError, match=r"no module is called 'transformer\.transformer_block\.1'"):
        READERS[name](pipe, tiny_sae(), "transformer.transformer_block.1")
    assert hooks_of(pipe) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either percentile or top_n"),
        ({"top_n": 2, "percentile": 99.0}, "give either percentile or top_n"),
        ({"top_n": 0}, r"top_n must be in \[1, 64\], got 0"),
        ({"top_n": 65}, r"top_n must be in \[1, 64\], got 65"),
        ({"percentile": 101.0}, r"percentile must be in \[0, 100\], got 101.0"),
        ({"top_n": 2, "floor": 1.5}, r"floor .* must be in \[0, 1\], got 1.5"),
    ],
)
def test_rules_that_select_nothing(options, said, pipe):
    with pytest.raises(ValueError, match=said):
        ConceptUnlearner({HOOKPOINT: tiny_sae()}).learn(pipe, {"one": PROMPTS, "two": ["a cone"]}, **options, **CALL)


def test_concepts_that_nobody_selected(pipe):
    unlearner = unlearner_of(pipe, HOOKPOINT, [selection("neon", [3], [1.0])])
    for names in (["cube"], [["neon"], ["cube"]]):
        with pytest.raises(ValueError, match="unknown concept 'cube'; known are neon"), unlearner.attach(pipe, names):
            pytest.fail("not reached")
    with pytest.raises(ValueError, match="known are none"), ConceptUnlearner({}).attach(pipe, ["cube"]):
        pytest.fail("not reached")
    for prompts in ({}, {"one": []}):
        with pytest.raises(ValueError, match="each concept needs at least one prompt"):
            unlearner.learn(pipe, prompts, top_n=1, **CALL)
    assert hooks_of(pipe) == []


@pytest.mark.parametrize("broken", ["second hookpoint", "module without tokens", "function"])
def test_no_hook_stays_where_a_reader_fails(broken):
    pipe, inputs = ours()
    plain = run(pipe, inputs)

    def fail(tokens):
        raise RuntimeError("failed in the function")

    functions = {
        "second hookpoint": {HOOKPOINT: lambda tokens: None, "transformer.no_such_block": lambda tokens: None},
        "module without tokens": {HOOKPOINT: lambda tokens: None, "transformer.pos_embed": lambda tokens: None},
        "function": {HOOKPOINT: lambda tokens: None, "transformer.transformer_blocks.0": fail},
    }[broken]
    with pytest.raises((ValueError, RuntimeError)), hooked(pipe, functions):
        run(pipe, inputs)
    assert hooks_of(pipe) == []
    assert torch.equal(run(pipe, inputs), plain)


def test_a_stopped_call_leaves_no_hook():
    """What Ctrl-C raises is no `Exception`."""
    pipe, inputs = ours()
    unlearner = unlearner_of(pipe, HOOKPOINT, [selection("neon", [3], [-3.0])])
    plain = run(pipe, inputs)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unlearner.attach(pipe, ["neon"]):
        run(pipe, {**inputs, "callback_on_step_end": stop})
    assert hooks_of(pipe) == []
    assert torch.equal(run(pipe, inputs), plain)
