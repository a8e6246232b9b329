"""The published baselines do what their equations say."""

import copy

import pytest
import torch
from tiny import tiny_pipeline
from tiny_unlearning import CALL, TEXT, images, tiny_material

from imgdit.benchmarks.unlearning.methods import gem, orthogonal, safree, steerers
from imgdit.benchmarks.unlearning.methods.closed_form import POOLED, TOKENS, text_vectors
from imgdit.sae.hooks import hooked


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def material(pipe):
    return tiny_material(pipe)


def test_the_hinge_by_hand():
    anchor, concept = torch.tensor([[[3.0, 0.0]]] * 3), torch.tensor([[[0.0, 4.0]]] * 3)
    velocity = torch.tensor([[[0.0, 4.0]], [[3.0, 0.0]], [[0.0, 0.0]]])
    found = gem.hinge(velocity, anchor, concept, eta=0.5)
    torch.testing.assert_close(found, torch.tensor([5.0, 0.0, 1.0]), atol=1e-4, rtol=0)


def test_velocity_matching_comes_nearer_to_the_anchor(pipe, material):
    (arguments,) = gem._first_calls(pipe, gem.PromptBatch(0, list(material.lines("cube")), [5, 6, 7]), material, 1)
    anchors = material.lines(material.others("cube")[0])
    arguments, anchor, concept = gem._with_teachers(pipe, arguments, anchors)
    unlearned = gem.erased_by_velocity_matching(pipe, ["cube"], material, lr=1e-2, budget=6, early=1 / 3)
    with unlearned.attach(pipe), torch.no_grad():
        after = gem.hinge(pipe.transformer(**arguments)[0], anchor, concept, 1.0)
    before = gem.hinge(concept, anchor, concept, 1.0)
    assert after.mean() < 0.9 * before.mean()


def test_a_rotation_keeps_angles_and_takes_the_concept_to_the_anchor(pipe, material):
    unlearned = orthogonal.erased_by_rotation(pipe, ["sketch"], material, erase=1e4)
    with unlearned.attach(pipe):
        rotated = {name: pipe.transformer.get_parameter(name).detach().clone() for name in (TOKENS, POOLED)}
    for name, weight in rotated.items():
        plain = pipe.transformer.get_parameter(name).detach()
        assert not torch.allclose(weight, plain)
        torch.testing.assert_close(weight.T @ weight, plain.T @ plain, atol=1e-4, rtol=1e-4)


def test_the_rotation_is_the_best_one():
    """No rotation near it has a larger ⟨R, M⟩, and with nothing to erase it is the identity."""
    generator = torch.Generator().manual_seed(0)
    weight, vectors = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (4, 24))
    concepts, anchors, kept, general = vectors.T[:, :4].split(6)
    terms = {"preserve": 0.3, "preserve_all": 0.5, "ridge": 1.5}
    same = orthogonal.rotated(weight, concepts, anchors, kept, general, erase=0.0, **terms)
    torch.testing.assert_close(same, weight)

    square = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    found = orthogonal.rotated(square, concepts, anchors, kept, general, erase=50.0, **terms)
    rotation = found @ torch.linalg.inv(square)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.tensor(1.0, dtype=torch.float64))

    def project(rows):
        values = (rows @ square.T).T
        return values @ torch.linalg.pinv(values)

    values = kept @ square.T
    target = -50.0 * project(concepts) @ (torch.eye(4, dtype=torch.float64) - project(anchors))
    target += 0.3 * values.T @ values + square @ (0.5 * general.T @ general / 6 + 1.5 * torch.eye(4)) @ square.T
    best = (rotation * target).sum()
    for _ in range(20):
        step = 0.1 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
        assert ((torch.linalg.matrix_exp(step - step.T) @ rotation) * target).sum() < best


def test_steering_adds_the_decoded_code(pipe, material):
    sae = material.saes[TEXT]
    change = -2.0 * steerers.concept_code(pipe, material, "cube", TEXT) @ sae.W_dec
    seen = []

    def note(tokens):
        seen.append((tokens.call, tokens.values.clone()))

    with hooked(pipe, {TEXT: note}):
        images(pipe)
        with steerers.steered_away(pipe, ["cube"], material, strength=-2.0).attach(pipe), hooked(pipe, {TEXT: note}):
            images(pipe)
    (call, plain), (_, steered) = seen[0], seen[-1]
    assert change.abs().max() > 0.1
    for rows, sign in ((call.conditional, 1), (call.unconditional, -1)):
        torch.testing.assert_close(steered[rows], plain[rows] + sign * change.expand_as(plain[rows]))
    with torch.no_grad():
        code = steerers.concept_code(pipe, material, "cube", TEXT)
    assert 0 < int((code > 0).sum()) <= sae.config.k * 3  # k for each token of the words


