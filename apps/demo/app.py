"""The page: all tabs, the queue, and a server that keeps to itself."""

from __future__ import annotations

import html
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Set before gradio is imported: no telemetry, and nothing is asked of the network.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from PIL import Image

from imgdit.apps.demo import any_to_any, ask, control, create, features, limits, live, scale, text, unlearn, widgets
from imgdit.apps.demo.holder import QUICK, Holder
from imgdit.apps.demo.limits import LIMITS
from imgdit.apps.session import Session
from imgdit.checkpoints import SCENES
from imgdit.io.text import read_text

HERE = Path(__file__).parent
THEME = gr.themes.Default(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="zinc",
    # The system's own fonts: a page that works offline fetches none.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white",
    # Also small notes are read: 4.5 to 1 or more against the page.
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
)
BAR = """<div class="bar"><b>imgdit</b><span>Controllable images from {}.</span>
<button id="theme" type="button" aria-label="Dark or light">◐</button></div>"""
KEPT = 40
"""Images of a person's history."""


MCP = "pip install 'imgdit[mcp]'"


def build(holder: Holder, results: Path, takes_models: bool = False) -> gr.Blocks:
    """The page.

    Args:
        holder: the model.
        results: folder of `imgdit mup …`.
        takes_models: people may name a folder or Hub repository of a model that answers.
    """
    with gr.Blocks(
        title="imgdit", analytics_enabled=False, delete_cache=(LIMITS.kept_seconds // 4, LIMITS.kept_seconds)
    ) as page:
        source = str(holder.session.shelf.places["model"])
        name = "the embedded model" if source == str(SCENES) else html.escape(Path(source).name)
        gr.HTML(BAR.format(name), padding=False)
        hidden = _hidden(holder)
        if hidden:
            gr.Markdown(" ".join(hidden.values()), elem_classes="note")
        onward: list[widgets.Onward] = []
        targets: dict[str, Any] = {}
        with gr.Row(elem_classes="desk"):
            with gr.Column(elem_classes="history"):
                history = gr.Gallery(
                    label="History", columns=1, format="png", type="filepath", show_label=False, allow_preview=False,
                    interactive=False, buttons=[], object_fit="cover",
                )  # fmt: skip
            with gr.Column(), gr.Tabs(overflow_behavior="wrap") as tabs:
                _tabs(holder, hidden, takes_models, onward, targets)
        with gr.Accordion("For researchers: how μP scales", open=False, elem_id="scale"):
            scale.build(holder, results)
        _take_onward(onward, _remember(onward, history, tabs), targets, tabs)
    return page.queue(max_size=LIMITS.queue, default_concurrency_limit=4)


def _tabs(
    holder: Holder, hidden: dict[str, str], takes_models: bool, onward: list[widgets.Onward], targets: dict[str, Any]
) -> None:
    """Lay all tabs out, and note their results and the places that take one."""
    with gr.Tab("Create", id="create"):
        start, result = create.build(holder)
        onward.append(result)
        if holder.session.begins_at_images:
            targets["start"] = start
    if "Control" not in hidden:
        with gr.Tab("Control", id="control"):
            targets["control"], result = control.build(holder)
            onward.append(result)
    if holder.session.shelf.turbo is not None:
        with gr.Tab("Live", id="live"):
            onward.append(live.build(holder))
    if any_to_any.pairs(holder.session):
        with gr.Tab("Any-to-any", id="any"):
            targets["any"], result = any_to_any.build(holder)
            onward.append(result)
    if any_to_any.knows_views(holder.session):
        with gr.Tab("Views", id="views"):
            targets["views"], result = any_to_any.build_views(holder)
            onward.append(result)
    if "Unlearn" not in hidden:
        with gr.Tab("Unlearn", id="unlearn"):
            onward.append(unlearn.build(holder))
    if "Features" not in hidden:
        with gr.Tab("Features", id="features"):
            onward.append(features.build(holder))
    if takes_models or ask.writes(holder.session):
        with gr.Tab(ask.TITLE, id="ask"):
            targets["ask"] = ask.build(holder, takes_models).image
    if (words := text.text_folder(holder.session)) is not None:
        with gr.Tab("Text", id="text"):
            text.build(holder, words)


def _take_onward(
    onward: Sequence[widgets.Onward], chosen: Sequence[gr.State], targets: Mapping[str, Any], tabs: gr.Tabs
) -> None:
    """Let the buttons under results take them, by their files in `chosen`, to the tabs that there are."""
    for result, latest in zip(onward, chosen):
        for place, button in result.buttons.items():
            if place not in targets:
                continue

            @limits.refusing(result.status)
            def take(file: str | None, place: str = place) -> Iterator[Any]:
                if file is None:
                    raise limits.Refused("create an image first, which then can be used elsewhere")
                value = {"background": file, "layers": [], "composite": None} if place == "control" else file
                yield value, gr.Tabs(selected="create" if place == "start" else place), gr.skip()

            button.visible = True
            button.click(
                take, latest, [targets[place], tabs, result.status], api_visibility="private",
                show_progress="hidden",
            )  # fmt: skip


def _remember(onward: Sequence[widgets.Onward], history: gr.Gallery, tabs: gr.Tabs) -> list[gr.State]:
    """Keep what a person generated at the side, the newest first; a click shows it where images are created.

    Returns:
        file of each tab's result.
    """
    seen, chosen = gr.State([]), [gr.State() for _ in onward]

    def remember(made: Any, before: list[str]) -> tuple[Any, ...]:
        files, names = widgets.files_of(made), {Path(file).name for file in before}
        kept = [*reversed([file for file in files if Path(file).name not in names]), *before][:KEPT]
        return kept, kept, files[-1] if files else gr.skip()

    def show(event: gr.SelectData) -> tuple[str, str, gr.Tabs]:
        file = event.value["image"]["path"]
        return file, file, gr.Tabs(selected="create")

    for result, latest in zip(onward, chosen):
        for run in result.runs:
            run.then(remember, [result.made, seen], [seen, history, latest], **QUICK)
    history.select(show, None, [onward[0].image, chosen[0], tabs], **QUICK)
    return chosen


def _hidden(holder: Holder) -> dict[str, str]:
    """Tabs that this model has nothing for, and why, in a message each."""
    session = holder.session
    adapters = "/".join(session.shelf.adapter_folder.parts[-2:])
    found = {}
    if not session.shelf.controls:
        found["Control"] = f"Without Control: there are no condition adapters in `{adapters}`."
    if not any_to_any.pairs(session) and not any_to_any.knows_views(session):
        found["Any-to-any"] = "Without Any-to-any: this model generates images from text and conditions only."
    if not session.shelf.has_sae:
        trains = "`imgdit sae train RECIPE` makes one"
        reason = f"there is no sparse autoencoder in `{holder.sae_place}`; {trains}."
        found |= {"Unlearn": f"Without Unlearn and Features: {reason}", "Features": ""}
    elif not session.unlearner.concepts:
        found["Unlearn"] = f"Without Unlearn: the sparse autoencoder in `{holder.sae_place}` has no concepts."
    return found


def serve(
    session: Session,
    *,
    results: Path = Path("outputs/mup"),
    host: str = "127.0.0.1",
    port: int | None = None,
    root_path: str | None = None,
    mcp: bool = False,
) -> tuple[gr.Blocks, str, Holder]:
    """Start the server; the page, its address and its model.

    Args:
        session: the model.
        results: folder of `imgdit mup …`, shown in the tab Scale.
        host: address to listen at; this machine alone by default.
        port: a free one from 7860 on by default.
        root_path: path under which a proxy shows the page; none by default.
        mcp: offer the endpoints as tools of the Model Context Protocol.

    Raises:
        ImportError: `mcp` without the package of that name, or with one that gradio does not know.
    """
    if mcp and find_spec("mcp") is None:
        raise ImportError(f"--mcp needs the package mcp; install it with: {MCP}")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Where a header is not looked at by us, Pillow refuses what would not fit.
    Image.MAX_IMAGE_PIXELS = LIMITS.pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    holder = Holder(session)
    page = build(holder, results, takes_models=host in ask.LOCAL and root_path is None)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        root_path=root_path,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        max_threads=LIMITS.queue + 32,  # who waits keeps one; the rest are for pages, files and stopping
        max_file_size=LIMITS.upload_mib * 2**20,
        allowed_paths=[str(holder.folder), *(str(results / name) for name in scale.PLOTS)],
        enable_monitoring=False,
        strict_cors=True,
        ssr_mode=False,
        mcp_server=mcp,
        theme=THEME,
        css_paths=HERE / "page.css",
        js=read_text(HERE / "page.js"),
        footer_links=[],
    )
    if mcp and page.mcp_error:  # gradio would go on without
        page.close(verbose=False)
        holder.close()
        raise ImportError(f"{page.mcp_error}; install what it needs with: {MCP}")
    return page, address, holder
