"""Mode "replace" in a text: tokens move by a difference of means, and keep what else they hold."""

import dataclasses
import json

import pytest
import torch
from tiny_sae import WIDTH, ours, run, selection, tiny_sae, unlearner_of

from imgdit.sae.concepts import ConceptBook
from imgdit.sae.hooks import hooked
from imgdit.sae.unlearning import ConceptUnlearner

TEXT, IMAGE = "transformer.context_embedder", "transformer.transformer_blocks.1"


def concept(name, features, mean, others, timesteps=(1000.0, 0.0)):
    """With a mean activation of so much in every value, at each timestep."""
    made = selection(name, features, [1.0] * len(features), timesteps)
    means = torch.tensor(mean if isinstance(mean, list) else [mean] * len(timesteps))
    return dataclasses.replace(made, mean=means[:, None].expand(-1, WIDTH).clone(), others=others)


def read(pipe, inputs, unlearner, *names, mode="replace"):
    """Tokens of the text before and after, at every call of the denoiser."""
    seen = []

    def note(tokens):
        seen.append((tokens.call.timestep, tokens.values.clone()))

    with hooked(pipe, {TEXT: note}), unlearner.attach(pipe, list(names), mode=mode), hooked(pipe, {TEXT: note}):
        run(pipe, inputs)
    return [(time, before, after) for (time, before), (_, after) in zip(seen[::2], seen[1::2])]


def active(x, features):
    sae = tiny_sae(TEXT)
    code = sae.encode(sae.normalize(x.reshape(-1, WIDTH))[0]).dense()
    return (code[:, features] > 0).any(1).view(x.shape[:-1])


def test_tokens_move_to_the_nearest_other_concept_that_stays():
    pipe, inputs = ours()
    others = ("one", "two", "far")
    known = {
        "one": concept("one", list(range(0, 20)), 0.0, others[1:]),
        "two": concept("two", list(range(20, 40)), [1.0, 3.0], ("one", "far")),
        "far": concept("far", [63], 10.0, ("one", "two")),
    }
    unlearner = unlearner_of(pipe, TEXT, list(known.values()))
    first, second = range(0, 20), range(20, 40)
    for time, before, after in read(pipe, inputs, unlearner, "one"):
        shown = active(before, list(first))
        assert shown.any() and not shown.all()
        torch.testing.assert_close(after, before + shown[..., None] * (3.0 - 2.0 * time / 1000))
    for time, before, after in read(pipe, inputs, unlearner, "one", "two"):  # far is left, and both are moved
        change = active(before, list(first))[..., None] * 10.0
        change = change + active(before, list(second))[..., None] * (10.0 - (3.0 - 2.0 * time / 1000))
        torch.testing.assert_close(after, before + change)
    for _, before, after in read(pipe, inputs, unlearner, *others[:2], "far"):  # none stays: the mean of all others
        change = active(before, list(first))[..., None] * 1.0
        assert torch.equal(after != before, (after != before).any(-1, keepdim=True).expand_as(after))
        alone = active(before, list(first)) & ~active(before, [*second, 63])
        torch.testing.assert_close(after[alone], (before + change)[alone])


def test_learned_means_are_stored(tmp_path):
    pipe, inputs = ours()
    unlearner = ConceptUnlearner({TEXT: tiny_sae(TEXT)})
    prompts = {"cube": ["a red cube"], "sphere": ["a red sphere"], "cone": ["a red cone"]}
    options = {"num_inference_steps": 1, "height": 16, "width": 16, "guidance_scale": 3.0}
    unlearner.learn(pipe, prompts, top_n=8, **options)
    unlearner.save_pretrained(tmp_path)
    again = ConceptUnlearner.from_pretrained(tmp_path)
    cube, sphere, cone = (again.books[TEXT].selections[name] for name in prompts)
    assert cube.others == ("sphere", "cone") and cube.mean is not None
    torch.testing.assert_close((sphere.mean + cone.mean) / 2, cube.replacement)
    for one, other in zip(read(pipe, inputs, again, "cube"), read(pipe, inputs, unlearner, "cube")):
        assert torch.equal(one[2], other[2])

    old = {name: dataclasses.replace(s, mean=None, others=()) for name, s in again.books[TEXT].selections.items()}
    book = dataclasses.replace(again.books[TEXT], selections=old)
    book.save(tmp_path / TEXT)
    early = ConceptUnlearner.from_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match="'cube' has no mean activation of its own"),
        early.attach(pipe, ["cube"], mode="replace"),
    ):
        raise AssertionError("not reached")
    with early.attach(pipe, ["cube"], mode="remove"):
        run(pipe, inputs)


def test_damaged_files(tmp_path):
    pipe, _ = ours()
    short = dataclasses.replace(concept("one", [3], 0.0, ()), mean=torch.zeros(1, WIDTH))
    unlearner_of(pipe, TEXT, [short]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"one/mean must be \(2, .*, got \(1, "):
        ConceptBook.load(tmp_path / TEXT)
    unlearner_of(pipe, TEXT, [concept("one", [3], 0.0, ("two",))]).save_pretrained(tmp_path)
    file = tmp_path / TEXT / "concepts.json"
    values = json.loads(file.read_text())
    values["concepts"]["one"]["others"] = 2
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="one: others must be a list of names, got 2"):
        ConceptBook.load(tmp_path / TEXT)


def test_patches_of_an_image_become_the_mean():
    """As published (arXiv 2606.31699), whatever means are stored."""
    pipe, inputs = ours()
    images = []
    for mean in (0.0, 5.0):
        with unlearner_of(pipe, IMAGE, [concept("one", [3, 4], mean, ("two",))]).attach(pipe, ["one"], mode="replace"):
            images.append(run(pipe, inputs))
    assert torch.equal(*images)


def test_the_default_is_replace_where_a_concept_has_what_it_needs():
    pipe, inputs = ours()
    known = [
        concept("one", list(range(0, 20)), 0.0, ("two", "far")),
        concept("two", list(range(20, 40)), [1.0, 3.0], ("one", "far")),
        dataclasses.replace(concept("far", [63], 10.0, ("one", "two")), mean=None),
    ]
    unlearner = unlearner_of(pipe, TEXT, known)
    assert unlearner.default_mode(pipe, ["one"]) == unlearner.default_mode(pipe, [["one"], ["two"]]) == "replace"
    assert unlearner.default_mode(pipe, ["one", "two"]) == "scale"  # none stays whose mean is known
    assert unlearner.default_mode(pipe, ["far"]) == unlearner.default_mode(pipe, [["one"], ["far"]]) == "scale"
    assert unlearner.default_mode(pipe, []) == "scale"

    def result(names, **options):
        with unlearner.attach(pipe, names, **options):
            return run(pipe, inputs, 1)

    assert torch.equal(result(["one"]), result(["one"], mode="replace"))
    assert not torch.equal(result(["one"]), result(["one"], mode="scale"))
    assert torch.equal(result(["one"], multiplier=-2.0), result(["one"], mode="scale", multiplier=-2.0))
    assert torch.equal(result(["one"], paper_compat=True), result(["one"], mode="scale", paper_compat=True))
    assert torch.equal(result(["far"]), result(["far"], mode="scale"))

    both = unlearner_of(pipe, IMAGE, known[:2])
    assert both.default_mode(pipe, ["one"]) == "scale"
    both.saes |= unlearner.saes
    both.books |= unlearner.books
    assert both.default_mode(pipe, ["one"]) == "replace"  # what is not named acts in the text alone
    assert both.default_mode(pipe, ["one"], hookpoints=[IMAGE, TEXT]) == "scale"
