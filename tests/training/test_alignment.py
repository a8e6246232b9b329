"""Objectives that align features of a block: the autoencoder's, and a teacher's that sees less noise."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from tiny import rope_config
from training.toy import Tokens, batch, collate, recipe

from imgdit import Frame, FrameLayout, MultiFrameFlowMatchScheduler
from imgdit.io.checkpoints import CheckpointError
from imgdit.training import Batches, train
from imgdit.training.build import build_model
from imgdit.training.objectives.alignment import HEAD, block_output, drop_head
from imgdit.training.objectives.feature_alignment import feature_alignment
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.objectives.self_flow import self_flow, split_frames
from imgdit.training.trained import load_trained

SCHEDULER = MultiFrameFlowMatchScheduler()
SMALL = rope_config(num_layers=1, num_single_layers=2)
ONE = FrameLayout.build([Frame((2, 4))], 4)
NEXTDIT = {
    "input_size": (1, 8, 8),
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "caption_channels": 24,
}
GIVEN = FrameLayout.build([Frame((2, 2), sigma=0.0), Frame((2, 2), index=1.0)], 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(folder, name, **sections):
    return recipe(folder, model={"arguments": SMALL}, **{"objective": {"name": name}, **sections})


def trained(recipe, **options):
    return train(recipe, model=build_model(recipe), batches=Batches(Tokens(), collate, seed=3), **options)


@pytest.mark.parametrize("objective", [feature_alignment, self_flow])
def test_it_is_flow_matching_where_the_model_does_not_train(objective, tmp_path):
    """Held-out losses of runs with and without alignment can be compared."""
    model = build_model(made(tmp_path, objective.__name__)).eval()
    torch.nn.init.normal_(model.proj_out.weight)
    expected = flow_matching(model, SCHEDULER, batch(), seeded()).loss
    assert torch.equal(objective(model, SCHEDULER, batch(), seeded()).loss, expected)


def test_feature_alignment_by_hand(tmp_path):
    """The velocity's loss, and the smooth L1 distance of the projected features from the clean latents."""
    model = build_model(made(tmp_path, "feature_alignment"))
    torch.nn.init.normal_(model.alignment_head.to_features.weight, generator=seeded(1))
    data = batch(3, GIVEN).at(0.5)
    with block_output(model, 0.5) as found:
        velocity = flow_matching(model, SCHEDULER, data, seeded(), text_dropout=0.0).loss
    projected = model.alignment_head(found[0][:, 4:])  # the second frame; the first one is clean
    distance = torch.nn.functional.smooth_l1_loss(projected, data.tokens[:, 4:])
    output = feature_alignment(model, SCHEDULER, data, seeded(), weight=0.3, text_dropout=0.0)
    torch.testing.assert_close(output.loss, velocity + 0.3 * distance)
    torch.testing.assert_close(output.metrics["alignment"], distance.detach())
    output.loss.backward()
    assert model.alignment_head.hidden.weight.grad.abs().sum() > 0
    zero = feature_alignment(model, SCHEDULER, data, seeded(), weight=0.0, text_dropout=0.0).loss
    torch.testing.assert_close(zero, velocity)


def test_the_levels_drawn_are_those_of_flow_matching(tmp_path):
    model = build_model(made(tmp_path, "feature_alignment"))
    torch.nn.init.normal_(model.proj_out.weight)
    ours = feature_alignment(model, SCHEDULER, batch(8), seeded(), clean=0.5).metrics["velocity"]
    assert torch.equal(ours, flow_matching(model, SCHEDULER, batch(8), seeded(), clean=0.5).loss.detach())


def test_split_frames():
    split = split_frames(FrameLayout.build([*GIVEN.frames, Frame((3, 4), index=2.0)], 4), 0.25, seeded())
    assert split.layout.lengths == (4, 3, 1, 9, 3) and split.frames == [0, 1, 1, 2, 2]
    assert split.masked.tolist() == [False, False, True, False, True]
    assert sorted(split.order.tolist()) == list(range(20))
    whole = FrameLayout.build([*GIVEN.frames, Frame((3, 4), index=2.0)], 4)
    assert torch.equal(split.layout.ids(), whole.ids()[split.order])
    assert split.layout.text_length == whole.text_length
    other = split_frames(whole, 0.25, seeded(1))
    assert not torch.equal(other.order, split.order)
    with pytest.raises(ValueError, match="a frame of one token cannot have two noise levels"):
        split_frames(FrameLayout.build([Frame((1, 1))], 4), 0.25, seeded())


def test_one_level_in_both_parts_is_one_frame(tmp_path):
    """Where the level is set, the model gives the split frame what it gives the whole one."""
    model = build_model(made(tmp_path, "self_flow"))
    torch.nn.init.normal_(model.proj_out.weight, generator=seeded(1))
    data = batch(3, ONE).at(0.5)
    ours = self_flow(model, SCHEDULER, data, seeded(), text_dropout=0.0).metrics["velocity"]
    noise = torch.randn(data.tokens.shape, generator=after_the_mask())
    theirs = flow_matching(model, SCHEDULER, dataclasses.replace(data, noise=noise), seeded(), text_dropout=0.0).loss
    torch.testing.assert_close(ours, theirs.detach())


