"""Rules by which masks are revealed."""

import itertools

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler
from masked_text_cases import CASES, named

from imgdit.schedulers.mask_schedule import masked_fraction
from imgdit.schedulers.masked_text import MaskedTextScheduler, TextDraws

MASK = 19


def block(seed: int = 0, rows: int = 3, length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, L, 20), and tokens (B, L) about half of which are masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, MASK, (rows, length), generator=generator)
    tokens[torch.rand(rows, length, generator=generator) < 0.6] = MASK
    return 3 * torch.randn(rows, length, 20, generator=generator), tokens


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SAMPLING = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.9},
    {"temperature": 0.8, "sampling_method": "greedy"},
    {"temperature": 0.8, "sampling_method": "multinomial", "threshold": 0.3},
    {"threshold": 0.2, "editing_threshold": 0.4, "prompt_mask": torch.arange(8) < 2},
    {"threshold": 2.0, "minimal_topk": 2},
]


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("mask", [MASK, None])
def test_default_settings_are_the_parent_bit_for_bit(options, mask):
    mine, theirs = MaskedTextScheduler(editing_threshold=0.7), BlockRefinementScheduler(editing_threshold=0.7)
    for steps, step, seed in itertools.product((1, 3, 8), (0, 1, 5), range(3)):
        logits, tokens = block(seed)
        found = []
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(steps, block_length=8)
            found.append(
                scheduler.step(
                    logits, step, tokens, mask_token_id=mask, generator=seeded(), return_dict=False, **options
                )
            )
        assert all(map(torch.equal, *found))


def test_own_rules_agree_with_the_parent_where_they_mean_the_same():
    """A planned block in which all rows hold as many masks."""
    logits, tokens = block()
    tokens[:] = MASK
    for steps, step, options in itertools.product((1, 3, 8), (0, 1, 2), SAMPLING):
        mine, theirs = MaskedTextScheduler(), BlockRefinementScheduler()
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(steps, block_length=8)
        mine.start_block(torch.full((3,), 8))
        found = [
            scheduler.step(logits, step, tokens, mask_token_id=MASK, generator=seeded(), **options)
            for scheduler in (mine, theirs)
        ]
        assert torch.equal(found[0].prev_sample, found[1].prev_sample)
        assert torch.equal(found[0].editing_transfer_index, found[1].editing_transfer_index)


def test_two_noisy_views_mask_each_token_once():
    ids = torch.randint(0, MASK, (2, 10), generator=seeded())
    real = torch.ones_like(ids)
    real[1, 7:] = 0
    scheduler = MaskedTextScheduler()
    noisy, other, masked, rest = scheduler.add_noise(
        ids, real, prompt_length=3, block_length=4, mask_token_id=MASK, generator=seeded()
    )
    assert torch.equal(masked ^ rest, (torch.arange(10) >= 3) & real.bool()) and masked.any() and rest.any()
    assert torch.equal(noisy == MASK, masked) and torch.equal(other == MASK, rest)


@pytest.mark.parametrize("name", named("schedule"))
def test_even_counts_are_lladas(name):
    scheduler = MaskedTextScheduler()
    for key, expected in CASES[name]["table"].items():
        masks, steps = map(int, key.split("/"))
        scheduler.set_timesteps(steps)
        assert scheduler.counts(masks).tolist() == expected


