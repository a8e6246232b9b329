"""Questions about scenes: answers are exact, words are tokens, and the text alone does not tell the answer."""

import json
import math
from dataclasses import asdict
from random import Random

import pytest
import torch
from tiny_runs import small_cache

from imgdit.checkpoints import SCENES
from imgdit.io.safe_json import read_object
from imgdit.pipelines.text_frames import QuestionForms
from imgdit.pipelines.texts import BYTES
from imgdit.scenes.captions import PLACES, plain_caption, vocabulary
from imgdit.scenes.latents import scene_views
from imgdit.scenes.questions import (
    ANSWERS,
    NEW_WORDS,
    Question,
    blind_accuracy,
    chance,
    heldout_questions,
    nearer_object,
    possible_kinds,
    question,
    question_forms,
    question_words,
    read_answer,
)
from imgdit.scenes.tokenizer import caption_tokenizer, question_tokenizer, text_tokenizer
from imgdit.scenes.training_texts import SceneImageTexts
from imgdit.scenes.world import STYLES, Camera, Scene, SceneObject

CUBE, CONE = SceneObject("cube", "red", x=-0.8, y=-0.5, size=0.7), SceneObject("cone", "blue", x=0.8, y=0.5, size=0.7)
TWO = Scene((CUBE, CONE), Camera(distance=5.0), "sketch", "wood")
ONE = Scene((CUBE,), Camera(), "photo", "night")
TRUTH = {
    "what object is it?": "cube",
    "what object is on the left?": "cube",
    "what object is on the right?": "cone",
    "what object is red?": "cube",
    "what object is blue?": "cone",
    "what object is left of the cone?": "cube",
    "what object is right of the cube?": "cone",
    "what colour is it?": "red",
    "what colour is the cube?": "red",
    "what colour is the cone?": "blue",
    "what colour is the left object?": "red",
    "what colour is the right object?": "blue",
    "is the cube left or right of the cone?": "left",
    "is the cone left or right of the cube?": "right",
    "what style is it?": "sketch",
    "where is it?": "on a wooden floor",
    "which is nearer, the cube or the cone?": "cube",
    "which is nearer, the cone or the cube?": "cube",
    "is the cube left of the cone?": "yes",
    "is the cone left of the cube?": "no",
    "is there a red cube?": "yes, a red cube",
    "is there a blue cube?": "no, a red cube",
    "is there a red cone?": "no, a blue cone",
    "is there a blue cone?": "yes, a blue cone",
    "is the cube red?": "yes, red",
    "is the cone blue?": "yes, blue",
    "is the cube blue?": "no, red",
    "is the style sketch?": "yes",
}


def asked(scene, count=150):
    return [question(scene, Random(i), kind) for kind in possible_kinds(scene) for i in range(count)]


def test_answers_are_the_truth_of_the_scene():
    found = {one.text: one.answer for one in asked(TWO)}
    assert {text: found[text] for text in TRUTH.keys() & found.keys()} == {t: TRUTH[t] for t in TRUTH.keys() & found}
    assert TRUTH.keys() - found.keys() == {"what object is it?", "what colour is it?"}
    assert found["how many objects are there?"] == "two"
    assert all(
        read_answer("yes_no", one) == "no" for text, one in found.items() if text[:2] == "is" and text not in TRUTH
    )
    others = {text.split()[-1][:-1]: one for text, one in found.items() if text.startswith("is there a red ")}
    assert {others[kind] for kind in others.keys() - {"cube", "cone"}} == {"no, a red cube"}  # of the same colour
    alone = {one.text: one.answer for one in asked(ONE)}
    assert alone["how many objects are there?"] == "one" and alone["what object is it?"] == "cube"
    assert alone["what colour is it?"] == "red" and alone["where is it?"] == "at night"
    assert not any("left" in text or "nearer" in text for text in alone)


