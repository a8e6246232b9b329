"""A depth condition while a label is unlearned, on the embedded model."""

from contextlib import contextmanager

import pytest
import torch

from imgdit.benchmarks.unlearning.conditions import ConditionedImages, adapter_file, conditioned, conditioned_scenes
from imgdit.benchmarks.unlearning.methods.material import Unlearned
from imgdit.benchmarks.unlearning.methods.weights import swapped
from imgdit.benchmarks.unlearning.report import of_conditions
from imgdit.checkpoints import SCENE_PROBE, SCENES
from imgdit.scenes.probe import SceneProbe

QUERIES, TOKENS = "transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"


def test_scenes_show_the_label_and_then_do_not():
    for target in ("neon", "cube"):
        found = conditioned_scenes(target, 2)
        named = [target in prompt for prompt in found.prompts]
        assert named == [True] * 2 + [False] * 2 and all(len(scene.objects) == 1 for scene in found.scenes)


def test_an_edited_model_under_a_condition(tmp_path):
    """Weights are changed below the adapter's, and are as they were afterwards."""
    probe = SceneProbe.from_pretrained(SCENE_PROBE).eval()
    images = ConditionedImages(SCENES, probe, 1, {"num_inference_steps": 1, "guidance_scale": 3.0})
    model = images.pipe.transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model.get_parameter(TOKENS), model.get_parameter(QUERIES.replace(".weight", ".base_layer.weight"))
    changed = {TOKENS: torch.zeros_like(plain[0]), QUERIES: torch.zeros_like(plain[1])}

    @contextmanager
    def nothing(pipe):
        yield {}

    @contextmanager
    def edited(pipe):
        assert pipe is images.pipe
        with swapped(pipe.transformer, changed):
            yield {}

    methods = {"none": lambda target: Unlearned(nothing, 0), "edited": lambda target: Unlearned(edited, 0)}
    found = conditioned(images, ["neon"], methods, Unlearned(nothing, 0))
    assert list(found) == ["no condition", "none", "edited"]
    rows = {name: of["neon"] for name, of in found.items()}
    assert all(row["of"] == 1 and row["shown"] <= 1 and row["kept"] <= 1 for row in rows.values())
    assert rows["none"] != rows["edited"] and rows["none"]["error"] != rows["no condition"]["error"]
    lines = of_conditions(found)
    assert [line[0] for line in lines[1:]] == ["no condition", "none", "edited"] and len({len(x) for x in lines}) == 1
    assert lines[2][1] == f"{rows['none']['shown']}/1" and lines[2][2] == f"{rows['none']['error']:.3f}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="there is no"):
        adapter_file(tmp_path)
