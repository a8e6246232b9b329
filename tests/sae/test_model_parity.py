"""The model and its loss against numbers recorded from SAeUron and sparsify."""

import dataclasses

import pytest
import torch
from saeuron_cases import CASES, cases, close, dense, sae_of, tensors

from imgdit.sae.model import SPARSIFY, SparseAutoencoder, auto_lr, geometric_median

MODES = {"patch": "topk", "batch": "batch_topk", "sample": "sample_topk"}


def trainable(sae, selection):
    """The SAE with the recorded selection and trainable weights."""
    config = dataclasses.replace(sae.config, activation=MODES[selection])
    new = SparseAutoencoder(config)
    new.load_state_dict(sae.state_dict())
    return new


@cases("encode_decode")
def test_encode_decode(name):
    case, recorded = CASES[name], tensors(name)
    sae = sae_of(case)
    rows = recorded["x"].flatten(0, 1)
    close(sae.scores(rows), recorded["pre_acts_no_relu"], 1e-5)
    code = sae.encode(rows)  # the reference's encode does no unit norm either
    close(code.dense(), dense(recorded["top_acts"], recorded["top_indices"], case["num_latents"]), 1e-5)
    close(sae.decode(code), recorded["decoded"], 1e-5)


@cases("forward")
def test_forward(name):
    case, recorded = CASES[name], tensors(name)
    sae = trainable(sae_of(case), case["selection"])
    out = sae.loss(
        tensors(case["x_from"])["x"],
        dead=recorded.get("dead_mask"),
        auxk_alpha=case["auxk_alpha"],
        paper_compat=True,
    )
    for scalar in ("fvu", "l2_loss", "auxk_loss", "multi_topk_fvu", "loss"):
        close(getattr(out, scalar), recorded[scalar], 1e-5, 1e-4)
    close(out.positive, recorded["l0_loss"], 1e-5, 1e-4)
    for tensor in ("sae_out", "explained_variance"):
        close(getattr(out, tensor), recorded[tensor], 1e-5, 1e-4)
    close(out.code.dense(), recorded["latents_dense"], 1e-5, 1e-4)
    fired = torch.zeros(case["num_latents"], dtype=torch.bool)
    fired[out.code.pattern.indices] = True
    assert torch.equal(fired, recorded["fired"])
    out.loss.backward()
    for parameter, value in sae.named_parameters():
        if f"grad.{parameter}" in recorded:
            close(value.grad, recorded[f"grad.{parameter}"], 1e-6, 1e-4)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case["kind"] == "forward" and case["corrected"]]
)
def test_corrected_losses(name):
    """The reference's two errors corrected, as sparsify computes it."""
    case, recorded = CASES[name], tensors(name)
    if case["input_unit_norm"]:
        pytest.skip("sparsify has no unit norm")
    sae = trainable(sae_of(case), case["selection"])
    out = sae.loss(tensors(case["x_from"])["x"], dead=recorded.get("dead_mask"), rules=SPARSIFY)
    for scalar, value in case["corrected"].items():
        close(getattr(out, scalar.removeprefix("sparsify_")), value, 1e-5, 1e-4)


@cases("sparsify")
def test_sparsify(name):
    case, recorded = CASES[name], tensors(name)
    sae = sae_of(case)
    code = sae.encode(recorded["x"])
    close(
        code.dense(), dense(recorded["encode.top_acts"], recorded["encode.top_indices"], sae.config.num_latents), 1e-5
    )
    sae = SparseAutoencoder(sae.config)
    sae.load_state_dict(sae_of(case).state_dict())
    out = sae.loss(
        recorded["x"],
        target=recorded.get("y"),
        dead=recorded.get("dead_mask"),
        auxk_alpha=case["auxk_alpha"],
        rules=SPARSIFY,
    )
    for scalar, value in case["scalars"].items():
        close(getattr(out, scalar), value, 1e-5, 1e-4)
    close(out.sae_out, recorded["sae_out"], 1e-5, 1e-4)
    close(out.code.dense(), dense(recorded["top_acts"], recorded["top_indices"], sae.config.num_latents), 1e-5)
    out.loss.backward()
    for parameter, value in sae.named_parameters():
        if f"grad.{parameter}" in recorded:
            close(value.grad, recorded[f"grad.{parameter}"], 1e-6, 1e-4)


@cases("geometric_median")
def test_geometric_median(name):
    case, recorded = CASES[name], tensors(name)
    close(geometric_median(recorded["points"], case["max_iter"], case["tol"]), recorded["median"], 1e-5)
    constant = recorded["points"][:1].expand(9, -1)
    close(geometric_median(constant), constant[0], 1e-5)  # NaN in the reference


@cases("auto_lr")
def test_auto_lr(name):
    for latents, rate in CASES[name]["by_num_latents"].items():
        assert auto_lr(int(latents)) == pytest.approx(rate, abs=1e-12)
