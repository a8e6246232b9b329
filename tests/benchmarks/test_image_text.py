"""The benchmark of captions and answers: one who knows the scenes reaches every bar, one who guesses is at chance."""

import math
from random import Random
from types import SimpleNamespace

import pytest
import torch

from imgdit.benchmarks.scenes import control, image_text, judge, text_to_image
from imgdit.benchmarks.scenes.image_text import (
    HOLE,
    HOLES,
    SHIFTS,
    agrees,
    answer_scores,
    cache_scores,
    caption_scores,
    fill_scores,
    filling,
    heldout_fillings,
    round_trip_scores,
    schedule_scores,
)
from imgdit.benchmarks.scenes.judge import KINDS, finds, judge_scores, probe_answer, questions_of
from imgdit.benchmarks.scenes.text_to_image import expected
from imgdit.scenes.caption_parser import parse_caption
from imgdit.scenes.captions import PLACES, caption, leave_out, plain_caption, words
from imgdit.scenes.probe import Reading
from imgdit.scenes.questions import ANSWERS, heldout_questions
from imgdit.scenes.readings import QUESTIONS
from imgdit.scenes.world import Scene

KNOWN: dict[float, Scene] = {}


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """Images of 8 pixels that show nothing but the number of their scene."""
    KNOWN.clear()
    text_to_image.held_out.cache_clear()

    def render(scenes):
        numbers = [float(len(KNOWN) + i + 1) for i in range(len(scenes))]
        KNOWN.update(zip(numbers, scenes))
        rgb = torch.tensor(numbers)[:, None, None, None].expand(-1, 3, 8, 8) / 2**16
        return SimpleNamespace(rgb=rgb)

    monkeypatch.setattr(image_text, "render", render)
    monkeypatch.setattr(text_to_image, "render", render)
    monkeypatch.setattr(judge, "render", render)
    yield
    text_to_image.held_out.cache_clear()


def shown(images):
    return [KNOWN.get(float(image.mean()) * 2**16) for image in images]


class Knows:
    """Sees which scene an image shows."""

    def __init__(self):
        kinds = [heldout_questions(kind, 40) for kind in ANSWERS]
        self.answers = {(scene, one.text): one.answer for found in kinds for scene, one in found}
        self.words = {case.text: case.whole for kind in HOLES for _, case in heldout_fillings(kind, 12)}

    def caption(self, images, seed, steps=None, shift=None):
        return [plain_caption(scene) for scene in shown(images)]

    def answer(self, images, questions, seed):
        return [self.answers.get((scene, text), "") for scene, text in zip(shown(images), questions)]

    def choose(self, images, questions, choices):
        said = [one.split(",")[0] for one in self.answer(images, questions, 0)]  # "no" of "no, a red cube"
        return [list(among).index(one) if one in among else 0 for one, among in zip(said, choices)]

    def fill(self, texts, images, seed):
        return [self.words[text] for text in texts]

    def images(self, prompts, seed):
        told = [parse_caption(prompt) for prompt in prompts]
        known = list(KNOWN.values())
        scenes = [next(s for s in known if said.names_objects(s) and s.style == said.style) for said in told]
        return image_text.render(scenes).rgb

    joint_task = "image and text at once"

    def joint(self, count, seed):
        scenes = [Scene.sample(i) for i in range(count)]
        return image_text.render(scenes).rgb, [caption(scene, Random(0)) for scene in scenes]


class Guesses(Knows):
    """Answers at random what the question leaves open, and always says and draws the same."""

    def __init__(self):
        found = [heldout_questions(kind, 400) for kind in ANSWERS]
        self.choices = {one.text: (one.kind, one.choices) for asked in found for _, one in asked}
        self.rng = Random(0)

    def caption(self, images, seed, steps=None, shift=None):
        return ["a photo of a red cube, on a" for _ in images]

    def answer(self, images, questions, seed):
        chosen = [(self.choices[text][0], self.rng.choice(self.choices[text][1])) for text in questions]
        return [image_text_phrase(*one) for one in chosen]

    def choose(self, images, questions, choices):
        return [self.rng.randrange(len(among)) for among in choices]

    def fill(self, texts, images, seed):
        return [text.replace(HOLE, "cube") for text in texts]

    def images(self, prompts, seed):
        return image_text.render([Scene.sample(0)] * len(prompts)).rgb

    joint_task = "image and text at once"

    def joint(self, count, seed):
        return self.images([""] * count, seed), ["a photo of a red cube, at night"] * count