def test_triggers_by_hand():
    concepts = torch.tensor([[1.0, 0.0]])
    without = torch.tensor([[5.0, 1.0], [5.0, 1.0], [2.0, 1.5]])  # without the last token the concept is further
    assert safree.triggers(without, concepts, 0.01).tolist() == [False, False, True]
    assert safree.triggers(without, concepts, 0.6).tolist() == [False, False, False]
    assert safree.triggers(without[:1], concepts, 0.01).tolist() == [False]


def test_filtered_tokens_lie_outside_the_concept_for_the_first_steps(pipe, material):
    _, pooled = text_vectors(pipe, [material.words["cube"]])
    plain, _ = text_vectors(pipe, ["a red cube photo"])
    read = []

    def note(tokens):
        read.append((tokens.call.timestep, tokens.values[tokens.call.conditional].clone()))

    with safree.filtered_tokens(pipe, ["cube"], material, last=25.0, middle=-1.0).attach(pipe):
        filtered, _ = text_vectors(pipe, ["a red cube photo"])
        with hooked(pipe, {TEXT: note}):
            pipe("a red cube photo", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL)
    changed = (filtered - plain).abs().amax(1) > 1e-6
    assert 0 < int(changed.sum()) < len(plain)
    unit = torch.nn.functional.normalize(pooled, dim=1)
    assert (filtered[changed] @ unit.T).abs().max() < 1e-4 < (plain[changed] @ unit.T).abs().max()
    with torch.no_grad():
        both = [pipe.transformer.context_embedder(text) for text in (plain, filtered)]
    for timestep, values in read:
        torch.testing.assert_close(values[0], both[timestep >= 500])
    assert {timestep >= 500 for timestep, _ in read} == {True, False}


def test_a_filter_removes_a_concept_that_one_token_holds(pipe, material):
    """Where the encoder has no attention and every word an embedding orthogonal to the others, the concept is its own
    token, and two prompts that differ in the concept become the same text, in every step. With attention, other
    tokens hold the concept too, and they stay."""
    apart = copy.deepcopy(pipe.text_encoder)
    prompts = {"cube": "a red cube photo", "sphere": "a red sphere photo"}
    ids = pipe.tokenizer(" ".join(prompts.values())).input_ids
    rows = {token: row for row, token in enumerate(dict.fromkeys(ids)) if token != pipe.tokenizer.eos_token_id}
    with torch.no_grad():
        apart.shared.weight.zero_()  # so that the end token shares nothing with the concept
        for token, row in rows.items():
            apart.shared.weight[token, row] = 1.0
        for block in apart.encoder.block:
            block.layer[0].SelfAttention.o.weight.zero_()
            block.layer[1].DenseReluDense.wo.weight.zero_()
    whole = pipe.text_encoder
    found = {}
    try:
        for kind, encoder in (("alone", apart), ("attention", whole)):
            pipe.register_modules(text_encoder=encoder)
            for concept, prompt in prompts.items():
                before, _ = text_vectors(pipe, [prompt])
                noise = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
                with safree.filtered_tokens(pipe, [concept], material, last=50.0, middle=-1.0).attach(pipe):
                    found[kind, concept] = (
                        before,
                        text_vectors(pipe, [prompt])[0],
                        pipe(prompt, **noise, **CALL).images,
                    )
    finally:
        pipe.register_modules(text_encoder=whole)
    for concept, prompt in prompts.items():
        before, after, _ = found["alone", concept]
        place = pipe.tokenizer(prompt).input_ids.index(pipe.tokenizer.convert_tokens_to_ids(concept))
        assert before[place].norm() > 1 and after[place].abs().max() < 1e-4
        others = [i for i in range(len(before)) if i != place]
        assert torch.equal(after[others], before[others])
    torch.testing.assert_close(found["alone", "cube"][2], found["alone", "sphere"][2], rtol=1e-3, atol=1e-4)
    cube, sphere = found["attention", "cube"], found["attention", "sphere"]
    assert ((cube[0] - sphere[0]).abs().amax(1) > 1e-4).sum() > 1  # more than one token holds the concept
    assert (cube[2] - sphere[2]).abs().max() > 0.01
