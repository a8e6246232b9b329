"""Text frames of `OneDiffusionPipeline`: prompts among the frames, and texts that are generated beside images."""

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from tiny_text_frames import LENGTH, pipeline, save_model

from imgdit import ImageFrame, ImageTextPipeline, OneDiffusionPipeline, TextFrame
from imgdit.checkpoints import SCENES
from imgdit.images import to_image
from imgdit.pipelines.image_text_inputs import question_rows
from imgdit.pipelines.text_frames import QuestionForms
from imgdit.scenes.questions import ANSWERS, heldout_questions
from imgdit.scenes.render import render
from imgdit.scenes.world import Scene

SETTINGS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(folder):
    loaded = OneDiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def images(count: int = 1, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make(pipe, frames, **options):
    return pipe(frames=frames, height=16, width=16, **{**SETTINGS, **options})


def test_a_clean_text_frame_is_the_prompt(pipe):
    options = {"output_type": "latent", "generator": seeded(0)[0]}
    prompt = make(pipe, [ImageFrame.generate()], prompt="a red cube", **options)
    options["generator"] = seeded(0)[0]
    frame = make(pipe, [TextFrame.clean("a red cube"), ImageFrame.generate()], **options)
    assert torch.equal(prompt.images, frame.images) and frame.texts is None
    assert (
        TextFrame.clean("a").text == "a" and TextFrame.generate(3).length == 3 and TextFrame.generate().sigma is None
    )


def test_images_stay_what_they_are_when_text_frames_are_loaded(pipe):
    def image():
        return make(
            pipe, [ImageFrame.generate()], prompt="a red cube", output_type="latent", generator=seeded(0)[0]
        ).images

    before = image()
    assert pipe.transformer.config.text_vocab_size is None
    text = make(pipe, [ImageFrame.clean(images()[0]), TextFrame.generate()])
    assert len(text.texts) == 1 and pipe.transformer.config.text_vocab_size
    assert torch.equal(before, image())


def test_texts_are_written_as_the_frames_say(pipe):
    shown = ImageFrame.clean(images()[0])
    caption, answer, filled = make(
        pipe, [shown, TextFrame.generate(6), TextFrame.ask("a red", 6), TextFrame.fill("a [?] cube")]
    ).texts
    assert make(pipe, [shown, TextFrame.generate(6)]).texts == [caption]
    assert make(pipe, [shown, TextFrame.ask("a red", 6)]).texts == [answer]
    assert filled.startswith("a ") and filled.endswith(" cube") and "<mask>" not in filled
    assert make(pipe, [TextFrame.fill("a [?] cube")]).images == [], "a text may be filled without an image"
    for layer in (one for one in pipe.transformer.modules() if isinstance(one, LoraLayer)):
        layer.set_scale(pipe.text_adapter, 0.0)
    seen = make(pipe, [shown, TextFrame.generate(6)], num_inference_steps=1).texts
    for layer in (one for one in pipe.transformer.modules() if isinstance(one, LoraLayer)):
        layer.set_scale(pipe.text_adapter, 1.0)
    assert seen != make(pipe, [shown, TextFrame.generate(6)], num_inference_steps=1).texts


def test_image_text_pipelines_load_them_too(pipe, folder):
    shown = images()
    writer = ImageTextPipeline.from_pretrained(folder)
    writer.set_progress_bar_config(disable=True)
    text = writer.caption(shown, resolution=16, **SETTINGS).texts
    assert writer.config.text_length == LENGTH and writer.text_adapter
    assert text == make(pipe, [ImageFrame.clean(shown[0]), TextFrame.generate()]).texts


def test_pipelines_of_one_transformer_share_its_text_frames(folder):
    """Each writes as if it had loaded them itself; without the LoRA nothing is written."""
    shown, asked = images(), [TextFrame.generate()]
    one = ImageTextPipeline.from_pretrained(folder)
    expected = one.caption(shown, resolution=16, **SETTINGS).texts
    for other in (ImageTextPipeline.from_pipe(one), ImageTextPipeline(**one.components)):
        assert other.caption(shown, resolution=16, **SETTINGS).texts == expected
    parts = {name: part for name, part in one.components.items() if not name.startswith("text_t") and part is not None}
    frames = OneDiffusionPipeline(**{name: part for name, part in parts.items() if name != "text_scheduler"})
    assert make(frames, [ImageFrame.clean(shown[0]), *asked]).texts == expected
    one.transformer.disable_lora()
    with pytest.raises(ValueError, match="enable_lora"):
        one.caption(shown)
    one.transformer.enable_lora()
    assert one.caption(shown, resolution=16, **SETTINGS).texts == expected
    one.transformer.delete_adapters(one.text_adapter)
    for write in (lambda: one.caption(shown), lambda: make(frames, [ImageFrame.clean(shown[0]), *asked])):
        with pytest.raises(ValueError, match="was removed"):
            write()


def test_a_batch_has_a_text_for_each_image_and_seed(pipe):
    two = images(2)
    whole = make(pipe, [ImageFrame.clean(two), TextFrame.ask(["a red", "a cube"], 8)], generator=seeded(1, 2))
    alone = [
        make(pipe, [ImageFrame.clean(image), TextFrame.ask(question, 8)], generator=seeded(n)).texts[0]
        for n, (image, question) in enumerate(zip(two, ["a red", "a cube"]), 1)
    ]
    assert whole.texts == alone
    copies = make(
        pipe, [ImageFrame.clean(two), TextFrame.generate(5)], num_images_per_prompt=2, generator=seeded(1, 1, 1, 1)
    )
    assert len(copies.texts) == 4 and copies.texts[0] == copies.texts[1]
    assert copies.latents.shape[:2] == (4, 1)


def test_callbacks_follow_the_steps_and_may_stop_them(pipe):
    steps = []

    def stop(owner, step, timestep, tensors):
        assert owner is pipe
        steps.append((step, sorted(tensors)))
        owner._interrupt = step == 1
        return {}

    shown = ImageFrame.clean(images()[0])
    options = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["block_x"]}
    make(pipe, [shown, TextFrame.generate(9)], num_inference_steps=8, **options)
    assert [step for step, _ in steps] == [0, 1] and steps[0][1] == ["block_x"]


