"""Tiles, features and vectors of images against recorded ones of LLaDA-V and LaViDa."""

import pytest
import torch
from vision_cases import CASES, assert_near, features, image_of, model_of, named, picture, recorded, tiling_of, vectors

from imgdit.images.tiles import Video, best_grid, cut_tiles
from imgdit.models.image_tokens import pool_tokens, tower_features

VIDEO_STRIDE = 37
"""Of recorded rows."""


@pytest.mark.parametrize("name", [name for name in named("preprocess") if "grid_choice" not in name])
def test_tiles(name):
    case = CASES[name]
    options, want = case["options"], recorded(name, "out")
    image = image_of(recorded(name, "in")["image"], options["repeat"])
    assert list(image.size) == options["size"]
    tiling = tiling_of(case["set"], options["image_aspect_ratio"], options.get("padded_base", False))
    tiles = cut_tiles(image, tiling)
    assert len(tiles) == options["tiles"]
    assert (list(tiling.grid_of(image.size) or (0, 0))) == options["grid_width_height"]
    tolerance = case["meta"]["tolerances"]["preprocess"]
    assert_near(tiles[:, :, 5::32, 3::32], want["sampled"], tolerance)
    assert_near(tiles.mean((2, 3)), want["tile_mean"], tolerance)
    assert_near(tiles.std((2, 3)), want["tile_std"], tolerance)


@pytest.mark.parametrize("name", [name for name in named("preprocess") if "grid_choice" in name])
def test_grids(name):
    case = CASES[name]
    tiling = model_of(case["set"]).projector.tiling
    found = [tiling.grid_of(tuple(size)) for size in recorded(name, "in")["sizes"].tolist()]
    assert [list(grid) for grid in found] == recorded(name, "out")["grid"].tolist()
    assert best_grid((10, 10), ((20, 10), (10, 20))) == (20, 10)  # of equal ones the first


@pytest.mark.parametrize("name", named("tower"))
def test_features(name):
    case = CASES[name]
    found, want = features(case["set"], case["options"]["picture"]), recorded(name, "out")
    tolerance = case["meta"]["tolerances"]["tower"]
    assert_near(found[:, ::81], want["tower_rows"], tolerance)
    assert_near(found.mean((1, 2)), want["tower_mean"], tolerance)
    assert_near(found.std((1, 2)), want["tower_std"], tolerance)
    with torch.no_grad():
        assert_near(model_of(case["set"]).projector.mm_projector(found)[:, ::81], want["projector_rows"], tolerance)


@pytest.mark.parametrize("name", named("merge"))
def test_vectors_of_images(name):
    case = CASES[name]
    options, want = case["options"], recorded(name, "out")
    found = vectors(case["set"], options["picture"])
    assert len(found) == options["length"] and list(picture(case["set"], options["picture"]).size) == options["size"]
    tolerance = case["meta"]["tolerances"]["merge"]
    stride = case["meta"]["row_stride"]
    assert_near(found[::stride], want["rows"], tolerance)
    assert_near(found[-3:], want["last"], tolerance)
    assert_near(found.mean(0), want["mean"], tolerance)
    if "newline_count" in want:
        newline = model_of(case["set"]).projector.image_newline
        assert (found == newline).all(1).sum() == want["newline_count"]


@pytest.mark.parametrize("name", named("merge_video"))
def test_vectors_of_videos(name):
    case = CASES[name]
    model = model_of(case["set"])
    (video,) = {one for one in named("merge_video") if "video" in recorded(one, "in")}
    frames = [image_of(frame) for frame in recorded(video, "in")["video"]]
    tiles = torch.cat([cut_tiles(frame, tiling_of(case["set"], "square")) for frame in frames])
    model.projector.register_to_config(video_newline=case["options"]["newline_position"])
    try:
        with torch.no_grad():
            (found,) = model.projector([tower_features(model.vision_tower, tiles)], [Video(frames)])
        assert model.projector.lengths([len(tiles)], [Video(frames)]) == [len(found)]
    finally:
        model.projector.register_to_config(video_newline="grid")
    want = recorded(name, "out")
    assert len(found) == case["options"]["length"]
    tolerance = case["meta"]["tolerances"]["merge"]
    assert_near(found[::VIDEO_STRIDE], want["rows"], tolerance)
    assert_near(found[-3:], want["last"], tolerance)
    assert_near(found.mean(0), want["mean"], tolerance)


@pytest.mark.parametrize("name", named("pool"))
def test_pooling(name):
    case, tokens = CASES[name], recorded(name, "in")["features"]
    for mode, want in recorded(name, "out").items():
        assert_near(pool_tokens(tokens, case["options"]["stride"], mode), want, case["meta"]["tolerances"]["pool"])
