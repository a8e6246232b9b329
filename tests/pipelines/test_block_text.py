"""BlockTextPipeline: cache, batches, seeds, ends, and what it refuses."""

import pytest
import torch
from block_text_cases import FIXTURES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from imgdit import DiffusionPipeline
from imgdit.models.bd3lm import load_bd3lm
from imgdit.pipelines.block_text import BlockTextPipeline, nucleus

BOS, EOS, MASK = 39, 38, 40


def make_pipe(folder="bd3lm", tokenizer=None):
    pipe = BlockTextPipeline(load_bd3lm(FIXTURES / folder), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tokenizer():
    words = {f"w{n}": n for n in range(38)} | {"<eos>": EOS, "<bos>": BOS, "<mask>": MASK}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="w0")


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


PROMPTS = [torch.tensor([BOS, 1, 2]), torch.tensor([BOS, 5, 6, 7, 8, 9, 3]), torch.tensor([BOS])]


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
@pytest.mark.parametrize("length", [9, 20])
def test_the_cache_changes_no_token(sampler, length):
    """Also beyond the length of training, where only the latest tokens are seen: with one layer's reach."""
    pipe = make_pipe()
    rows = [
        pipe(
            input_ids=PROMPTS[:1], gen_length=length, sampler=sampler, num_inference_steps=6, cache=cache,
            generator=seeds(3), eos_early_stop=False,
        ).sequences
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*rows)


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
def test_a_batch_writes_what_each_prompt_does_alone(sampler):
    pipe = make_pipe()
    options = {"gen_length": 7, "sampler": sampler, "num_inference_steps": 5, "eos_early_stop": False}
    together = pipe(input_ids=PROMPTS, generator=seeds(1, 2, 3), **options).sequences
    for seed, (prompt, row) in enumerate(zip(PROMPTS, together), 1):
        assert torch.equal(pipe(input_ids=[prompt], generator=seeds(seed), **options).sequences[0], row)


def test_a_seed_repeats_a_text_and_rows_have_their_own():
    pipe = make_pipe()
    same = [PROMPTS[0], PROMPTS[0]]
    first = pipe(input_ids=same, gen_length=9, generator=seeds(1, 2)).sequences
    assert torch.equal(first, pipe(input_ids=same, gen_length=9, generator=seeds(1, 2)).sequences)
    assert torch.equal(first[:1], pipe(input_ids=same[:1], gen_length=9, generator=seeds(1)).sequences)
    assert not torch.equal(first[0], first[1])


def test_a_row_ends_with_its_first_end_token():
    pipe = make_pipe()
    with torch.no_grad():
        pipe.model.output_layer.linear.bias[EOS] = 12.0
    whole = pipe(
        input_ids=PROMPTS[:1],
        gen_length=13,
        generator=seeds(5),
        temperature=2.0,
        eos_early_stop=False,
        eos_token_id=EOS,
    )
    ended = pipe(input_ids=PROMPTS[:1], gen_length=13, generator=seeds(5), temperature=2.0, eos_token_id=EOS)
    place = whole.sequences[0].tolist().index(EOS)
    assert place < 12
    assert torch.equal(ended.sequences[0, : place + 1], whole.sequences[0, : place + 1])
    assert (ended.sequences[0, place:] == EOS).all() and not (whole.sequences[0, place:] == EOS).all()


def test_a_text_that_repeats_itself_is_cut():
    pipe = make_pipe()
    with torch.no_grad():
        pipe.model.output_layer.linear.bias[4] = 100.0
    calls = []
    found = pipe(
        input_ids=PROMPTS[:1], gen_length=300, eos_early_stop=False, min_entropy=4.0, eos_token_id=EOS,
        callback_on_step_end=lambda *args: calls.append(None),
    ).sequences  # fmt: skip
    assert (found == EOS).all() and len(calls) < 260


