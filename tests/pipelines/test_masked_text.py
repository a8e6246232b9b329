"""`MaskedTextPipeline`: options, padding, holes, ends, caches, callbacks, and what it refuses."""

import inspect
import json
import logging

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tiny_text import EOS, MASK, VOCABULARY, make_model, make_tokenizer

import imgdit
from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler


def make_pipe(kind: str = "llama", tokenizer=None, **settings) -> MaskedTextPipeline:
    pipe = MaskedTextPipeline(make_model(kind), MaskedTextScheduler(**settings), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = torch.tensor([[3, 7, 11, 2, 9]])
SHORT = {"gen_length": 8, "block_length": 4, "num_inference_steps": 2, "threshold": 2.0, "eos_early_stop": False}


def test_arguments_of_llada2_are_accepted_as_they_are():
    mine = list(inspect.signature(MaskedTextPipeline.__call__).parameters.values())
    theirs = list(inspect.signature(LLaDA2Pipeline.__call__).parameters.values())
    assert [one.name for one in mine[: len(theirs)]] == [one.name for one in theirs]
    assert all(one.kind is one.KEYWORD_ONLY for one in mine[len(theirs) :])
    assert MaskedTextPipeline._callback_tensor_inputs == LLaDA2Pipeline._callback_tensor_inputs
    pipe = MaskedTextPipeline(make_model(), BlockRefinementScheduler(block_length=4, editing_threshold=0.3))
    assert isinstance(pipe.scheduler, MaskedTextScheduler) and pipe.scheduler.config.editing_threshold == 0.3
    output = pipe(
        input_ids=PROMPT, gen_length=8, block_length=4, num_inference_steps=4, temperature=0.5, top_p=0.9, top_k=5,
        sampling_method="multinomial", threshold=0.7, editing_threshold=0.5, max_post_steps=2, minimal_topk=1,
        eos_early_stop=True, generator=torch.Generator().manual_seed(0), output_type="seq", return_dict=False,
    )  # fmt: skip
    assert output[0].shape == (1, 8) and output[1] is None and not (output[0] == MASK).any()


RUNS = {
    "plain": {},
    "guided": {"guidance_scale": 2.0},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "guided, prefix": {"guidance_scale": 2.0, "cache": "prefix"},
    "edited": {"editing_threshold": 0.3, "threshold": 0.5},
    "ends": {"eos_early_stop": True},
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "dream"])
@pytest.mark.parametrize("name", RUNS)
def test_a_batch_is_written_as_one_by_one_with_padding_on_any_side(kind, name):
    pipe, options = make_pipe(kind), SHORT | RUNS[name]
    rows = [[3, 7, 11, 2, 9], [5, 1, 8], [30, 4, 4, 21]]
    alone = torch.cat([pipe(input_ids=torch.tensor([row]), **options).sequences for row in rows])
    assert not (alone == MASK).any()
    for side in ("left", "right", "middle"):
        ids, mask = torch.full((3, 6), EOS), torch.zeros(3, 6, dtype=torch.long)
        for n, row in enumerate(rows):
            places = {"left": slice(6 - len(row), 6), "right": slice(0, len(row))}.get(side)
            places = [0, *range(7 - len(row), 6)] if places is None else places
            ids[n, places], mask[n, places] = torch.tensor(row), 1
        together = pipe(input_ids=ids, attention_mask=mask, **options).sequences
        assert torch.equal(together, alone), side


def test_texts_chats_and_batches():
    pipe = make_pipe(tokenizer=make_tokenizer())
    output = pipe("w3 w7 w11 w2 w9", **SHORT)
    assert torch.equal(output.sequences, pipe(input_ids=PROMPT, **SHORT).sequences)
    several = pipe(["w3 w7 w11 w2 w9", "w1"], **SHORT)
    assert several.texts[0] == output.texts[0] and several.texts[1] == pipe("w1", **SHORT).texts[0]
    assert pipe("w1", output_type="seq", **SHORT).texts is None
    chatting = make_pipe(tokenizer=make_tokenizer(template=True))
    ids = torch.tensor([[36, 1, 37]])
    expected = chatting(input_ids=ids, **SHORT).texts
    assert chatting("w1", **SHORT).texts == expected
    message = {"role": "user", "content": "w1"}
    assert chatting(messages=[message], **SHORT).texts == expected
    both = chatting(messages=[[message], [message, {"role": "assistant", "content": "w5"}]], **SHORT).texts
    assert len(both) == 2 and both[0] == expected[0]
    assert chatting("w1", use_chat_template=False, **SHORT).texts == pipe("w1", **SHORT).texts


