import torch

from imgdit.benchmarks.scenes.text_to_image import expected
from imgdit.scenes.answers import NOTHING
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.readings import QUESTIONS, SceneReadings
from imgdit.scenes.world import Scene
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches


def test_shapes_and_folder(tmp_path):
    torch.manual_seed(0)
    probe = SceneProbe(tuple(QUESTIONS.items()), channels=(8, 8, 16, 16)).eval()
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    reading = probe(pixels)
    assert {name: logits.shape for name, logits in reading.answers.items()} == {
        name: (2, len(choices)) for name, choices in QUESTIONS.items()
    }
    assert reading.depth.shape == (2, 1, 128, 128) and reading.segmentation.shape == (2, 9, 128, 128)
    assert reading.features.shape == (2, 16) and reading.depth.min() > 0
    probe.save_pretrained(tmp_path)
    loaded = SceneProbe.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).depth, reading.depth)
    assert probe(pixels[:, :, ::2, ::2]).depth.shape == (2, 1, 128, 128)  # other sizes are resized first


def test_readings_are_true():
    dataset = SceneReadings(split="heldout")
    for i in range(4):
        sample = dataset[i]
        assert sample.pixels.shape == (4, 3, 128, 128) and sample.pixels.abs().max() <= 1
        said = {name: choices[n] for (name, choices), n in zip(QUESTIONS.items(), sample.answers[0].tolist())}
        assert said == expected(Scene.sample(i, "heldout"))
        nothing = {name: choices[n] for (name, choices), n in zip(QUESTIONS.items(), sample.answers[-1].tolist())}
        assert set(nothing.values()) == {NOTHING}
        shown = set(sample.classes.unique().tolist()) - {0}
        assert len(shown) == len(Scene.sample(i, "heldout").objects)
        again = dataset[i]
        assert torch.equal(sample.pixels, again.pixels) and torch.equal(sample.depth, again.depth)


def test_a_probe_learns(tmp_path):
    recipe = load_recipe("scenes/probe")
    recipe = recipe.replace(
        run={
            "folder": str(tmp_path),
            "steps": 24,
            "batch_size": 2,
            "log_every": 8,
            "mixed_precision": "no",
            "evaluate_every": 0,
            "tracker": "none",
        },
        model={"arguments": {"channels": [8, 16, 16, 16]}},
        schedule={"warmup": 2},
    )
    batches, _ = training_batches(recipe)
    first = train(recipe, model=build_model(recipe), batches=batches, stop_at=8).metrics
    model = build_model(recipe)
    last = train(recipe, model=model, batches=batches, resume=True).metrics
    assert last["abs_rel"] < first["abs_rel"] and last["segmentation"] < first["segmentation"]
