"""A seed is an image: how it is batched, stored, cached, cut up for decoding or attended to does not matter.

Bitwise where the arithmetic is the same; where the same sums are taken in another order, `SAME` on latents and pixels
of size one (float32 has 6e-8, and an image is a thousand products deep).
"""

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import WORDS, rope_config, sincos_config, tiny_pipeline
from tiny_control import SD3_TARGETS, image, lora_file
from training.toy import Tokens, collate

from imgdit import Condition, ImgDiTPipeline
from imgdit.lora.files import AdapterInfo
from imgdit.training import Batches

SAME = 5e-5
EXAMPLES = pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])


@dataclass(frozen=True)
class Case:
    """Images that are asked for at once."""

    model: str
    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    """Height and width in pixels."""
    conditions: tuple[str, ...]
    """Adapters: "joint" ones see the image, "own" ones only themselves."""
    stochastic: bool = False
    """Whether every step draws new noise."""


SENTENCES = st.lists(st.sampled_from(WORDS), min_size=0, max_size=6).map(" ".join)
CASES = st.builds(
    Case,
    model=st.sampled_from(["rope", "sincos"]),
    prompts=st.lists(SENTENCES, min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 3),
    guidance=st.sampled_from([1.0, 3.0]),
    size=st.sampled_from([(16, 16), (16, 24), (8, 16)]),
    conditions=st.lists(st.sampled_from(["joint", "own"]), max_size=2).map(tuple),
    stochastic=st.booleans(),
)


@functools.cache
def folder(model: str) -> tempfile.TemporaryDirectory:
    """The pipeline and its adapters on the disk."""
    made = tempfile.TemporaryDirectory()
    pipe = tiny_pipeline(rope_config() if model == "rope" else sincos_config(dual_attention_layers=(0,)))
    targets = {} if model == "rope" else {"targets": SD3_TARGETS}
    lora_file(Path(made.name) / "joint.safetensors", pipe.transformer, **targets)
    lora_file(
        Path(made.name) / "own.safetensors", pipe.transformer, seed=1, info=AdapterInfo(mode="independent"), **targets
    )
    pipe.save_pretrained(Path(made.name) / "pipeline")
    return made


def loaded(model: str) -> ImgDiTPipeline:
    place = Path(folder(model).name)
    pipe = ImgDiTPipeline.from_pretrained(place / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    for name in ("joint", "own"):
        pipe.load_control(place / f"{name}.safetensors", adapter_name=name)
    return pipe


kept = functools.cache(loaded)


def seeds(case: Case) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(case.seed + i) for i in range(len(case.prompts))]


def latents(case: Case, pipe: ImgDiTPipeline | None = None, **options) -> torch.Tensor:
    """All of a case's images as latents, (B, C, h, w)."""
    pipe, (height, width) = pipe or kept(case.model), case.size
    pipe.scheduler.register_to_config(stochastic_sampling=case.stochastic)
    call = {
        "conditions": [Condition(image(i), name) for i, name in enumerate(case.conditions)],
        "condition_generator": torch.Generator().manual_seed(case.seed),
        "generator": seeds(case),
        "output_type": "latent",
    }
    return pipe(
        list(case.prompts), height=height, width=width, num_inference_steps=case.steps, guidance_scale=case.guidance,
        **call | options,
    ).images  # fmt: skip


def hold(examples, strategy, check):
    """Hypothesis on a check, as often as asked."""
    some = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    some(given(strategy)(check))()


def same(a, b):
    torch.testing.assert_close(a, b, atol=SAME, rtol=SAME)


@EXAMPLES
def test_batch_size_and_order(examples):
    def check(drawn):
        case, order, cut = drawn
        whole = latents(case)
        assert len(whole) == 1 or not torch.equal(whole[0], whole[1])
        order = [i for i in order if i < len(case.prompts)]
        for part in (order[:cut], order[cut:]):
            if part:
                prompts = tuple(case.prompts[i] for i in part)
                same(latents(replace(case, prompts=prompts), generator=[seeds(case)[i] for i in part]), whole[part])

    hold(examples, st.tuples(CASES, st.permutations(range(4)), st.integers(0, 4)), check)


@EXAMPLES
def test_saved_and_loaded(examples):
    again = functools.cache(loaded)

    def check(case):
        assert torch.equal(latents(case), latents(case, again(case.model)))
        assert torch.equal(latents(case), latents(case))

    kept("rope"), kept("sincos")
    assert again("rope") is not kept("rope")
    hold(examples, CASES, check)


@EXAMPLES
def test_cache_on_and_off(examples):
    def check(case):
        same(latents(case, cache=True), latents(case, cache=False))

    own = CASES.map(lambda case: replace(case, conditions=("own",) * max(1, len(case.conditions))))
    hold(examples, own, check)


@EXAMPLES
def test_attention_backend(examples):
    """The backends of a CPU; tests/test_attention.py and test_cuda.py hold the others against dense attention."""

    def check(case):
        transformer = kept(case.model).transformer
        expected = latents(case)
        transformer.set_attention_backend("_native_math")
        try:
            same(latents(case), expected)
        finally:
            transformer.set_attention_backend("native")  # diffusers keeps the last one for every model
            transformer.reset_attention_backend()
        assert torch.equal(latents(case), expected)

    hold(examples, CASES, check)


@EXAMPLES
def test_chunked_decoding(examples):
    """Slices one by one, and tiles no smaller than the image; smaller ones are blended, which is another image."""

    def check(case):
        pipe = kept(case.model)
        case = replace(case, conditions=())
        expected = latents(case, output_type="pt")
        pipe.vae.enable_slicing()
        same(latents(case, output_type="pt"), expected)
        pipe.vae.disable_slicing()
        if max(case.size) <= pipe.vae.tile_sample_min_size:
            pipe.vae.enable_tiling()
            assert torch.equal(latents(case, output_type="pt"), expected)
            pipe.vae.disable_tiling()

    hold(examples, CASES, check)


@EXAMPLES
def test_number_of_workers(examples):
    """What a model is trained on, whoever prepares it and in whatever portions."""

    def check(drawn):
        workers, size, start, seed = drawn
        plain = Batches(Tokens(), collate, seed=seed).stream(start, size)
        prepared = Batches(Tokens(), collate, seed=seed, workers=workers).stream(start, size)
        single = Batches(Tokens(), collate, seed=seed).stream(start, 1)
        for _ in range(3):
            one, other = next(plain), next(prepared)
            assert one.indices == other.indices
            assert torch.equal(one.batch.tokens, other.batch.tokens)
            assert torch.equal(one.batch.text.embeddings, other.batch.text.embeddings)
            assert torch.equal(one.batch.tokens, torch.cat([next(single).batch.tokens for _ in range(size)]))

    drawn = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 40), st.integers(0, 9))
    hold(min(examples, 15), drawn, check)
