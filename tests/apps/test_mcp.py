"""The demo's endpoints as tools of the Model Context Protocol."""

import sys

import httpx
import pytest
from gradio_client import Client
from tiny import tiny_pipeline
from typer.testing import CliRunner

from imgdit.apps.cli import app as commands
from imgdit.apps.demo import app
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session


@pytest.fixture
def session(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return Session(Shelf(tmp_path / "model"))


def test_without_the_package_the_command_says_what_to_install(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)  # as if it were not there
    with pytest.raises(ImportError, match=r"pip install 'imgdit\[mcp\]'"):
        app.serve(session, mcp=True)
    told = CliRunner().invoke(commands, ["demo", "--mcp", "--model", session.shelf.places["model"]])
    assert told.exit_code != 0 and "imgdit[mcp]" in told.output


def test_every_endpoint_is_a_tool(session, tmp_path):
    pytest.importorskip("mcp")
    page, address, holder = app.serve(session, results=tmp_path / "mup", mcp=True)
    try:
        tools = httpx.get(f"{address}gradio_api/mcp/schema", timeout=60).json()
        endpoints = Client(address, verbose=False, httpx_kwargs={"timeout": 60}).view_api(return_format="dict")[
            "named_endpoints"
        ]
        assert {tool["name"] for tool in tools} == {name.removeprefix("/") for name in endpoints}
        create = next(tool for tool in tools if tool["name"] == "create")
        assert "Generate images from a prompt" in create["description"]
        assert create["inputSchema"]["properties"]["prompt"]["type"] == "string"
    finally:
        page.close(verbose=False)
        holder.close()
