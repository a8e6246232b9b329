"""A training step against the recorded one, what it learns, and that it goes on where it stopped."""

import pytest
import torch
from saeuron_cases import CASES, cases, close, tensors

from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.training import SAETrainConfig, SAETraining


def weights(sae):
    return {name: value.detach().clone() for name, value in sae.named_parameters()}


@cases("train")
def test_recorded_training(name):
    case, recorded = CASES[name], tensors(name)
    cfg, train = case["cfg"], case["train"]
    config = SAEConfig.from_dict({**cfg, "d_in": case["d_in"]})
    sae = SparseAutoencoder(config)
    sae.load_state_dict({key.removeprefix("init."): value for key, value in recorded.items() if key[:5] == "init."})
    data, per_batch = recorded["data"], case["feature_maps_per_batch"]
    accumulate = train.get("grad_acc_steps", 1)
    training = SAETraining(
        sae,
        SAETrainConfig(
            lr=train["lr"],
            schedule=train["lr_scheduler"],
            warmup=train["lr_warmup_steps"],
            auxk_alpha=train["auxk_alpha"],
            dead_after=train["dead_feature_threshold"],
            clip_norm=case["clip_grad_norm"],
            standardize=False,
            accumulate=accumulate,
            micro=train.get("micro_acc_steps", 1),
            paper_compat=True,
        ),
        steps=len(data) // per_batch * train["num_epochs"],
    )
    spied = {}
    project = sae.project_decoder_gradient

    def spy():
        spied["clipped"] = {key: value.grad.clone() for key, value in sae.named_parameters()}
        project()
        spied["projected"] = sae.W_dec.grad.clone()

    sae.project_decoder_gradient = spy
    batches = [part for _ in range(train["num_epochs"]) for part in data.split(per_batch)]
    for i, batch in enumerate(batches):
        step = i // accumulate
        rate = training.schedule.get_last_lr()[0]
        metrics = training.step(batch)
        expected = case["forwards_per_step"][step]
        if accumulate == 1:
            for scalar in ("fvu", "auxk_loss", "multi_topk_fvu"):
                mean = sum(entry[scalar] for entry in expected) / len(expected)
                assert metrics[scalar] == pytest.approx(mean, rel=1e-4, abs=1e-5)
        if (i + 1) % accumulate:
            continue
        assert rate == pytest.approx(case["lr_per_step"][step], abs=1e-12)
        for key, value in spied["clipped"].items():
            close(value, recorded[f"step{step}.grad_clipped.{key}"], 1e-6, 1e-4)
        close(spied["projected"], recorded[f"step{step}.grad_projected.W_dec"], 1e-6, 1e-4)
        for key, value in weights(sae).items():
            # Adam's eps turns a rounding difference of a near-zero gradient into a full step.
            wrong = (value - recorded[f"step{step}.after.{key}"]).abs()
            assert (wrong > 2e-6).float().mean() <= 0.001 and wrong.max() <= 2 * train["lr"]
    assert torch.equal(training.rows_since_fired, recorded["final.num_tokens_since_fired"])


def features(rows, seed=0, d=24, count=48, active=3):
    """Rows that really are sums of few directions, on a large mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(count, d, generator=torch.Generator().manual_seed(99)), dim=1
    )
    code = torch.rand(rows, count, generator=generator) * (
        torch.rand(rows, count, generator=generator) < active / count
    )
    return 50 * code @ directions + 300 * torch.eye(d)[3], directions


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "sample_topk", "groupmax"])
def test_it_learns(activation):
    k = {"sample_topk": 4 * 8, "groupmax": 8}.get(activation, 4)
    config = SAEConfig(24, 96, k=k, activation=activation)
    training = SAETraining(
        SparseAutoencoder(config, generator=torch.Generator().manual_seed(0)),
        SAETrainConfig(lr=6e-3, dead_after=20_000, schedule="constant"),
        150,
    )
    values = [training.step(features(512, seed=i)[0].view(64, 8, 24)) for i in range(150)]
    assert values[-1]["fvu"] < 0.5 * values[0]["fvu"]
    sae = training.trained()
    x = features(2048, seed=1000)[0]
    error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < (0.6 if activation == "groupmax" else 0.35)
    if activation == "batch_topk":
        assert sae.threshold > 0
        assert 2 < float((sae.encode(x).acts > 0).sum() / len(x)) < 6  # about k per row, by the threshold alone
    assert training.density().shape == (96,)


def test_dead_features_are_revived():
    """The loss on the error that is left brings features back."""
    config = SAEConfig(24, 96, k=4)
    shares = {}
    for alpha in (0.0, 0.5):
        sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sae.encoder.weight[48:] *= 0.05  # positive now and then, never among the largest
        training = SAETraining(
            sae, SAETrainConfig(lr=1e-2, auxk_alpha=alpha, dead_after=3000, schedule="constant"), 120
        )
        for i in range(120):
            shares[alpha] = training.step(features(512, seed=i)[0])["dead"]
    assert shares[0.5] < 0.7 * shares[0.0]


def test_it_goes_on_bitwise():
    def new():
        config = SAEConfig(24, 96, k=4, activation="batch_topk")
        sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(0))
        return SAETraining(sae, SAETrainConfig(lr=3e-3, dead_after=2000, accumulate=2), 20)

    whole = new()
    for i in range(20):
        whole.step(features(256, seed=i)[0])
    first = new()
    for i in range(10):
        first.step(features(256, seed=i)[0])
    second = new()
    second.load(first.tensors(), first.numbers())
    for i in range(10, 20):
        second.step(features(256, seed=i)[0])
    for name, value in weights(whole.sae).items():
        assert torch.equal(value, weights(second.sae)[name])
    assert whole.sae.threshold == second.sae.threshold


def test_statistics_are_folded_into_the_weights():
    training = SAETraining(SparseAutoencoder(SAEConfig(24, 96, k=4)), SAETrainConfig(lr=3e-3), 20)
    for i in range(20):
        training.step(features(256, seed=i)[0])
    x = features(64, seed=77)[0]
    saved = training.trained()
    inner = training.sae((x - training.mean) / training.scale).detach() * training.scale + training.mean
    torch.testing.assert_close(saved(x), inner, atol=2e-3, rtol=1e-4)
    again = SAETraining.continued_from(saved, SAETrainConfig(), 20)
    torch.testing.assert_close(again.sae.W_dec.norm(dim=1), torch.ones(96), atol=0.05, rtol=0)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_saved_and_continued(unit_norm):
    """Inputs far from 0: what is saved explains them as well as what was trained, and training goes on from there."""
    config = SAEConfig(24, 96, k=4, input_unit_norm=unit_norm)
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(0))
    training, offset = SAETraining(sae, SAETrainConfig(lr=3e-3), 40), 3 * torch.arange(24.0)
    for i in range(40):
        last = training.step(features(256, seed=i)[0] + offset)["fvu"]
    x = features(256, seed=77)[0] + offset
    saved = training.trained()
    error, spread = (saved(x) - x).square().sum(), (x - x.mean(0)).square().sum()
    assert float(error / spread) < 1.3 * last
    again = SAETraining.continued_from(saved, SAETrainConfig(lr=1e-6), 20)
    assert again.step(x)["fvu"] < 1.3 * last


def test_nan_is_refused():
    training = SAETraining(SparseAutoencoder(SAEConfig(8, 16, k=2)), SAETrainConfig(), 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        training.step(torch.full((4, 8), float("nan")))
