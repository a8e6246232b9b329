"""`imgdit doctor`: what is installed, and what of it works here."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from imgdit.apps.console import calm


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Tell versions, devices, memory and working attention backends. Exits with 1 if something needed is missing."""
    calm()
    from imgdit.apps.doctor import checkup, report

    found = checkup()
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(report(found)))
    if found["problems"]:
        raise typer.Exit(1)
