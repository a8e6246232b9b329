"""Texts against recorded runs of LLaDA, Fast-dLLM and Dream."""

import pytest
import torch
from masked_text_cases import CASES, FewSteps, Replay, model_of, named, recorded

from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler

DREAM = {
    "origin": {"choose": "ancestral", "reveal": "time"},
    "maskgit_plus": {"choose": "probability", "reveal": "time"},
    "topk_margin": {"choose": "margin", "reveal": "time"},
    "entropy": {"choose": "entropy", "reveal": "time"},
    "confidence_threshold": {"choose": "probability", "reveal": "owed"},
}


def write(pipe, found, **options):
    """A run's whole grids: at first, and after each step."""
    prompt = found["prompt"]
    new = options["gen_length"]
    mask = pipe.mask_token_id
    grids = [torch.cat([prompt, torch.full((len(prompt), new), mask)], 1)]
    reports = []

    def keep(pipe, step, timestep, given):
        block = given["block_x"]
        grids.append(torch.cat([block, grids[-1][:, block.shape[1] :]], 1))
        reports.append(given)

    pipe.set_progress_bar_config(disable=True)
    pipe(
        input_ids=prompt, attention_mask=found.get("attention_mask"), eos_early_stop=False,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["block_x", "transfer_index", "sampled_tokens", "sampled_probs"], **options,
    )  # fmt: skip
    return grids, reports


def llada_options(case):
    blocks = case["gen_length"] // case["block_length"]
    eos, eot = case["eos_token_id"], case["eot_token_id"]
    late = ()
    if case.get("confidence_eos_eot_inf"):  # the published code forgets the end token at other temperatures
        late = (eot,) if case["temperature"] else (eos, eot)
    return {
        "gen_length": case["gen_length"],
        "block_length": case["block_length"],
        "num_inference_steps": case["steps"] // blocks,
        "temperature": case["temperature"],
        "sampling_method": "gumbel",
        "threshold": 2.0,
        "guidance_scale": case.get("cfg_scale", 0.0) + 1,
        "remasking": case.get("remasking"),
        "forbidden_tokens": (eos,) if case.get("logits_eos_inf") else (),
        "late_tokens": late,
    }


@pytest.mark.parametrize("name", named("generate"))
def test_llada_writes_what_its_own_sampler_does(name):
    case, found = CASES[name], recorded(name)
    pipe = Replay(model_of(name), MaskedTextScheduler())
    kinds = {"gumbel": "gumbel_uniform", "order": "remask_uniform"}
    pipe.draws = {key: found[kind] for key, kind in kinds.items() if kind in found}
    pipe.holes_compete = bool((found["prompt"] == case["mask_token_id"]).any())
    options = llada_options(case)
    grids, _ = write(pipe, found, allow_mask_token=case["masks_left"] > 0, **options)
    # Steps that find nothing masked are left out here and recorded there.
    kept = [grid for n, grid in enumerate(found["grids"]) if n == 0 or not torch.equal(grid, found["grids"][n - 1])]
    mine = [grid for n, grid in enumerate(grids) if n == 0 or not torch.equal(grid, grids[n - 1])]
    assert len(mine) == len(kept) and all(map(torch.equal, mine, kept))
    assert torch.equal(grids[-1], found["output"])


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}.head" in CASES])
def test_options_of_ends_and_masks_matter(name):
    case, found = CASES[name], recorded(name)
    options = llada_options(case) | {"late_tokens": (), "forbidden_tokens": ()}
    pipe = MaskedTextPipeline(model_of(name), MaskedTextScheduler())
    grids, _ = write(pipe, found, **options)
    plain = recorded(f"{name}.head").get("output_without_option")
    if plain is not None:
        assert torch.equal(grids[-1], plain) and not torch.equal(plain, found["output"])
    else:
        assert not (grids[-1] == case["mask_token_id"]).any() and (found["output"] == case["mask_token_id"]).any()


