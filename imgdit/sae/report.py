"""Features as a folder to look at: `features.json`, a PNG sheet per feature, and one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imgdit.sae.features import FeatureSurvey, HeatMaps

_TILE = 128
"""Side of an image on a sheet, in pixels."""

_STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
img{max-width:100%}h2{margin:2rem 0 .3rem}p{margin:.2rem 0}.dim{color:#666}
.bars{display:flex;align-items:flex-end;gap:2px;height:90px}.bars i{flex:1;background:#47a;min-height:1px}"""


def overlay(image: Image.Image, heat: torch.Tensor, strongest: float) -> Image.Image:
    """An image with a feature's activations (rows, columns) in red over its grey."""
    side = _size(image)
    grey = image.convert("L").convert("RGB").resize(side)
    fraction = (heat / max(strongest, 1e-12)).clamp(0, 1)
    mask = Image.fromarray((fraction * 200).round().to(torch.uint8).numpy()).resize(side, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", side, (220, 20, 20)), grey, mask)


def feature_sheet(shown: HeatMaps, number: int, images: Sequence[int]) -> Image.Image:
    """A sheet of images over their heat maps, if there are any, for one of the features, by its place in
    `shown.features`."""
    columns = [[shown.images[i].convert("RGB").resize(_size(shown.images[i]))] for i in images]
    if shown.maps is not None:
        strongest = float(shown.maps[:, number].max())
        for column, i in zip(columns, images):
            column.append(overlay(shown.images[i], shown.maps[i, number], strongest))
    width, height = columns[0][0].size
    sheet = Image.new("RGB", (len(columns) * (width + 4) - 4, len(columns[0]) * (height + 4) - 4), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            sheet.paste(image, (x * (width + 4), y * (height + 4)))
    return sheet


def _size(image: Image.Image) -> tuple[int, int]:
    return _TILE, max(_TILE * image.height // image.width, 1)


def write_report(
    folder: str | Path,
    survey: FeatureSurvey,
    shown: HeatMaps,
    prompts: Sequence[Any],
    *,
    scores: torch.Tensor | None = None,
    title: str = "Features",
    top: int = 8,
) -> Path:
    """Write the folder.

    Args:
        survey, shown: of the same prompts.
        scores: (S, L), by which the features were searched.
        top: images of each feature.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts, edges, dead = survey.histogram()
    entries, sections = [], []
    for number, feature in enumerate(shown.features):
        best = survey.top_images(feature, top)
        entry: dict[str, Any] = {
            "feature": feature,
            "density": float(survey.density[feature]),
            "mean_by_timestep": dict(zip(map(str, survey.timesteps), survey.means[:, feature].tolist())),
            "top": [{"prompt": str(prompts[p]), "activation": value, "token": place} for p, value, place in best],
        }
        if scores is not None:
            entry["score_by_timestep"] = dict(zip(map(str, survey.timesteps), scores[:, feature].tolist()))
        entries.append(entry)
        text = f"active on {entry['density']:.2%} of the tokens"
        if scores is not None:
            text += f", mean score {float(scores[:, feature].mean()):.4f}"
        image = '<p class="dim">not active in any of these images</p>'
        if best:
            sheet = feature_sheet(shown, number, [p for p, _, _ in best])
            sheet.save(folder / f"feature-{feature:05d}.png")
            image = f'<img alt="feature {feature}" src="{_data_uri(sheet)}">'
        lines = "; ".join(html.escape(str(prompts[p])) for p, _, _ in best)
        curve = _bars(survey.means[:, feature].tolist(), [f"timestep {t:g}" for t in survey.timesteps])
        sections.append(f'<h2>Feature {feature}</h2><p>{text}</p>{image}<p class="dim">{lines}</p>{curve}')
    data = {
        "timesteps": survey.timesteps,
        "dead": dead,
        "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()},
        "features": entries,
    }
    (folder / "features.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    density = _bars(counts.tolist(), [f"10^{edge:.2f}" for edge in edges.tolist()[:-1]])
    page = folder / "index.html"
    page.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{len(survey.density)} features, {dead} never active in these "
        f"{len(prompts)} images. Numbers of features by density, from 10^-6 to 1:</p>{density}"
        '<p class="dim">Images: plain, and below where the feature is active, mean over the timesteps. Bars: mean '
        "activation from the first step to the last.</p>" + "".join(sections) + "</html>",
        encoding="utf-8",
    )
    return page


def _bars(values: Sequence[float], labels: Sequence[str]) -> str:
    largest = max([*values, 1e-12])
    bars = "".join(
        f'<i style="height:{100 * max(value, 0.0) / largest:.1f}%" title="{label}: {value:.4g}"></i>'
        for value, label in zip(values, labels)
    )
    return f'<div class="bars">{bars}</div>'


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
