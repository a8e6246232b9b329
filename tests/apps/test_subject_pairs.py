import json

import pytest
import torch
from tiny import tiny_pipeline
from tiny_images import image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from imgdit.data.sources import open_rows
from imgdit.data.subjects import Idea, Pair, make_subjects
from imgdit.images import to_image
from imgdit.scenes.subject_pairs import (
    Diptychs,
    FeatureScore,
    ProbeScore,
    ScenePairs,
    named_ideas,
    scene_ideas,
)
from imgdit.scenes.tasks import from_scene
from imgdit.scenes.world import Scene

IDEAS = [Idea(f"thing {n}", ("left", f"thing {n} on the right")) for n in range(6)]


def make(idea, seed):
    return Pair(image(seed, (16, 16)), image(seed + 100, (16, 16)))


def alternate(idea, pair):
    return float(idea.subject[-1] in "024")


def test_good_pairs_become_a_folder_to_train_on(tmp_path):
    report = make_subjects(IDEAS, make, alternate, tmp_path)
    assert (report.generated, report.kept, report.scores) == (6, 3, [1, 0, 1, 0, 1, 0])
    rows = open_rows(tmp_path).rows
    assert [row.captions[0] for row in rows] == [IDEAS[n].places[1] for n in (0, 2, 4)]
    assert all(list(row.conditions) == ["condition"] for row in rows)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    make_subjects(IDEAS[:4], make, alternate, tmp_path)
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write('{"subject": "thing 4", "se')  # killed here
    made = []

    def counted(idea, seed):
        made.append(seed)
        return make(idea, seed)

    assert make_subjects(IDEAS, counted, alternate, tmp_path).kept == 3
    assert made == [4, 5] and len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 6
    with pytest.raises(ValueError, match="is of other ideas from line 1 on"):
        make_subjects(IDEAS[1:], make, alternate, tmp_path)
    with pytest.raises(ValueError, match=r"a score in \[0, 1\], got 2"):
        make_subjects(IDEAS, make, alternate, tmp_path, threshold=2)


def test_the_probe_knows_the_subject():
    scene, other = (Scene.sample(n, objects=1) for n in (0, 1))
    thing = scene.objects[0]
    images = [to_image(from_scene("grey", s, None, size=128).target) for s in (scene, scene.with_camera(other.camera))]
    score = ProbeScore()
    told = ("", "")
    assert score(Idea(f"{thing.colour} {thing.kind}", told), Pair(*images)) > 0.5
    wrong = "cube" if thing.kind != "cube" else "sphere"
    assert score(Idea(f"{thing.colour} {wrong}", told), Pair(*images)) < 0.5
    assert score(Idea(f"{thing.colour} {thing.kind}", told), Pair(images[0], images[0])) == 0


def test_the_embedded_model_makes_pairs():
    (idea,) = scene_ideas(1)
    assert len(idea.subject.split()) == 2 and idea.places[0] != idea.places[1]
    pairs = ScenePairs(steps=1)
    first, again = pairs(idea, 3), pairs(idea, 3)
    assert first.reference.size == first.target.size == (128, 128)
    assert first.target.tobytes() == again.target.tobytes() != first.reference.tobytes()


def test_halves_of_one_image(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**config, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    (idea,) = named_ideas(["a red cube"], 1)
    pair = Diptychs(str(tmp_path / "model"), 16, num_inference_steps=1)(idea, 0)
    assert pair.reference.size == pair.target.size == (16, 16)
    score = FeatureScore(str(tmp_path / "vit"))
    assert score(idea, Pair(pair.reference, pair.reference)) == 0
    assert 0 <= score(idea, Pair(image(0, (16, 16)), image(1, (16, 16)))) <= 1
    assert json.dumps(idea._asdict())
