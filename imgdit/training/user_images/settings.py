"""What a recipe says about the data "user_images"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from imgdit.checkpoints import EMBEDDED
from imgdit.data.rows import CONDITIONS, Columns
from imgdit.images.preprocess import find_preprocessor
from imgdit.naming import check_choice, check_name
from imgdit.recipes import check_arguments
from imgdit.tasks import TASK_TOKENS
from imgdit.training.recipe import Recipe

USER_IMAGES = "user_images"
"""`data.name` of these recipes."""


@dataclass(frozen=True)
class UserImagesSettings:
    """Arguments of the data "user_images".

    Raises:
        ValueError: a value out of range, an unknown name, or two that do not go together.
    """

    path: str = ""
    """The data, see `imgdit.data.open_rows`. Rows count as often in an epoch as their `repeats` say."""
    model: str = EMBEDDED
    """Pipeline folder or Hub id of the autoencoder and text encoders; "embedded" for the one that comes along."""
    cache: str | None = "outputs/cache"
    """Folder that keeps what was computed, for any number of runs; `None`: compute again every time."""
    base: int = 512
    """Side of the square bucket in pixels; the others have its area."""
    ratio: float = 2.0
    """Of a bucket's longer to its shorter side, at most; 1: squares only."""
    samples: int = 4
    """Images of a batch."""
    min_side: int = 0
    """Pixels that an image's shorter side must have; 0: half of `base`."""
    max_broken: float = 0.05
    """Fraction of the rows that may be unusable. They are counted and left out."""
    condition: str | None = None
    """Name of the condition that each image comes with; `None`: none."""
    control: str | None = None
    """Folder with the condition of each image under the image's name, of any ending: inside `path` ("control") or
    beside it, as `conditioning_data_dir` of kohya's scripts and `control_path` of ai-toolkit; `None`: none."""
    preprocessor: str | None = None
    """Computes the condition of rows that lack it: a key of `imgdit.images.preprocess.PREPROCESSORS`, or
    "package.module:function" (`find_preprocessor`)."""
    preprocessor_options: dict[str, Any] = field(default_factory=dict)
    """Its options, such as {"low": 50}."""
    mode: Literal["frame", "independent", "joint"] = "frame"
    """What reads the condition. "frame": the model itself, as a second frame (OneDiffusion); "independent" or "joint":
    an adapter (OminiControl), and the condition sees only itself, or everything."""
    position: Literal["aligned", "subject"] = "aligned"
    """"aligned": on the image; "subject": to its left; of conditions that an adapter reads."""
    task_token: bool = False
    """Whether captions begin with the token of their frames' task, as the embedded model's do: the condition's, that
    of views where there are cameras, or that of text to image."""
    views: int = 1
    """Images of a sample: the row's own and its further frames."""
    cameras: bool = False
    """Whether each view is followed by a frame of its camera's rays; needs `ratio: 1`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the source's: {"text": "caption"}."""
    ignore: tuple[str, ...] = ()
    """Columns that mean nothing."""
    held_out: float = 0.0
    """Fraction of the rows that is kept for the held-out loss; which ones, their content decides."""
    seed: int = 0
    """Of the order and the captions."""
    source_split: str = "train"
    """Of a `datasets` data set."""
    ahead: bool = True
    """Whether the caches are filled before the first batch; otherwise as rows are used."""
    split: str = "train"
    """"train" or "heldout"."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.views < 1:
            raise ValueError(
                f"a batch needs at least one sample and one view, got samples={self.samples}, views={self.views}"
            )
        if self.condition is None and self.preprocessor is not None:
            raise ValueError(f"preprocessor={self.preprocessor!r} computes conditions; name the condition too")
        if self.control is not None and self.condition is None:
            raise ValueError(f"control={self.control!r} is a folder of conditions; name the condition too")
        if self.cameras and (self.ratio != 1 or self.views < 2):
            raise ValueError(f"rays belong to at least two square views, got ratio={self.ratio}, views={self.views}")
        check_choice("mode", self.mode, ("frame", "independent", "joint"))
        check_choice("position", self.position, ("aligned", "subject"))
        check_choice("split", self.split, ("train", "heldout"))
        if self.condition is not None:
            check_name("condition", self.condition, CONDITIONS)
        if self.task_token:
            what = "condition with a token" if self.condition else "task of views without cameras"
            check_name(what, self._task, TASK_TOKENS)
        if self.preprocessor is not None:
            check_arguments(find_preprocessor(self.preprocessor), self.preprocessor_options, "preprocessor_options")

    @property
    def _task(self) -> str:
        return self.condition or ("views" if self.cameras else "text_to_image" if self.views == 1 else "none")

    @property
    def task(self) -> str | None:
        """Task whose token the captions begin with; `None`: no token."""
        return self._task if self.task_token else None

    @property
    def least_side(self) -> int:
        """Pixels that an image's shorter side must have."""
        return self.min_side or self.base // 2

    @property
    def column_names(self) -> Columns:
        """What the source's columns are called, and which are left alone."""
        return Columns(self.columns, tuple(self.ignore))


def settings_of(recipe: Recipe) -> UserImagesSettings:
    """The settings of a recipe on the data "user_images".

    Raises:
        ValueError: it has other data, or a setting is wrong.
    """
    if recipe.data.name != USER_IMAGES:
        raise ValueError(f"the recipe's data is {recipe.data.name!r}; only {USER_IMAGES!r} are people's own files")
    check_arguments(UserImagesSettings, recipe.data.arguments, "data.arguments")
    return UserImagesSettings(**recipe.data.arguments)