@pytest.mark.parametrize(
    ("masks", "steps", "settings", "expected"),
    [
        (32, 16, {"reveal": "shift", "shift": 1 / 3}, [6, 4, 4, 2, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (32, 8, {"reveal": "shift", "shift": 3.0}, [2, 2, 2, 2, 4, 4, 7, 9]),
        (20, 50, {"reveal": "shift"}, [1] * 20 + [0] * 30),
        (32, 16, {"reveal": "shift", "shift": 1.0}, [2] * 16),
        (32, 12, {"reveal": "cosine"}, [1, 2, 2, 4, 3, 4, 5, 3, 4, 2, 1, 1]),
        (32, 12, {"reveal": "logit_normal"}, [1, 1, 3, 3, 4, 4, 5, 4, 3, 2, 1, 1]),
    ],
)
def test_counts_of_schedules_are_lavidas(masks, steps, settings, expected):
    scheduler = MaskedTextScheduler(**settings)
    scheduler.set_timesteps(steps)
    assert scheduler.counts(masks).tolist() == expected
    for fewer in range(masks):
        counts = scheduler.counts(fewer)
        assert counts.sum() == fewer and (counts[: min(steps, fewer)] >= 1).all() and (counts[fewer:] == 0).all()


@pytest.mark.parametrize(
    "reveal", ["even", "cosine", "shift", "logit_normal", "time", "threshold", "factor", "owed", "maskgit"]
)
@pytest.mark.parametrize("choose", ["probability", "log_probability", "margin", "entropy", "random", "ancestral"])
def test_every_rule_ends_for_rows_with_different_numbers_of_masks(reveal, choose):
    if choose == "ancestral" and reveal in ("threshold", "factor", "owed", "maskgit"):
        with pytest.raises(ValueError, match="does not have"):
            MaskedTextScheduler(reveal=reveal, choose=choose)
        return
    scheduler = MaskedTextScheduler(reveal=reveal, choose=choose, order_noise=0.5 * (choose == "margin"))
    for steps in (1, 3, 11):
        logits, tokens = block()
        tokens[0] = MASK
        tokens[2] = 0  # nothing to do
        kept = tokens != MASK
        scheduler.set_timesteps(steps)
        limit = scheduler.start_block((~kept).sum(1))
        before, generator = tokens.clone(), seeded()
        for step in range(limit):
            output = scheduler.step(
                logits, step, tokens, mask_token_id=MASK, threshold=0.9, forbid_mask=True, generator=generator,
                sampling_method="filtered",
            )  # fmt: skip
            assert torch.equal(output.transfer_index, (tokens == MASK) & (output.prev_sample != MASK))
            tokens = output.prev_sample
        assert not (tokens == MASK).any() and torch.equal(tokens[kept], before[kept])


@pytest.mark.parametrize("reveal", ["even", "cosine", "shift", "logit_normal", "time", "maskgit"])
def test_a_row_is_revealed_as_if_alone(reveal):
    logits, tokens = block()
    found = []
    for rows in (slice(0, 3), slice(1, 2)):
        scheduler = MaskedTextScheduler(reveal=reveal)
        scheduler.set_timesteps(3)
        scheduler.start_block((tokens[rows] == MASK).sum(1))
        found.append(scheduler.step(logits[rows], 0, tokens[rows], mask_token_id=MASK, threshold=2.0).prev_sample)
    assert torch.equal(found[0][1], found[1][0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("scales", [[0.0] * 6, [4.5 * (1 - k / 6) for k in range(1, 7)]])
def test_maskgit_reveals_as_diffusers_scheduler_of_amused(schedule, scales):
    generator = torch.Generator().manual_seed(3)
    theirs = AmusedScheduler(MASK, masking_schedule=schedule)
    theirs.set_timesteps(6)
    theirs.temperatures = torch.tensor(scales)
    mine = MaskedTextScheduler(
        reveal="maskgit", choose="log_probability", order_noise=4.5 * bool(scales[0]), order_noise_decay="linear",
        mask_schedule=schedule,
    )  # fmt: skip
    mine.set_timesteps(6)
    tokens = torch.full((3, 16), MASK)
    tokens[1, :9] = 3
    mine.start_block((tokens == MASK).sum(1))
    expected = tokens
    for step, timestep in enumerate(theirs.timesteps.tolist()):
        logits = 2 * torch.randn(3, 16, MASK, generator=generator)
        expected = theirs.step(logits, timestep, expected, generator=seeded(step)).prev_sample
        tokens = mine.step(
            logits, step, tokens, mask_token_id=MASK, temperature=1.0, generator=seeded(step)
        ).prev_sample  # fmt: skip
        assert torch.equal(tokens, expected)
    assert not (tokens == MASK).any()


def test_equal_confidences_are_revealed_together():
    """Which of them came first would be the processor's choice."""
    logits, tokens = confident(0.5, 0.5, 0.5, 0.9)
    assert revealed(logits, tokens, steps=2, reveal="maskgit") == [0, 1, 2, 3]
    logits, tokens = confident(0.5, 0.6, 0.7, 0.9)
    assert revealed(logits, tokens, steps=2, reveal="maskgit") == [2, 3]  # 4 cos(π / 4) = 2.8 stay


def test_noise_on_the_order_falls():
    def scales(decay):
        scheduler = MaskedTextScheduler(
            reveal="maskgit", choose="log_probability", order_noise=2.0, order_noise_decay=decay
        )
        scheduler.set_timesteps(4)
        logits, tokens = torch.zeros(1, 2, 20), torch.full((1, 2), MASK)
        seen = []
        scheduler._above_cut = lambda confidence, fillable, step: seen.append(confidence) or fillable
        order = torch.tensor([[0.5, 0.9]])
        for step in range(4):
            scheduler.step(logits, step, tokens, mask_token_id=MASK, draws=TextDraws(order=order))
        noise = -(-order.double().log()).log()
        return [float((one[0, 1] - one[0, 0]) / (noise[0, 1] - noise[0, 0])) for one in seen]

    assert scales("none") == pytest.approx([2.0] * 4)
    assert scales("linear") == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert scales("cumulative") == pytest.approx([1.5, 0.75, 0.1875, 0.0])


def test_unknown_mask_schedules_are_refused():
    for name in ("pow", "pow0", "cos", "linear2"):
        with pytest.raises(ValueError, match="mask_schedule must be one of cosine, linear, pow2"):
            MaskedTextScheduler(mask_schedule=name)
    halves = masked_fraction(torch.tensor([0.0, 0.5, 1.0]), "pow0.5")
    torch.testing.assert_close(halves, torch.tensor([1.0, 1 - 0.5**0.5, 1e-6]))


def confident(*probabilities: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks (1, L) whose best tokens have these probabilities, of two tokens."""
    best = torch.tensor([probabilities])
    return torch.stack([best, 1 - best, torch.zeros_like(best)], -1).log().clamp(min=-1e4), torch.full(best.shape, 2)


def revealed(logits, tokens, step=0, steps=1, threshold=None, **settings) -> list[int]:
    scheduler = MaskedTextScheduler(**settings)
    scheduler.set_timesteps(steps)
    output = scheduler.step(logits, step, tokens, mask_token_id=2, threshold=threshold, sampling_method="filtered")
    return output.transfer_index.nonzero()[:, 1].tolist()


def test_a_categorical_draw_leaves_masks_by_their_probability():
    """Token and mask in one draw: masks stay with probability s/t, the others go by the model's distribution."""
    scheduler = MaskedTextScheduler(reveal="time", choose="ancestral", eps=1e-5)
    scheduler.set_timesteps(4, block_length=20000)
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0]).expand(1, 20000, 4)
    tokens = torch.full((1, 20000), 3)
    call = {"mask_token_id": 3, "sampling_method": "categorical", "temperature": 1.0}
    found = scheduler.step(logits, 1, tokens, generator=seeded(), **call)
    gone = found.transfer_index
    assert float(gone.float().mean()) == pytest.approx(1 / 3, abs=0.015)  # from t = 3/4 to s = 1/2
    assert torch.equal(gone, found.prev_sample != 3)
    drawn = found.prev_sample[gone].bincount(minlength=3) / gone.sum()
    torch.testing.assert_close(drawn, logits[0, 0, :3].softmax(-1), rtol=0, atol=0.02)
    greedy = scheduler.step(logits, 1, tokens, generator=seeded(), **{**call, "temperature": 0.0})
    assert set(greedy.prev_sample.unique().tolist()) == {2, 3}


def test_noise_removal_reveals_what_the_schedule_leaves():
    logits, tokens = block()
    scheduler = MaskedTextScheduler(reveal="time", choose="ancestral", eps=0.5, noise_removal=True)
    scheduler.set_timesteps(3, block_length=8)
    assert scheduler.start_block((tokens == MASK).sum(1)) == 4
    call = {"mask_token_id": MASK, "sampling_method": "categorical", "temperature": 1.0, "generator": seeded()}
    for step in range(3):
        tokens = scheduler.step(logits, step, tokens, **call).prev_sample
    left = tokens == MASK
    assert left.any()
    done = scheduler.step(logits, 3, tokens, **call).prev_sample
    assert torch.equal(done[left], logits[..., :MASK].argmax(-1)[left]) and torch.equal(done[~left], tokens[~left])


def test_thresholds_of_fast_dllm():
    logits, tokens = confident(0.875, 0.75, 0.6, 0.9375)
    assert revealed(logits, tokens, threshold=0.875, reveal="threshold") == [0, 3]  # at least, not more than
    assert revealed(logits, tokens, threshold=0.99, reveal="threshold") == [3]
    # 1 - f / 3 = 0.8, 1 - f / 4 = 0.85 for f = 0.6: the third best, 0.75, fails.
    assert revealed(logits, tokens, reveal="factor", factor=0.6) == [0, 3]
    # 1 - f / 5 = 0.838 for f = 0.81: only 0.64, the last of four, fails.
    logits, tokens = confident(0.875, 0.8, 0.64, 0.9375)
    assert revealed(logits, tokens, reveal="factor", factor=0.81) == [0, 1, 3]
    assert revealed(logits, tokens, reveal="factor", factor=0.81, factor_takes_last=True) == [0, 1, 2, 3]
    # Two a step; the second best is refused, and owed in the next step.
    assert revealed(logits, tokens, steps=2, threshold=0.9, reveal="owed") == [3]
    assert revealed(logits, tokens, steps=2, threshold=0.8, reveal="owed") == [0, 3]


def test_gumbel_noise_chooses_tokens_and_not_their_confidence():
    logits, tokens = block()
    uniforms = torch.rand(logits.shape, dtype=torch.float64, generator=seeded())
    scheduler = MaskedTextScheduler()
    given = {"mask_token_id": MASK, "temperature": 0.7, "sampling_method": "gumbel"}
    output = scheduler.step(logits, 0, tokens, draws=TextDraws(gumbel=uniforms), **given)
    expected = (logits.double().exp() / (-uniforms.log()) ** 0.7).argmax(-1)
    assert torch.equal(output.sampled_tokens, expected) and not torch.equal(expected, logits.argmax(-1))
    clean = logits.double().softmax(-1).gather(-1, expected[..., None])[..., 0].float()
    torch.testing.assert_close(output.sampled_probs, clean)
    drawn = scheduler.step(logits, 0, tokens, generator=seeded(), **given)
    assert torch.equal(drawn.prev_sample, output.prev_sample)  # the same draws
    assert not torch.equal(scheduler.step(logits, 0, tokens, generator=seeded(2), **given).sampled_tokens, expected)


def test_tokens_that_are_forbidden_late_or_masks():
    logits, tokens = block()
    logits[..., 4] += 20
    logits[..., MASK] += 40
    scheduler = MaskedTextScheduler(threshold=2.0)
    scheduler.set_timesteps(8, block_length=8)
    plain = scheduler.step(logits, 0, tokens, mask_token_id=MASK)
    assert (plain.sampled_tokens == MASK).all()
    unmasked = scheduler.step(logits, 0, tokens, mask_token_id=MASK, forbid_mask=True)
    assert (unmasked.sampled_tokens == 4).all() and (unmasked.sampled_probs < 1e-3).all()
    other = scheduler.step(logits, 0, tokens, mask_token_id=MASK, forbid_mask=True, forbidden=(4,))
    assert not torch.isin(other.sampled_tokens, torch.tensor([4, MASK])).any()
    logits[0, 0, 4] -= 40  # the only place that predicts something else
    tokens[0, 0] = MASK
    late = scheduler.step(logits, 0, tokens, mask_token_id=MASK, forbid_mask=True, late=(4,))
    assert late.transfer_index[0].nonzero().tolist() == [[0]] and (late.sampled_probs[0, 1:] == 0).all()


def test_every_draw_is_from_the_generator():
    logits, tokens = block()
    for method, choose in itertools.product(("multinomial", "gumbel", "filtered"), ("random", "ancestral", "margin")):
        scheduler = MaskedTextScheduler(choose=choose, order_noise=1.0)
        found = []
        for seed in (1, 1):
            torch.manual_seed(len(found))
            scheduler.set_timesteps(4, block_length=8)
            found.append(
                scheduler.step(
                    logits, 0, tokens, mask_token_id=MASK, temperature=1.0, sampling_method=method, threshold=2.0,
                    generator=seeded(seed),
                ).prev_sample
            )  # fmt: skip
        assert torch.equal(*found)


@pytest.mark.parametrize("settings", [{"reveal": "evn"}, {"choose": "best"}, {"shift": 0.0}, {"eps": 1.0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=r"reveal|choose|expected"):
        MaskedTextScheduler(**settings)


def test_a_categorical_draw_without_a_schedule_is_refused():
    with pytest.raises(
        ValueError, match="'categorical' draws which masks go: choose='ancestral', got choose='margin'"
    ):
        MaskedTextScheduler(choose="margin").step(
            block()[0], 0, block()[1], mask_token_id=MASK, sampling_method="categorical"
        )
    with pytest.raises(ValueError, match="reveal='time', got reveal='even'"):
        MaskedTextScheduler(noise_removal=True)


def test_calls_that_mean_nothing_are_refused():
    logits, tokens = block()
    with pytest.raises(ValueError, match="need a mask token"):
        MaskedTextScheduler(choose="random").step(logits, 0, tokens)
    with pytest.raises(ValueError, match="sampling_method must be one of"):
        MaskedTextScheduler().step(logits, 0, tokens, mask_token_id=MASK, sampling_method="gumble")
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        MaskedTextScheduler(choose="margin").step(logits, 0, tokens, mask_token_id=MASK, temperature=-1)


def test_settings_are_saved(tmp_path):
    scheduler = MaskedTextScheduler(reveal="shift", shift=0.5, choose="margin", order_noise=0.1)
    scheduler.save_pretrained(tmp_path)
    again = MaskedTextScheduler.from_pretrained(tmp_path)
    assert {**again.config} == {**scheduler.config}
    assert MaskedTextScheduler.from_config(BlockRefinementScheduler(block_length=4).config).config.block_length == 4
