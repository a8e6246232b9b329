"""Free-form prompts become captions of the scenes; captions stay as they are, and what is not known is told."""

import json
from random import Random

import pytest

from imgdit.apps.jobs.plan import PROMPTS
from imgdit.checkpoints import SCENES
from imgdit.naming import closest
from imgdit.prompts import PromptWords, read_prompt, remark
from imgdit.prompts.facts import KEY
from imgdit.scenes.caption_parser import parse_caption
from imgdit.scenes.captions import caption, leave_out
from imgdit.scenes.meanings import scene_facts, scene_words
from imgdit.scenes.tokenizer import caption_tokenizer, text_tokenizer
from imgdit.scenes.world import Scene

WORDS = scene_words()


def about(*prompts):
    return remark(WORDS, [note for prompt in prompts for note in read_prompt(WORDS, prompt).notes])


def captions(count):
    for i in range(count):
        rng = Random(i)
        yield caption(Scene.sample(i), rng, leave_out(rng, 0.4))


def test_captions_stay_as_they_are():
    said = [*captions(600), *PROMPTS, "A RED  CUBE", "", "neon style, at night"]
    assert [read_prompt(WORDS, prompt).prompt for prompt in said] == said
    assert about(*said) is None


def test_what_is_read_is_a_caption_again():
    """Words of captions in disorder: whatever comes out, the grammar can say it, and says no other object."""
    for i, said in enumerate(captions(200)):
        words = said.replace("tubes", "tube").split()
        Random(i).shuffle(words)
        found = read_prompt(WORDS, " ".join(words)).prompt
        parsed = parse_caption(found)
        assert parsed is not None
        named = {word.strip(",") for word in words}
        assert {kind for kind, _ in parsed.objects} <= named | ({"cylinder"} if "tube" in named else set())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ball, crimson, at dusk", "a red sphere at sunset"),
        ("there is a box which is navy", "a blue cube"),
        ("an olive doughnut and a violet pill, comic", "a green torus and a purple capsule, cartoon style"),
        ("cone right of the yellow tube; the cone is pink", "a yellow cylinder left of a pink cone"),
        ("on the right a green ball, on the left a red cone", "a red cone left of a green sphere"),
        ("an orange pillar, to its left a cyan die", "a cyan cube left of an orange cylinder"),
        ("The crystal is blue and the hoop is pink.", "a blue octahedron and a pink torus"),
        ("a red cube on the wooden floor", "a red cube on a wooden floor"),
        ("pyramyd, grean", "a green pyramid"),
        ("a drawing of a light blue square box", "a blue cube, sketch style"),
        ("a cartoon drawing of a blue box", "a blue cube, cartoon style"),
        ("a yellow ball on a green floor", "a yellow sphere"),
        ("a pink cat and a ball, blue", "a blue sphere"),
        ("can you draw a pink can?", "a pink cylinder"),
    ],
)
def test_people_are_understood(prompt, expected):
    assert read_prompt(WORDS, prompt).prompt == expected


@pytest.mark.parametrize(
    ("prompt", "expected", "said"),
    [
        ("a white ball", "a yellow sphere", '"white" (nearest: yellow)'),
        ("a small red cube", "a red cube", 'never taught "small"'),
        ("a maroon cuve", "a maroon cuve", '"cuve" (nearest: cube)'),
        ("a red cube, watercolour style", "a red cube, cartoon style", '"watercolour" (nearest: cartoon)'),
        ("two red balls at night", "a red sphere at night", '"two red balls"'),
        ("a red ball, a blue box and a pink cone", "a red sphere and a blue cube", '"pink cone"'),
        ("a red ball without any shadow at night", "a red sphere at night", '"without any shadow" is not read'),
        ("not a cube but a red ball", "a red sphere", '"not cube" is not read'),
        ("a red ball inside a blue box", "a red sphere and a blue cube", '"inside" is not read'),
        ("a cat", "a cat", '"cat"'),
        ("ein Würfel", "ein Würfel", '"ein", "würfel"'),
    ],
)
def test_what_is_not_known_is_told(prompt, expected, said):
    assert read_prompt(WORDS, prompt).prompt == expected
    assert said in about(prompt)


def test_each_word_is_told_once_with_what_is_known_of_its_kind():
    said = about("a white cube", "a white torus", "a blue ball")
    assert said.count('"white"') == 1 and '"ball"' not in said
    assert "colours red, orange" in said and "objects" not in said and "backgrounds" not in said
    assert "backgrounds at sunset" in about("a cat")


def test_a_colour_is_chosen_where_none_is_said():
    assert read_prompt(WORDS, "a ball and a blue box").prompt == "a red sphere and a blue cube"
    assert read_prompt(WORDS, "a ball and a red box").prompt == "an orange sphere and a red cube"


def test_ordinary_words_are_no_misspelt_names():
    for word in ("read", "bed", "cute", "tall", "bell", "bold", "grow", "glue", "think", "stone", "done", "purpose"):
        assert read_prompt(WORDS, f"{word} red cube").prompt == "a red cube", word


def test_the_embedded_model_carries_the_facts(tmp_path):
    assert PromptWords.of_folder(SCENES) == scene_words(), "write scene_facts() into the tokenizer's configuration"
    assert json.loads(json.dumps(scene_facts())) == scene_facts()
    (tmp_path / "tokenizer").mkdir()
    caption_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert PromptWords.of_folder(tmp_path) == scene_words()
    assert PromptWords.of_tokenizer(text_tokenizer()) is None
    assert PromptWords.of_folder(tmp_path / "nowhere") is None


def test_damaged_facts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"unknown key of {KEY} 'name'; did you mean 'names'"):
        PromptWords.from_dict({"name": {}})
    with pytest.raises(ValueError, match="missing"):
        PromptWords.from_dict({"names": {}})
    with pytest.raises(ValueError, match="unknown kind of word 'colours'"):
        PromptWords.from_dict({**scene_facts(), "near": {"colours": {}}})


def test_every_synonym_leads_to_a_name():
    for part in (WORDS.same, WORDS.near):
        for kind, names in part.items():
            assert set(names) <= set(WORDS.names[kind]), closest(str(names), WORDS.names[kind])
