"""What commands say: versions, addresses, names and files; one sentence where something is wrong."""

import json
import re
import socket
import urllib.request

from tiny_runs import small_pipeline
from typer.testing import CliRunner

import imgdit
from imgdit.apps.cli import app
from imgdit.apps.demo.app import serve
from imgdit.apps.studio import Studio


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


def said(done):
    """What a command said, without the frame around it."""
    return re.sub(r"[│╭╰─╮╯\s]+", " ", done.output)


def test_the_version_is_told():
    assert run("--version").output == f"imgdit {imgdit.__version__}\n"


def test_addresses_that_cannot_be_listened_at_are_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, what in (
            (["--port", port], "give another --port"),
            (["--port", 80808], "65535"),
            (["--host", "256.0.0.1", "--port", 1024], "cannot listen at 256.0.0.1"),
            (["--root-path", "imgdit"], "begins with a slash"),
        ):
            done = run("demo", "--model", "nowhere", *options)
            assert done.exit_code == 2 and what in said(done), done.output


def test_the_demo_behind_a_path(tmp_path):
    page, address, holder = serve(Studio(small_pipeline(tmp_path)), results=tmp_path, root_path="/imgdit")
    try:
        with urllib.request.urlopen(f"{address}config") as answer:
            assert json.load(answer)["root"].endswith("/imgdit")
    finally:
        page.close(verbose=False)
        holder.close()
