import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from imgdit import Frame, FrameLayout, MultiFrameFlowMatchScheduler
from imgdit.schedulers.flow_match import linear_sigmas, mix, velocity

CONFIGS = {
    "static": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.1, "time_shift_type": "linear"},
    "karras": {"use_karras_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
}


def schedulers(name, steps, sigmas):
    pair = FlowMatchEulerDiscreteScheduler(**CONFIGS[name]), MultiFrameFlowMatchScheduler(**CONFIGS[name])
    for scheduler in pair:
        mu = 0.8 if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(None if sigmas else steps, sigmas=sigmas, mu=mu)
    return pair


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sigmas", [None, linear_sigmas(5)], ids=["default", "explicit"])
def test_one_frame_is_bitwise_the_parent(name, sigmas):
    parent, ours = schedulers(name, 5, sigmas)
    layout = FrameLayout.build([Frame((2, 3))], 1)
    x = y = z = torch.randn(2, 6, 4)
    for i, t in enumerate(parent.timesteps):
        v = torch.randn(2, 6, 4)
        generators = [torch.Generator().manual_seed(i) for _ in range(3)]
        x = parent.step(v, t, x, generator=generators[0]).prev_sample
        y = ours.step(v, t, y, generator=generators[1], return_dict=False)[0]
        assert torch.equal(x, y)
    _, ours = schedulers(name, 5, sigmas)
    for i, t in enumerate(ours.timesteps):
        v = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(i))
        w = z
        z = ours.step(v, t, z, generator=torch.Generator().manual_seed(i), layout=layout).prev_sample
        parent._step_index = ours._step_index - 1
        assert torch.equal(z, parent.step(v, t, w, generator=torch.Generator().manual_seed(i)).prev_sample)


def test_given_frames_do_not_move():
    _, scheduler = schedulers("static", 4, linear_sigmas(4))
    layout = FrameLayout.build([Frame((1, 2), 0.0), Frame((2, 2)), Frame((1, 3), 0.2), Frame((1, 1))], 2)
    x = torch.randn(2, 10, 4)
    v = torch.randn(2, 5, 4)
    moved = scheduler.step(v, scheduler.timesteps[0], x, layout=layout).prev_sample
    step = scheduler.sigmas[1] - scheduler.sigmas[0]
    assert torch.equal(moved[:, :2], x[:, :2]) and torch.equal(moved[:, 6:9], x[:, 6:9])
    torch.testing.assert_close(moved[:, 2:6], x[:, 2:6] + step * v[:, :4])
    torch.testing.assert_close(moved[:, 9:], x[:, 9:] + step * v[:, 4:])


@pytest.mark.parametrize("name", ["static", "stochastic"])
def test_frames_at_their_own_levels(name):
    """Each moves to the next lower level of the schedule; at the run's level it moves as in an ordinary step; at 0 it
    stays. The parent's per-token branch has the other sign: a wrong one would move away from the data."""
    _, scheduler = schedulers(name, 4, linear_sigmas(4))
    layout = FrameLayout.build([Frame((1, 2)), Frame((1, 2)), Frame((1, 2))], 1)
    data, noise = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    levels = scheduler.sigmas[torch.tensor([[0, 2, 4], [1, 3, 4]])]
    x = mix(data, noise, levels, layout.lengths)
    moved = scheduler.step(
        velocity(data, noise), scheduler.timesteps[0], x, layout=layout, frame_timesteps=levels * 1000,
        generator=torch.Generator().manual_seed(0),
    ).prev_sample  # fmt: skip
    after = scheduler.sigmas[torch.tensor([[1, 3, 4], [2, 4, 4]])]
    if name == "stochastic":
        noise = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, mix(data, noise, after, layout.lengths), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[:, 4:], data[:, 4:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["static", "stochastic"])
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 5)], ids=["image", "video"])
def test_cells_at_their_own_levels(name, grid):
    """A grid is what its tokens are one by one; the output is data - noise, as in the parent's branch."""
    parent, scheduler = schedulers(name, 4, linear_sigmas(4))
    data, noise = torch.randn(2, 4, *grid), torch.randn(2, 4, *grid)
    place = torch.randint(0, 5, (2, *grid), generator=torch.Generator().manual_seed(3))
    levels = scheduler.sigmas[place]
    x = (1 - levels[:, None]) * data + levels[:, None] * noise
    seed = [torch.Generator().manual_seed(0) for _ in range(2)]
    moved = scheduler.step(
        data - noise, scheduler.timesteps[0], x, per_token_timesteps=levels * 1000, generator=seed[0]
    ).prev_sample
    flat = parent.step(
        (data - noise).flatten(2).mT, scheduler.timesteps[0], x.flatten(2).mT,
        per_token_timesteps=levels.flatten(1) * 1000, generator=seed[1],
    ).prev_sample  # fmt: skip
    assert torch.equal(moved, flat.mT.unflatten(2, grid))
    if name == "static":
        after = scheduler.sigmas[(place + 1).clamp(max=4)][:, None]
        torch.testing.assert_close(moved, (1 - after) * data + after * noise, atol=1e-5, rtol=1e-5)
        tokens = scheduler.step(
            (data - noise).flatten(2).mT, scheduler.timesteps[1], x.flatten(2).mT,
            per_token_timesteps=levels.flatten(1) * 1000, return_dict=False,
        )[0]  # fmt: skip
        assert torch.equal(tokens, flat)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.sampled_from(["static", "dynamic"]))