def test_only_holes_are_filled():
    pipe = make_pipe(tokenizer=make_tokenizer())
    ids = torch.tensor([[3, MASK, 11, MASK, 9, 4], [MASK, 6, 7, 8, 1, 2]])
    output = pipe(input_ids=ids, num_inference_steps=2, threshold=2.0)
    known = ids != MASK
    assert output.sequences.shape == ids.shape and torch.equal(output.sequences[known], ids[known])
    assert not (output.sequences == MASK).any()
    assert output.texts[1].split()[1:] == ["w6", "w7", "w8", "w1", "w2"]
    given = pipe(input_ids=ids.masked_fill(~known, 5), infill_mask=~known, num_inference_steps=2, threshold=2.0)
    assert torch.equal(given.sequences, output.sequences)
    alone = [pipe(input_ids=row[None], num_inference_steps=2, threshold=2.0).sequences for row in ids]
    assert torch.equal(torch.cat(alone), output.sequences)
    written = pipe(input_ids=ids, **SHORT).sequences  # and 8 new tokens
    assert written.shape == (2, 14) and torch.equal(written[:, :6][known], ids[known]) and not (written == MASK).any()
    assert pipe("w1 <|mdm_mask|> w2").texts[0].split()[::2] == ["w1", "w2"]


@pytest.mark.parametrize("kind", ["llama", "dream"])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_holes_are_filled_alike_with_padding_on_any_side(kind, cache):
    pipe, row = make_pipe(kind), torch.tensor([[MASK, MASK, 11, MASK, 9]])
    options = {"num_inference_steps": 3, "threshold": 2.0, "cache": cache}
    expected = pipe(input_ids=row, **options).sequences
    for places in ([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 2, 3, 5, 6]):
        ids, mask = torch.full((1, 7), EOS), torch.zeros(1, 7, dtype=torch.long)
        ids[0, places], mask[0, places] = row[0], 1
        filled = pipe(input_ids=ids, attention_mask=mask, **options).sequences
        assert torch.equal(filled[:, places], expected) and (filled[mask == 0] == EOS).all()


def test_no_hole_is_the_identity():
    pipe = make_pipe()
    for prompt in (PROMPT, torch.tensor([[3, MASK, 5]])):  # a mask that is not marked stays
        nothing = torch.zeros_like(prompt, dtype=torch.bool)
        assert torch.equal(pipe(input_ids=prompt, infill_mask=nothing).sequences, prompt)


@pytest.mark.parametrize("kind", ["llama", "dream"])
def test_a_suffix_is_seen_and_stays(kind):
    """New tokens between a prompt and a suffix are a hole between two parts of a prompt."""
    pipe = make_pipe(kind)
    suffix = torch.tensor([20, 3, MASK, 6])
    options = SHORT | {"gen_length": 4}
    found = pipe(input_ids=PROMPT, suffix_ids=suffix, **options).sequences
    assert found.shape == (1, 4) and not torch.equal(found, pipe(input_ids=PROMPT, **options).sequences)
    whole = torch.cat([PROMPT, torch.full((1, 4), MASK), suffix[None]], 1)
    holes = torch.zeros_like(whole, dtype=torch.bool)
    holes[:, 5:9] = True
    filled = pipe(input_ids=whole, infill_mask=holes, **options | {"gen_length": 0}).sequences
    assert torch.equal(filled, torch.cat([PROMPT, found, suffix[None]], 1))
    two = pipe(input_ids=PROMPT.repeat(2, 1), suffix_ids=torch.stack([suffix, suffix]), **options).sequences
    assert torch.equal(two, found.repeat(2, 1))
    with pytest.raises(ValueError, match="one row, or one per prompt, got 3 for 1"):
        pipe(input_ids=PROMPT, suffix_ids=suffix.repeat(3, 1), **options)
    with pytest.raises(ValueError, match=r"suffix_ids must lie in 0\.\.39"):
        pipe(input_ids=PROMPT, suffix_ids=suffix + 20, **options)
    with pytest.raises(ValueError, match="at most gen_length=39"):  # 48 positions
        pipe(input_ids=PROMPT, suffix_ids=suffix, **options | {"gen_length": 40})


def test_all_masks_and_nothing_at_all_are_prompts():
    pipe = make_pipe(tokenizer=make_tokenizer())
    blank = torch.full((1, 6), MASK)
    filled = pipe(input_ids=blank, num_inference_steps=3, guidance_scale=2.0).sequences
    assert filled.shape == (1, 6) and not (filled == MASK).any()
    empty = pipe("", **SHORT)
    assert empty.sequences.shape == (1, 8) and not (empty.sequences == MASK).any()
    pipe.model.double()  # an even choice between two tokens must not hang on rounding
    both = pipe(["", "w3 w7"], **SHORT)
    assert torch.equal(both.sequences[:1], pipe("", **SHORT).sequences)