def image_text_phrase(kind, choice):
    return PLACES[choice][-1] if kind == "place" else choice


class Probe(torch.nn.Module):
    """Says which scene an image shows."""

    questions = QUESTIONS

    def forward(self, pixels):
        said = [expected(scene) for scene in shown((pixels + 1) / 2)]
        logits = {
            name: torch.tensor([[float(choice == one[name]) for choice in choices] for one in said])
            for name, choices in QUESTIONS.items()
        }
        blank = torch.zeros(len(pixels), 1, 8, 8)
        return Reading(logits, blank, blank, torch.zeros(len(pixels), 2))


def test_one_who_knows_reaches_every_bar():
    writer, kept = Knows(), {}
    scores = caption_scores(writer, 12, kept.__setitem__)
    scores += fill_scores(writer, 12, kept.__setitem__)
    scores += answer_scores(writer, 40, kept.__setitem__)
    scores += round_trip_scores(writer, writer, Probe(), 12, kept.__setitem__)
    assert all(score.met is not False for score in scores)
    assert sum(score.met is True for score in scores) == 11 + 5 + 16 + 3
    values = [score.estimate.value for score in scores if "without the image" not in score.metric]
    assert values == [1.0] * len(values)
    assert all(not wrong for _, _, wrong in kept.values())
    assert kept["answer, style"][0][0].startswith("what style is it? ")
    assert scores[0].counts == {"right": 12, "of": 12}


def test_one_who_guesses_is_at_chance():
    writer, kept = Guesses(), {}
    scores = answer_scores(writer, 400, kept.__setitem__)
    chances = {"object": 1 / 8, "colour": 1 / 8, "style": 1 / 6, "place": 1 / 6}
    for kind, (right, blind, gain) in zip(ANSWERS, zip(*[iter(scores)] * 3, strict=True), strict=True):
        wanted = chances.get(kind, 1 / 2)
        apart = 4 * math.sqrt(wanted * (1 - wanted) / 400)
        assert abs(right.estimate.value - wanted) < apart and abs(blind.estimate.value - wanted) < apart, kind
        assert right.met is False and gain.met is False and f"{wanted:.2f}"[:3] in blind.metric
    scores = caption_scores(writer, 12, kept.__setitem__)
    assert {score.estimate.value for score in scores} == {0.0}
    scores = round_trip_scores(writer, writer, Probe(), 12, kept.__setitem__)
    assert not any(score.met for score in scores) and len(kept["joint"][2]) == 12
    assert scores[2].task == "image and text at once"
    assert fill_scores(writer, 12, kept.__setitem__)[-1].estimate.value == 0.0


def test_judges_are_compared_with_the_probe():
    kept = {}
    scores = judge_scores(Knows(), Probe(), 40, kept.__setitem__)
    assert (
        [score.estimate.value for score in scores] == [1.0] * 15 and scores[-1].met and scores[-1].counts["of"] == 280
    )
    assert kept["judge, style"][0][0].startswith("what style is it? ")
    scores = judge_scores(Guesses(), Probe(), 200, kept.__setitem__)
    assert scores[-1].met is False and 0.15 < scores[-1].estimate.value < 0.45


def test_the_probes_answers_follow_from_what_it_sees():
    for kind in KINDS:
        for scene, question in heldout_questions(kind, 60):
            assert probe_answer(question, expected(scene)) == question.value, question
    nothing = {name: "nothing" for name in QUESTIONS}
    for kind in KINDS:
        for _, question in heldout_questions(kind, 40):
            said = probe_answer(question, nothing)
            assert said == {"yes_no": "no", "style": "nothing", "place": "nothing"}.get(kind)
    seen = expected(next(scene for scene, _ in heldout_questions("relation", 1)))
    alone = {**seen, "right object": "nothing", "right colour": "nothing"}
    _, relation = heldout_questions("relation", 1)[0]
    assert probe_answer(relation, alone) is None


def test_a_judge_finds_what_a_prompt_says():
    scenes = [Scene.sample(i, objects=1 + i % 2) for i in range(30)]
    images = image_text.render(scenes).rgb

    class Sees:
        def choose(self, images, questions, choices):
            found = []
            for scene, text, among in zip(shown(images), questions, choices):
                right = {one.text: one.answer for one in questions_of(scene)}
                found.append(list(among).index(right[text]))
            return found

    assert all(finds(Sees(), images, scenes))
    others = [scenes[0], *scenes[:-1]]
    same = finds(Sees(), images[:1], scenes[:1])
    assert same == [True] and {len(questions_of(scene)) for scene in others} == {3, 5}

    class Blind(Sees):
        def choose(self, images, questions, choices):
            return [0] * len(questions)

    first = [all(one.value == one.choices[0] for one in questions_of(scene)) for scene in scenes]
    assert finds(Blind(), images, scenes) == first


