"""The page: all tabs, the queue, and a server that keeps to itself."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Set before gradio is imported: no telemetry, and nothing is asked of the network.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from PIL import Image

from imgdit.apps.demo import any_to_any, ask, control, create, features, limits, scale, text, unlearn
from imgdit.apps.demo.holder import Holder
from imgdit.apps.demo.limits import LIMITS
from imgdit.apps.session import Session
from imgdit.checkpoints import SCENES

CSS = """
.gradio-container, .gradio-container main { width: 100% !important; }
.gradio-container { max-width: 1500px !important; margin: auto; }
footer { display: none !important; }
/* Results are shown whole, as large as the window allows, small ones enlarged. */
.result.square { aspect-ratio: 1; max-height: 76vh; }
.result img { width: 100%; height: 100%; max-height: 76vh !important; object-fit: contain; }
.results .grid-wrap { min-height: 0 !important; max-height: none !important; overflow: visible; }
.results .grid-container img { max-height: 70vh; object-fit: contain; }
.block > .wrap.hide { display: none; } /* gradio's progress, which is switched off and would say "Error" unseen */
.note { font-size: 0.9em; opacity: 0.85; }
"""
THEME = gr.themes.Default(
    primary_hue="orange",
    # The system's own fonts: a page that works offline fetches none.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


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
        name = "the embedded model" if source == str(SCENES) else f"`{Path(source).name}`"
        gr.Markdown(f"# imgdit\nControllable images from {name}.")
        hidden = _hidden(holder)
        if hidden:
            gr.Markdown(" ".join(hidden.values()), elem_classes="note")
        canvas = asked = None
        with gr.Tabs() as tabs:
            with gr.Tab("Create", id="create"):
                created = create.build(holder)
            if "Control" not in hidden:
                with gr.Tab("Control", id="control"):
                    canvas = control.build(holder)
            if "Any-to-any" not in hidden:
                with gr.Tab("Any-to-any", id="any"):
                    any_to_any.build(holder)
            if "Unlearn" not in hidden:
                with gr.Tab("Unlearn", id="unlearn"):
                    unlearn.build(holder)
            if "Features" not in hidden:
                with gr.Tab("Features", id="features"):
                    features.build(holder)
            if takes_models or ask.writes(holder.session):
                with gr.Tab(ask.TITLE, id="ask"):
                    asked = ask.build(holder, takes_models)
            if (words := text.text_folder(holder.session)) is not None:
                with gr.Tab("Text", id="text"):
                    text.build(holder, words)
            with gr.Tab("Scale", id="scale"):
                scale.build(holder, results)

        @limits.refusing(created.status)
        def use(file: str | None) -> Iterator[Any]:
            if file is None:
                raise limits.Refused("create an image first, which then can be the condition of others")
            yield {"background": file, "layers": [], "composite": None}, gr.Tabs(selected="control"), gr.skip()

        @limits.refusing(created.status)
        def look(file: str | None) -> Iterator[Any]:
            if file is None:
                raise limits.Refused("create an image first, which then can be captioned and asked about")
            yield file, gr.Tabs(selected="ask"), gr.skip()

        if asked is not None:
            created.ask.visible = True
            created.ask.click(
                look, created.chosen, [asked.image, tabs, created.status], api_visibility="private",
                show_progress="hidden",
            )  # fmt: skip
        if canvas is not None:
            created.use.click(
                use, created.chosen, [canvas, tabs, created.status], api_visibility="private", show_progress="hidden"
            )
    return page.queue(max_size=LIMITS.queue, default_concurrency_limit=4)


def _hidden(holder: Holder) -> dict[str, str]:
    """Tabs that this model has nothing for, and why, in a message each."""
    session = holder.session
    adapters = "/".join(session.shelf.adapter_folder.parts[-2:])
    found = {}
    if not session.shelf.controls:
        found["Control"] = f"Without Control: there are no condition adapters in `{adapters}`."
    if not any_to_any.pairs(session) and "views" not in session.shelf.tasks:
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
        css=CSS,
        footer_links=[],
    )
    if mcp and page.mcp_error:  # gradio would go on without
        page.close(verbose=False)
        holder.close()
        raise ImportError(f"{page.mcp_error}; install what it needs with: {MCP}")
    return page, address, holder