def biased(pipe, **logits):
    """The pipeline's model with the logits of some tokens raised."""
    change = torch.zeros(VOCABULARY)
    for token, value in logits.items():
        change[int(token[1:])] = value
    pipe.model.register_forward_hook(lambda model, args, output: setattr(output, "logits", output.logits + change))
    return pipe


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("reveal", ["even", "time", "threshold", "factor", "owed"])
def test_a_model_that_predicts_masks_ends_and_leaves_none(reveal, cache):
    pipe = biased(make_pipe(reveal=reveal), _39=100.0)
    options = SHORT | {"threshold": 0.9, "cache": cache}
    assert not (pipe(input_ids=PROMPT, **options).sequences == MASK).any()
    left = pipe(input_ids=PROMPT, allow_mask_token=True, **options).sequences
    assert (left == MASK).all()  # and returns


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("kind", ["llama", "dream"])
@pytest.mark.parametrize("settings", [{}, {"reveal": "time", "choose": "ancestral"}, {"reveal": "shift"}])
def test_any_number_of_steps_and_tokens_leaves_no_mask(steps, kind, settings):
    for cache in (None, "dual"):
        output = make_pipe(kind, **settings)(
            input_ids=PROMPT, gen_length=7, block_length=4, num_inference_steps=steps, cache=cache, threshold=2.0
        )
        assert output.sequences.shape == (1, 7) and not (output.sequences == MASK).any()


def test_a_row_ends_at_its_end_token():
    pipe = biased(make_pipe(tokenizer=make_tokenizer()), _38=100.0)
    calls = []
    options = SHORT | {"eos_early_stop": True, "callback_on_step_end": lambda *given: calls.append(given[1])}
    output = pipe(input_ids=PROMPT, **options)
    assert (output.sequences == EOS).all() and output.texts == [""] and len(calls) < 4
    # Without the stop, all blocks are written; without the token, there is none.
    assert len(pipe(input_ids=PROMPT, **SHORT).sequences[0]) == 8
    assert not (pipe(input_ids=PROMPT, forbidden_tokens=[EOS], **options).sequences == EOS).any()
    # An end token in the prompt, or as padding, ends nothing.
    plain = make_pipe()
    ids, mask = torch.tensor([[EOS, EOS, 3, 7]]), torch.tensor([[0, 0, 1, 1]])
    stopping = SHORT | {"eos_early_stop": True}
    assert torch.equal(
        plain(input_ids=ids, attention_mask=mask, **stopping).sequences,
        plain(input_ids=ids[:, 2:], **stopping).sequences,
    )


def test_late_tokens_are_revealed_last():
    pipe = biased(make_pipe(), _38=12.0)
    options = SHORT | {"block_length": 8, "num_inference_steps": 8}
    order = []

    def keep(pipe, step, timestep, given):
        order.append(given["block_x"][0, 5:].clone())
        return {}

    pipe(input_ids=PROMPT, callback_on_step_end=keep, **options)
    assert (order[0] == EOS).any()
    order.clear()
    pipe(input_ids=PROMPT, callback_on_step_end=keep, late_tokens=[EOS], **options)
    kinds = [bool((grid == EOS).any()) for grid in order]
    assert kinds == sorted(kinds)  # once they come, only they come


def test_the_first_cached_pass_is_exact_and_one_pass_a_block_is_all(caplog):
    single = SHORT | {"num_inference_steps": 1}
    pipe = make_pipe()
    plain = pipe(input_ids=PROMPT, **single).sequences
    log = logging.getLogger("imgdit.pipelines.masked_text")
    log.addHandler(caplog.handler)
    for cache in ("prefix", "dual"):
        for _ in range(2):
            assert torch.equal(pipe(input_ids=PROMPT, cache=cache, **single).sequences, plain)
    log.removeHandler(caplog.handler)
    told = {record.getMessage().split(":")[0] for record in caplog.records}
    assert told == {f"cache={cache!r} is approximate" for cache in ("prefix", "dual")}
    # In more passes it is what it says, approximate, and leaves no trace behind.
    many = SHORT | {"num_inference_steps": 4}
    before = pipe(input_ids=PROMPT, **many).sequences
    pipe(input_ids=PROMPT, cache="dual", **many)
    assert torch.equal(pipe(input_ids=PROMPT, **many).sequences, before)


