import pytest
import torch

from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.recipe import parse_recipe
from imgdit.training.sources import training_batches

READY = ["scenes/autoencoder", "scenes/probe", "scenes/text_encoder"]  # the others stand on these


@pytest.mark.parametrize("name", READY)
def test_packaged_recipes_build_and_step(name, tmp_path):
    """Each recipe that comes along names data and a model that fit: its first step runs."""
    recipe = load_recipe(name)
    recipe = recipe.replace(
        run={"folder": str(tmp_path), "batch_size": 2, "mixed_precision": "no", "evaluate_every": 0, "tracker": "none"}
    )
    batches, held_out = training_batches(recipe)
    assert held_out == []
    result = train(recipe, model=build_model(recipe), batches=batches, stop_at=1)
    assert result.step == 1 and result.metrics["loss"] > 0


def test_the_held_out_batch_is_of_another_split():
    recipe = load_recipe("scenes/text_encoder")
    batches, (held_out,) = training_batches(recipe)
    first = next(batches.stream(0, 512)).batch
    assert held_out.answers.shape == first.answers.shape == (512, 7)
    assert not torch.equal(held_out.answers, first.answers)


def test_a_reader_learns_its_sentences(tmp_path):
    recipe = load_recipe("scenes/text_encoder")
    recipe = recipe.replace(
        run={"folder": str(tmp_path), "steps": 60, "batch_size": 64, "log_every": 20, "tracker": "none"},
        model={"arguments": {"d_model": 48, "num_layers": 1, "num_heads": 4, "d_ff": 96}},
        optimizer={"lr": 1e-2},
        schedule={"warmup": 5},
    )
    batches, held_out = training_batches(recipe)
    model = build_model(recipe)
    with torch.no_grad():
        logits = model(held_out[0].input_ids, held_out[0].mask)
    before = torch.stack([x.argmax(1) for x in logits], 1).eq(held_out[0].answers).float().mean()
    result = train(recipe, model=model, batches=batches)
    assert before < 0.3 and result.metrics["right"] > 0.6


def test_mistakes_in_the_data_section():
    values = {"run": {"folder": "x", "steps": 1, "batch_size": 1}}
    with pytest.raises(ValueError, match=r"data\.name is 'user_image'; did you mean 'user_images'"):
        training_batches(parse_recipe({**values, "data": {"name": "user_image"}}, "toy"))
    wrong = {"name": "imgdit.scenes.sources:images", "arguments": {"look": 2}}
    with pytest.raises(ValueError, match="unknown key 'look'; did you mean 'looks'"):
        training_batches(parse_recipe({**values, "data": wrong}, "toy"))
    zero = {"name": "imgdit.scenes.sources:images", "arguments": {"looks": 0}}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        training_batches(parse_recipe({**values, "data": zero}, "toy"))
