"""Words without a meaning in the scenes are named with the nearest known one; what the grammar says never is."""

from random import Random

import pytest

from imgdit.apps.jobs.plan import PROMPTS
from imgdit.scenes.captions import caption
from imgdit.scenes.meanings import about_words, meaningless
from imgdit.scenes.world import Scene


def test_what_the_grammar_says_has_a_meaning():
    said = [caption(Scene.sample(i), Random(i)) for i in range(500)]
    assert about_words([*said, *PROMPTS, "A RED CUBE.", "a red cube on the wooden floor", ""]) is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a white cube", [("white", "colour", "pink")]),  # known as the colour of tiles, and as nothing else
        ("a black sphere at night", [("black", "colour", "green")]),
        ("a navy torus", [("navy", "colour", "blue")]),
        ("a small red cube", [("small", None, None)]),  # from "a mosaic of small tiles"
        ("a wooden cube", [("wooden", None, None)]),
        ("a maroon cuve", [("maroon", "colour", "red"), ("cuve", "object", "cube")]),
        ("a golden torus", [("golden", "colour", "yellow")]),
        ("the cube is red", []),
        ("blue balls", [("balls", "object", "sphere")]),
        ("red cubes", [("cubes", "object", "cube")]),
        ("a red cube on a white background", [("white background", "background", "on a grey background")]),
        ("a red cube at dusk", [("dusk", "background", "at sunset")]),
        ("a red cube, watercolour style", [("watercolour", "style", "cartoon")]),
        ("a cat beside a red cube", [("cat", None, None), ("beside", None, None)]),
        ("ein Würfel und ein Würfel", [("ein", None, None), ("würfel", None, None), ("und", None, None)]),
    ],
)
def test_what_has_none_is_named_with_the_nearest(prompt, expected):
    assert [tuple(one) for one in meaningless(prompt)] == expected


def test_each_word_is_said_once_with_what_is_known_of_its_kind():
    said = about_words(["a white cube", "a white torus", "a blue ball"])
    assert said.count('"white"') == 1 and '"ball" (nearest: sphere)' in said
    assert "colours red, orange" in said and "objects sphere, cube" in said and "backgrounds" not in said
    assert "backgrounds in a grey studio" in about_words(["a cat"])