def test_guidance_changes_the_text_and_up_to_one_is_off():
    pipe = make_pipe()
    plain = pipe(input_ids=PROMPT, **SHORT).sequences
    for off in (0.0, 1.0):
        assert torch.equal(pipe(input_ids=PROMPT, guidance_scale=off, **SHORT).sequences, plain)
    assert not torch.equal(pipe(input_ids=PROMPT, guidance_scale=4.0, **SHORT).sequences, plain)


@pytest.mark.parametrize("method", ["multinomial", "gumbel", "filtered"])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_seed_writes_the_same_text(method, remasking):
    pipe, found = make_pipe(), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        found.append(
            pipe(
                input_ids=PROMPT, temperature=1.0, sampling_method=method, remasking=remasking,
                generator=torch.Generator().manual_seed(seed), **SHORT,
            ).sequences
        )  # fmt: skip
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_callbacks_see_and_change_what_is_written():
    pipe, seen = make_pipe(), []

    def look(pipe, step, timestep, given):
        seen.append((step, timestep, given))
        given["block_x"][:, -1] = 12
        return {"block_x": given["block_x"]}

    output = pipe(
        input_ids=PROMPT, callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=MaskedTextPipeline._callback_tensor_inputs, **SHORT,
    )  # fmt: skip
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert {name: tuple(value.shape) for name, value in seen[0][2].items()} == {
        "block_x": (1, 9), "transfer_index": (1, 4), "editing_transfer_index": (1, 4), "sampled_tokens": (1, 4),
        "sampled_probs": (1, 4), "active_block": (1, 4),
    }  # fmt: skip
    assert output.sequences[0, 3] == output.sequences[0, 7] == 12

    def stop(pipe, step, timestep, given):
        pipe._interrupt = True
        return {}

    assert (pipe(input_ids=PROMPT, callback_on_step_end=stop, **SHORT).sequences == MASK).any()


