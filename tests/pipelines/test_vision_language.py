"""`VisionLanguagePipeline`: batches, padding, cache, seeds, drafts, ends, choices, files, and what it refuses."""

import json
import shutil

import pytest
import torch
from tiny_vision import SPECIAL, make_projector, make_tower, make_vision_pipe, noise_image
from transformers import PreTrainedTokenizerFast
from vision_cases import FIXTURES

import imgdit
from imgdit.images.tiles import Video
from imgdit.models.image_rows import join_rows
from imgdit.models.masked_text_passes import sees_prefix
from imgdit.models.vision_language import load_vision_language
from imgdit.pipelines.dialogues import SYSTEM
from imgdit.pipelines.vision_language import LaViDaPipeline, LLaDAVPipeline, VisionLanguagePipeline
from imgdit.pipelines.vision_language_loading import load_vision_language_pipeline

IMAGES = [noise_image(40, 30, 1), noise_image(31, 77, 2), noise_image(60, 40, 3)]
QUESTIONS = ["What is it?", "How many objects are there?", "red?"]
SHORT = {"gen_length": 8, "eos_early_stop": False}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipe():
    return make_vision_pipe(reveal="shift")


RUNS = {
    "plain": {},
    "blocks": {"block_length": 4},
    "guided": {"guidance_scale": 2.0},
    "prompt": {"cache": "prompt"},
    "guided, prompt": {"cache": "prompt", "guidance_scale": 2.0},
    "prefix": {"cache": "prefix"},
    "drawn": {"temperature": 1.0},
    "suffix": {"suffix": " The answer is"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_is_answered_as_one_by_one(pipe, name):
    options = SHORT | RUNS[name]
    alone = [
        pipe(image, question, generator=seeded(n), **options)
        for n, (image, question) in enumerate(zip(IMAGES, QUESTIONS))
    ]
    together = pipe(IMAGES, QUESTIONS, generator=seeded(0, 1, 2), **options)
    assert torch.equal(together.sequences, torch.cat([one.sequences for one in alone]))
    assert together.texts == [one.texts[0] for one in alone]
    assert len({tuple(row) for row in together.sequences.tolist()}) > 1  # images and questions matter


def test_rows_may_have_no_image_or_several(pipe):
    rows = [None, [IMAGES[0], IMAGES[1]], IMAGES[2]]
    alone = torch.cat([pipe([row], "What?", **SHORT).sequences for row in rows])
    assert torch.equal(pipe(rows, "What?", **SHORT).sequences, alone)
    video = pipe(Video([IMAGES[0], IMAGES[1]]), "What?", **SHORT).sequences
    assert video.shape == (1, 8)
    passes = []
    hook = pipe.vision_tower.register_forward_pre_hook(
        lambda module, args, options: passes.append(options["pixel_values"]), with_kwargs=True
    )
    several = pipe(IMAGES[0], QUESTIONS, **SHORT).sequences
    hook.remove()
    assert len(passes) == 1 and len(passes[0]) == 5  # tiles of one image
    assert torch.equal(several[1:2], pipe(IMAGES[0], QUESTIONS[1], **SHORT).sequences)
    said = pipe([rows[1]], "Between <image> and <image>?", **SHORT).sequences
    assert not torch.equal(said, alone[1:2])


def test_the_cached_prompt_is_its_mask(pipe):
    """Every pass of a run with the cache has the logits of one pass over everything with LaViDa's mask."""
    found = []
    pipe(
        IMAGES[0], "What is it?", cache="prompt", callback_on_step_end_tensor_inputs=["block_x", "sampled_probs"],
        callback_on_step_end=lambda pipe, step, timestep, given: found.append(given), **SHORT,
    )  # fmt: skip
    rows = pipe._rows([IMAGES[0]], "What is it?", None, None)
    prompts = pipe._see(rows, 8)
    length = prompts.ids.shape[1]
    grid = torch.cat([prompts.ids, torch.full((1, 8), SPECIAL["mask"])], 1)
    embeds = pipe.model.get_input_embeddings()(grid)
    embeds[:, :length][prompts.images.places] = prompts.images.vectors[prompts.images.places]
    logits = pipe.model(inputs_embeds=embeds, attention_mask=sees_prefix(torch.tensor([length]), length + 8)).logits
    best = logits[:, length:].double().softmax(-1)
    best[..., SPECIAL["mask"]] = 0
    torch.testing.assert_close(found[0]["sampled_probs"], best.max(-1).values.float(), rtol=0, atol=1e-5)
    assert len(found) == 4  # half as many steps as tokens


def test_seeds_and_callbacks(pipe):
    options = SHORT | {"temperature": 1.0}
    first, again, other = (
        pipe(IMAGES[0], "What?", generator=torch.Generator().manual_seed(seed), **options).sequences
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    seen = []
    pipe(
        IMAGES[0], "What?", suffix="!", callback_on_step_end_tensor_inputs=["answer"],
        callback_on_step_end=lambda pipe, step, timestep, given: seen.append(given["answer"].clone()), **SHORT,
    )  # fmt: skip
    masks = [int((answer == SPECIAL["mask"]).sum()) for answer in seen]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0 and seen[0].shape[1] > 8


def test_an_end_token_in_a_draft_does_not_cut_off_what_is_known_behind_it(pipe):
    tokenizer, steps = pipe.tokenizer, []
    others = [token for token in range(len(tokenizer)) if token != SPECIAL["eot"]]
    found = pipe(
        IMAGES[0], "Fill it.", draft="a <|mdm_mask|> cube", gen_length=9, block_length=3, forbidden_tokens=others,
        callback_on_step_end=lambda *given: steps.append(given),
    )  # fmt: skip
    assert found.texts[0].split()[0] == "a" and found.texts[0].endswith("cube")
    known = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a ", " cube")]
    assert len(steps) < 9 - sum(map(len, known)), "the first end token behind the draft ends the answer"


def test_drafts_keep_what_they_say(pipe):
    tokenizer = pipe.tokenizer
    draft = "a <|mdm_mask|> cube <|reserved_token_1|> the river"
    row = pipe(IMAGES[0], "Fill it.", draft=draft, gap_length=3, eos_early_stop=False).sequences[0].tolist()
    words = tokenizer(draft, add_special_tokens=False)["input_ids"]
    gap = words.index(SPECIAL["fim"])
    spread = [*words[:gap], *[SPECIAL["mask"]] * 3, *words[gap:]]
    assert len(row) == len(spread) and SPECIAL["mask"] not in row
    assert all(got == want for got, want in zip(row, spread) if want != SPECIAL["mask"])
    both = pipe(IMAGES[:2], "Fill it.", draft=["a", "the red"], gen_length=6, eos_early_stop=False).sequences
    for answer, said in zip(both.tolist(), ("a", "the red")):
        begun = tokenizer(said, add_special_tokens=False)["input_ids"]
        assert answer[: len(begun)] == begun and len(answer) == 6
    text = pipe(IMAGES[0], "Fill it.", draft=draft, gap_length=3).texts[0]
    assert "reserved" not in text and text.startswith("a")
    with pytest.raises(ValueError, match="give gen_length"):
        pipe(IMAGES[:2], "Fill it.", draft=["a", "a red cube"])
    with pytest.raises(ValueError, match="a draft has token 352"):
        pipe(IMAGES[0], "Fill it.", draft=torch.full((1, 3), 352))
    with pytest.raises(ValueError, match=r"of the draft\), got True"):
        pipe(IMAGES[0], "What?", gen_length=True)
    with pytest.raises(ValueError, match="at least 3"):
        pipe(IMAGES[0], "Fill it.", draft=torch.full((1, 3), 5), gen_length=2)


def test_stop_strings_and_ends(pipe):
    whole = pipe(IMAGES[0], "What?", **SHORT)
    stop = pipe.tokenizer.decode(whole.sequences[0, 4])
    stopped = pipe(IMAGES[0], "What?", stop_strings=stop, **SHORT)
    place = pipe.tokenizer.decode(whole.sequences[0]).index(stop)
    assert stopped.texts[0] == whole.texts[0][:place]
    ends = whole.sequences[0].tolist().index(whole.sequences[0, 4])
    assert torch.equal(stopped.sequences[0, :ends], whole.sequences[0, :ends])
    assert (stopped.sequences[0, ends:] == SPECIAL["eos"]).all()
    draft = torch.tensor([[70, SPECIAL["eot"], SPECIAL["mask"], SPECIAL["mask"]]])
    steps = []
    ended = pipe(IMAGES[0], "What?", draft=draft, callback_on_step_end=lambda *given: steps.append(given))
    assert len(steps) == 1 and ended.texts == [pipe.tokenizer.decode(70)]
    assert SPECIAL["eos"] in ended.sequences[0] and SPECIAL["mask"] not in ended.sequences[0]


def test_llada_v_leaves_ends_of_texts_out():
    owner = make_vision_pipe(LLaDAVPipeline)
    assert owner.forbidden_tokens == tuple(SPECIAL[name] for name in ("eos", "bos", "start_header", "end_header"))
    with torch.no_grad():
        owner.model.lm_head.weight[SPECIAL["eos"]] *= 50
    found = owner(IMAGES[0], "What?", **SHORT).sequences
    assert not torch.isin(found, torch.tensor(owner.forbidden_tokens)).any()
    assert (owner(IMAGES[0], "What?", forbidden_tokens=(), **SHORT).sequences == SPECIAL["eos"]).any()


@pytest.mark.parametrize("cache", [None, "prompt"])
def test_choices_are_scored_by_their_likelihood(pipe, cache):
    found = pipe.choose(IMAGES, "Is it red?", ["red", "a ball", "."], cache=cache)
    assert found.log_likelihoods.shape == (3, 3) and found.best == found.log_likelihoods.argmax(1).tolist()
    alone = pipe.choose(IMAGES[1], "Is it red?", ["red", "a ball", "."], cache=cache)
    torch.testing.assert_close(alone.log_likelihoods, found.log_likelihoods[1:2], rtol=0, atol=1e-4)
    if cache is None:  # two tokens: the answer and the end; the first pass has both masked
        token = pipe._ids(".")[0]
        rows = pipe._rows([IMAGES[0]], "Is it red?", None, None)
        run = pipe._prepare(
            pipe._see(rows, 2), torch.full((1, 2), SPECIAL["mask"]), torch.zeros(1, 0, dtype=torch.long),
            *_options_of(pipe), (), None, (),
        )  # fmt: skip
        run.passes.begin(run.prompt_length, run.prompt_length + 2)
        first = run.passes(run.grid).double().log_softmax(-1)[0, [0, 1], [token, SPECIAL["eot"]]]
        best = int(first.argmax())
        run.grid[0, run.prompt_length + best] = (token, SPECIAL["eot"])[best]
        other = 1 - best
        second = run.passes(run.grid).double().log_softmax(-1)[0, other, (token, SPECIAL["eot"])[other]]
        torch.testing.assert_close(found.log_likelihoods[0, 2], first[best] + second, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least two choices"):
        pipe.choose(IMAGES, "Is it red?", ["red"])


def test_captions_and_answers_are_calls(pipe):
    options = {"gen_length": 4}
    assert pipe.caption(IMAGES, **options).texts == pipe(IMAGES, "Describe the image in detail.", **options).texts
    assert pipe.answer(IMAGES, QUESTIONS, **options).texts == pipe(IMAGES, QUESTIONS, **options).texts
    chat = [{"role": "user", "content": "<image>\nWhat is it?"}]
    said = pipe(IMAGES[0], messages=chat, **options).sequences
    assert torch.equal(said, pipe(IMAGES[0], "What is it?", **options).sequences)
    whole = [{"role": "system", "content": SYSTEM}, *chat]
    assert torch.equal(said, pipe(IMAGES[0], messages=[whole], **options).sequences)


@pytest.mark.parametrize("owner", [LaViDaPipeline, LLaDAVPipeline])
def test_saved_pipelines_are_loaded_as_they_were(owner, tmp_path):
    projector = make_projector(most_tiles=1, pool_stride=2)
    pipe = make_vision_pipe(owner, projector, reveal="shift", shift=3.0)
    pipe.save_pretrained(tmp_path)
    loaded = load_vision_language_pipeline(tmp_path)
    assert type(loaded) is owner and loaded.scheduler.config.shift == 3.0
    loaded.set_progress_bar_config(disable=True)
    for image in IMAGES:
        assert torch.equal(loaded(image, "What?", **SHORT).sequences, pipe(image, "What?", **SHORT).sequences)
    again = imgdit.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is owner
    parts = load_vision_language(tmp_path)
    assert torch.equal(parts.projector.image_newline, pipe.projector.image_newline)


@pytest.fixture
def published(tmp_path):
    """A copy of a published folder and of its tower's."""
    for name in ("model", "siglip-tiny"):
        shutil.copytree(FIXTURES / "lavida" / name, tmp_path / name)
    return tmp_path


def change(file, **values):
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **values}))


def test_published_folders_make_pipelines(published):
    pipe = load_vision_language_pipeline(published / "model")
    assert type(pipe) is LaViDaPipeline and pipe.scheduler.config.reveal == "shift"
    assert pipe.scheduler.config.shift == pytest.approx(1 / 3) and pipe.mask_token_id == SPECIAL["mask"]
    assert pipe.projector.config.pool_stride == 2 and pipe.vision_tower.config.num_hidden_layers == 2
    other = load_vision_language_pipeline(FIXTURES / "llada_v/model")
    assert type(other) is LLaDAVPipeline and other.projector.config.most_tiles == 4
    change(published / "model/config.json", mm_vision_tower="elsewhere")
    named = load_vision_language_pipeline(published / "model", vision_tower=published / "siglip-tiny")
    assert torch.equal(named.projector.image_newline, pipe.projector.image_newline)


def test_the_tower_may_be_beside_only(published):
    """Without the tower's weights in the model's folder those of its own folder are taken."""
    from safetensors.torch import load_file, save_file

    file = published / "model/model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, file, metadata={"format": "pt"})
    inside = load_vision_language(FIXTURES / "lavida/model").vision_tower
    beside = load_vision_language(published / "model").vision_tower
    assert all(map(torch.equal, inside.encoder.parameters(), beside.encoder.parameters()))
    (published / "siglip-tiny/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither .*model .* nor .*siglip-tiny .* has weights of the vision tower"):
        load_vision_language(published / "model")


def test_folders_that_lack_something_are_refused(published):
    model = published / "model"
    shutil.move(published / "siglip-tiny", published / "hidden")
    with pytest.raises(ValueError, match=r"model/config.json names the vision tower 'siglip-tiny', which is neither"):
        load_vision_language_pipeline(model)
    shutil.move(published / "hidden", published / "siglip-tiny")
    (model / "tokenizer.json").rename(model / "hidden.json")
    with pytest.raises(ValueError, match=r"model has no tokenizer"):
        load_vision_language_pipeline(model)
    (model / "hidden.json").rename(model / "tokenizer.json")
    config = json.loads((published / "siglip-tiny/config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (published / "siglip-tiny/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is \(.*32.*\), expected \(.*64.*\); are these weights of its size"):
        load_vision_language_pipeline(model)
    config["vision_config"]["hidden_size"] = 32
    (published / "siglip-tiny/config.json").write_text(json.dumps(config))
    change(model / "config.json", image_grid_pinpoints=[[3840, 3840]])
    with pytest.raises(ValueError, match=r"model/config.json: a grid of 3840x3840 pixels is 100 tiles"):
        load_vision_language_pipeline(model)
    change(model / "config.json", image_aspect_ratio="round")
    with pytest.raises(ValueError, match=r"model/config.json: expected image_aspect_ratio .*'round'"):
        load_vision_language_pipeline(model)
    change(model / "config.json", model_type="llava_qwen")
    with pytest.raises(ValueError, match="model_type 'llava_qwen'"):
        load_vision_language_pipeline(model)


def test_parts_of_different_models_are_refused(pipe):
    parts = {name: getattr(pipe, name) for name in ("model", "vision_tower", "projector", "scheduler", "tokenizer")}
    with pytest.raises(ValueError, match="vision_tower is of 20 features, the projector is made for 16"):
        LaViDaPipeline(**parts | {"vision_tower": make_tower(20)})
    small = make_vision_pipe().model
    small.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"tokens up to 332, the language model .* has embeddings of 300"):
        LaViDaPipeline(**parts | {"model": small})
    other = PreTrainedTokenizerFast.from_pretrained(FIXTURES / "lavida/model")
    model = make_vision_pipe().model
    model.config.mask_token_id = 5
    with pytest.raises(ValueError, match=r"the mask token is 327 in the tokenizer .* and 5 in the model"):
        LaViDaPipeline(**parts | {"model": model, "tokenizer": other})


def test_images_and_prompts_that_do_not_fit_are_refused(pipe, tmp_path):
    noise_image(190, 2).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line.png': an image of 190x2 pixels is too narrow"):
        pipe.caption(tmp_path / "line.png")
    noise_image(1, 1).save(tmp_path / "dot.png")
    for width, height in ((20_000, 10), (10, 20_000)):
        noise_image(width, height).save(tmp_path / "strip.png")
        with pytest.raises(ValueError, match=rf"strip.png' has {width}x{height} pixels; .* at most 100 times"):
            pipe.answer(tmp_path / "strip.png", "What is it?")
    with pytest.raises(ValueError, match=r"dot.png' has 1x1 pixels"):
        pipe.caption([IMAGES[0], tmp_path / "dot.png"])
    with pytest.raises(ValueError, match=r"there is no image .*none.png"):
        pipe.caption(tmp_path / "none.png")
    with pytest.raises(ValueError, match="images for 3 rows and 2 prompts"):
        pipe(IMAGES, ["a", "b"])
    with pytest.raises(ValueError, match="say <image> 2 times, for 1 images"):
        pipe(IMAGES[0], "<image> or <image>?")
    with pytest.raises(ValueError, match="one of prompt, messages and input_ids"):
        pipe(IMAGES[0])
    with pytest.raises(ValueError, match="prompt 0 has token 352"):
        pipe(IMAGES[0], input_ids=[[352, -200]])
    with pytest.raises(ValueError, match="prompt 0 has mask tokens"):
        pipe(IMAGES[0], "Fill <|mdm_mask|>.")
    with pytest.raises(ValueError, match=r"exceed the model's 512 positions"):
        pipe([[*IMAGES] * 16], "What?", gen_length=8)
    with pytest.raises(ValueError, match="role must be one of"):
        pipe(IMAGES[0], messages=[{"role": "robot", "content": "?"}])
    with pytest.raises(ValueError, match="has 2 images and 1 places"):
        join_rows([[5, -200]], [[3, 4]], 0)
    assert issubclass(LaViDaPipeline, VisionLanguagePipeline)


def _options_of(pipe):
    """Options of one greedy block, and the mask token."""
    from imgdit.pipelines.masked_text_inputs import TextOptions

    options = TextOptions(
        2, 1, 0.0, None, None, "greedy", 2.0, None, 0, 1, 1.0, None, None, (), (), False, False, None, "seq"
    )
    return options, pipe.mask_token_id
