"""Features as a site in a folder, which a browser opens from the disk: an index to search, and a page of each feature.

<folder>/index.html               the features
<folder>/feature-<number>.html    one of them
<folder>/features.json            the data
<folder>/tiles/                   images, heat maps and patches

Pages need no server and no network. All text is escaped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imgdit.io.atomic import write_text, written_whole
from imgdit.io.text import read_text
from imgdit.sae.feature_labels import feature_labels
from imgdit.sae.features import FeatureSurvey, HeatMaps

_TILE = 192
"""Width of an image, in pixels."""
_AROUND = 1
"""Cells of the grid around the strongest token that a patch shows."""


def overlay(image: Image.Image, heat: torch.Tensor, strongest: float) -> Image.Image:
    """An image with a feature's activations (rows, columns) in red over its grey."""
    side = _size(image)
    grey = image.convert("L").convert("RGB").resize(side)
    fraction = (heat / max(strongest, 1e-12)).clamp(0, 1)
    mask = Image.fromarray((fraction * 200).round().to(torch.uint8).numpy()).resize(side, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", side, (220, 20, 20)), grey, mask)


def patch(image: Image.Image, token: int, rows: int, columns: int) -> Image.Image:
    """The part of an image around one cell of its grid, all of it within the image."""
    row, column = divmod(token, columns)
    width, height = image.width / columns, image.height / rows
    high, wide = min(2 * _AROUND + 1, rows), min(2 * _AROUND + 1, columns)
    top, left = min(max(row - _AROUND, 0), rows - high), min(max(column - _AROUND, 0), columns - wide)
    bottom, right = top + high, left + wide
    box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
    part = image.convert("RGB").crop(box)
    return part.resize((_TILE // 2, max(_TILE // 2 * part.height // part.width, 1)), Image.Resampling.BICUBIC)


def _size(image: Image.Image) -> tuple[int, int]:
    return _TILE, max(_TILE * image.height // image.width, 1)


def write_report(
    folder: str | Path,
    survey: FeatureSurvey,
    shown: HeatMaps,
    prompts: Sequence[Any],
    *,
    scores: torch.Tensor | None = None,
    captions: Sequence[str | None] | None = None,
    title: str = "Features",
    top: int = 8,
) -> Path:
    """Write the site; each file appears whole or not at all, the index last.

    Args:
        survey, shown: of the same prompts.
        scores: (S, L), by which the features were searched.
        captions: of the images, from which features get labels; `None`: from the prompts.
        top: images of each feature.

    Returns:
        The index.
    """
    folder = Path(folder)
    (folder / "tiles").mkdir(parents=True, exist_ok=True)
    best = {feature: survey.top_images(feature, top) for feature in shown.features}
    texts = [str(prompt) for prompt in prompts] if captions is None else captions
    labels = feature_labels(texts, {feature: [image for image, _, _ in rows] for feature, rows in best.items()})
    for number in sorted({image for rows in best.values() for image, _, _ in rows}):
        plain = shown.images[number].convert("RGB")
        _save(plain.resize(_size(plain)), folder / "tiles" / f"{number:06d}.png")
    entries = []
    for place, feature in enumerate(shown.features):
        entry: dict[str, Any] = {
            "feature": feature,
            "label": labels[feature],
            "density": float(survey.density[feature]),
            "mean_by_timestep": dict(zip(map(str, survey.timesteps), survey.means[:, feature].tolist())),
            "top": [
                {
                    "prompt": str(prompts[number]),
                    "caption": None if captions is None else captions[number],
                    "activation": value,
                    "token": token,
                    **_tiles(folder / "tiles", shown, place, number, token),
                }
                for number, value, token in best[feature]
            ],
        }
        if scores is not None:
            entry["score_by_timestep"] = dict(zip(map(str, survey.timesteps), scores[:, feature].tolist()))
        entries.append(entry)
    for place, entry in enumerate(entries):
        text = _feature_page(entry, entries[place - 1], entries[(place + 1) % len(entries)], title)
        write_text(folder / _page_of(entry), text)
    counts, edges, dead = survey.histogram()
    data = {
        "timesteps": survey.timesteps,
        "dead": dead,
        "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()},
        "features": entries,
    }
    write_text(folder / "features.json", json.dumps(data, indent=1))
    page = folder / "index.html"
    write_text(page, _index(data, len(survey.density), len(prompts), title))
    return page


def _tiles(folder: Path, shown: HeatMaps, place: int, number: int, token: int) -> dict[str, str]:
    """Names of an image's file and, if the features have places in it, of the heat map and patch that it writes."""
    names = {"image": f"{number:06d}.png"}
    if shown.maps is not None:
        feature, heat = shown.features[place], shown.maps[number, place]
        names |= {"heat": f"heat-{feature:05d}-{number:06d}.png", "patch": f"patch-{feature:05d}-{number:06d}.png"}
        strongest = float(shown.maps[:, place].max())
        _save(overlay(shown.images[number], heat, strongest), folder / names["heat"])
        _save(patch(shown.images[number], token, *heat.shape), folder / names["patch"])
    return names


def _save(image: Image.Image, file: Path) -> None:
    with written_whole(file) as temporary:
        image.save(temporary, "PNG")


# Pages


def _index(data: dict[str, Any], latents: int, images: int, title: str) -> str:
    histogram = data["density_histogram"]
    names = [
        f"density 10^{low:.2f}: {count:g} features"
        for low, count in zip(histogram["log10_edges"], histogram["counts"])
    ]
    cards = "".join(_card(entry) for entry in data["features"])
    return _document(
        title,
        f"<header><h1>{html.escape(title)}</h1><p>{len(data['features'])} of {latents} features, on {images} images; "
        f"{data['dead']} of all are never active in them.</p>"
        f'<figure class="density">{_bars(histogram["counts"], names)}<figcaption><span>rare, 10<sup>−6</sup></span>'
        "<span>features by density</span><span>always active</span></figcaption></figure>"
        '<form role="search"><label>Search <input id="words" type="search" placeholder="words, or a number" '
        'autocomplete="off"></label> <label>Sort <select id="order"><option value="place">as found'
        '<option value="density">rarest first<option value="label">by label</select></label> '
        f'<output id="count">{len(data["features"])} shown</output></form></header>'
        f'<main id="cards">{cards}</main><p id="none" hidden>No feature has these words.</p>'
        f"<script>{_asset('features.js')}</script>",
    )


def _card(entry: dict[str, Any]) -> str:
    words = [str(entry["feature"]), entry["label"]]
    words += [text for one in entry["top"] for text in (one["prompt"], one["caption"] or "")]
    known = html.escape(" ".join(words).lower())
    images = "".join(_image(one["image"], one["prompt"]) for one in entry["top"][:4])
    heats = "".join(_image(one["heat"], "where it is active") for one in entry["top"][:4] if "heat" in one)
    views = f'<div class="strip">{images}</div>' + (f'<div class="strip">{heats}</div>' if heats else "")
    if not entry["top"]:
        views = "<p>not active in any of these images</p>"
    return (
        f'<a class="card" href="{_page_of(entry)}" data-words="{known}" data-density="{entry["density"]:.6g}" '
        f'data-label="{html.escape(entry["label"])}"><h2>{_name(entry)}</h2>'
        f"<p>{_density(entry)}</p>{views}{_profile(entry)}</a>"
    )


def _feature_page(entry: dict[str, Any], before: dict[str, Any], after: dict[str, Any], title: str) -> str:
    shown = []
    for one in entry["top"]:
        views = _image(one["image"], one["prompt"])
        if "heat" in one:
            views += _image(one["heat"], "where it is active") + _image(one["patch"], "the strongest place", "patch")
        said = f"<p>{html.escape(one['prompt'])}</p>"
        if one["caption"]:
            said += f'<p class="dim">described as: {html.escape(one["caption"])}</p>'
        said += f'<p class="dim">{one["activation"]:.3g} at token {one["token"]}</p>'
        shown.append(f'<article><div class="views">{views}</div>{said}</article>')
    text = _density(entry)
    if "score_by_timestep" in entry:
        values = list(entry["score_by_timestep"].values())
        text += f"; mean score {sum(values) / len(values):.4f}"
    times = list(entry["mean_by_timestep"])
    return _document(
        f"Feature {entry['feature']}: {title}",
        f'<header><nav><a href="index.html">{html.escape(title)}</a><span><a rel="prev" href="{_page_of(before)}">'
        f'previous</a> <a rel="next" href="{_page_of(after)}">next</a></span></nav>'
        f"<h1>{_name(entry)}</h1><p>{text}</p></header><main><section><h2>Mean activation by timestep</h2>"
        f'<figure class="large">{_profile(entry)}<figcaption><span>{float(times[0]):.0f}</span><span>timestep</span>'
        f"<span>{float(times[-1]):.0f}</span></figcaption></figure></section><section><h2>Strongest images</h2>"
        f'<div class="grid">{"".join(shown) or "<p>not active in any of these images</p>"}</div></section></main>',
    )


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{html.escape(title)}</title><style>{_asset("features.css")}</style>'
        f"{body}</html>\n"
    )


def _asset(name: str) -> str:
    return read_text(Path(__file__).with_name(name))


def _page_of(entry: dict[str, Any]) -> str:
    return f"feature-{entry['feature']:05d}.html"


def _name(entry: dict[str, Any]) -> str:
    label = html.escape(entry["label"]) or '<span class="dim">no label</span>'
    return f'{label} <span class="number">{entry["feature"]}</span>'


def _density(entry: dict[str, Any]) -> str:
    return f"active on {entry['density']:.2%} of the tokens"


def _image(name: str, text: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<img{shown} loading="lazy" src="tiles/{name}" alt="{html.escape(text)}" title="{html.escape(text)}">'


def _profile(entry: dict[str, Any]) -> str:
    values = entry["mean_by_timestep"]
    return _bars(list(values.values()), [f"timestep {float(time):g}: {value:.4g}" for time, value in values.items()])


def _bars(values: Sequence[float], titles: Sequence[str]) -> str:
    largest = max([*values, 1e-12])
    bars = "".join(
        f'<i style="height:{100 * max(value, 0.0) / largest:.1f}%" title="{html.escape(title)}"></i>'
        for value, title in zip(values, titles)
    )
    return f'<div class="bars">{bars}</div>'