@pytest.mark.parametrize("kind", ["llama", "dream"])
def test_saved_and_loaded_it_writes_the_same(kind, tmp_path):
    pipe = make_pipe(kind, tokenizer=make_tokenizer(template=True), reveal="shift", choose="margin")
    expected = pipe("w3 w7", **SHORT)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["imgdit", "MaskedTextScheduler"]
    for owner in (MaskedTextPipeline, imgdit.DiffusionPipeline):
        again = owner.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert type(again) is MaskedTextPipeline and again("w3 w7", **SHORT).texts == expected.texts
    make_pipe(kind).save_pretrained(tmp_path / "bare")
    assert MaskedTextPipeline.from_pretrained(tmp_path / "bare").tokenizer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of prompt, messages or input_ids"),
        ({"prompt": "w1", "messages": [{"role": "user", "content": "w1"}]}, "not both"),
        ({"prompt": []}, "at least one"),
        ({"prompt": 3}, "must be a text or a list of texts"),
        ({"prompt": {"w1": 1}}, "must be a text or a list of texts"),
        ({"prompt": "w1", "input_ids": PROMPT}, "got input_ids and another"),
        ({"messages": []}, r"at least one, got \[\]"),
        ({"messages": "w1"}, "must be a list of messages"),
        ({"messages": [[]]}, "a chat must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "with role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, "with role and content"),
        ({"input_ids": PROMPT.float()}, "must be int64"),
        ({"input_ids": PROMPT + 38}, r"must lie in 0\.\.39"),
        ({"input_ids": PROMPT, "attention_mask": torch.ones(1, 4)}, "attention_mask must be"),
        ({"input_ids": PROMPT, "infill_mask": torch.ones(1, 4)}, "infill_mask must be"),
        (
            {"input_ids": PROMPT, "infill_mask": torch.ones(1, 5), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
            "marks padding",
        ),
        ({"input_ids": PROMPT, "gen_length": 44}, "exceed the model's 48 positions; take at most gen_length=43"),
        ({"input_ids": PROMPT, "gen_length": 0}, "gen_length must be a whole number"),
        ({"input_ids": PROMPT, "gen_length": True}, "gen_length must be a whole number of at least 1.*got True"),
        ({"input_ids": PROMPT, "num_inference_steps": True}, "num_inference_steps must be .* got True"),
        ({"input_ids": PROMPT, "block_length": 0}, "block_length must be a whole number"),
        ({"input_ids": PROMPT, "num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"input_ids": PROMPT, "temperature": -1.0}, "temperature must be"),
        ({"input_ids": PROMPT, "temperature": float("nan")}, "temperature must be"),
        ({"input_ids": PROMPT, "temperature": float("inf")}, "temperature must be"),
        ({"input_ids": PROMPT, "guidance_scale": -1.0}, "guidance_scale must be"),
        ({"input_ids": PROMPT, "guidance_scale": float("inf")}, "guidance_scale must be"),
        ({"input_ids": PROMPT, "max_post_steps": None}, "max_post_steps must be"),
        ({"input_ids": PROMPT, "num_inference_steps": 10**9}, "num_inference_steps must be at most"),
        ({"input_ids": PROMPT, "top_k": 1.5}, "top_k must be"),
        ({"input_ids": PROMPT, "top_k": -1}, "top_k must be"),
        ({"input_ids": PROMPT, "editing_threshold": float("nan")}, "editing_threshold must be"),
        ({"input_ids": PROMPT, "mask_token_id": True}, "mask_token_id must lie in"),
        ({"input_ids": PROMPT, "callback_on_step_end": 3}, "must be callable"),
        (
            {"input_ids": PROMPT, "gen_length": 4, "callback_on_step_end": lambda *_: True},
            "must return tensors by name",
        ),
        ({"input_ids": PROMPT, "attention_mask": [[1, 1, 1, 1, 1]]}, "attention_mask must be a tensor"),
        ({"input_ids": PROMPT, "infill_mask": [[1, 1, 1, 1, 1]]}, "infill_mask must be a tensor"),
        ({"input_ids": PROMPT, "eos_token_id": MASK}, "is mask_token_id and eos_token_id"),
        ({"input_ids": PROMPT, "eos_token_id": "<eos>"}, "eos_token_id must lie in"),
        ({"input_ids": PROMPT, "forbidden_tokens": range(VOCABULARY)}, "the whole vocabulary"),
        ({"input_ids": PROMPT, "top_p": 0.0}, "top_p must be"),
        ({"input_ids": PROMPT, "cache": "exact"}, "cache must be one of"),
        ({"input_ids": PROMPT, "remasking": "high"}, "remasking must be one of"),
        ({"input_ids": PROMPT, "sampling_method": "best"}, "sampling_method must be one of"),
        ({"input_ids": PROMPT, "output_type": "pil"}, "output_type must be one of"),
        ({"input_ids": PROMPT, "mask_token_id": 40}, "mask_token_id must lie in"),
        ({"input_ids": PROMPT, "forbidden_tokens": [-1]}, "forbidden_tokens must lie in"),
        ({"input_ids": PROMPT, "generator": [torch.Generator()] * 2}, "one per text"),
        ({"input_ids": PROMPT, "generator": 5}, "torch.Generator"),
        ({"input_ids": PROMPT, "callback_on_step_end_tensor_inputs": ["logits"]}, "callbacks may ask for"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(tokenizer=make_tokenizer())(**options)


def test_models_and_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no tokenizer; give input_ids"):
        make_pipe()("w1")
    pipe = MaskedTextPipeline(make_model(mask_token_id=None), MaskedTextScheduler())
    with pytest.raises(ValueError, match="names a mask_token_id"):
        pipe(input_ids=PROMPT)
    assert pipe(input_ids=PROMPT, mask_token_id=MASK, **SHORT).sequences.shape == (1, 8)
    with pytest.raises(ValueError, match="is causal"):
        MaskedTextPipeline(make_model(is_causal=True), MaskedTextScheduler())(input_ids=PROMPT)


def test_without_a_length_it_writes_as_much_as_there_are_positions_for():
    output = make_pipe()(input_ids=PROMPT, block_length=43, num_inference_steps=1, eos_early_stop=False)
    assert output.sequences.shape == (1, 43)


@pytest.mark.parametrize("method", ["multinomial", "gumbel", "filtered"])
def test_rows_with_their_own_generators_do_not_depend_on_each_other(method):
    pipe = make_pipe(choose="random")
    rows = [[3, 7, 11, 2, 9], [5, MASK, 8, 1, 1], [30, 4, 4, 21, 2]]
    options = SHORT | {"temperature": 1.0, "sampling_method": method}

    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    together = pipe(input_ids=torch.tensor(rows), generator=seeds(1, 2, 3), **options).sequences
    for n, row in enumerate(rows):
        alone = pipe(input_ids=torch.tensor([row]), generator=seeds(n + 1), **options).sequences[0]
        assert torch.equal(together[n, -len(alone) :], alone)
    same = pipe(input_ids=torch.tensor([rows[0]] * 2), generator=seeds(1, 2), **options).sequences
    assert not torch.equal(same[0], same[1])
