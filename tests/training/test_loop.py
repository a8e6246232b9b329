import json
import math

import pytest
import torch
from safetensors import safe_open
from tiny import rope_config, tiny_mmdit, tiny_vae
from training.toy import Tokens, batch, fixed_noise, global_noise, recipe, toy_train

from imgdit.io.checkpoints import load_weights
from imgdit.training import Batches
from imgdit.training.batches import Images
from imgdit.training.loop import NonFiniteLoss, optimizer_groups, train
from imgdit.training.objectives.autoencoder import autoencoder
from imgdit.training.objectives.flow_matching import flow_matching


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))


def test_it_learns(tmp_path):
    """Four samples by heart."""
    made = recipe(tmp_path, run={"steps": 60, "log_every": 10}, optimizer={"lr": 5e-3})
    toy_train(made, collate=fixed_noise, length=4)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_larger_batch(tmp_path, accumulation):
    # Adam divides by the gradient's size: where that is nearly nothing, only eps keeps rounding small.
    options = {"optimizer": {"eps": 1e-4}}
    whole, _ = toy_train(recipe(tmp_path / "1", **options), collate=fixed_noise)
    made = recipe(tmp_path / "2", run={"accumulation": accumulation}, **options)
    parts, _ = toy_train(made, collate=fixed_noise)
    assert differences(whole, parts) < 1e-6
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / "2")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_one_step_is_adamw_on_the_mup_groups(tmp_path):
    """Against the same step written out."""
    made = recipe(tmp_path, run={"steps": 1}, optimizer={"clip_norm": 0.1, "weight_decay": 0.1})
    config = rope_config(num_layers=1, num_single_layers=1, mup_base_width=16)
    order = Batches(Tokens(), fixed_noise, seed=3)
    (micro,) = [next(order.stream(0, 4))]
    expected = tiny_mmdit(config).train()
    optimizer = torch.optim.AdamW(optimizer_groups(expected, made.optimizer), betas=made.optimizer.betas)
    flow_matching(expected, None, micro.batch, None, text_dropout=0.0).loss.backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    optimizer.step()
    trained, _ = toy_train(made, collate=fixed_noise, model=tiny_mmdit(config))
    assert differences(trained, expected) == 0


def test_rates_follow_the_schedule_and_keep_their_ratios(tmp_path):
    made = recipe(tmp_path, run={"steps": 5}, schedule={"kind": "constant", "warmup": 1, "decay": 2})
    model = tiny_mmdit(rope_config(mup_base_width=16))
    toy_train(made, model=model, stop_at=2)
    toy_train(made, model=model, resume=True)
    first = optimizer_groups(model, made.optimizer)[0]["lr"]
    assert [line["lr"] / first for line in lines(tmp_path)] == pytest.approx([0.5, 1, 1, 1, 0.5])
    state = json.loads((tmp_path / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert state["schedule"] == {"step": 5, "lr": [0.0] * len(state["schedule"]["lr"])}


def test_average_is_the_running_one(tmp_path):
    """After each step: average = d average + (1 - d) weight, d = min(decay, (1 + n) / (10 + n))."""
    expected, weights = None, []
    made = recipe(tmp_path, run={"steps": 6, "checkpoint_every": 1, "keep": 9}, ema={"decay": 0.3})
    model, _ = toy_train(made)
    for step in range(1, 7):
        load_weights(model, tmp_path / "checkpoints" / f"step-{step:08d}", ema=False)
        weights.append(model.proj_out.weight.detach().clone())
        decay = 0.0 if step == 1 else min(0.3, step / (9 + step))
        expected = weights[-1] if expected is None else decay * expected + (1 - decay) * weights[-1]
        load_weights(model, tmp_path / "checkpoints" / f"step-{step:08d}")
        torch.testing.assert_close(model.proj_out.weight, expected)


def test_looking_does_not_change_the_training(tmp_path):
    plain, _ = toy_train(recipe(tmp_path / "plain"), objective=global_noise)
    seen = []
    model = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1))

    def look(step):
        torch.randn(3)  # as a careless sampler would
        seen.append((step, model.training, model.proj_out.weight.clone()))

    run = {"evaluate_every": 1, "sample_every": 2, "checkpoint_every": 2, "keep": 9}
    made = recipe(tmp_path / "looked", run=run)
    toy_train(made, model=model, objective=global_noise, held_out=[batch(2)], on_sample=look)
    assert differences(plain, model) == 0
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
    average = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1))
    load_weights(average, tmp_path / "looked" / "checkpoints" / "step-00000002")
    assert torch.equal(average.proj_out.weight, seen[0][2])


