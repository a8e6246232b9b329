"""`imgdit demo`: the library in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imgdit.apps.commands.options import with_loading
from imgdit.apps.console import calm, user_errors
from imgdit.pipelines.load_options import LoadOptions


@with_loading
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model by default.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of condition adapters, the only one that is read; MODEL/adapters.")
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="Folder of the sparse autoencoders; MODEL/sae by default.")] = None,
    mup: Annotated[Path, typer.Option(help="Folder that `imgdit mup` wrote to.")] = Path("outputs/mup"),
    host: Annotated[str, typer.Option(help="Address to listen at; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="A free one from 7860 on by default.")] = None,
    root_path: Annotated[
        str | None, typer.Option(help="Path under which a proxy shows the demo, such as /imgdit; it passes on Host.")
    ] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Offer every tab to programs as tools (MCP).")] = False,
    *,
    loading: LoadOptions,
) -> None:
    """Open the demo: make, control, unlearn and look, in a browser. Ctrl-C ends it."""
    with user_errors():
        calm()
        try:
            import gradio
        except ImportError as error:
            raise ImportError("the demo needs gradio; install it with: pip install 'imgdit[demo]'") from error
        if root_path is not None and not root_path.startswith(("/", "http://", "https://")):
            raise ValueError(f"--root-path begins with a slash, such as /imgdit; got {root_path!r}")
        if port is not None:
            _check_free(host, port)
        from imgdit.apps.demo.app import serve
        from imgdit.apps.jobs.shelf import Shelf
        from imgdit.apps.session import Session
        from imgdit.checkpoints import SCENES

        session = Session(Shelf(model or SCENES, adapters, sae), loading)
        page, address, holder = serve(session, results=mup, host=host, port=port, root_path=root_path, mcp=mcp)
    typer.echo(f"imgdit is at {address} (gradio {gradio.__version__}); Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        holder.close()


def _check_free(host: str, port: int) -> None:
    """Refuse an address that nothing can listen at, before a model is loaded for it."""
    import socket

    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise ValueError(f"cannot listen at {host}, port {port}: {reason}; give another --port or --host") from error
