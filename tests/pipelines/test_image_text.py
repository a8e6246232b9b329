"""`ImageTextPipeline`: texts about images by Dual Diffusion's rules, and as frames."""

import copy

import numpy as np
import pytest
import torch
from dual_diffusion_cases import PIPELINE
from dual_diffusion_cases import pipeline as dual
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from tiny import WORDS, randomize, rope_config, tiny_mmdit, tiny_pipeline, tiny_tokenizer

from imgdit import DiffusionPipeline, ImageTextPipeline, ImgDiTPipeline, MaskedTextScheduler
from imgdit.checkpoints import SCENES
from imgdit.models.text_head import add_text_head
from imgdit.pipelines.image_text_loading import load_image_text_pipeline
from imgdit.pipelines.text_frames import save_text_frames


def framed() -> ImageTextPipeline:
    """A tiny pipeline whose texts are frames, with a tokenizer of their own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = rope_config(text_vocab_size=len(tokenizer), text_rope_axis=0, joint_attention_dim=32)
    parts = tiny_pipeline().components
    parts["text_encoder"].resize_token_embeddings(len(tokenizer))
    pipe = ImageTextPipeline(**{**parts, "transformer": tiny_mmdit(config)}, text_tokenizer=tokenizer, text_length=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPES = {"dual": dual, "framed": framed}
SIZES = {"dual": 16, "framed": 16}


@pytest.fixture(params=PIPES)
def pipe(request):
    return PIPES[request.param]()


def images(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_batch_is_written_as_one_by_one(pipe):
    shown, options = images(3), {"max_length": 8, "num_inference_steps": 4, "temperature": 1.0}
    whole = pipe.caption(shown, generator=seeded(1, 2, 3), **options)
    alone = [pipe.caption(image, generator=seeded(n), **options) for n, image in enumerate(shown, 1)]
    assert torch.equal(whole.sequences, torch.cat([one.sequences for one in alone]))
    assert whole.texts == [one.texts[0] for one in alone]
    assert not (whole.sequences == pipe.mask_token_id).any()
    assert len({tuple(row) for row in whole.sequences.tolist()}) > 1


def test_a_seed_gives_the_same_text(pipe):
    def write(seed):
        generator = torch.Generator().manual_seed(seed)
        return pipe.caption(images(1), max_length=10, temperature=1.0, generator=generator).sequences

    assert torch.equal(write(1), write(1)) and not torch.equal(write(1), write(2))


def test_the_image_decides_the_text(pipe):
    """Greedily drawn texts of other images differ in their logits, whatever the tokens."""
    found = []
    hook = pipe.transformer.register_forward_hook(lambda *args: found.append(args[2].text_logits))
    pipe.caption(images(2), max_length=4, num_inference_steps=1, temperature=0.0, generator=seeded(0, 0))
    hook.remove()
    assert float((found[0][0] - found[0][1]).abs().max()) > 1e-4


def test_answers_leave_their_question_out(pipe):
    question = "a red cube" if pipe.follows_reference is False else "What is it?"
    found = pipe.answer(images(2), question, max_length=24, num_inference_steps=3, generator=seeded(1, 2))
    template = pipe._template.format(question)
    asked = pipe._text_tokenizer(template, add_special_tokens=False)["input_ids"]
    for row, text in zip(found.sequences.tolist(), found.texts):
        assert row[: len(asked)] == asked and question not in text
    one = pipe.answer(images(1), [question, question + " cube"], max_length=24, num_inference_steps=1)
    assert len(one.texts) == 2


def test_holes_alone_are_filled(pipe):
    text = "a [?] cube [?2] red"
    found = pipe.fill(text, images(1), max_length=20, num_inference_steps=2)
    tokenizer = pipe._text_tokenizer
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("a", "cube", "red")]
    row, at = found.sequences[0].tolist(), 0
    for part, hole in zip(parts, (1, 2, 0)):
        assert row[at : at + len(part)] == part
        at += len(part) + hole
    assert set(row[at:]) == {tokenizer.eos_token_id}


def test_a_filled_hole_does_not_end_the_text():
    pipe = framed()
    with torch.no_grad():
        pipe.transformer.text_proj_out.bias[pipe._text_tokenizer.eos_token_id] += 100
    found = pipe.fill("a [?] cube", images(1), max_length=20, num_inference_steps=1)
    assert found.texts[0].endswith("cube")
    assert pipe.caption(images(1), max_length=8, num_inference_steps=1).texts == [""]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 14), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_any_rows_are_filled_in_their_holes_as_one_by_one(count, length, steps, fraction, seed):
    """Dual Diffusion's sampler on holes anywhere, as many per row as there may be."""
    pipe, generator = dual(), torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 100, (count, length), generator=generator)
    holes = torch.rand(count, length, generator=generator) < fraction
    latents = torch.randn(count, 4, 4, 6, generator=generator)
    seeds = range(seed, seed + count)
    options = {"num_inference_steps": steps}
    whole = pipe.complete(ids, holes, latents=latents, generator=seeded(*seeds), **options).sequences
    assert torch.equal(whole[~holes], ids[~holes]) and not (whole[holes] == pipe.mask_token_id).any()
    alone = [
        pipe.complete(ids[n : n + 1], holes[n : n + 1], latents=latents[n : n + 1], generator=seeded(s), **options)
        for n, s in enumerate(seeds)
    ]
    assert torch.equal(whole, torch.cat([one.sequences for one in alone]))


