"""The benchmark of writing: its model computes what the narrow one does, each way computes less, tokens are equal."""

import pytest
import torch
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.benchmarks.speed import writing
from imgdit.benchmarks.speed.timing import flops_of
from imgdit.models.masked_lm import new_masked_lm
from imgdit.scenes.captions import plain_caption
from imgdit.scenes.texts import scene_text_tokenizer
from imgdit.scenes.world import Scene

SMALL = {"prompt": 8, "new": 16, "block": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return new_masked_lm(360, 359, 1, 16, 1, 2, 64).eval()


def test_a_wider_model_computes_the_same(model):
    wide = writing.widened(model, 96, 2, 3, 64)
    assert wide.config.hidden_size == 96 and wide.config.num_hidden_layers == 2 and not wide.config.is_causal
    ids = torch.randint(0, 360, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            wide(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="of a multiple of 8 features"):
        writing.widened(model, 96, 2, 8, 64)


def test_rows_hold_captions_with_an_end_behind_each():
    row = writing.CaptionRows(0, "heldout", 64)[0]
    tokenizer = scene_text_tokenizer()
    ids = row.ids[0].tolist()
    assert len(ids) == 64 and ids[0] == tokenizer.bos_token_id and 1 < ids.count(tokenizer.eos_token_id) < 10
    assert torch.equal(writing.CaptionRows(0, "heldout", 64)[0].ids, row.ids)
    said = tokenizer.decode(ids[1 : ids.index(tokenizer.eos_token_id)])
    assert said.replace(" ", "") == plain_caption(Scene.sample(0, "heldout")).replace(" ", "")
    other = writing.CaptionRows(0, "heldout", 64, plain=False)[0].ids
    assert not torch.equal(other, row.ids)
    assert writing.writer_recipe("run", 10, plain=False).data.arguments["plain"] is False


def test_each_way_computes_less_and_no_cache_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(writing, "timed", lambda call, _: flops_of(call))
    rows = {row.way: row for row in writing.writing_comparisons(model, **SMALL)}
    assert list(rows) == list(writing.WAYS)
    assert rows["no cache"].agreement == 1.0 and rows["no cache"].faster > 1  # logits of the block only
    faster = [row.faster for row in rows.values()]
    assert faster == sorted(faster)
    assert [row.passes for row in rows.values()][:3] == [16, 16, 16]


def test_block_diffusion_writes_the_same_with_its_cache(monkeypatch):
    monkeypatch.setattr(writing, "timed", lambda call, _: flops_of(call))
    row = writing.block_writing_comparison(new=16, block_size=4, width=16, layers=1, heads=2)
    assert row.agreement == 1.0 and row.faster > 1.5 and row.passes == 15 + 3


def test_the_command_prints_a_row_per_way(tmp_path, monkeypatch):
    for name, value in {"WIDTH": 96, "LAYERS": 3, "HEADS": 4, "PROMPT": 8, "NEW": 16}.items():
        monkeypatch.setattr(writing, name, value)
    recipe, ways, blocks = writing.writer_recipe, writing.writing_comparisons, writing.block_writing_comparison
    monkeypatch.setattr(writing, "writer_recipe", lambda folder, steps, plain: recipe(folder, steps, 24, plain))
    monkeypatch.setattr(writing, "writing_comparisons", lambda model, **options: ways(model, **options | SMALL))
    small = {"new": 8, "block_size": 4, "width": 16, "layers": 1, "heads": 2}
    monkeypatch.setattr(writing, "block_writing_comparison", lambda **options: blocks(**options | small))
    done = CliRunner().invoke(app, ["bench", "write-speed", "--out", str(tmp_path), "--steps", "1"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert all(any(line.startswith(way) for line in lines) for way in [*writing.WAYS, "block diffusion, cached"])
