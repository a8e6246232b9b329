"""Names of version 0.1 are found where they are now, with a warning."""

import importlib
import sys

import pytest

from imgdit.moved import MOVED, PACKAGES, SPLIT


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_module_is_found(old):
    sys.modules.pop(f"imgdit.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"imgdit.{old} is now imgdit.{MOVED[old]}"):
        module = importlib.import_module(f"imgdit.{old}")
    new = importlib.import_module(f"imgdit.{MOVED[old]}")
    assert module.__doc__ == new.__doc__
    for name in [name for name in vars(new) if not name.startswith("_")]:
        assert getattr(module, name) is getattr(new, name)


def test_no_old_name_hides_a_module():
    for old in MOVED:
        sys.modules.pop(f"imgdit.{old}", None)
        spec = importlib.util.find_spec(f"imgdit.{old}")
        assert type(spec.loader).__name__ == "MovedLoader", f"{old} is a module today"
    assert SPLIT.keys() <= MOVED.keys()
    assert MOVED.keys() >= PACKAGES


def test_content_of_split_modules_is_found():
    with pytest.warns(DeprecationWarning):
        from imgdit.training.config import Recipe, build_model, parse_as
    from imgdit import recipes
    from imgdit.training import build, recipe

    assert (Recipe, build_model, parse_as) == (recipe.Recipe, build.build_model, recipes.parse_as)
    with pytest.warns(DeprecationWarning, match="imgdit.layout.FrameLayout"):
        from imgdit.frames import FrameLayout
    from imgdit import layout

    assert FrameLayout is layout.FrameLayout


def test_a_renamed_class_is_found_where_it_was():
    with pytest.warns(DeprecationWarning, match="imgdit.PictureFrame is now ImageFrame"):
        from imgdit import PictureFrame
    with pytest.warns(DeprecationWarning, match="imgdit.tasks.PictureFrame is now ImageFrame"):
        from imgdit.tasks import PictureFrame as same
    assert PictureFrame is same is importlib.import_module("imgdit.tasks").ImageFrame


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(ModuleNotFoundError, match=r"imgdit\.no_such"):
        importlib.import_module("imgdit.no_such")
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match="no_such"):
        sys.modules.pop("imgdit.lora_files", None)
        exec("from imgdit.lora_files import no_such")


def test_old_names_of_attributes_and_arguments():
    """Version 0.1 said picture where the field says image."""
    import numpy as np
    from PIL import Image

    from imgdit.data.rows import Row
    from imgdit.tasks import task_frames

    with pytest.warns(DeprecationWarning, match=r"Row: 'picture' is now 'image'"):
        row = Row("a", picture=b"data")
    with pytest.warns(DeprecationWarning, match=r"Row: 'picture' is now 'image'"):
        assert row.picture is row.image == b"data"
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    with pytest.warns(DeprecationWarning, match=r"task_frames: 'pictures' is now 'images'"):
        old = task_frames("depth", pictures=image)
    assert [frame.kind for frame in old] == [frame.kind for frame in task_frames("depth", images=image)]
    with pytest.raises(TypeError, match="unexpected keyword argument 'photo'"):
        Row("a", photo=b"data")


def test_a_studio_is_a_session():
    from imgdit.apps.studio import Studio
    from imgdit.checkpoints import SCENES

    with pytest.warns(DeprecationWarning, match="imgdit.apps.request is now"):
        sys.modules.pop("imgdit.apps.request", None)
        from imgdit.apps.request import AskedFrame, Request
    with pytest.warns(DeprecationWarning, match=r"Session\(Shelf\(folder\)\)"):
        studio = Studio(SCENES)
    assert studio.controls == studio.shelf.controls and studio.home == SCENES
    made = studio.make(Request("a red cube", seed=1, steps=1, frames=(AskedFrame(),)))
    with pytest.warns(DeprecationWarning, match="Generated: 'pictures' is now 'images'"):
        assert len(made.pictures) == 1 and made.pictures[0].size == made.images[0].size


def test_frames_are_clean_or_generated():
    """Version 0.1 said given, made and held."""
    from imgdit.frames import Frame
    from imgdit.pipelines.options import FrameOptions
    from imgdit.tasks import ImageFrame

    with pytest.warns(DeprecationWarning, match=r"ImageFrame\.given is now ImageFrame\.clean") as warned:
        old = ImageFrame.given("x", "depth")
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="'is_given' is now 'is_clean'"):
        assert old.is_given and old.kind == "depth"
    with pytest.warns(DeprecationWarning, match=r"ImageFrame\.make is now ImageFrame\.generate"):
        assert not ImageFrame.make().is_clean
    with pytest.warns(DeprecationWarning, match="'held' is now 'is_clean'"):
        assert Frame((2, 2), sigma=0.0).held
    with pytest.warns(DeprecationWarning, match="'given_level' is now 'conditioning_level'"):
        assert FrameOptions(given_level="clean").conditioning_level == "clean"


def test_old_options_of_the_command_line_are_taken_and_hidden():
    from typer.main import get_command

    from imgdit.apps.cli import app

    command = get_command(app).commands["any"]
    with pytest.warns(DeprecationWarning, match="--given is now --condition"):
        context = command.make_context("any", ["--given", "image=a.png", "--make=depth"])
    assert (context.params["conditions"], context.params["generate"]) == (["image=a.png"], ["depth"])
    assert not any("--given" in option.opts or "--make" in option.opts for option in command.params)


def test_old_keys_of_recipes_are_taken():
    from imgdit.recipes import check_arguments
    from imgdit.scenes.training_frames import SceneFrames

    check_arguments(SceneFrames, {"shares": {"pictures": 1.0}}, "data.arguments")
    with pytest.warns(DeprecationWarning) as warned, pytest.raises(ValueError, match="unknown name in pairs"):
        SceneFrames(shares={"pictures": 1.0}, pairs={"none": 1.0})
    assert [str(one.message).partition(" is now ")[::2] for one in warned] == [
        ("SceneFrames: 'shares'", "'probabilities'; the old name goes with version 0.3"),
        ("data.arguments.probabilities: 'pictures'", "'images'; the old name goes with version 0.3"),
    ]