class Calls:
    """Records what a model is given and returns."""

    def __init__(self, model):
        self.inputs, self.past, self.outputs, self.rows = [], [], [], []
        self.before = model.register_forward_pre_hook(self.given, with_kwargs=True)
        self.after = model.register_forward_hook(lambda model, args, output: self.outputs.append(output.logits))

    def given(self, model, args, options):
        cache = options.get("past_key_values")
        self.inputs.append(options["input_ids"].clone())
        self.past.append(0 if cache is None else cache.get_seq_length())
        self.rows.append(options["logits_to_keep"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.before.remove()
        self.after.remove()

    def compare(self, case, found):
        assert [(ids.shape[1], past) for ids, past in zip(self.inputs, self.past)] == [
            (call["length"], call["past"]) for call in case["calls"]
        ]
        for n, logits in enumerate(self.outputs):
            if f"call.{n}.input_ids" in found:
                assert torch.equal(self.inputs[n], found[f"call.{n}.input_ids"])
                expected = found[f"call.{n}.logits"]
                if expected.numel():
                    torch.testing.assert_close(logits, expected[:, self.rows[n]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", named("fast"))
def test_fast_dllm_is_reproduced(name):
    case, found = CASES[name], recorded(name)
    cached = next((kind for kind in ("prefix", "dual") if kind in case["function"]), None)
    reveal = "threshold" if "threshold" in case else "factor" if "factor" in case else "even"
    settings = {"reveal": reveal, "factor": case.get("factor", 1.0), "factor_takes_last": True}
    few = case["masks_left"] > 0
    pipe = MaskedTextPipeline(model_of(name), (FewSteps if few else MaskedTextScheduler)(**settings))
    with Calls(pipe.model) as calls:
        grids, reports = write(
            pipe, found, gen_length=case["gen_length"], block_length=case["block_length"], sampling_method="gumbel",
            num_inference_steps=case["steps"] * case["block_length"] // case["gen_length"], cache=cached,
            threshold=case.get("threshold", 2.0), temperature=case["temperature"],
        )  # fmt: skip
    calls.compare(case, found)
    assert len(reports) == case["nfe"]
    assert torch.equal(grids[-1], found["output"])
    for n, report in enumerate(reports):
        call, transfer, tokens = case["calls"][n], found[f"step.{n}.transfer"], found[f"step.{n}.x0"]
        # The recorded places are those of the call, ours those of the block.
        offset = call["replace"][0] if call["replace"] else call["past"]
        lo = report["block_x"].shape[1] - report["transfer_index"].shape[1] - offset
        inside = slice(lo, lo + report["transfer_index"].shape[1])
        assert (
            torch.equal(report["transfer_index"], transfer[:, inside]) and transfer.sum() == transfer[:, inside].sum()
        )
        shown = report["transfer_index"]
        assert torch.equal(report["sampled_tokens"][shown], tokens[:, inside][shown])


@pytest.mark.parametrize("name", named("dream_generate"))
def test_dream_writes_what_its_own_sampler_does(name):
    case, found = CASES[name], recorded(name)
    settings = DREAM[case["alg"]] | {"order_noise": case.get("alg_temp") or 0.0, "eps": case.get("eps", 1e-3)}
    pipe = Replay(model_of(name), MaskedTextScheduler(**settings))
    kinds = {"order": "transfer_uniform", "revealed": "transferred"}
    pipe.draws = {key: found[kind] for key, kind in kinds.items() if kind in found}
    if case["temperature"]:
        pipe.draws["tokens"] = found["proposals"].clamp(min=0)  # -1 where nothing is masked
    if "revealed" in pipe.draws:
        pipe.draws["revealed"] = pipe.draws["revealed"].bool()
    grids, reports = write(
        pipe, found, gen_length=case["max_new_tokens"], block_length=case["max_new_tokens"],
        num_inference_steps=case["steps"], temperature=case["temperature"], top_p=case.get("top_p"),
        top_k=case.get("top_k"), sampling_method="filtered", threshold=case.get("threshold"),
    )  # fmt: skip
    assert len(reports) <= case["steps_run"]
    grids += [grids[-1]] * (len(found["grids"]) - len(grids))
    assert torch.equal(torch.stack(grids), found["grids"]) and torch.equal(grids[-1], found["output"])
    start = found["prompt"].shape[1]
    for n, report in enumerate(reports):
        proposals = found["proposals"][n][:, start:]
        masked = proposals >= 0
        assert torch.equal(report["sampled_tokens"][masked], proposals[masked])


@pytest.mark.parametrize("name", [name for name in named("dream_generate") if "confidence" in recorded(name)])
def test_dream_is_as_sure_as_its_own_code(name):
    """The confidences of each recorded grid."""
    case, found = CASES[name], recorded(name)
    seen = []

    class Watched(MaskedTextScheduler):
        def _confidence(self, drawn, options):
            seen.append(super()._confidence(drawn, options))
            return seen[-1]

    pipe = Replay(model_of(name), Watched(**DREAM[case["alg"]], eps=case.get("eps", 1e-3)))
    pipe.draws = {"tokens": found["proposals"].clamp(min=0)}
    if "transferred" in found:
        pipe.draws["revealed"] = found["transferred"].bool()
    write(
        pipe, found, gen_length=case["max_new_tokens"], block_length=case["max_new_tokens"],
        num_inference_steps=case["steps"], temperature=case["temperature"], top_p=case.get("top_p"),
        top_k=case.get("top_k"), sampling_method="filtered", threshold=case.get("threshold"),
    )  # fmt: skip
    start = found["prompt"].shape[1]
    assert seen
    for mine, theirs in zip(seen, found["confidence"]):
        masked = ~theirs[:, start:].isnan()
        torch.testing.assert_close(mine[masked].float(), theirs[:, start:][masked], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", named("dream_block"))
def test_dream_with_cached_blocks_is_reproduced(name):
    case, found = CASES[name], recorded(name)
    threshold = case["alg"] == "confidence_threshold"
    settings = {"reveal": "threshold"} if threshold else DREAM["entropy"]
    pipe = MaskedTextPipeline(model_of(name), MaskedTextScheduler(**settings, eps=case["eps"]))
    with Calls(pipe.model) as calls:
        grids, _ = write(
            pipe, found, gen_length=case["max_new_tokens"], block_length=case["block_length"],
            num_inference_steps=case["steps"] * case["block_length"] // case["max_new_tokens"],
            temperature=case["temperature"], top_p=case.get("top_p"), top_k=case.get("top_k"),
            sampling_method="filtered", threshold=case.get("threshold"),
            cache="dual" if case["dual_cache"] else "prefix",
        )  # fmt: skip
    calls.compare(case, found)
    assert torch.equal(grids[-1], found["output"])


@pytest.mark.parametrize("name", named("greedy_check"))
def test_greedy_answers_are_known(name):
    found = recorded(name)
    pipe = MaskedTextPipeline(model_of(name), MaskedTextScheduler())
    length = len(found["good"])
    given = {"prompt": found["prompt"][None]}
    grids, _ = write(pipe, given, gen_length=length, block_length=length, num_inference_steps=length, threshold=2.0)
    assert torch.equal(torch.stack(grids[:-1]), found["grids"])
    answer = grids[-1][0, len(found["prompt"]) :]
    assert torch.equal(answer, found["good"]) == CASES[name]["expected_good"]
    assert torch.equal(answer, found["bad"]) == CASES[name]["expected_bad"]
