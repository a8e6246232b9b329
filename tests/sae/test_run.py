"""Whole runs: activations to memory or disk, several autoencoders, resume, files that load."""

import json

import pytest
import torch
import yaml
from tiny import tiny_pipeline

from imgdit.sae.activations import ActivationRecorder, RecordedActivations, ShuffleBuffer, stream_activations
from imgdit.sae.hooks import find_hookpoints
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.training.sae_recipe import load_sae_recipe
from imgdit.training.sae_run import load_pipeline, train_saes

CALL = {"num_inference_steps": 3, "height": 16, "width": 24, "guidance_scale": 3.0}
PROMPTS = ["a red cube", "the blue sphere", "a green cone", "the red cone", "a small sphere", "a blue cube"]
HOOKPOINTS = ["transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"]


def recipe_of(tmp_path, **changes):
    values = {
        "run": {"folder": str(tmp_path / "run"), "steps": 8, "batch_size": 96, "log_every": 2, "checkpoint_every": 4},
        "pipeline": {"pretrained": "unused", "batch_size": 2, "call": CALL},
        "data": {"prompts": PROMPTS, "held_out": 2, "buffer": 400},
        "sae": {"hookpoints": HOOKPOINTS, "num_latents": 64, "k": 4},
        "train": {"lr": 0.003, "dead_after": 500},
        "concepts": {"prompts": {"cube": ["a red cube"], "cone": ["a red cone"]}, "top_n": 2},
    }
    for section, fields in changes.items():
        values[section] = {**values[section], **fields}
    path = tmp_path / "sae.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_sae_recipe(path)


def weights(folder):
    return {
        hookpoint: {name: value for name, value in sae.state_dict().items()}
        for hookpoint, sae in ConceptUnlearner.from_pretrained(folder).saes.items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for hookpoint, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, other[hookpoint][name]), (hookpoint, name)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_run_and_resume(tmp_path, where):
    changes = {"data": {"shards": str(tmp_path / "shards")}} if where == "disk" else {}
    recipe = recipe_of(tmp_path, **changes)
    result = train_saes(recipe, pipe=tiny_pipeline())
    assert set(result.metrics) == set(HOOKPOINTS)
    values = result.metrics[HOOKPOINTS[0]]
    assert {"fvu", "l0", "dead", "auxk_loss", "threshold", "picture_distance"} <= values.keys()
    assert 0 < values["fvu"] < 1.5 and 0 < values["picture_distance"] < 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["hookpoint"] == HOOKPOINTS[0]] == [2, 4, 6, 8, 8]
    unlearner = ConceptUnlearner.from_pretrained(result.folder)
    assert unlearner.concepts == ["cube", "cone"]
    assert unlearner.saes[HOOKPOINTS[0]].threshold > 0
    with pytest.raises(ValueError, match="holds a run"):
        train_saes(recipe, pipe=tiny_pipeline())

    again = recipe_of(tmp_path, run={"folder": str(tmp_path / "again")}, **changes)
    train_saes(again, pipe=tiny_pipeline(), stop_at=5)
    resumed = train_saes(again, pipe=tiny_pipeline(), resume=True)
    assert_equal(weights(result.folder), weights(resumed.folder))

    pipe = tiny_pipeline()
    with unlearner.attach(pipe, ["cube"], multiplier=-2.0):
        pipe("a red cube", **CALL, output_type="latent")


def test_a_run_that_goes_on_with_other_prompts_says_so(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    recipe = recipe_of(tmp_path, data={"prompts": [], "prompts_file": str(file)})
    train_saes(recipe, pipe=tiny_pipeline(), stop_at=1)
    train_saes(recipe, pipe=tiny_pipeline(), stop_at=2, resume=True)
    file.write_text("\n".join(["a yellow ring", *PROMPTS]))
    with pytest.raises(ValueError, match="was made with other prompts: 1 added, 0 gone, 0 changed; 4 rows then"):
        train_saes(recipe, pipe=tiny_pipeline(), resume=True)


def test_a_run_of_version_0_1_goes_on(tmp_path):
    """Its recipe lacks fields that came later, and names the prompts about scenes by a number."""
    data = {"prompts": [], "prompts_from": "imgdit.scenes.prompts:captions", "count": 6}
    recipe = recipe_of(tmp_path, data=data)
    train_saes(recipe, pipe=tiny_pipeline(), stop_at=1)
    path = tmp_path / "run/checkpoints/step-00000001/state.json"
    state = json.loads(path.read_text())
    section = state["recipe"]["data"]
    del section["prompts_from"], section["count"]
    section["scene_captions"] = 6
    path.write_text(json.dumps(state))
    assert train_saes(recipe, pipe=tiny_pipeline(), resume=True, stop_at=2).step == 2
    section["scene_captions"] = 7
    path = tmp_path / "run/checkpoints/step-00000002/state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": state["recipe"]}))
    with pytest.raises(ValueError, match="another data section"):
        train_saes(recipe, pipe=tiny_pipeline(), resume=True)


