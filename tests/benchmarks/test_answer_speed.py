"""The benchmark of answers about images: what it times does less."""

from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.benchmarks.speed import answers
from imgdit.benchmarks.speed.timing import Comparison, flops_of

SMALL = {"prompt": 120, "answer": 8, "hidden_size": 32, "num_layers": 1}


def test_each_way_computes_less(monkeypatch):
    """Of 8 passes over 128 tokens the cached prompt leaves one over 120 and 8 over 8; the schedule leaves half."""

    def counted(work, against, ours, other, **_):
        ratio = flops_of(ours) / flops_of(other)
        return Comparison(work, against, 0.0, 0.0, ratio, ratio, ratio, 0.0)

    monkeypatch.setattr(answers, "compare", counted)
    cached, half, both = (row.ratio for row in answers.answer_comparisons(rounds=1, **SMALL))
    tokens = 8 * 128
    assert abs(cached - (120 + 8 * 8) / tokens) < 0.12 and abs(half - 0.5) < 0.01
    assert abs(both - (120 + 4 * 8) / tokens) < 0.12 and both < cached < half


def test_the_command_prints_a_row_per_way(monkeypatch):
    rows = answers.answer_comparisons
    monkeypatch.setattr(answers, "answer_comparisons", lambda **options: rows(**options | SMALL))
    done = CliRunner().invoke(app, ["bench", "answer-speed", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert all(any(line.startswith(way) for line in done.output.splitlines()) for way in answers.WAYS)
