"""The benchmark of scenes measures what it says: a maker that cheats reaches every bar, one that is blind none."""

import pytest
import torch

from imgdit.benchmarks.scenes.any_to_any import relative_pose
from imgdit.benchmarks.scenes.text_to_image import (
    condition_scores,
    expected,
    held_out,
    text_scores,
    view_scores,
)
from imgdit.cameras import rotation_error
from imgdit.scenes.geometry import camera_to_world
from imgdit.scenes.probe import Reading
from imgdit.scenes.readings import QUESTIONS
from imgdit.scenes.render import render
from imgdit.scenes.tasks import from_scene
from imgdit.scenes.world import Scene


class Cheat:
    """Looks the scenes up by their prompts."""

    def __init__(self, *held):
        self.scenes = {prompt: scene for h in held for prompt, scene in zip(h.prompts, h.scenes)}

    def _render(self, prompts):
        return render([self.scenes[prompt] for prompt in prompts])

    def images(self, prompts, seed):
        return self._render(prompts).rgb

    def condition(self, task, prompts, images, seed):
        seen = self._render(prompts)
        made = [from_scene(task, self.scenes[p], None, seen.one(i)).condition for i, p in enumerate(prompts)]
        return torch.stack(made)

    def conditioned(self, task, prompts, conditions, seed):
        return self._render(prompts).rgb

    def views(self, prompts, images, cameras, seed):
        scenes = [self.scenes[p].with_camera(there) for p, (_, there) in zip(prompts, cameras)]
        return render(scenes).rgb


class Blind(Cheat):
    def images(self, prompts, seed):
        return torch.full((len(prompts), 3, 128, 128), 0.5)

    def condition(self, task, prompts, images, seed):
        return self.images(prompts, seed)

    def conditioned(self, task, prompts, conditions, seed):
        return self.images(prompts, seed)

    def views(self, prompts, images, cameras, seed):
        return images


class Oracle(torch.nn.Module):
    """A probe that recognises the renders of given scenes and calls everything else nothing."""

    def __init__(self, *held):
        super().__init__()
        self.questions = QUESTIONS
        self.known = {
            h.rendering.rgb[i].sum().item(): (scene, h.rendering.depth[i])
            for h in held
            for i, scene in enumerate(h.scenes)
        }

    def forward(self, pixels):
        answers = {name: torch.zeros(len(pixels), len(choices)) for name, choices in self.questions.items()}
        depth = torch.full((len(pixels), 1, 128, 128), 5.0)
        for row, image in enumerate(pixels):
            total = (image / 2 + 0.5).sum().item()
            found = next((value for key, value in self.known.items() if abs(key - total) < 0.05), None)
            for name, choices in self.questions.items():
                value = expected(found[0])[name] if found else "nothing"
                answers[name][row, choices.index(value)] = 1
            if found:
                depth[row] = found[1]
        return Reading(answers, depth, torch.zeros(len(pixels), 9, 128, 128), pixels.flatten(1)[:, ::5000])


@pytest.fixture(scope="module")
def worlds():
    count = 3
    return count, [
        held_out(count, split, objects)
        for split, objects in (("heldout", 1), ("heldout_triples", 1), ("heldout", 2), ("heldout", None))
    ]


def test_the_cheat_meets_every_bar_and_the_blind_none(worlds):
    count, held = worlds
    kept = {}
    probe = Oracle(*held)
    for maker, met in ((Cheat(*held), True), (Blind(*held), False)):
        keep = kept.setdefault(met, {}).__setitem__
        scores = [
            *text_scores(maker, probe, count, keep),
            *condition_scores(maker, probe, count, keep),
            *view_scores(maker, count, keep),
        ]
        judged = [score for score in scores if score.met is not None and "relative to that" not in score.metric]
        assert len(judged) == 10
        assert {score.met for score in judged} == {met}, [s for s in judged if s.met != met]
    assert len(kept[True]) == 8
    prompts, images, wrong = kept[False]["text, one object"]
    assert len(prompts) == count and images.shape == (count, 3, 128, 128) and wrong == list(range(count))


def test_scores_hold_their_raw_numbers(worlds):
    count, held = worlds
    scores = view_scores(Blind(*held), count, lambda *_: None)
    gain = next(score for score in scores if "over copying" in score.metric)
    assert gain.counts["values"] == [0.0] * count and gain.estimate.value == 0 and not gain.met
    score = text_scores(Blind(*held), Oracle(*held), count, lambda *_: None)[0]
    assert score.counts == {"right": 0, "of": count} and score.bar == "≥ 95%"


def test_held_out_scenes_are_fixed_and_true_to_their_prompts():
    again = held_out(2)
    assert again.prompts == held_out(2).prompts
    assert [s.to_dict() for s in again.scenes] == [Scene.sample(100_000 + i, "heldout").to_dict() for i in range(2)]


def test_relative_poses_are_told_in_the_first_cameras_frame():
    camera = Scene.sample(3).camera
    other = camera.orbit(azimuth=30.0)
    pose = relative_pose(camera, other)
    assert rotation_error(torch.eye(3), pose).item() == pytest.approx(30.0, abs=1e-4)
    assert torch.allclose(relative_pose(other, camera) @ pose, torch.eye(4), atol=1e-5)
    assert torch.allclose(camera_to_world([camera])[0] @ pose, camera_to_world([other])[0], atol=1e-5)