def test_a_question_has_what_it_needs():
    assert possible_kinds(TWO) == tuple(ANSWERS)
    assert set(ANSWERS) - set(possible_kinds(ONE)) == {"relation", "nearer"}
    behind = Scene((SceneObject("cube", "red"), SceneObject("cone", "blue", y=1.5)), Camera(distance=5.0))
    assert set(ANSWERS) - set(possible_kinds(behind)) == {"relation"}
    level = Scene((CUBE, SceneObject("cone", "blue", x=0.8, y=-0.45)), Camera(distance=5.0))
    assert nearer_object(level) is None
    turned = TWO.with_camera(Camera(azimuth=180.0))  # from behind
    assert nearer_object(TWO) == CUBE and nearer_object(turned) == CONE
    with pytest.raises(ValueError, match="answers no question of the kind 'nearer'"):
        question(ONE, Random(0), "nearer")
    with pytest.raises(ValueError, match="kind of question"):
        question(ONE, Random(0), "colours")


def test_the_folder_of_the_embedded_model_says_what_confirms_a_claim():
    forms = QuestionForms(**question_forms())
    assert read_object(SCENES / "text_frames" / "questions.json") == json.loads(json.dumps(asdict(forms)))
    for kind in ANSWERS:
        for _, one in heldout_questions(kind, 24):
            confirming = forms.confirmation(one.text)
            assert (confirming is not None) == ("," in one.answer)
            if confirming is not None:
                assert (confirming == one.answer) == (one.value == "yes") and confirming.startswith("yes, ")


@pytest.mark.parametrize("kind", ANSWERS)
def test_text_alone_does_not_answer(kind):
    """At most four points above chance, on questions of other scenes than those that the guesses are from."""
    found = [one for _, one in heldout_questions(kind, 1500, "train", 300_000)]
    known, rest = found[:1000], found[1000:]
    blind, by_chance = blind_accuracy(known, rest), chance(rest)
    assert blind <= by_chance + 0.04, (blind, by_chance)
    # A test of the measure: told which is right, it answers.
    told = [Question(one.kind, f"{one.text} {one.answer}", one.answer, one.choices) for one in found]
    assert blind_accuracy(told, told) == 1.0
    counts = [sum(one.value == value for one in found) for value in ANSWERS[kind]]
    mean = len(found) / len(counts)
    assert all(abs(n - mean) < 5 * math.sqrt(mean) for n in counts), counts


def test_drawn_questions_count_one_as_often_as_two():
    found = [question(Scene.sample(seed), Random(seed), None).answer for seed in range(4000)]
    one, two = (found.count(answer) for answer in ANSWERS["count"])
    assert abs(one - two) < 4 * math.sqrt(one + two)
    yes, no = (found.count(answer) for answer in ANSWERS["yes_no"])
    assert abs(yes - no) < 4 * math.sqrt(yes + no)


def test_heldout_questions_are_the_same_and_about_their_scenes():
    first, again = (heldout_questions("yes_no", 5, "heldout_triples") for _ in range(2))
    assert first == again and first[0][0] == Scene.sample(200_000, "heldout_triples")
    assert len({one.text for _, one in first}) > 1


def test_answers_are_read():
    assert read_answer("object", "The cube.") == "cube" and read_answer("object", "a cube and a cone") is None
    assert read_answer("yes_no", "no") == "no" and read_answer("yes_no", "nothing") is None
    for background, phrases in PLACES.items():
        assert {read_answer("place", f"it is {phrase}") for phrase in phrases} == {background}
    assert read_answer("place", "floor") is None and read_answer("colour", "") is None
    one = question(TWO, Random(0), "place")
    assert one.is_right("on wooden planks") and not one.is_right("at night") and not one.is_right("")


def test_all_words_are_tokens_and_no_token_of_captions_has_moved():
    assert set(NEW_WORDS) == question_words() - {*vocabulary(), ","}
    captions, texts, questions = caption_tokenizer(), text_tokenizer(), question_tokenizer()
    for smaller, larger in ((captions, texts), (texts, questions)):
        assert smaller.get_vocab().items() < larger.get_vocab().items()
    assert len(questions) == len(texts) + len(NEW_WORDS)
    longest = 0
    for seed in range(300):
        one = question(Scene.sample(seed), Random(seed))
        ids = questions(f"{one.text} {one.answer}").input_ids
        tokens = questions.convert_ids_to_tokens(ids)
        assert tokens[-1] == "</s>" and not set(tokens) & {*BYTES, "<unk>"}
        assert questions.decode(ids, skip_special_tokens=True) == f"{one.text} {one.answer}"
        longest = max(longest, len(ids))
    assert longest <= 16
    assert "<0x69>" in questions.tokenize("item")  # a new word inside a longer one is none


