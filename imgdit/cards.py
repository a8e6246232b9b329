"""Model cards: the README.md beside published weights, which the Hub shows as the model's page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from imgdit.io.atomic import write_text, written_whole

CARD, IMAGE = "README.md", "card.png"
MARK = "<!-- written by imgdit -->"
"""In cards that may be replaced; a card without it is somebody's own."""
LICENCES = (
    "agpl-3.0", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail",
    "openrail++", "unlicense",
)  # fmt: skip
"""Names that the Hub knows; any other licence is "other" with a name of its own."""
_NAME_LENGTH = 60


@dataclass(frozen=True)
class CardDetails:
    """What only the person who publishes weights can say of them."""

    description: str | None = None
    """What they are for, what they were trained on, what they cannot do."""
    licence: str | None = None
    """Such as "apache-2.0"; the Hub's names are known to it as such, others are shown as they stand."""
    image: Image.Image | str | Path | None = None
    """What they do, at a glance."""
    recipe: str | None = None
    """How they were trained, as YAML."""
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    """Name -> value, with the unit in the name."""
    base_model: str | None = None
    """Hub id of the model that they belong to."""


@dataclass(frozen=True)
class ModelCard:
    """A card: what is known of the weights themselves, and `details`.

    Its text is Markdown with the Hub's metadata on top. Values of metadata and of tables are escaped; the description
    is Markdown of its author.
    """

    title: str
    summary: str
    """One sentence: what the files are."""
    usage: str
    """Python that loads and uses them."""
    details: CardDetails = CardDetails()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What whoever uses them should know: name -> value."""
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = "text-to-image"
    """Task of the Hub."""
    relation: str | None = None
    """To the base model: "adapter", "finetune", "quantized"."""

    def text(self) -> str:
        """The Markdown file."""
        parts = [self._metadata(), f"# {_line(self.title)}", self.summary]
        details = self.details
        if details.image is not None:
            parts.append(f"![{_line(self.summary).replace('[', '(').replace(']', ')')}]({IMAGE})")
        if details.description:
            parts.append(details.description.strip())
        parts.append(f"## How to load\n\nWith imgdit installed:\n\n{_fenced('python', self.usage)}")
        settings = {"base model": details.base_model, **self.settings}
        settings = {name: value for name, value in settings.items() if value is not None}
        if settings:
            parts.append(_table("Settings", "setting", settings))
        if details.metrics:
            parts.append(_table("Metrics", "metric", details.metrics))
        if details.recipe:
            parts.append(f"## Recipe\n\n{_fenced('yaml', details.recipe)}")
        licence = details.licence or "No licence is stated; ask the author before you use the weights."
        parts.append(f"## Licence\n\n{_line(licence)}" + self._base_licence())
        return "\n\n".join([*parts, MARK]) + "\n"

    def _base_licence(self) -> str:
        base = self.details.base_model
        return f"\n\nThe base model {_line(base)} has a licence of its own." if base else ""

    def _metadata(self) -> str:
        from huggingface_hub import ModelCardData

        base, licence = self.details.base_model, (self.details.licence or "").strip()
        known = licence.lower() if licence.lower() in LICENCES else None
        named = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")[:_NAME_LENGTH]
        other: dict[str, Any] = {"license_name": named} if named and known is None else {}
        on_the_hub = base if base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) else None
        data = ModelCardData(
            license=known or ("other" if named else None),
            base_model=on_the_hub,
            base_model_relation=self.relation if on_the_hub else None,
            library_name="imgdit",
            pipeline_tag=self.pipeline_tag,
            tags=["imgdit", "diffusers", *self.tags],
            **other,
        )
        return f"---\n{data.to_yaml()}\n---"


def write_card(folder: str | Path, card: ModelCard) -> Path:
    """Write a card and its image into the folder of the weights. A README.md that somebody wrote stays as it is.

    Args:
        folder: is made where it is missing.

    Returns:
        The card's file.

    Raises:
        ValueError: the image cannot be read, or the disk refuses.
    """
    folder = Path(folder)
    path = folder / CARD
    if path.is_file() and MARK.encode() not in path.read_bytes():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if card.details.image is not None:
        image = _opened(card.details.image)
        with written_whole(folder / IMAGE) as temporary:
            image.save(temporary, format="PNG")
    write_text(path, card.text())
    return path


def _opened(image: Image.Image | str | Path) -> Image.Image:
    """An image without what its file says beside the pixels (place, camera, prompts)."""
    if isinstance(image, Image.Image):
        return _bare(image)
    try:
        with Image.open(Path(image).expanduser()) as opened:
            return _bare(opened)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"the card's image {str(image)!r} cannot be read: {error}") from error


def _bare(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.info.clear()
    return image


def _line(text: Any) -> str:
    """A value as one line of Markdown that HTML does not reach."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _fenced(language: str, text: str) -> str:
    """A block of code, whatever its text holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _table(title: str, first: str, values: Mapping[str, Any]) -> str:
    cells = ([_line(cell).replace("|", "\\|") for cell in (name, _short(value))] for name, value in values.items())
    lines = [
        f"## {title}",
        "",
        f"| {first} | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in cells),
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
