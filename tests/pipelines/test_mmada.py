"""`MMaDAPipeline`: batches, padding, seeds, inpainting, answers, reasoning, files, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmada_cases import FIXTURES, SIZES, make_pipe
from PIL import Image
from transformers import AutoTokenizer

import imgdit
from imgdit.models.masked_text_passes import BlockPasses
from imgdit.pipelines.mmada import load_mmada, masked_cells
from imgdit.pipelines.mmada_rows import MMaDATokens, question_rows, text_to_image_rows

PROMPTS = ["a photo of a red cube", "two cats"]
FEW = {"num_inference_steps": 4, "output_type": "latent"}
SHORT = {"gen_length": 8, "block_length": 4, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def seeded(*seeds):
    found = [torch.Generator().manual_seed(seed) for seed in seeds]
    return found[0] if len(found) == 1 else found


def noise(*sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def test_each_prompt_completes_its_own_image_in_all_of_its_images(pipe):
    codes = pipe.encode_images(noise((9, 9), (9, 9)))
    codes[:, :1] = -1
    found = pipe(PROMPTS, codes=codes, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **FEW).codes
    alone = [pipe(PROMPTS[n // 2], codes=codes[n // 2][None], generator=seeded(n), **FEW).codes for n in range(4)]
    assert torch.equal(found, torch.cat(alone))
    assert not torch.equal(found[0, 1:], found[2, 1:])
    with pytest.raises(ValueError, match="for each prompt or for each image"):
        pipe(PROMPTS, codes=codes[[0, 1, 0]], num_images_per_prompt=2, **FEW)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_a_batch_is_generated_as_one_by_one(pipe, guidance_scale):
    options = FEW | {"guidance_scale": guidance_scale}
    together = pipe(PROMPTS, generator=seeded(1, 2), **options).codes
    alone = [pipe(prompt, generator=seeded(n + 1), **options).codes for n, prompt in enumerate(PROMPTS)]
    assert together.shape == (2, 4, 4) and torch.equal(together, torch.cat(alone))
    copies = pipe(PROMPTS, num_images_per_prompt=2, generator=seeded(1, 5, 2, 6), **options).codes
    assert torch.equal(copies[[0, 2]], together) and not torch.equal(copies[1], copies[0])


def test_seeds_greedy_codes_and_noise_on_the_order(pipe):
    first = pipe(PROMPTS, generator=seeded(3), **FEW).codes
    assert torch.equal(pipe(PROMPTS, generator=seeded(3), **FEW).codes, first)
    assert not torch.equal(pipe(PROMPTS, generator=seeded(4), **FEW).codes, first)
    greedy = FEW | {"temperature": 0.0, "order_noise": 0.0}
    certain = pipe(PROMPTS, generator=seeded(3), **greedy).codes
    assert torch.equal(pipe(PROMPTS, generator=seeded(4), **greedy).codes, certain)
    one_step = greedy | {"num_inference_steps": 1}
    ids = pipe.tokens.image_ids(torch.full((1, 16), -1))
    rows = text_to_image_rows(pipe.tokens, [pipe._ids(PROMPTS[0])], ids)
    with torch.no_grad():
        logits = pipe.model(rows.ids).logits[:, rows.image, pipe.tokens.codes]
    assert torch.equal(pipe(PROMPTS[0], guidance_scale=1.0, **one_step).codes.flatten(1), logits.argmax(-1))


def test_padding_on_either_side_changes_nothing(pipe):
    texts = [pipe._ids(prompt) for prompt in PROMPTS]
    ids = pipe.tokens.image_ids(torch.randint(-1, 64, (2, 16), generator=seeded(0)))
    found = []
    for side, length in (("left", None), ("right", None), ("left", 30)):
        rows = text_to_image_rows(pipe.tokens, texts, ids, length, side)
        passes = BlockPasses(pipe.model, None, rows.attention_mask, 1.0, rows.prompt, pipe.tokens.mask)
        passes.begin(rows.image.start, rows.image.stop)
        with torch.no_grad():
            found.append(passes(rows.ids))
        assert (rows.ids[1][rows.attention_mask[1] == 0] == pipe.tokens.padding).all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)
    chats = pipe._chats(["Is it red?", "What is the colour of the ball?"])
    answers = []
    for side in ("left", "right"):
        asked, mask = question_rows(pipe.tokens, chats, ids.clamp(min=pipe.tokens.first_code), side)
        answers.append(pipe._write(input_ids=asked, attention_mask=mask, **SHORT).sequences)
    assert torch.equal(*answers)


def test_known_codes_stay_and_the_others_are_generated(pipe):
    image, mask = noise((40, 61))[0], np.zeros((40, 61), dtype=np.uint8)
    mask[:20] = 255
    output = pipe("two cats", image=image, mask_image=Image.fromarray(mask), generator=seeded(0), **FEW)
    known = pipe.encode_images(image)
    assert torch.equal(output.codes[:, 2:], known[:, 2:]) and not torch.equal(output.codes[:, :2], known[:, :2])
    given = known.clone()
    given[:, :2] = -1
    assert torch.equal(pipe("two cats", codes=given, generator=seeded(0), **FEW).codes, output.codes)
    assert torch.equal(pipe("two cats", codes=known, generator=seeded(0), **FEW).codes, known)  # nothing to do
    cells = masked_cells(Image.fromarray(mask), image, (16, 16), 4)
    assert cells[:2].all() and not cells[2:].any()
    exact = masked_cells(np.pad(np.ones((1, 1), dtype=np.uint8), ((5, 10), (0, 15))), image, (16, 16), 4)
    assert exact.nonzero().tolist() == [[1, 0]]  # one pixel of the image's final size


def test_images_come_in_all_types_and_sizes(pipe):
    options = {"num_inference_steps": 2, "generator": seeded(0)}
    output = pipe("two cats", **options)
    assert output.images[0].size == (16, 16) and output.codes.shape == (1, 4, 4) and output.texts is None
    pixels = pipe("two cats", output_type="pt", **options | {"generator": seeded(0)}).images
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() >= 0 and pixels.max() <= 1
    wide = pipe("two cats", height=8, width=24, output_type="np", **options).images
    assert wide.shape == (1, 8, 24, 3)
    images, codes, texts = pipe("two cats", return_dict=False, **options)
    assert images[0].size == (16, 16) and codes.shape == (1, 4, 4) and texts is None


def test_guidance_steers_away_from_the_negative_prompt(pipe):
    options = FEW | {"temperature": 0.0, "order_noise": 0.0}
    plain = pipe(PROMPTS[0], **options).codes
    assert torch.equal(pipe(PROMPTS[0], negative_prompt="", **options).codes, plain)
    assert not torch.equal(pipe(PROMPTS[0], negative_prompt="a green sphere", **options).codes, plain)
    # Guidance away from the prompt itself is none.
    same = pipe(PROMPTS[0], negative_prompt=PROMPTS[0], **options).codes
    assert torch.equal(same, pipe(PROMPTS[0], guidance_scale=1.0, **options).codes)


def test_answers_captions_and_texts(pipe):
    images, questions = noise((40, 61), (50, 33)), ["Is it red?", "What is the colour of the ball?"]
    together = pipe.answer(images, questions, **SHORT)
    alone = [pipe.answer(image, question, **SHORT) for image, question in zip(images, questions)]
    assert torch.equal(together.sequences, torch.cat([one.sequences for one in alone]))
    assert (together.sequences < len(pipe.tokenizer)).all()  # no codes, no masks
    assert not (together.sequences == pipe.tokens.mask).any() and len(together.texts) == 2
    assert torch.equal(pipe.answer(images, questions[0], **SHORT).sequences[:1], alone[0].sequences)
    assert torch.equal(pipe.answer(images[0], questions, **SHORT).sequences[:1], alone[0].sequences)
    assert not torch.equal(pipe.caption(images, **SHORT).sequences, together.sequences)
    squashed = pipe.answer(images[0], questions[0], fit="squash", **SHORT).sequences
    assert squashed.shape == (1, 8)
    chat = [{"role": "user", "content": "Is it red?"}]
    assert torch.equal(pipe.write("Is it red?", **SHORT).sequences, pipe.write(messages=chat, **SHORT).sequences)
    tensors = torch.from_numpy(np.array(images[0])).permute(2, 0, 1)
    assert torch.equal(pipe.encode_images(tensors), pipe.encode_images(images[0]))


def test_text_comes_before_the_image_and_is_seen_by_it(pipe):
    options = FEW | {"temperature": 0.0, "order_noise": 0.0, "reasoning_length": 8}
    text = {"block_length": 4, "num_inference_steps": 2}
    output = pipe(PROMPTS, reasoning_options=text, **options)
    assert len(output.texts) == 2 and not torch.equal(output.codes, pipe(PROMPTS, **FEW).codes)
    alone = [pipe(prompt, reasoning_options=text, **options) for prompt in PROMPTS]
    assert torch.equal(torch.cat([one.codes for one in alone]), output.codes)
    assert [one.texts[0] for one in alone] == output.texts
    forbidden = {"forbidden_tokens": (*range(50, 310), *range(339, 416))}
    other = pipe(PROMPTS, reasoning_options=text | forbidden, **options)
    assert other.texts != output.texts and not torch.equal(other.codes, output.codes)


def test_callbacks_see_change_and_stop(pipe):
    seen = []

    def change(pipe, step, timestep, given):
        seen.append(given["codes"].clone())
        if step == 0:
            return {"codes": torch.full_like(given["codes"], -1).index_fill(1, torch.tensor([0]), 7)}
        if step == 2:
            pipe._interrupt = True

    codes = pipe(
        "two cats", callback_on_step_end=change, generator=seeded(0), **FEW | {"num_inference_steps": 8}
    ).codes
    assert len(seen) == 3 and codes[0, 0, 0] == 7 and (seen[2] < 0).any()
    assert (codes >= 0).all() and (codes < 64).all()
    assert torch.equal(codes.flatten(1)[seen[2] >= 0], seen[2][seen[2] >= 0])


def test_saved_and_loaded_it_does_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = pipe(PROMPTS, generator=seeded(0), **FEW).codes
    text = pipe.caption(noise((20, 20)), **SHORT).sequences
    for load in (imgdit.DiffusionPipeline.from_pretrained, imgdit.MMaDAPipeline.from_pretrained, load_mmada):
        loaded = load(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is imgdit.MMaDAPipeline and loaded.default_size == 16
        assert torch.equal(loaded(PROMPTS, generator=seeded(0), **FEW).codes, expected)
    assert torch.equal(loaded.caption(noise((20, 20)), **SHORT).sequences, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": True}, "at least 1, got True"),
        ({"height": 18}, "multiples of 4 pixels, got 18x16"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must not be negative"),
        ({"generator": [torch.Generator()] * 3}, "got 3 generators for 1 images"),
        ({"codes": torch.zeros(1, 3, 4, dtype=torch.long)}, r"codes must be \(batch, 4, 4\)"),
        ({"codes": torch.full((1, 4, 4), 64)}, r"0\.\.63, the table of the image tokenizer.* got 64 to 64"),
        ({"image": noise((9, 9))[0]}, "takes image and mask_image, got one of them"),
        ({"height": 300, "width": 300}, "5635 tokens, the model has 4096 positions"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "callbacks may ask for"),
        ({"output_type": "text"}, "output_type must be one of"),
        ({"image": noise((9, 9))[0], "mask_image": np.ones((8, 9))}, "the image's 9x9 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "two cats"} | FEW | options)


@pytest.mark.parametrize(("size", "shown"), [((1, 1), "1x1"), ((10, 20000), "20000x10"), ((1, 40), "40x1")])
def test_images_that_cannot_be_read_are_refused(pipe, size, shown, tmp_path):
    image = Image.new("RGB", size[::-1])
    image.save(tmp_path / "thin.png")
    with pytest.raises(ValueError, match=rf"thin\.png' has {shown} pixels; images to be read have at least 2"):
        pipe.answer(Image.open(tmp_path / "thin.png"), "Is it red?", **SHORT)
    with pytest.raises(ValueError, match=f"an image has {shown} pixels"):
        pipe.caption(np.zeros((*size, 3), dtype=np.uint8), **SHORT)
    with pytest.raises(ValueError, match="got 3 questions for 2 images"):
        pipe.answer(noise((8, 8), (8, 8)), ["a", "b", "c"], **SHORT)


def test_folders_that_do_not_belong_together_are_refused(pipe, tmp_path):
    images = {"image_tokenizer": FIXTURES / "magvitv2", "sizes": SIZES}
    bare = tmp_path / "bare"
    shutil.copytree(FIXTURES / "lm", bare, ignore=shutil.ignore_patterns("token*", "special*"))
    with pytest.raises(ValueError, match=r"bare has no tokenizer"):
        load_mmada(bare, **images)
    with pytest.raises(ValueError, match=r"no folder .*tower"):
        load_mmada(FIXTURES / "lm", tmp_path / "tower")
    config = json.loads((FIXTURES / "lm/config.json").read_text())
    for changes, message in (
        ({"codebook_size": 8192}, r"config\.json has 8192 codes, the image tokenizer .* 64"),
        ({"model_type": "llada"}, r"config\.json is of a model of type 'llada', expected 'mmada'"),
        ({"mask_token_id": 334}, "the tokenizer's mask token is 335, the model's 334"),
    ):
        folder = tmp_path / next(iter(changes))
        shutil.copytree(FIXTURES / "lm", folder)
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_mmada(folder, **images)
    larger = AutoTokenizer.from_pretrained(FIXTURES / "lm")
    larger.add_tokens([f"new{n}" for n in range(20)])
    with pytest.raises(ValueError, match=r"359 tokens and the image tokenizer 64 codes, together 423; .* 416"):
        MMaDATokens.of(larger, 64, 416)
    with pytest.raises(ValueError, match=r"no tokenizer of MMaDA: it has no bos_token"):
        larger.bos_token = None
        MMaDATokens.of(larger, 64, 500)
