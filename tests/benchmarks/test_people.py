"""People's prompts: what scenes have of them, and when an image has it."""

from random import Random

import pytest
import torch

from imgdit.benchmarks.scenes.people import Asked, people_prompts, people_scores, right
from imgdit.checkpoints import SCENE_PROBE
from imgdit.scenes.captions import caption
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.render import render
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene


def seen(left, right=("nothing", "nothing"), style="photo", background="sky"):
    sides = {"left object": left[0], "left colour": left[1], "right object": right[0], "right colour": right[1]}
    return {**sides, "style": style, "background": background}


def test_the_file_names_what_scenes_have():
    asked = people_prompts()
    assert len(asked) == len({one.prompt for one in asked}) == 200
    for one in asked:
        assert {kind for kind, _ in one.objects} <= set(OBJECTS) and len(one.objects) <= 2
        assert {colour for _, colour in one.objects} <= {*COLOURS, None}
        assert one.style in (*STYLES, None) and one.background in (*BACKGROUNDS, None)
        assert not one.left or len(one.objects) == 2
    assert len(people_prompts(30)) == 30 and set(people_prompts(30)) <= set(asked)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (seen(("sphere", "red"), ("cube", "blue")), {"object": True, "colour": True, "side": True}),
        (seen(("cube", "blue"), ("sphere", "red")), {"object": True, "colour": True, "side": False}),
        (seen(("sphere", "red")), {"object": False, "colour": False, "side": False}),
        (seen(("sphere", "blue"), ("cube", "pink")), {"object": True, "colour": False, "side": True}),
    ],
)
def test_marks(image, expected):
    asked = Asked("red ball left of blue box", (("sphere", "red"), ("cube", "blue")), True, None, None)
    assert right(asked, image) == expected


def test_what_is_not_asked_has_no_mark():
    assert right(Asked("something", (), False, None, None), seen(("cone", "red"))) == {}
    assert right(Asked("a ball, neon", (("sphere", None),), False, "neon", None), seen(("sphere", "red"))) == {
        "object": True,
        "style": False,
    }


def test_scores_of_true_renders():
    scenes = [Scene.sample(seed, objects=1) for seed in range(6)]
    asked = [
        Asked(caption(scene, Random(0)), ((scene.objects[0].kind, scene.objects[0].colour),), False,
              scene.style, scene.background)
        for scene in scenes
    ]  # fmt: skip

    class Renders:
        def images(self, prompts, seed):
            assert prompts == [one.prompt for one in asked]
            return render(scenes).rgb

    kept = {}
    probe = SceneProbe.from_pretrained(SCENE_PROBE).eval()
    scores = people_scores(Renders(), probe, asked, kept.__setitem__)
    assert [score.metric for score in scores] == ["object right", "colour right", "style right", "background right"]
    assert all(score.estimate.value >= 5 / 6 for score in scores)
    assert isinstance(kept["free-form prompts"][1], torch.Tensor)
