"""The page: all tabs, the queue, and a server that keeps to itself."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Set before gradio is imported: no telemetry, and nothing is asked of the network.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from PIL import Image

from imgdit.checkpoints import SCENES

from ..studio import Studio
from . import any_to_any, control, create, features, scale, unlearn
from .holder import Holder
from .limits import LIMITS

CSS = """
.gradio-container, .gradio-container main { width: 100% !important; }
.gradio-container { max-width: 1200px !important; margin: auto; }
footer { display: none !important; }
"""
THEME = gr.themes.Default(
    primary_hue="orange",
    # The system's own fonts: a page that works offline fetches none.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


MCP = "pip install 'imgdit[mcp]'"


def build(holder: Holder, results: Path) -> gr.Blocks:
    """The page.

    Args:
        holder: the model.
        results: folder of `imgdit mup …`.
    """
    with gr.Blocks(
        title="imgdit", analytics_enabled=False, delete_cache=(LIMITS.kept_seconds // 4, LIMITS.kept_seconds)
    ) as page:
        source = str(holder.studio.places["model"])
        name = "the embedded model" if source == str(SCENES) else f"`{Path(source).name}`"
        gr.Markdown(f"# imgdit\nControllable pictures from {name}.")
        with gr.Tabs() as tabs:
            with gr.Tab("Create", id="create"):
                created = create.build(holder)
            with gr.Tab("Control", id="control"):
                canvas = control.build(holder)
            with gr.Tab("Any-to-any", id="any"):
                any_to_any.build(holder)
            with gr.Tab("Unlearn", id="unlearn"):
                unlearn.build(holder)
            with gr.Tab("Features", id="features"):
                features.build(holder)
            with gr.Tab("Scale", id="scale"):
                scale.build(holder, results)

        def use(file: str | None) -> tuple[Any, Any]:
            if file is None:
                raise gr.Error("Make a picture first.", print_exception=False)
            return {"background": file, "layers": [], "composite": None}, gr.Tabs(selected="control")

        created.use.click(use, created.chosen, [canvas, tabs], queue=False, api_visibility="private")
    return page.queue(max_size=LIMITS.queue, default_concurrency_limit=4)


def serve(
    studio: Studio,
    *,
    results: Path = Path("outputs/mup"),
    host: str = "127.0.0.1",
    port: int | None = None,
    root_path: str | None = None,
    mcp: bool = False,
) -> tuple[gr.Blocks, str, Holder]:
    """Start the server; the page, its address and its model.

    Args:
        studio: the model.
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
    holder = Holder(studio)
    page = build(holder, results)
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
