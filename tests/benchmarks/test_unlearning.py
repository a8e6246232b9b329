"""UnlearnCanvas' scores against the recorded ones."""

import json

import pytest
from saeuron_cases import CASES, FOLDER

from imgdit.benchmarks.unlearning.scores import mean_scores, score_target

METRICS = [name for name, case in CASES.items() if case["kind"] == "metrics"]


@pytest.mark.parametrize("domain", ["style", "object"])
@pytest.mark.parametrize("name", METRICS)
def test_recorded_scores(name, domain):
    case = CASES[name]
    recorded = json.loads((FOLDER / case["json"]).read_text())
    labels = {"style": recorded["styles"], "object": recorded["objects"]}
    columns = {"style": "style_acc", "object": "class_acc"}
    other = "object" if domain == "style" else "style"
    scores = [
        score_target(target, dict(zip(labels[domain], values[columns[domain]])), values[columns[other]])
        for target, values in recorded[f"{domain}_targets"].items()
    ]
    for got, expected in zip(mean_scores(scores), case[f"{domain}_result_percent"].values()):
        assert 100 * got == pytest.approx(expected, abs=case["tolerance"] + 1e-9)


def test_mistakes():
    with pytest.raises(ValueError, match="'boat' is not among the labels cube, cone"):
        score_target("boat", {"cube": 1.0, "cone": 0.5}, [0.5])
    with pytest.raises(ValueError, match="needs other labels"):
        score_target("cube", {"cube": 1.0}, [0.5])
    with pytest.raises(ValueError, match="no target"):
        mean_scores([])