def test_go_on_from_saved_autoencoders(tmp_path):
    first = train_saes(recipe_of(tmp_path), pipe=tiny_pipeline())
    more = recipe_of(tmp_path, run={"folder": str(tmp_path / "more")}, sae={"pretrained": str(first.folder)})
    begun = train_saes(more, pipe=tiny_pipeline(), stop_at=1)
    later = train_saes(more, pipe=tiny_pipeline(), resume=True)
    name = HOOKPOINTS[0]
    assert begun.metrics[name]["fvu"] < 1.2 * first.metrics[name]["fvu"]
    assert later.metrics[name]["fvu"] < begun.metrics[name]["fvu"]


def test_recipe_loads_the_pipeline(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    recipe = recipe_of(tmp_path, pipeline={"pretrained": str(tmp_path / "pipe")})
    assert type(load_pipeline(recipe)).__name__ == "ImgDiTPipeline"


@pytest.mark.parametrize("name", ["scenes/sae", "scenes/sae_text"])
def test_packaged_recipes_work_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = load_sae_recipe(name)
    pipe = load_pipeline(packaged)
    run = {"folder": "run", "steps": 1, "batch_size": 64}
    call = {"num_inference_steps": 1, "height": 64, "width": 64}
    small = recipe_of(
        tmp_path,
        run=run,
        pipeline={"pretrained": packaged.pipeline.pretrained, "call": call},
        data={"held_out": 0},
        sae={"hookpoints": list(packaged.sae.hookpoints)},
        concepts={"prompts": {}, "top_n": None},
    )
    assert train_saes(small).step == 1 and (tmp_path / "run/saes").is_dir()
    assert set(find_hookpoints(pipe, packaged.sae.hookpoints)) == set(packaged.sae.hookpoints)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": {"hookpoints": ["transformer.blocks.*"]}}, "the nearest is"),
        ({"sae": {"activation": "sample_topk"}}, "set data.shards"),
        ({"data": {"buffer": 100}}, "at least two batches"),
        ({"data": {"prompts": []}}, "give one of prompts"),
        ({"data": {"held_out": 6}}, "leaves nothing of 6 prompts"),
        ({"concepts": {"top_n": None}}, "give either top_n or percentile"),
        ({"concepts": {"floor": 10}}, r"floor is a fraction of the best score and must be in \[0, 1\], got 10"),
        ({"train": {"lr": -1.0}}, "lr must be positive"),
        ({"run": {"step": 4}}, "did you mean 'steps'"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_saes(recipe_of(tmp_path, **changes), pipe=tiny_pipeline())


def test_recording_goes_on_where_it_stopped(tmp_path):
    pipe = tiny_pipeline()
    options = {"batch_size": 2, "seed": 3, **CALL}
    ActivationRecorder(pipe, PROMPTS, HOOKPOINTS, tmp_path / "whole", **options).record_all()
    ActivationRecorder(pipe, PROMPTS[:2], HOOKPOINTS, tmp_path / "parts", **options).record_all()
    ActivationRecorder(pipe, PROMPTS, HOOKPOINTS, tmp_path / "parts", **options).record_all()
    for hookpoint in HOOKPOINTS:
        whole, parts = (RecordedActivations(tmp_path / name, hookpoint) for name in ("whole", "parts"))
        assert len(whole) == len(parts) == 6 * 3  # prompts times steps, the guided half alone
        assert whole[0].shape == (24, 32)
        assert all(torch.equal(whole[i], parts[i]) for i in range(len(whole)))
        assert whole.timestep(0) == whole.timestep(1) > whole.timestep(2)
    with pytest.raises(ValueError, match="recording with seed=3"):
        ActivationRecorder(pipe, PROMPTS, HOOKPOINTS, tmp_path / "parts", **{**options, "seed": 4}).record_all()
    with pytest.raises(ValueError, match="recorded are"):
        RecordedActivations(tmp_path / "parts", "transformer.transformer_blocks.0")


def test_batch_size_changes_no_activation():
    pipe = tiny_pipeline()

    def stream(batch_size):
        recordings = stream_activations(pipe, PROMPTS[:2], HOOKPOINTS[:1], batch_size=batch_size, seed=1, **CALL)
        return [[found.values for found in recording.maps] for recording in recordings]

    ((a, b, c),) = stream(2)
    ones = stream(1)
    for together, apart in zip((a, b, c), zip(*ones)):
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-3)


def test_nan_activations_are_refused():
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.zero_()
        pipe.transformer.transformer_blocks[0].ff.net[2].bias[0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(stream_activations(pipe, PROMPTS, HOOKPOINTS, **CALL))


def test_buffer():
    buffer = ShuffleBuffer(10, (1,), seed=0)
    assert buffer.nbytes == 40
    buffer.add(torch.arange(8.0)[:, None])
    taken = torch.cat([buffer.take(3), buffer.take(5)]).flatten()
    assert sorted(taken.tolist()) == list(range(8)) and taken.tolist() != list(range(8))
    buffer.add(torch.arange(25.0)[:, None])
    assert buffer.filled == 10
    rest = buffer.take(10).flatten().tolist()
    assert len(set(rest)) == 10
    with pytest.raises(ValueError, match="holds 0 rows"):
        buffer.take(1)