def test_without_a_number_of_steps_one_token_is_revealed_at_a_time():
    pipe, seen = framed(), []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["transfer_index"].sum(1).tolist())

    pipe.text_scheduler.register_to_config(threshold=2.0)
    pipe.caption(images(2), callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["transfer_index"])
    assert seen == [[1, 1]] * pipe.config.text_length


def test_passes_are_made_only_where_a_token_has_changed():
    pipe, passes = dual(), []
    hook = pipe.transformer.register_forward_hook(lambda *args: passes.append(None))
    pipe.caption(images(1), max_length=3, num_inference_steps=200, generator=seeded(0))
    hook.remove()
    assert 1 <= len(passes) <= 4


def test_guidance_steers_away_from_the_text_without_an_image(pipe):
    def logits(**options):
        found = []

        def keep(module, args, output):
            found.append(output.text_logits)

        hook = pipe.transformer.register_forward_hook(keep)
        given = []

        def step(pipe, step, timestep, tensors):
            given.append(tensors["sampled_probs"])
            return {}

        pipe.caption(
            images(1), max_length=4, num_inference_steps=1, temperature=1.0, generator=seeded(0),
            callback_on_step_end=step, callback_on_step_end_tensor_inputs=["sampled_probs"], **options,
        )  # fmt: skip
        hook.remove()
        return found, given[0]

    plain, plain_probs = logits()
    off, off_probs = logits(guidance_scale=1.0)
    assert torch.equal(plain_probs, off_probs) and torch.equal(plain[0], off[0])
    guided, guided_probs = logits(guidance_scale=3.0)
    assert len(guided) > len(plain) and not torch.equal(guided_probs, plain_probs)


def test_callbacks_see_steps_and_can_stop(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append((step, tensors["block_x"].shape))
        pipe._interrupt = step == 1

    shown = images(1)
    found = pipe.caption(shown, max_length=30, num_inference_steps=30, generator=seeded(0), callback_on_step_end=stop)
    assert steps == [(0, (1, 30)), (1, (1, 30))] and (found.sequences == pipe.mask_token_id).any()


def test_progress_counts_steps(pipe, capsys):
    loud = copy.copy(pipe)
    loud.set_progress_bar_config(disable=False)
    loud.caption(images(1), max_length=6, num_inference_steps=3, generator=seeded(0))
    assert "3/3" in capsys.readouterr().err
    loud.set_progress_bar_config(disable=True)


def test_saved_and_loaded_it_writes_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is ImageTextPipeline and again.config.text_length == pipe.config.text_length
    again.set_progress_bar_config(disable=True)
    options = {"max_length": 8, "num_inference_steps": 4, "temperature": 1.0}
    found = [one.caption(images(2), generator=seeded(1, 2), **options).sequences for one in (pipe, again)]
    assert torch.equal(*found)
    assert again.text_scheduler.config == again.text_scheduler.config | dict(pipe.text_scheduler.config)


def test_the_published_folder_is_found_by_its_own_name():
    assert type(DiffusionPipeline.from_pretrained(PIPELINE)) is ImageTextPipeline


def test_images_and_texts_together(pipe):
    options = {"max_length": 8, "num_inference_steps": 3, "image_output": "latent"}
    found = pipe.joint(2, generator=seeded(1, 2), **options)
    alone = [pipe.joint(1, generator=seeded(seed), **options) for seed in (1, 2)]
    assert not (found.sequences == pipe.mask_token_id).any() and len(found.texts) == 2
    assert torch.equal(found.sequences, torch.cat([one.sequences for one in alone]))
    torch.testing.assert_close(found.images, torch.cat([one.images for one in alone]), atol=1e-4, rtol=1e-4)


def test_prompts_still_become_images():
    """The text head changes nothing of text to image."""
    pipe = framed()
    plain = ImgDiTPipeline(
        **{name: pipe.components[name] for name in ImgDiTPipeline._get_signature_keys(ImgDiTPipeline)[0]}
    )
    plain.set_progress_bar_config(disable=True)
    call = {"prompt": "a red cube", "num_inference_steps": 2, "output_type": "latent"}
    found = [one(generator=seeded(3), **call).images for one in (pipe, plain)]
    assert torch.equal(*found)


def test_text_without_an_image():
    found = dual().fill("a [?] cube", max_length=12, num_inference_steps=2, generator=seeded(1))
    assert found.texts[0].startswith("a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.caption(), "give images, or latents= of them"),
        (lambda p: p.caption([]), "images is an empty list"),
        (lambda p: p.caption(images(1), latents=torch.zeros(1, 4, 8, 8)), "not both"),
        (
            lambda p: p.caption(Image.new("RGB", (2000, 10))),
            "the image has 2000x10 pixels",
        ),
        (lambda p: p.caption(latents=torch.zeros(4, 8, 8)), r"latents must be \(batch, 4, h, w\), got \(4, 8, 8\)"),
        (lambda p: p.caption(images(1), max_lenght=3), "unknown option 'max_lenght'; did you mean 'max_length'"),
        (lambda p: p.caption(images(1), max_length=0), "max_length must be a whole number of at least 1, got 0"),
        (lambda p: p.caption(images(1), num_inference_steps=0), "num_inference_steps must be a whole number"),
        (lambda p: p.caption(images(1), temperature=-1.0), "temperature must be at least 0"),
        (lambda p: p.caption(images(1), resolution=15), "resolution must be a multiple of"),
        (lambda p: p.caption(images(2), generator=seeded(1)), "a list of generators needs one per text, got 1 for 2"),
        (
            lambda p: p.caption(images(1), callback_on_step_end_tensor_inputs=["latents"]),
            r"callbacks may ask for .* got \['latents'\]",
        ),
        (lambda p: p.answer(images(1)), "answer needs questions"),
        (lambda p: p.answer(questions="What is it?"), "give images"),
        (lambda p: p.answer(images(1), ""), "questions is empty; write something"),
        (lambda p: p.answer(images(1), "what\x07"), r"the control character U\+0007 at place 4"),
        (lambda p: p.answer(images(2), ["a", "b", "c"]), "got 3 texts for 2 images"),
        (lambda p: p.answer(images(1), "cube " * 40, max_length=12), "max_length=12 leaves none for an answer"),
        (lambda p: p.fill("a red cube", images(1)), r"has no hole; write \[\?\]"),
        (lambda p: p.fill("a [red] [?]", images(1)), r"the unknown placeholder \[red\]; write \[\?\] for one token"),
        (lambda p: p.fill("cube " * 40 + "[?]", images(1), max_length=12), "max_length is 12; shorten it"),
        (lambda p: p.fill(7, images(1)), "text must be a text or a list of texts"),
        (lambda p: p.caption(images(1), max_length=True), "at least 1, got True"),
        (lambda p: p.joint(0), "count must be a whole number of at least 1, got 0"),
        (lambda p: p.joint(latents=torch.zeros(1, 4, 8, 8)), "leave out latents and guidance_scale"),
        (lambda p: p.complete(torch.zeros(1, 4, dtype=torch.long), max_length=3), "leave max_length=3 out"),
        (lambda p: p.complete(torch.full((1, 4), 124)), r"input_ids must lie in 0..123"),
        (lambda p: p.complete(torch.zeros(2, 4, dtype=torch.long), torch.ones(1, 4)), r"holes must be \(2, 4\)"),
    ],
)
def test_what_is_refused_before_anything_runs(call, message, monkeypatch):
    pipe = dual()
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    monkeypatch.setattr(pipe.vae, "encode", lambda *args, **kwargs: pytest.fail("it ran"))
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        call(pipe)


