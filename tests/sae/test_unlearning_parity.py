"""Scores, selections, hooks and whole runs against numbers recorded from SAeUron."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from saeuron_cases import CASES, FOLDER, cases, close, sae_of, tensors
from tiny_sae import edit

from imgdit.sae.calls import DenoiserCall
from imgdit.sae.concepts import ConceptStatistics, quantile, select_concept
from imgdit.sae.edits import ChosenFeatures, Edit, edit_by_decoding
from imgdit.sae.hooks import hooked
from imgdit.sae.streams import Tokens
from imgdit.sae.unlearning import ConceptUnlearner, Intervention


def statistics_of(latents: dict[str, torch.Tensor], timesteps=None, width: int = 1) -> ConceptStatistics:
    """Statistics from recorded latents (prompts, steps, L) of each concept."""
    steps = next(iter(latents.values())).shape[1]
    return ConceptStatistics(
        timesteps=tuple(timesteps or range(1000, 1000 - steps, -1)),
        means={name: values.float().mean(0) for name, values in latents.items()},
        counts={name: len(values) for name, values in latents.items()},
        inputs={name: torch.zeros(steps, width) for name in latents},
    )


def latents_in(recorded: dict[str, torch.Tensor], prefix: str, names) -> dict[str, torch.Tensor]:
    return {name: recorded[f"{prefix}.{name}"] for name in names}


@cases("scores")
def test_scores(name):
    case, recorded = CASES[name], tensors(name)
    latents = latents_in(recorded, "latents", case["concepts"])
    statistics = statistics_of(latents)
    for concept in case["concepts"]:
        scores = statistics.scores(concept)
        close(scores, recorded[f"scores.{concept}"], 1e-6)
        for i, percentile in enumerate(case["percentiles"]):
            close(quantile(scores, percentile / 100), recorded[f"thresholds.{concept}"][:, i], 1e-6)
            selection = select_concept(statistics, concept, percentile=percentile)
            counts = [row[i] for row in case["selected_counts"][concept]]
            assert selection.selected.sum(1).tolist() == counts
    single = statistics_of({case["single_concept"]: latents[case["single_concept"]]})
    close(single.scores(case["single_concept"]), recorded["scores_single_concept"], 1e-6)


@cases("percentile_counts")
def test_percentile_counts(name):
    case = CASES[name]
    scores = torch.randperm(case["num_latents"], generator=torch.Generator().manual_seed(0)).float()[None]
    for percentile, count in case["selected"].items():
        assert int((scores > quantile(scores, float(percentile) / 100)).sum()) == count


def rows_of(x, case):
    return x if case["layout"] != "BCHW" else x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["kind"] == "hook" and "masked" in c["which"]])
def test_masked_hook(name):
    case, recorded = CASES[name], tensors(name)
    sae = sae_of(case).to(getattr(torch, case["sae_dtype"]))
    latents = recorded if case["latents_from"] is None else tensors(case["latents_from"])
    statistics = statistics_of(latents_in(latents, "latents", case["all_concepts"]), width=sae.config.d_in)
    selections = [select_concept(statistics, c, percentile=case["percentile"]) for c in case["concepts"]]
    tolerance = (0.0, 2**-7) if case["x_dtype"] == "bfloat16" else (2e-5, 0.0)
    hooks = {
        exact: Intervention(sae, [selections], "scale", case["multiplier"], (0, 1000), "both", not exact)
        for exact in (True, False)
    }
    for i, timestep in enumerate(statistics.timesteps):
        x = recorded[f"x.{i}"]
        steps = [selection.at(timestep) for selection in selections]
        assert torch.cat([step.features for step in steps]).tolist() == recorded[f"features.{i}"].tolist()
        factors = torch.cat([step.means for step in steps]) * case["multiplier"]
        close(factors, recorded[f"scaling.{i}"], 1e-5, 1e-5)
        close(torch.cat([step.thresholds for step in steps]), recorded[f"mask_threshold.{i}"], 1e-6)

        rows = rows_of(x, case)
        half = slice(0, len(x) // 2), slice(len(x) // 2, len(x))
        call = DenoiserCall(float(timestep), len(x), half[1], half[0], None, (), 0)
        for exact, key in ((True, "out_correct_preserve"), (False, "out_reference_preserve")):
            expected = rows_of(recorded[f"{key}.{i}"], case).float()
            close(hooks[exact](Tokens(rows, (), call)).float(), expected, *tolerance)

        flat = rows.reshape(-1, rows.shape[-1])
        plan = hooks[True].plans[float(timestep)]
        change = Edit(plan.chosen.features, plan.factors, plan.chosen.thresholds)
        dropped = edit_by_decoding(sae, flat, change, error="dropped")
        close(dropped, rows_of(recorded[f"out_no_error.{i}"], case).reshape(flat.shape), *tolerance)
        close(edit_by_decoding(sae, flat, change), edit(sae, flat, change), *tolerance)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["kind"] == "hook" and "recon" in c["which"]])
def test_reconstruction_and_feature_hooks(name):
    case, recorded = CASES[name], tensors(name)
    sae = sae_of(case)
    everywhere = Edit(
        torch.tensor([case["feature"]]), torch.tensor([case["feature_multiplier"]]), torch.tensor([-1.0])
    )
    for i in range(case["steps"]):
        x = rows_of(recorded[f"x.{i}"], case)
        flat = x.reshape(-1, x.shape[-1])
        close(sae(x), rows_of(recorded[f"recon.{i}"], case), 2e-5)
        for key, error in (("out_feature", "dropped"), ("out_feature_preserve", "kept")):
            expected = rows_of(recorded[f"{key}.{i}"], case).reshape(flat.shape)
            close(edit_by_decoding(sae, flat, everywhere, error=error), expected, 2e-5)
        close(edit(sae, flat, everywhere), edit_by_decoding(sae, flat, everywhere), 1e-5)


def pipeline_of(case) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel.from_pretrained(FOLDER / case["unet"])
    options = {name: value for name, value in case["scheduler"].items() if name not in ("_class_name", "eta")}
    pipe = StableDiffusionPipeline(None, None, None, unet, DDIMScheduler(**options), None, None, None, False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, case, recorded, concept):
    embeds = recorded[f"embeds.{concept}"]
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=recorded["neg_embeds"].expand_as(embeds),
        latents=recorded[f"init_latents.{concept}"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance_scale"],
        eta=case["scheduler"]["eta"],
        output_type="latent",
    ).images


@cases("e2e")
def test_whole_run(name):
    case, recorded = CASES[name], tensors(name)
    pipe, sae, hookpoint = pipeline_of(case), sae_of(case), case["hookpoint"]
    latents = {}
    for concept in case["concepts"]:
        acts, codes = [], []

        def read(tokens, acts=acts, codes=codes):
            guided = tokens.values[tokens.call.conditional]
            acts.append(guided.clone())
            codes.append(sae.encode(guided.flatten(0, 1)).mean(guided.shape[1]))

        with hooked(pipe, {hookpoint: read}):
            close(sample(pipe, case, recorded, concept), recorded[f"final_latents.{concept}"], 2e-3)
        close(torch.stack(acts, 1), recorded[f"acts.{concept}"], 1e-4)
        latents[concept] = torch.stack(codes, 1)
        close(latents[concept], recorded[f"concept_latents.{concept}"], 1e-3)

    with hooked(pipe, {hookpoint: lambda tokens: sae(tokens.values)}):
        concept = next(c for c in case["concepts"] if f"reconstruct_latents.{c}" in recorded)
        close(sample(pipe, case, recorded, concept), recorded[f"reconstruct_latents.{concept}"], 2e-3)

    statistics = statistics_of(latents, [float(t) for t in case["timesteps"]], sae.config.d_in)
    selections = [select_concept(statistics, c, percentile=case["percentile"]) for c in case["unlearn"]]
    for step, timestep in enumerate(case["timesteps"]):
        chosen = torch.cat([s.at(timestep).features for s in selections]).tolist()
        assert chosen == case["features"][step]
    for key, paper in (("preserve_correct", False), ("preserve_reference", True)):
        hook = Intervention(sae, [selections], "scale", case["multiplier"], (0, 1000), "both", paper)
        for concept in case["concepts"]:
            with hooked(pipe, {hookpoint: hook}):
                got = sample(pipe, case, recorded, concept)
            close(got, recorded[f"unlearned_latents.{key}.{concept}"], 2e-3)


def test_unlearner_is_what_was_recorded(tmp_path):
    """The same run by the public way: learn from prompts' embeddings, save, load, attach."""
    case, recorded = CASES["e2e_small"], tensors("e2e_small")
    pipe, sae = pipeline_of(case), sae_of(case)
    unlearner = ConceptUnlearner({case["hookpoint"]: sae})
    prompts = {
        concept: [
            {
                "prompt_embeds": recorded[f"embeds.{concept}"][i : i + 1],
                "negative_prompt_embeds": recorded["neg_embeds"],
                "latents": recorded[f"init_latents.{concept}"][i : i + 1],
            }
            for i in range(2)
        ]
        for concept in case["concepts"]
    }
    unlearner.learn(
        pipe,
        prompts,
        percentile=case["percentile"],
        batch_size=1,
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance_scale"],
    )
    unlearner.save_pretrained(tmp_path)
    unlearner = ConceptUnlearner.from_pretrained(tmp_path)
    assert unlearner.concepts == case["concepts"]
    for key, paper in (("preserve_correct", False), ("preserve_reference", True)):
        with unlearner.attach(pipe, case["unlearn"], multiplier=case["multiplier"], paper_compat=paper):
            for concept in case["concepts"]:
                got = sample(pipe, case, recorded, concept)
                close(got, recorded[f"unlearned_latents.{key}.{concept}"], 2e-3)


def test_small_product_decides_as_the_whole_one():
    """Features right at the threshold and at the k-th place."""
    case = CASES["hook_single"]
    sae, x = sae_of(case), rows_of(tensors("hook_single")["x.0"], case).reshape(-1, 24)
    code = sae.encode(x).dense()
    features = torch.arange(96)
    chosen = ChosenFeatures(sae, features, torch.zeros(96))
    close(chosen.activations(x, chosen.scores(x)), code, 1e-6)