def test_an_image_is_generated_together_with_its_text(pipe):
    both = make(pipe, [ImageFrame.generate(), TextFrame.generate()], generator=seeded(0)[0])
    assert len(both.images) == len(both.texts) == 1


def test_bad_frames_are_refused(pipe):
    shown = ImageFrame.clean(images()[0])
    cases = [
        ([TextFrame.ask("a red")], "a question needs the image"),
        ([TextFrame.generate()], "there is no image"),
        ([shown, TextFrame.fill("a cube")], "has no hole"),
        ([shown, TextFrame.fill("a [colour] cube")], r"unknown placeholder \[colour\]"),
        ([shown, TextFrame.ask(" ")], "is empty"),
        ([shown, TextFrame.ask("a\x07")], r"control character U\+0007"),
        ([shown, TextFrame.generate(LENGTH + 1)], "longer than the 12 that the model was trained on"),
        ([shown, TextFrame.ask("a red cube " * 9)], "leaves none for an answer"),
        ([shown, TextFrame.fill("a red [?] " * 9)], "max_length is 12"),
        ([shown, TextFrame(0, None, text="a [?]", question="a")], "not both"),
        ([shown, TextFrame.generate(adapter="x")], "leave it out"),
        (
            [shown, ImageFrame.generate("depth"), TextFrame.generate()],
            "about one frame of kind 'image', got image, depth",
        ),
        ([TextFrame.clean("a"), shown, TextFrame.generate()], "generate the image first"),
        ([TextFrame.clean("a"), TextFrame.clean("b"), ImageFrame.generate()], "several prompts"),
        ([TextFrame(3), ImageFrame.generate()], "says something"),
        ([ImageFrame.generate(), TextFrame.ask("a red")], "together with one whole text"),
    ]
    computed = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *args: computed.append(1))
    for frames, message in cases:
        with pytest.raises(ValueError, match=message):
            make(pipe, frames)
    hook.remove()
    assert not computed
    with pytest.raises(ValueError, match="leave latents out"):
        make(pipe, [shown, TextFrame.generate()], latents=torch.zeros(1, 1, 4, 8, 8))
    plain = pipeline()
    with pytest.raises(ValueError, match=r"no text head .*\('embedded'\)"):
        make(plain, [shown, TextFrame.generate()])