def test_models_that_write_nothing(tmp_path):
    for part in SCENES.iterdir():
        if part.name != "text_frames":
            (tmp_path / part.name).symlink_to(part)
    pipe = ImageTextPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this transformer has no text head .* Dual Diffusion's folders have one"):
        pipe.caption(images(1))
    pipe = framed()
    pipe.register_modules(text_tokenizer=None)
    with pytest.raises(ValueError, match="the tokenizer has no mask_token and none of <extra_id_0>"):
        pipe.caption(images(1))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(len(WORDS))])
    pipe.register_modules(text_tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"the tokenizer of texts has 35 tokens, the text head predicts 20"):
        pipe.caption(images(1))


def test_the_scheduler_of_texts_can_be_another():
    pipe = framed()
    pipe.register_modules(text_scheduler=MaskedTextScheduler(reveal="shift", choose="margin"))
    found = pipe.caption(images(1), num_inference_steps=3)
    assert not (found.sequences == pipe.mask_token_id).any()


def with_text_frames(place):
    """The tiny pipeline with text frames beside it, which no training has touched."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.model_max_length = 9
    pipe = tiny_pipeline()
    pipe.save_pretrained(place)
    add_text_head(pipe.transformer, len(tokenizer), rope_axis=2, embeds=True)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=r".*(add_[qkv]_proj|proj_mlp)"), "reads")
    randomize(pipe.transformer, std=0.2)
    save_text_frames(pipe.transformer, "reads", tokenizer, place / "text_frames")
    return place


def test_text_frames_beside_a_pipeline_are_loaded(tmp_path):
    pipe = load_image_text_pipeline(with_text_frames(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.text_length == 9 and pipe.transformer.config.text_embeds
    options = {"num_inference_steps": 4, "temperature": 1.0, "generator": seeded(1)}
    found = pipe.caption(images(1), **options).sequences
    assert found.shape == (1, 9) and not (found == pipe.mask_token_id).any()
    call = {"prompt": "a red cube", "num_inference_steps": 2, "output_type": "latent"}
    drawn = [one(generator=seeded(3), **call).images for one in (pipe, tiny_pipeline())]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="is not part of a pipeline's folder"):
        pipe.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="has a text head of 20 tokens already"):
        pipe.load_text_frames(tmp_path / "text_frames")