def test_rows_hold_images_with_captions_and_answered_questions(tmp_path):
    with small_cache():
        data = SceneImageTexts(latents=str(tmp_path), scenes=2, images=2, captions=1, questions=3, plain=1.0)
        batch, again = data[3], data[3]
    assert batch.tokens.shape == (2, 64, 64) and batch.size == (8, 8)
    assert torch.equal(batch.texts.ids, again.texts.ids) and torch.equal(batch.tokens, again.tokens)
    assert batch.texts.ids.shape == (8, 32) and len({tuple(row) for row in batch.texts.ids.tolist()}) > 4
    tokenizer, said = data.tokenizer, []
    for ids, prompt, counted in zip(batch.texts.ids, batch.texts.prompt, batch.texts.counted):
        assert torch.equal(counted, ~prompt)  # end tokens are targets, questions never
        whole = (tokenizer.decode(ids[part], skip_special_tokens=True) for part in (prompt, counted))
        said.append(tuple(whole))
    first = [look for seed in range(2) for view in scene_views(seed).looks for look in view]
    assert not said[0][0] and {said[0][1], said[4][1]} <= {plain_caption(look) for look in first}
    assert all(text.endswith("?") and answer for text, answer in (*said[1:4], *said[5:]))
    with small_cache():
        turns = SceneImageTexts(latents=str(tmp_path), scenes=2, images=2, captions=1, questions=3, question_length=14)
        captions, questions = turns[0], turns[1]
        lengths = {turns[n].texts.ids.shape[1] for n in range(1, 41, 2)}
    assert captions.texts.ids.shape == (2, 32) and not captions.texts.prompt.any()
    assert 14 in lengths and len(lengths) > 3 and min(lengths) == 14 and max(lengths) <= 32
    assert len(questions.texts.ids) == 6 and questions.texts.prompt.any(1).all()
    assert captions.pooled is not None and captions.pooled.shape[0] == 1
    with small_cache():
        data = SceneImageTexts(
            latents=str(tmp_path), scenes=2, images=2, captions=1, questions=3, question_length=12, caption_every=3,
            kinds={"count": 1.0, "style": 2.0, "relation": 1.0}, count_padding=False,
        )  # fmt: skip
        batches = [data[n] for n in range(12)]
        with pytest.raises(ValueError, match="none of the 2 scenes has two"):
            SceneImageTexts(latents=str(tmp_path), scenes=2, two_objects=0.5)
    assert [not batch.texts.prompt.any() for batch in batches] == [n % 3 == 0 for n in range(12)]
    answered = [batch.texts for n, batch in enumerate(batches) if n % 3]
    words = {data.tokenizer.decode(i[c], skip_special_tokens=True) for t in answered for i, c in zip(t.ids, t.counted)}
    assert {"one"} < words <= {"one", "two", *STYLES}
    assert all((texts.counted.sum(1) == 2).all() for texts in answered)  # the word and one end token
    data.two_objects, data.pairs = 1.0, [1]
    assert {data._draw(Random(n), asked=True)[0] for n in range(9)} == {1}
    assert {data._draw(Random(n), asked=False)[0] for n in range(9)} == {0, 1}
    with pytest.raises(ValueError, match="unknown kind of question 'size'"):
        SceneImageTexts(latents=str(tmp_path), kinds={"size": 1.0})
    with pytest.raises(ValueError, match="two_objects is a probability"):
        SceneImageTexts(latents=str(tmp_path), two_objects=1.5)
    with pytest.raises(ValueError, match="caption_every"):
        SceneImageTexts(latents=str(tmp_path), caption_every=0)
    with pytest.raises(ValueError, match="in turn need both"):
        SceneImageTexts(latents=str(tmp_path), captions=0, question_length=14)
    with pytest.raises(ValueError, match="each image a text"):
        SceneImageTexts(latents=str(tmp_path), captions=0, questions=0)
