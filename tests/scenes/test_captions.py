from itertools import pairwise
from random import Random

import pytest

from imgdit.scenes.captions import LOOKS, PLACES, leave_out, meaning, vocabulary, words
from imgdit.scenes.captions import caption as scene_caption
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Camera, Scene, SceneObject


def captions(count=400):
    for seed in range(count):
        scene = Scene.sample(seed)
        yield scene, scene_caption(scene, Random(seed))


def read(caption):
    """Objects with their colours in the order of the caption."""
    spoken = words(caption)
    return [
        {"object": after, "colour": word} for word, after in pairwise(spoken) if word in COLOURS and after in OBJECTS
    ]


def test_sentences_say_what_the_scene_means():
    for scene, caption in captions():
        said = meaning(scene)
        things = read(caption)
        assert sorted(map(str, things)) == sorted(map(str, said["objects"]))
        spoken = words(caption)
        assert sum(word in OBJECTS for word in spoken) == sum(word in COLOURS for word in spoken) == len(scene.objects)
        assert any(place in caption for place in PLACES[scene.background])
        assert not any(p in caption for b in BACKGROUNDS if b != scene.background for p in PLACES[b])
        marks = {"sketch": ("sketch", "pencil"), "photo": ("photo", "photograph")}
        named = [s for s in STYLES if any(mark in spoken for mark in marks.get(s, (s,)))]
        assert scene.style in named
        assert "  " not in caption and caption == caption.strip() and "{" not in caption
        for article, noun in pairwise(spoken):
            if noun in COLOURS:
                assert article == ("an" if noun == "orange" else "a")


def test_left_and_right_are_told_as_they_are():
    told = set()
    for scene, caption in captions(1500):
        if len(scene.objects) < 2:
            continue
        things, said = read(caption), meaning(scene)
        assert said["relation"] == "left"
        # The first of the caption is the left one unless it is said to be right of the other.
        swapped = "right of" in caption
        assert things == (said["objects"][::-1] if swapped else said["objects"]), caption
        told.add(swapped)
    assert told == {True, False}


def test_what_stands_behind_is_not_told_as_left():
    things = (SceneObject("cube", "red", 0.0, -1.0, 0.6), SceneObject("cone", "blue", 0.0, 1.0, 0.6))
    scene = Scene(things, Camera(elevation=40.0))
    assert meaning(scene)["relation"] is None
    for seed in range(30):
        assert not {"left", "right"} & set(words(scene_caption(scene, Random(seed))))


def test_one_scene_has_many_sentences():
    scene = Scene.sample(4, objects=2)
    assert len({scene_caption(scene, Random(seed)) for seed in range(300)}) > 100
    assert scene_caption(scene, Random(5)) == scene_caption(scene, Random(5))


def test_parts_can_be_left_unsaid():
    rng = Random(0)
    shares = [leave_out(rng, 0.3) for _ in range(1000)]
    for part in ("place", "style"):
        assert 0.25 < sum(part in unsaid for unsaid in shares) / 1000 < 0.35
    for scene, _ in captions(100):
        styleless, placeless = scene_caption(scene, rng, ["style"]), scene_caption(scene, rng, ["place"])
        assert scene.style not in words(styleless) and any(p in styleless for p in PLACES[scene.background])
        assert not any(p in placeless for p in PLACES[scene.background])
        bare = scene_caption(scene, rng, ("place", "style"))
        assert len(read(bare)) == len(scene.objects) and scene.style not in words(bare)
        nameless = scene_caption(scene, rng, ["subject"])
        assert not read(nameless) and scene.style in words(nameless)
        assert any(p in nameless for p in PLACES[scene.background])
    with pytest.raises(ValueError, match=r"chance is in \[0, 1\], got 2"):
        leave_out(rng, 2)
    with pytest.raises(ValueError, match="needs place and style"):
        scene_caption(scene, rng, ["subject", "style"])
    with pytest.raises(ValueError, match="'stile'"):
        scene_caption(scene, rng, ["stile"])


def test_vocabulary_is_what_is_said():
    known = vocabulary()
    assert known == sorted(set(known)) and {*OBJECTS, *COLOURS, *STYLES} <= set(known)
    drawn = [scene_caption(scene, Random(seed)) for scene, _ in captions(600) for seed in range(6)]
    spoken = {word for text in drawn for word in words(text)}
    spoken |= {word for scene, caption in captions(600) for word in words(caption)}
    assert spoken <= set(known)
    missing = set(known) - spoken - {"next"}  # "next to" is said of what stands behind each other
    assert not missing
    assert set(LOOKS) == set(STYLES) and set(PLACES) == set(BACKGROUNDS)
