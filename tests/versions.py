"""Run the tests in fresh environments of several Pythons, with the lowest and the newest versions of the ranges.

    python tests/versions.py                 all cells: minutes and gigabytes each
    python tests/versions.py --only 3.11-lowest --tests tests/test_layout.py
    python tests/versions.py --dry-run       print the commands

Each cell gets an environment of its own below --out, and its result is kept: a second call runs what is missing or
failed. A Python that neither the system nor uv has is reported and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = ("dev",)
SHOWN = ("torch", "diffusers", "transformers", "peft", "gradio")


class Cell(NamedTuple):
    """One environment."""

    python: str
    versions: str
    """"lowest" or "newest"."""

    @property
    def name(self) -> str:
        return f"{self.python}-{self.versions}"


CELLS = [Cell("3.11", "lowest"), *(Cell(python, "newest") for python in ("3.11", "3.12", "3.13"))]
"""Lowest versions have wheels for the lowest Python only."""


def requirements() -> list[Requirement]:
    """The build system's, the core's and those of `EXTRAS`."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"]
    return [Requirement(line) for line in lines + [line for extra in EXTRAS for line in extras[extra]]]


def lowest(requirement: Requirement) -> str:
    """The requirement with exactly the lowest version of its range."""
    (low,) = (one.version for one in requirement.specifier if one.operator == ">=")
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={low}"


def commands(cell: Cell, folder: Path, tests: Iterable[str]) -> Iterator[list[str]]:
    """What makes the environment of a cell and runs the tests in it."""
    python, uv = str(folder / "bin/python"), shutil.which("uv")
    if shutil.which(f"python{cell.python}"):
        yield [f"python{cell.python}", "-m", "venv", "--clear", str(folder)]
    else:
        yield ["uv", "venv", "--clear", "--seed", "--python", cell.python, str(folder)]
    install = ["uv", "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install", "--quiet"]
    lines = [lowest(one) if cell.versions == "lowest" else str(one) for one in requirements()]
    yield [*install, "--only-binary", ":all:", *([] if cell.versions == "lowest" else ["--upgrade"]), *lines]
    yield [*install, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    yield [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]


def run(cell: Cell, out: Path, tests: list[str]) -> dict[str, object]:
    """Make a cell's environment and run the tests; the result as it is kept."""
    folder, started = out / cell.name, time.perf_counter()
    if not (shutil.which(f"python{cell.python}") or shutil.which("uv")):
        return {"result": f"not run: neither python{cell.python} nor uv is installed", "versions": {}}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DIFFUSERS_ATTN_CHECKS": "1"}
    environment.pop("PYTHONPATH", None)
    result, last = "passed", ""
    for command in commands(cell, folder, tests):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        last = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]
        if done.returncode:
            (out / f"{cell.name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
            result = f"failed: {shlex.join(command)[:60]} …"
            last = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
            break
    return {
        "result": result,
        "last": last,
        "seconds": round(time.perf_counter() - started),
        "versions": installed(folder / "bin/python"),
    }


def installed(python: Path) -> dict[str, str]:
    """Versions of `SHOWN` in an environment."""
    code = (
        "import json\nfrom importlib.metadata import distributions\n"
        "print(json.dumps({one.name.lower(): one.version for one in distributions()}))"
    )
    if not python.exists():
        return {}
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in SHOWN if name in found}


def table(results: dict[str, dict]) -> str:
    """The results in Markdown."""
    lines = [f"| Python, versions | {' | '.join(SHOWN)} | result | seconds |", "|---" * (len(SHOWN) + 3) + "|"]
    for name, one in results.items():
        versions = [one["versions"].get(package, "") for package in SHOWN]
        words = one["result"] + (f": {one['last']}" if one.get("last") else "")
        lines.append(" | ".join([f"| {name.replace('-', ', ')}", *versions, words, f"{one.get('seconds', '')} |"]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/versions")
    parser.add_argument("--only", help="cells with commas between them: " + ", ".join(cell.name for cell in CELLS))
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what pytest runs; everything by default")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args(arguments)
    known = {cell.name: cell for cell in CELLS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if options.dry_run:
        for name in names:
            for command in commands(known[name], options.out / name, options.tests):
                print(shlex.join(command))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "versions.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        if results.get(name, {}).get("result") != "passed":
            results[name] = run(known[name], options.out, options.tests)
            file.write_text(json.dumps(results, indent=1), encoding="utf-8")
            print(f"{name}: {results[name]['result']}", flush=True)
    print(table(results))
    return int(any(results[name]["result"] != "passed" for name in names))


if __name__ == "__main__":
    sys.exit(main())