def test_a_callback_can_stop_and_sees_one_token_per_step():
    pipe, seen = make_pipe(), []

    def look(pipe, step, time, given):
        seen.append(int(given["transfer_index"].sum()))
        pipe._interrupt = step == 4

    pipe(
        input_ids=PROMPTS[:1], gen_length=13, callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["transfer_index"],
    )  # fmt: skip
    assert seen == [1] * 5


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
def test_rows_of_an_interrupted_run_keep_their_masks_where_they_are(sampler):
    """Also a row that has an end token among masks, which may still reveal another one before it."""
    pipe, seen = make_pipe(), []

    def stop(pipe, step, time, given):
        seen.append(given["block_x"].clone())
        pipe._interrupt = step == 1

    found = pipe(
        input_ids=[PROMPTS[2]] * 2, gen_length=13, sampler=sampler, num_inference_steps=8, generator=seeds(1, 2),
        eos_token_id=list(range(38)), callback_on_step_end=stop,
    ).sequences  # fmt: skip
    assert found.shape == (2, 13) and len(seen) == 2
    for row, grid in zip(found, seen[-1]):
        known = grid[1:]
        assert torch.equal(row[: len(known)], known) and (row[len(known) :] == MASK).all()
    assert (found == MASK).any(1).all()


def test_ancestral_sampling_leaves_no_mask_even_in_one_step():
    pipe = make_pipe()
    for steps in (1, 2, 3):
        found = pipe(
            input_ids=PROMPTS[:1], gen_length=13, sampler="ancestral", num_inference_steps=steps, eos_early_stop=False
        )
        assert not (found.sequences == MASK).any()


def test_texts_in_and_out_and_a_saved_pipeline(tmp_path):
    pipe = make_pipe(tokenizer=make_tokenizer())
    found = pipe(["w1 w2", ""], gen_length=6, generator=seeds(1, 2))
    assert len(found.texts) == 2 and found.sequences.shape == (2, 6)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(["w1 w2", ""], gen_length=6, generator=seeds(1, 2)).sequences, found.sequences)


def test_nucleus_keeps_the_first_and_what_fits():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert torch.allclose(nucleus(p, 0.85), torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert torch.equal(nucleus(p, 0.1), torch.tensor([1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either prompt or input_ids"),
        ({"prompt": "w1"}, "tokenizer"),
        ({"input_ids": [torch.tensor([BOS, MASK])]}, "fills no holes"),
        ({"input_ids": [torch.tensor([99])]}, "0..40"),
        ({"input_ids": [torch.zeros(0, dtype=torch.long)]}, "at least one int64 token"),
        ({"input_ids": PROMPTS, "gen_length": 0}, "gen_length"),
        ({"input_ids": PROMPTS, "sampler": "euler"}, "sampler"),
        ({"input_ids": PROMPTS, "top_p": 0.0}, "top_p"),
        ({"input_ids": PROMPTS, "num_inference_steps": 0}, "num_inference_steps"),
        ({"input_ids": PROMPTS, "num_inference_steps": 10**9}, "num_inference_steps"),
        ({"input_ids": PROMPTS, "num_inference_steps": True}, "num_inference_steps"),
        ({"input_ids": PROMPTS, "gen_length": True}, "got True for"),
        ({"input_ids": PROMPTS, "temperature": float("inf")}, "finite temperature"),
        ({"input_ids": [[BOS, 1]]}, "as tensors"),
        ({"input_ids": PROMPTS, "generator": seeds(1)}, "one per text"),
        ({"input_ids": PROMPTS, "callback_on_step_end_tensor_inputs": ["logits"]}, "callbacks may ask"),
    ],
)
def test_bad_calls_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipe()(**options)


@pytest.mark.parametrize("prompt", [3, [None], {"w1": 1}, b"w1"])
def test_prompts_are_texts(prompt):
    with pytest.raises(ValueError, match="a text or a list of texts"):
        make_pipe(tokenizer=make_tokenizer())(prompt)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="left to right"):
        make_pipe("ar")(input_ids=PROMPTS)
    with pytest.raises(ValueError, match="continues no further"):
        make_pipe("mdlm")(input_ids=PROMPTS, gen_length=16)
