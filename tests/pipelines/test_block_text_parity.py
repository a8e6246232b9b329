"""Texts against recorded runs of BD3-LM, MDLM, SEDD and the autoregressive baseline."""

import pytest
import torch
from block_text_cases import CASES, Replay, model_of, named, recorded

from imgdit.pipelines import block_text
from imgdit.pipelines.block_text import text_end, write_autoregressively


def windows(found):
    """Recorded grids, without the places that are not there yet."""
    return [[row[row >= 0] for row in grid] for grid in found["grids"]]


@pytest.mark.parametrize("name", named("sample"))
def test_texts_are_written_as_recorded(name):
    case, found = CASES[name], recorded(name)
    model = model_of(name)
    model.register_to_config(model_length=case["context_size"] or case["length"], block_size=case["block_size"])
    pipe = Replay(model)
    pipe.draws, pipe.zero_at_last = found, name.endswith("last_step")
    pipe.set_progress_bar_config(disable=True)
    calls, grids, times = [], [], []
    model.register_forward_hook(lambda *args: calls.append(None))

    def keep(pipe, step, time, given):
        grids.append(given["block_x"].clone())
        times.append(time)

    output = pipe(
        input_ids=found["output"][:, :1], gen_length=case["length"] - 1, num_inference_steps=case["num_steps"],
        sampler="first_hitting" if case["first_hitting"] else "ancestral", cache=case["kv_cache"],
        top_p=case["nucleus_p"], eos_early_stop=False, callback_on_step_end=keep,
    )  # fmt: skip
    assert torch.equal(output.sequences, found["output"][:, 1:])
    if case["checkpoint"] == "sedd":
        # Steps that find nothing masked are left out here and recorded there.
        assert len(grids) == len(calls) and all(map(torch.equal, grids, found["grids"]))
        return
    assert len(grids) == case["updates"]
    torch.testing.assert_close(torch.stack(times), found["t"], rtol=0, atol=1e-6)
    expected = windows(found)
    size = case["context_size"] or case["length"]
    for n, grid in enumerate(grids):
        # The next recorded window has one more block where this step finished one.
        for row, whole in zip(grid[:, -size:], expected[n + 1]):
            assert torch.equal(row[-whole.shape[0] :], whole[: row.shape[0]]) or torch.equal(
                row[row.shape[0] - whole.shape[0] + case["block_size"] :], whole[: -case["block_size"]]
            )
    # The last block is not stored here: nothing reads it.
    assert len(calls) == case["forward_calls"] - (1 if case["kv_cache"] else 0)


@pytest.mark.parametrize("name", named("ar_sample"))
def test_the_autoregressive_model_writes_as_recorded(name, monkeypatch):
    found = recorded(name)
    noise = iter(found["gumbel"])
    # The recording holds the noise itself: -ln(-ln u).
    monkeypatch.setattr(block_text, "draw_uniform", lambda *args: (-(-next(noise).double()).exp()).exp())
    ids = write_autoregressively(model_of(name), found["output"][:, :1], found["output"].shape[1] - 1)
    assert torch.equal(ids, found["output"])


@pytest.mark.parametrize("number", range(len(CASES["stop"]["rows"])))
def test_texts_end_where_recorded(number):
    row = CASES["stop"]["rows"][number]
    tokens = recorded("stop")[row["sequence"]][0]
    found = text_end(
        tokens, [CASES["stop"]["eos_token_id"]], ends=2 if row["var_length"] else None, cut=row["var_length"]
    )
    assert (found.stops, found.length) == (row["stop"], row["length"])
    assert found.entropy == pytest.approx(row["entropy"], abs=1e-5)