def test_the_true_velocity_leads_to_the_data(steps, name):
    _, scheduler = schedulers(name, steps, linear_sigmas(steps))
    data, noise = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    x = mix(data, noise, scheduler.sigmas[:1][None], [6])
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(data, noise), t, x).prev_sample
    torch.testing.assert_close(x, data, atol=1e-5, rtol=1e-5)


def test_mu_counts_generated_tokens_as_flux_does():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = MultiFrameFlowMatchScheduler(use_dynamic_shifting=True)
    for tokens in (64, 256, 1000, 4096):
        assert scheduler.mu(tokens) == pytest.approx(calculate_shift(tokens))
    assert MultiFrameFlowMatchScheduler(shift=3.0).mu(256) is None


def test_folders_are_shared_with_the_parent(tmp_path):
    ours = MultiFrameFlowMatchScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.3)
    ours.save_pretrained(tmp_path)
    for cls in (MultiFrameFlowMatchScheduler, FlowMatchEulerDiscreteScheduler):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls and loaded.config.base_shift == 0.3 and loaded.config.shift == 3.0
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path)
    assert MultiFrameFlowMatchScheduler.from_pretrained(tmp_path).config.shift == 2.0
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.base_shift == 0.3


def test_draws_have_the_distributions_asked_for():
    scheduler = MultiFrameFlowMatchScheduler()
    uniform = scheduler.sample_sigmas(4000, 2, distribution="uniform", generator=torch.Generator().manual_seed(0))
    assert uniform.shape == (4000, 2)
    for level in (0.1, 0.5, 0.9):
        assert (uniform < level).float().mean() == pytest.approx(level, abs=0.02)
    assert torch.corrcoef(uniform.T)[0, 1].abs() < 0.05
    normal = torch.logit(scheduler.sample_sigmas(8000, mean=0.5, std=2.0, generator=torch.Generator().manual_seed(0)))
    assert normal.mean() == pytest.approx(0.5, abs=0.07) and normal.std() == pytest.approx(2.0, abs=0.07)


def test_draws_are_shifted_as_the_steps_are():
    plain = MultiFrameFlowMatchScheduler().sample_sigmas(50, generator=torch.Generator().manual_seed(1))
    static = MultiFrameFlowMatchScheduler(shift=3.0)
    shifted = static.sample_sigmas(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    dynamic = MultiFrameFlowMatchScheduler(use_dynamic_shifting=True)
    shifted = dynamic.sample_sigmas(50, num_tokens=1024, generator=torch.Generator().manual_seed(1))
    dynamic.set_timesteps(sigmas=plain[:, 0].tolist(), mu=dynamic.mu(1024))
    torch.testing.assert_close(shifted[:, 0], dynamic.sigmas[:-1], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="pass num_tokens"):
        dynamic.sample_sigmas(2)


def test_clean_frames_and_shared_levels():
    scheduler = MultiFrameFlowMatchScheduler()
    sigmas = scheduler.sample_sigmas(3000, 3, clean=0.4, generator=torch.Generator().manual_seed(0))
    assert (sigmas > 0).any(dim=1).all(), "one frame of a sample keeps its noise"
    assert 0.3 < (sigmas == 0).float().mean() < 0.4
    assert (scheduler.sample_sigmas(50, 3, clean=1.0) > 0).sum(dim=1).eq(1).all()
    shared = scheduler.sample_sigmas(20, 3, shared=True)
    assert torch.equal(shared, shared[:, :1].expand(-1, 3)) and shared.unique().numel() == 20
    a, b = (scheduler.sample_sigmas(5, 2, clean=0.5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x, lay: s.step(x, s.timesteps[0], x, frame_timesteps=torch.ones(1, 2)), "needs the layout"),
        (lambda s, x, lay: s.step(x[:, :2], s.timesteps[0], x, layout=lay), r"must be \(1, 3, 4\)"),
        (
            lambda s, x, lay: s.step(x, s.timesteps[0], x, per_token_timesteps=torch.ones(1, 5), layout=lay),
            "per frame .* or per token",
        ),
        (
            lambda s, x, lay: s.step(x, s.timesteps[0], x, per_token_timesteps=torch.ones(1, 4)),
            r"must be \(B, N\) .* got \(1, 4\) for samples of shape \(1, 5, 4\)",
        ),
        (
            lambda s, x, lay: s.step(x[..., None], s.timesteps[0], x[..., None], per_token_timesteps=torch.ones(1, 4)),
            r"or \(B, h, w\) for latent grids .* got \(1, 4\)",
        ),
        (lambda s, x, lay: s.sample_sigmas(2, distribution="normal"), "'logit_normal' or 'uniform', got 'normal'"),
        (lambda s, x, lay: s.sample_sigmas(2, clean=1.5), r"fraction of frames in \[0, 1\]"),
        (lambda s, x, lay: mix(x, x, torch.ones(1, 3), [2, 3]), r"sigmas must be \(1, 2\)"),
        (lambda s, x, lay: linear_sigmas(0), "at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    _, scheduler = schedulers("static", 3, linear_sigmas(3))
    layout = FrameLayout.build([Frame((1, 3)), Frame((1, 2), 0.0)], 1)
    with pytest.raises(ValueError, match=message):
        call(scheduler, torch.randn(1, 5, 4), layout)
