"""The tables of docs/families.md: each cell is what the family's record says, and what its tests cover."""

import re
from pathlib import Path

import pytest
import tiny_ernie_image
import tiny_flux2
import tiny_flux3
import tiny_flux_kin
import tiny_ideogram4
import tiny_krea2
import tiny_qwen_image
import tiny_qwen_image21
import tiny_z_image

from imgdit.families import MODULES
from imgdit.family import family_named, find_family

PAGE = (Path(__file__).parents[2] / "docs/families.md").read_text()
TINY = (tiny_flux2, tiny_flux3, tiny_flux_kin, tiny_qwen_image, tiny_z_image, tiny_krea2)
TINY += (tiny_qwen_image21, tiny_ideogram4, tiny_ernie_image)
CASES = {name: case for tiny in TINY for name, case in tiny.CASES.items()}


def table(first):
    """Rows of the table with this first cell in its head, as dictionaries by the head."""
    lines = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


CLASSES = {name: row for row in table("file") for name in re.findall(r"`(\w+)`", row["classes"])}
RUN = [name for name in MODULES if name != "SD3JointModelFlexible"]
"""Without the class whose weights are read into `MMDiT`."""
OWN = ("MMDiT", "NextDiT")
"""Trained by their own forward."""
CONDITIONS = {row["family"]: row for row in table("family")}


def test_every_class_has_a_row():
    assert CLASSES.keys() >= MODULES.keys()
    for name in CLASSES.keys() & MODULES.keys():
        assert CLASSES[name]["file"] == f"`{MODULES[name]}.py`"


@pytest.mark.parametrize("column", ["conditions", "references", "activations", "LoRA names", "μP", "image training"])
@pytest.mark.parametrize("name", RUN)
def test_a_cell_is_what_the_record_says(name, column):
    family = family_named(name)
    stock = "in its own pipeline" if name == "MMDiT" else "no"
    expected = {
        "conditions": stock if family.conditions is None else "yes",
        "references": "no" if family.conditions is None or family.conditions.references is None else "yes",
        "activations": "yes",
        "LoRA names": "yes" if family.lora is not None and (family.lora.blocks or family.lora.layers) else "PEFT",
        "μP": "no" if family.mup is None else "yes",
        "image training": "as `MMDiT`" if family.as_mmdit else "yes" if family.training or name in OWN else "no",
    }
    assert CLASSES[name][column] == expected[column]


@pytest.mark.parametrize("column", ["completion (`complement=True`)", "ControlNet residuals"])
@pytest.mark.parametrize("row", CONDITIONS)
def test_a_cell_is_what_the_tests_cover(row, column):
    cases = [case for name, case in CASES.items() if name.startswith(row)]
    assert cases, f"no tiny pipeline of {row}"
    conditions = find_family(cases[0].pipeline().transformer).conditions
    if column == "ControlNet residuals":
        assert any(case.residuals for case in cases) == bool(conditions.residual_arguments)
        expected = "added" if conditions.residual_arguments else "none"
    else:
        assert any(case.completes for case in cases) == (conditions.sigma is not None)
        takes = "yes" if conditions.references is None else "without reference images"
        expected = "refused" if conditions.sigma is None else takes
    assert CONDITIONS[row][column] == expected
