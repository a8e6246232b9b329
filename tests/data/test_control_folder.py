"""Conditions in a folder beside the images, as kohya's scripts and ai-toolkit keep them."""

import pytest
from tiny_images import image

from imgdit.data.control_folder import folder_of_trainers, with_conditions
from imgdit.data.sources import open_rows


def folder(path, *names):
    for number, name in enumerate(names):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(file)
        if "control" not in name:
            file.with_suffix(".txt").write_text(f"caption {number}")
    return path


def conditions(rows):
    return {row.name: row.conditions["depth"].path.name for row in rows.rows if "depth" in row.conditions}


def test_conditions_are_found_by_path_or_name(tmp_path):
    names = ("4_cube/a.png", "b.png", "control/a.jpg", "control/b.png", "control/c.png")
    path = folder(tmp_path / "images", *names)
    rows = with_conditions(open_rows(path), path, "control", "depth")
    assert conditions(rows) == {"4_cube/a.png": "a.jpg", "b.png": "b.png"}
    assert {row.name: row.repeats for row in rows.rows} == {"4_cube/a.png": 4, "b.png": 1}
    assert "1 condition (c) of no image" in rows.notes[-1].message
    assert folder_of_trainers(path) == {"data.arguments.path": str(path), "data.arguments.control": "control"}


def test_a_folder_elsewhere_with_the_same_paths(tmp_path):
    path = folder(tmp_path / "images", "x/a.png", "y/a.png")
    other = folder(tmp_path / "maps/control", "x/a.png", "y/a.webp")
    rows = with_conditions(open_rows(path), path, str(other), "depth")
    assert conditions(rows) == {"x/a.png": "a.png", "y/a.png": "a.webp"}
    assert folder_of_trainers(path) == {"data.arguments.path": str(path)}
    image(0).save(path / "a.png")
    with pytest.raises(ValueError, match=r"2 conditions called 'a'; which is a\.png's\?"):
        with_conditions(open_rows(path), path, str(other), "depth")


def test_folders_that_are_not_there(tmp_path):
    path = folder(tmp_path / "images", "a.png")
    with pytest.raises(ValueError, match="no folder 'control' of conditions"):
        with_conditions(open_rows(path), path, "control", "depth")
    with pytest.raises(ValueError, match="no folder 'nowhere' of images"):
        folder_of_trainers(tmp_path.__class__("nowhere"))
