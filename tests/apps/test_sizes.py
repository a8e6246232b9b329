"""Sizes: what a model was taught, by its folder or by its own size, and what another one costs."""

import json

import pytest
from tiny_runs import small_pipeline

from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.jobs.sizes import check_sides, duration, unsuited
from imgdit.apps.session import Session
from imgdit.checkpoints import SCENES
from imgdit.prompts.facts import KEY
from imgdit.taught import FILE, Taught, read_taught, write_taught


@pytest.mark.parametrize(
    ("size", "sizes", "own", "better"),
    [
        ((128, 128), [(128, 128)], 128, None),
        ((256, 256), [(128, 128)], 128, "take 128x128"),
        ((96, 48), [(64, 64), (96, 48)], 64, None),
        ((192, 96), [(64, 64), (96, 48)], 64, "take 96x48"),
        # A model of which only its own size is known was taught others of about that area (FLUX.1, SD3).
        ((1344, 768), [], 1024, None),
        ((512, 512), [], 1024, None),
        ((2048, 2048), [], 1024, "take 1024x1024"),
        ((256, 256), [], 1024, "take 1024x1024"),
        ((2048, 512), [], 1024, "take 1456x720"),
        ((64, 64), [], None, None),
    ],
)
def test_only_a_size_that_was_not_taught_is_remarked(size, sizes, own, better):
    said = unsuited(size, sizes, own, 16)
    assert said is None if better is None else better in said and f"{size[0]}x{size[1]}" in said


def test_sides_are_named_in_the_order_they_are_given():
    with pytest.raises(ValueError, match="got 250x128; try 240x128"):
        check_sides(250, 128, 16)
    with pytest.raises(ValueError, match="got 0x128; try 16x128"):
        check_sides(0, 128, 16)
    check_sides(256, None, 16)


def test_times_are_rough():
    assert [duration(seconds) for seconds in (0.1, 42.4, 130, 3600, 9000)] == ["1 s", "42 s", "2 min", "60 min", "2 h"]


def test_the_folder_tells_what_was_taught(tmp_path):
    assert read_taught(tmp_path) == Taught()
    write_taught(tmp_path, Taught(((64, 96), (96, 64)), "scenes"))
    assert read_taught(tmp_path) == Taught(((64, 96), (96, 64)), "scenes")
    assert read_taught(SCENES) == Taught(((128, 128),), "scenes")
    for damaged, said in (({"size": []}, "did you mean 'sizes'"), ({"sizes": [[1]]}, "width and height")):
        (tmp_path / FILE).write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=said):
            read_taught(tmp_path)


def test_remarks_are_of_models_that_were_taught_the_scenes_only(tmp_path):
    folder = small_pipeline(tmp_path)
    taught = read_taught(folder)
    assert taught == Taught(((128, 128),), "scenes")  # `assemble` writes it from the recipe
    (folder / FILE).unlink()
    tokenizer = folder / "tokenizer/tokenizer_config.json"
    values = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps({name: value for name, value in values.items() if name != KEY}))
    asked = Request("a white cube", steps=10, height=256, width=256)
    (said,) = Session(Shelf(folder)).remarks(asked)  # its own size is known, and nothing of its words
    assert "128x128" in said and "It takes at least" in said
    write_taught(folder, taught)
    tokenizer.write_text(json.dumps(values))
    session = Session(Shelf(folder))
    words, size = session.remarks(asked)
    assert '"white" (nearest: yellow)' in words and "was taught 128x128" in size
    assert (
        session.remarks(Request("a red cube", height=128, width=128)) == session.remarks(Request("a red cube")) == []
    )