def test_conditions_are_judged_too():
    scenes = [Scene.sample(i) for i in range(8)]
    found = control._judged("depth", Guesses(), image_text.render(scenes).rgb, scenes, [True] * 8)
    assert [score.metric for score in found] == ["text right, by the judge", "judge agrees with the probe on text"]
    assert found[0].estimate == found[1].estimate and found[0].estimate.value < 0.5
    assert control._judged("depth", None, None, [], []) == []


def test_schedules_are_asked_for():
    asked = []

    class Counts(Knows):
        def caption(self, images, seed, steps=None, shift=None):
            asked.append((shift, steps))
            return super().caption(images, seed)

    scores = schedule_scores(Counts(), 5, steps=(2, 4))
    assert asked == [(shift, steps) for shift in SHIFTS for steps in (2, 4)]
    assert len(scores) == 6 and all(score.counts["seconds_per_caption"] >= 0 for score in scores)


def test_a_cache_is_compared_with_full_attention():
    asked = []

    class Counts(Knows):
        def caption(self, images, seed, steps=None, shift=None, cache=None):
            asked.append(cache)
            texts = super().caption(images, seed)
            return texts if cache else ["", *texts[1:]]

    (score,) = cache_scores(Counts(), 5)
    assert asked == [True, False, False, True, True, False]
    assert (score.counts["right"], score.counts["of"]) == (4, 5)
    assert score.counts["seconds_per_caption_cache"] >= 0 and score.counts["seconds_per_caption_full_attention"] >= 0


def test_the_grammar_reads_what_it_says():
    for seed in range(400):
        scene, rng = Scene.sample(seed), Random(seed)
        for unsaid in ((), leave_out(rng, 0.5), ("subject",)):
            said = parse_caption(caption(scene, rng, unsaid))
            assert said.style == (None if "style" in unsaid else scene.style)
            assert said.background == (None if "place" in unsaid else scene.background)
            assert said.objects == () if "subject" in unsaid else said.names_objects(scene)
        said = parse_caption(f" {plain_caption(scene).upper()}.")
        assert (said.style, said.background) == (scene.style, scene.background) and said.names_objects(scene)
        if scene.relation:
            mirrored = said._replace(objects=said.objects[::-1])
            assert not mirrored.names_objects(scene) and not said._replace(relation=None).names_objects(scene)


@pytest.mark.parametrize(
    "text",
    [
        "", "cube", "an red cube", "a red cube at", "a red cube a blue cone", "a red cube left of a red cone",
        "a red cube left of a blue cube", "a photo of a sketch of a red cube",
        "a red cube, photo style, at night, at night",
        "a red cube left of a blue cone and a green torus",
    ],
)  # fmt: skip
def test_what_the_grammar_cannot_say_is_not_read(text):
    assert parse_caption(text) is None


def test_fillings_lack_one_word_that_the_image_decides():
    for kind in HOLES:
        cases = heldout_fillings(kind, 30)
        assert cases == heldout_fillings(kind, 30) and len({case.word for _, case in cases}) > 1
        for scene, case in cases:
            assert case.text.count(HOLE) == 1 and case.text.replace(HOLE, case.word) == case.whole
            others = {
                word: parse_caption(case.text.replace(HOLE, word)) for _, other in cases for word in [other.word]
            }
            right = [
                word for word, said in others.items()
                if said is not None and said.names_objects(scene)
                and (said.style, said.background) == (scene.style, scene.background)
            ]  # fmt: skip
            assert right == [case.word]
    assert filling(Scene.sample(3, objects=1), Random(0), "relation") is None


def test_agreement_minds_sides_only_where_they_are_named():
    seen = {"left object": "cube", "left colour": "red", "right object": "cone", "right colour": "blue"}
    seen |= {"style": "photo"}
    for text, same in (
        ("a photo of a red cube left of a blue cone", True),
        ("a photo of a blue cone left of a red cube", False),
        ("a photo of a blue cone and a red cube", True),
        ("a sketch of a red cube left of a blue cone", False),
        ("a photo of a red cube", False),
    ):
        assert agrees(parse_caption(text), seen) is same
    assert words(HOLE) == []