def test_held_out_loss_is_at_fixed_noise(tmp_path):
    """A learning rate of nearly nothing: the same weights give the same numbers at every step."""
    run = {"evaluate_every": 1, "evaluate_sigmas": [0.2, 0.8]}
    toy_train(recipe(tmp_path, run=run, optimizer={"lr": 1e-30}), held_out=[batch(2), batch(3)])
    found = [{k: v for k, v in line.items() if "held_out" in k} for line in lines(tmp_path) if "held_out" in line]
    assert len(found) == 4 and all(one == found[0] for one in found)
    assert found[0].keys() == {"held_out_0.2", "held_out_0.8", "held_out"}
    assert found[0]["held_out"] == pytest.approx((found[0]["held_out_0.2"] + found[0]["held_out_0.8"]) / 2)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    made = recipe(tmp_path, run={"steps": 9, "checkpoint_every": 1, "batch_size": 2})
    order = Batches(Tokens(), fixed_noise, seed=3).order
    marked = Tokens()[order[5]][0]  # the second sample of step 3

    def poisoned(samples):
        data = fixed_noise(samples)
        data.tokens[(data.tokens == marked).all(dim=2).all(dim=1), 0, 0] = float("nan")
        return data

    with pytest.raises(NonFiniteLoss) as error:
        toy_train(made, collate=poisoned)
    path = tmp_path / "bad-batch-step-00000003-rank-0.safetensors"
    assert "step 3: loss nan" in str(error.value) and str(path) in str(error.value)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["indices"]) == [[order[4], order[5]]]
        assert file.get_tensor("0.tokens").isnan().sum() == 1
        assert {"0.text.embeddings", "0.text.pooled", "0.noise", "0.sigmas"} <= set(file.keys())
    model = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1))
    load_weights(model, tmp_path / "checkpoints" / "step-00000002")
    assert all(p.isfinite().all() for p in model.parameters())


def test_only_what_is_trained_is_stored(tmp_path):
    def frozen():
        model = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1)).requires_grad_(False)
        model.proj_out.requires_grad_(True)
        return model

    whole, result = toy_train(recipe(tmp_path / "whole"), model=frozen())
    with safe_open(result.checkpoint / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["proj_out.bias", "proj_out.weight"]
    toy_train(recipe(tmp_path / "half"), model=frozen(), stop_at=2)
    resumed, _ = toy_train(recipe(tmp_path / "half"), model=frozen(), resume=True)
    assert differences(whole, resumed) == 0
    plain = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1))
    load_weights(plain, result.checkpoint, ema=False)
    assert differences(whole, plain) == 0


def test_bf16_autocast_ends_with_the_run(tmp_path):
    model, _ = toy_train(recipe(tmp_path, run={"mixed_precision": "bf16"}), collate=fixed_noise)
    assert model.proj_out.weight.dtype == torch.float32
    data = batch(1)
    hidden = model(data.tokens, data.text.embeddings, data.text.pooled, torch.tensor([0.5]), layout=data.layout).sample
    expected = type(model)(**model.config).train()
    expected.load_state_dict(model.state_dict())
    assert torch.equal(
        hidden,
        expected(data.tokens, data.text.embeddings, data.text.pooled, torch.tensor([0.5]), layout=data.layout).sample,
    )


def test_autoencoder_trains_and_resumes(tmp_path):
    class Noise:
        def __getitem__(self, index):
            return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1

    made = recipe(tmp_path / "whole", model={"kind": "autoencoder_kl"}, objective={"name": "autoencoder"})
    options = {"batches": Batches(Noise(), lambda samples: Images(torch.stack(samples)), seed=0)}
    whole = tiny_vae()
    train(made, model=whole, held_out=[Images(torch.zeros(1, 3, 16, 16))], **options)
    half = made.replace(run={"folder": str(tmp_path / "half")})
    train(half, model=tiny_vae(), stop_at=2, **options)
    resumed = tiny_vae()
    train(half, model=resumed, objective=autoencoder, resume=True, **options)
    assert differences(whole, resumed) == 0


def test_curves_go_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy_train(recipe(tmp_path, run={"tracker": "auto"}))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([line["loss"] for line in lines(tmp_path)])


def test_a_cut_line_of_metrics_is_dropped(tmp_path):
    toy_train(recipe(tmp_path), stop_at=2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    toy_train(recipe(tmp_path), resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))


def test_what_cannot_be_trained_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"batch_size=4 must divide by run.accumulation=3 times 1 rank"):
        toy_train(recipe(tmp_path, run={"accumulation": 3}))
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a launcher that accelerate does not listen to without a GPU
    with pytest.raises(ValueError, match="2 processes were started, but accelerate sees 1; start them with"):
        toy_train(recipe(tmp_path))
    with pytest.raises(ValueError, match="nothing to train"):
        toy_train(recipe(tmp_path), model=tiny_mmdit().requires_grad_(False))


def test_it_is_quiet_without_a_terminal(tmp_path, capfd):
    toy_train(recipe(tmp_path))
    assert "it/s" not in capfd.readouterr().err