def after_the_mask():
    generator = seeded()
    torch.randperm(8, generator=generator)
    return generator


def test_the_teacher_sees_the_cleaner_level(tmp_path):
    model = build_model(made(tmp_path, "self_flow"))
    calls = []
    hook = model.register_forward_pre_hook(
        lambda module, args: calls.append((args[0], args[3] / 1000.0, torch.is_grad_enabled()))
    )
    entered = []

    @contextmanager
    def teacher():
        entered.append(len(calls))
        yield
        entered.append(len(calls))

    data = batch(16, ONE)
    output = self_flow(model, SCHEDULER, data, seeded(), teacher=teacher, masked=0.25)
    hook.remove()
    (noisy, cleaner, graded), (tokens, levels, learning) = calls
    assert entered == [0, 1] and not graded and learning
    assert levels.shape == (16, 2) and (levels[:, 0] != levels[:, 1]).all()
    assert (cleaner == levels.amin(1, keepdim=True)).all()
    same = (levels == cleaner).repeat_interleave(torch.tensor([6, 2]), dim=1)
    assert torch.equal(noisy[same], tokens[same]) and (noisy[~same] != tokens[~same]).any()
    assert 0.0 < output.metrics["alignment"] < 2.0
    torch.testing.assert_close(output.loss.detach(), output.metrics["velocity"] + 0.8 * output.metrics["alignment"])
    output.loss.backward()
    assert model.alignment_head.to_hidden.weight.grad.abs().sum() > 0


def test_clean_frames_stay_clean(tmp_path):
    """Of the pairs of a batch one frame may be given; it has no second level."""
    model = build_model(made(tmp_path, "self_flow"))
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    self_flow(model, SCHEDULER, batch(32), seeded(), clean=0.7)
    hook.remove()
    levels = seen[1]  # (B, 4): two parts of two frames
    zero = levels == 0
    assert torch.equal(zero[:, 0], zero[:, 1]) and torch.equal(zero[:, 2], zero[:, 3]) and zero.any()
    assert not (zero[:, 0] & zero[:, 2]).any()


@pytest.mark.parametrize("name", ["feature_alignment", "self_flow"])
def test_a_run_goes_on_and_leaves_a_plain_model(tmp_path, name):
    """The head is trained and resumed with the model, the average is the teacher, and what is exported has no head."""
    sections = {"run": {"steps": 4}, "ema": {"decay": 0.5}, "optimizer": {"kind": "muon", "lr": 0.01}}
    whole = made(tmp_path / "whole", name, **sections)
    trained(whole)
    half = made(tmp_path / "half", name, **sections)
    trained(half, stop_at=2)
    trained(half, resume=True)
    plain = load_trained(half.run.folder)
    for (key, a), b in zip(load_trained(whole.run.folder).state_dict().items(), plain.state_dict().values()):
        assert torch.equal(a, b), key
    assert not hasattr(plain, HEAD)
    later = made(tmp_path / "later", "flow_matching")
    later = later.replace(model={"start_from": half.run.folder})
    started = build_model(later)
    assert all(torch.equal(a, b) for a, b in zip(started.parameters(), plain.parameters(), strict=True))


def test_the_model_s_own_weights_do_not_depend_on_the_head(tmp_path):
    model = build_model(made(tmp_path, "feature_alignment"))
    drop_head(model)
    plain = build_model(made(tmp_path, "flow_matching")).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_aligned(tmp_path):
    bare = build_model(made(tmp_path, "flow_matching"))
    with pytest.raises(ValueError, match="the model has no alignment head"):
        feature_alignment(bare, SCHEDULER, batch(), seeded())
    with pytest.raises(ValueError, match="objective 'self_flow' learns from the average weights"):
        trained(made(tmp_path / "run", "self_flow", ema={"decay": 0.0}))
    model = build_model(made(tmp_path, "self_flow"))
    with pytest.raises(ValueError, match=r"a depth is a fraction .* got 1.0 of 3 blocks"):
        self_flow(model, SCHEDULER, batch(), seeded(), depths=(0.3, 1.0))
    with pytest.raises(ValueError, match="masked is a fraction of tokens"):
        self_flow(model, SCHEDULER, batch(), seeded(), masked=0.0)
    with pytest.raises(CheckpointError, match="alignment_head"):
        one = made(tmp_path / "one", "feature_alignment", run={"steps": 1})
        trained(one)
        trained(made(tmp_path / "one", "flow_matching", run={"steps": 2}), resume=True)
    with pytest.raises(ValueError, match=r"are for model.kind 'mmdit', got NextDiT"):
        build_model(made(tmp_path, "self_flow").replace(model={"kind": "nextdit", "arguments": NEXTDIT}))