def test_questions_of_other_forms_are_refused(tmp_path):
    """By the folder's own list of forms."""
    questions = QuestionForms(("a {colour} cube?", "what {colour}?"), {"colour": ("red", "blue"), "side": ("left",)})
    pipe = OneDiffusionPipeline.from_pretrained(save_model(tmp_path / "model", questions))
    pipe.load_text_frames(tmp_path / "model" / "text_frames")
    assert pipe.text_questions == questions
    writer = ImageTextPipeline.from_pretrained(tmp_path / "model")
    writer.load_text_frames(tmp_path / "model" / "text_frames")
    for model in (pipe, writer):
        model.set_progress_bar_config(disable=True)
    shown = images()[0]
    assert len(writer.answer(shown, "A  red cube?", resolution=16, num_inference_steps=1).texts) == 1
    told = r"not trained to answer 'a cone\?'. It answers a \{colour\} cube\? what \{colour\}\? \(colour: red, blue\)$"
    with pytest.raises(ValueError, match=told):
        writer.answer(shown, ["a red cube?", "a cone?"])
    with pytest.raises(ValueError, match=told):
        make(pipe, [ImageFrame.clean(shown), TextFrame.ask("a cone?")])
    with pytest.raises(ValueError, match=r"unknown name in 'a \{color\}'.*colour"):
        QuestionForms(("a {color}",), {"colour": ("red",)})
    path = tmp_path / "model" / "text_frames" / "questions.json"
    for damaged in ('{"forms": ["a"]}', '{"forms": [1], "words": {}}', '{"forms": ["a"], "words": []}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"questions\.json does not hold forms of questions"):
            pipeline().load_text_frames(path.parent)


def test_a_claim_is_judged_by_what_its_answer_tells(tmp_path):
    """Behind "right" or "left", whichever it is; other questions and choices are scored as without confirmations."""
    forms = ("the {kind} {colour}?", "what {kind}?")
    words = {"kind": ("cube", "cone"), "colour": ("red", "blue")}
    questions = QuestionForms(forms, words, {forms[0]: "right a {colour} {kind}"})
    assert questions.confirmation("The  cone red?") == "right a red cone"
    assert questions.confirmation("what cube?") is None
    pipe = ImageTextPipeline.from_pretrained(save_model(tmp_path / "model", questions))
    pipe.set_progress_bar_config(disable=True)
    shown, asked, choices = images(3), ["the cube red?", "what cone?", "the cone blue?"], ["right", "left"]

    def scores(among=choices, **options):
        return pipe.choose(shown, asked, among, resolution=16, **options).log_likelihoods

    found = scores()
    call = pipe._options({"resolution": 16})
    reader_rows = question_rows(pipe._text_tokenizer, asked[:1], "{}", LENGTH, pipe.mask_token_id)
    reader = pipe._reader(reader_rows, pipe._encoded(pipe._images(shown[:1], call)), call)
    told = pipe._text_tokenizer("a red cube", add_special_tokens=False)["input_ids"] + [pipe._eos]
    grid, first, left, total = reader_rows.ids.clone(), reader_rows.starts[0] + 1, [0, 1, 2, 3], 0.0
    with torch.no_grad():
        while left:
            known = reader(grid).logits[0, first:].double().log_softmax(-1)
            best = max(left, key=lambda n: float(known[n, told[n]]))
            total += float(known[best, told[best]])
            grid[0, first + best] = told[best]
            left.remove(best)
    assert float(found[0, 0]) == pytest.approx(total, abs=1e-4)
    torch.testing.assert_close(found[[0, 2]].exp().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(scores(choices[::-1]).flip(1), found, rtol=0, atol=1e-4)
    alone = pipe.choose(shown[2], asked[2], choices, resolution=16).log_likelihoods
    torch.testing.assert_close(alone, found[2:], rtol=0, atol=1e-4)
    three = scores([*choices, "of"])
    with pytest.raises(ValueError, match="a choice of 5 with its end token exceed max_length=8"):
        scores(max_length=8)
    pipe.text_questions = None
    assert scores(max_length=8).shape == (3, 2)
    plain = scores()
    torch.testing.assert_close(plain[1], found[1], rtol=0, atol=1e-4)
    assert ((plain - found)[[0, 2]].abs() > 1e-2).all()
    torch.testing.assert_close(three[:, :2], plain, rtol=0, atol=1e-4)
    for wrong in ({"what?": "right"}, {forms[1]: "right {colour}"}):
        with pytest.raises(ValueError, match=r"unknown form with a confirmation|unknown name in 'right \{colour\}'"):
            QuestionForms(forms, words, wrong)


def test_a_pipeline_with_text_frames_is_not_saved(pipe, folder, tmp_path):
    pipe.load_text_frames(folder / "text_frames")
    with pytest.raises(ValueError, match="save the pipeline before load_text_frames"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_embedded_model_refuses_what_it_was_not_taught():
    """Its folder holds the forms of the questions of scenes; other words are refused by its tokenizer."""
    embedded = ImageTextPipeline.from_pretrained(SCENES)
    embedded.check_text_head()
    for kind in ANSWERS:
        for _, asked in heldout_questions(kind, 12):
            assert embedded.check_questions(asked.text) == [asked.text]
    for question in ("where is the cube?", "what is this?", "is there a cube?", "how many zebras are there?"):
        with pytest.raises(
            ValueError, match=r"not trained to answer .* It answers what object is it\? .*where is it\?"
        ):
            embedded.answer(None, question)
    assert embedded.check_fillings("a photo of a [?] [?2]")
    with pytest.raises(ValueError, match="never trained on 'zebra' in "):
        embedded.fill("a photo of a [?] zebra")


def test_the_embedded_model_writes_and_its_images_stay():
    embedded = ImageTextPipeline.from_pretrained(SCENES)
    embedded.set_progress_bar_config(disable=True)

    def image():
        options = {"num_inference_steps": 1, "output_type": "latent", "generator": seeded(0)[0]}
        return embedded("a red cube at night", **options).images

    before = image()
    scenes = [Scene.sample(seed, "heldout") for seed in range(4)]
    shown = [to_image(one) for one in render(scenes, 128).rgb]
    found = embedded.answer(shown, "how many objects are there?", num_inference_steps=8)
    assert found.texts == [{1: "one", 2: "two"}[len(scene.objects)] for scene in scenes]
    assert torch.equal(before, image())


def test_a_text_is_written_before_its_image_where_texts_read_clean_images_only(folder):
    pipe = ImageTextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "resolution": 16, "image_output": "pt"}
    found = pipe.joint(2, generator=seeded(1, 2), **options)
    assert found.images.shape == (2, 3, 16, 16) and found.texts[0] != found.texts[1]
    drawn = pipe(
        found.texts, height=16, width=16, num_inference_steps=4, generator=seeded(1, 2), output_type="pt"
    ).images
    assert drawn.shape == found.images.shape
    tokens = pipe.joint(1, generator=seeded(1)[0], output_type="seq", **options)
    assert tokens.texts is None and torch.equal(tokens.sequences, found.sequences[:1])
