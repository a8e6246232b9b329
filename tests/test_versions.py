"""The matrix of Pythons and versions, without making its environments."""

import json
import shlex

import pytest
import versions
from packaging.requirements import Requirement


def test_lowest_versions_are_those_of_the_ranges():
    assert versions.lowest(Requirement("torch>=2.7")) == "torch==2.7"
    assert versions.lowest(Requirement("ray[data]>=2.40")) == "ray[data]==2.40"
    for requirement in versions.requirements():
        low = Requirement(versions.lowest(requirement))
        (pin,) = low.specifier
        assert low.name == requirement.name and requirement.specifier.contains(pin.version)


def test_a_dry_run_prints_the_commands_of_the_cells(tmp_path, capsys):
    only = [
        "--only",
        "3.11-lowest,3.13-newest",
        "--dry-run",
        "--out",
        str(tmp_path),
        "--tests",
        "tests/test_layout.py",
    ]
    assert versions.main(only) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8 and not list(tmp_path.iterdir())
    assert "torch==2.7" in lines[1] and "diffusers==0.42" in lines[1] and "--upgrade" not in lines[1]
    assert "diffusers<0.44,>=0.42" in lines[5] and "--upgrade" in lines[5]
    assert lines[3][1:] == ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layout.py"]
    with pytest.raises(SystemExit):
        versions.main(["--only", "3.9-lowest", "--dry-run"])


def test_results_are_kept_and_failures_tried_again(tmp_path, capsys, monkeypatch):
    runs = []

    def run(cell, out, tests):
        runs.append(cell.name)
        failed = runs == ["3.11-lowest"]
        return {"result": "failed: pip" if failed else "passed", "versions": {"torch": "2.7.0"}, "seconds": 3}

    monkeypatch.setattr(versions, "run", run)
    arguments = ["--only", "3.11-lowest,3.12-newest", "--out", str(tmp_path)]
    assert versions.main(arguments) == 1 and versions.main(arguments) == 0
    assert runs == ["3.11-lowest", "3.12-newest", "3.11-lowest"]
    assert "| 3.12, newest | 2.7.0 |  |  |  |  | passed | 3 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "versions.json").read_text())["3.11-lowest"]["result"] == "passed"


def test_a_python_that_is_not_there_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(versions.shutil, "which", lambda name: None)
    result = versions.run(versions.Cell("3.13", "newest"), tmp_path, ["tests"])
    assert result["result"] == "not run: neither python3.13 nor uv is installed"


def test_a_command_that_fails_ends_its_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "commands", lambda *a: iter([["true"], ["sh", "-c", "echo no wheel >&2; exit 1"]]))
    monkeypatch.setattr(versions.shutil, "which", lambda name: name)
    result = versions.run(versions.Cell("3.11", "lowest"), tmp_path, ["tests"])
    assert result["result"].startswith("failed: sh -c") and result["last"] == "no wheel"
    assert (tmp_path / "3.11-lowest.log").read_text() == "no wheel\n"
