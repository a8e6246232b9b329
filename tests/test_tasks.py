"""Tasks: which frames they are, what their prompts say, and what is refused."""

import pytest

from imgdit.tasks import (
    COLOURS,
    TASK_TOKENS,
    TASKS,
    ImageFrame,
    check_frames,
    frames_of_mask,
    hex_colour,
    infer_task,
    task_frames,
    task_prompt,
)


def told(frames) -> list[tuple[str, bool]]:
    return [(frame.kind, frame.is_clean) for frame in frames]


def test_every_task_of_the_scenes_is_one_of_ours():
    assert set(TASK_TOKENS) <= set(TASKS)
    assert all(TASKS[name].token == token for name, token in TASK_TOKENS.items())


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.frames == (2, 2)])
def test_a_pair_is_an_image_and_what_it_comes_from(name):
    kind = TASKS[name].condition
    assert told(task_frames(name, "condition")) == [("image", False), (kind, True)]
    assert told(task_frames(name, "photo", inverse=True)) == [("image", True), (kind, False)]


def test_identity_takes_one_to_three_references():
    for n in (1, 2, 3):
        assert told(task_frames("identity", ["face"] * n)) == [("image", False), *[("image", True)] * n]
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"takes 1 to 3 given image.* got {n}"):
            task_frames("identity", ["face"] * n)


@pytest.mark.parametrize(
    ("images", "cameras", "mask"),
    [
        (["a"], [1, 2, 3], [0, 0, 1, 0, 1, 0]),  # one image to three views
        ((), [1, 2], [1, 0, 1, 0]),  # text to views
        (["a", "b"], [1, None], [0, 0, 0, 1]),  # the second camera is to be found
        (["a", "b"], None, [0, 1, 0, 1]),  # both are
        ([None, "b"], [1, 2], [1, 0, 0, 0]),
    ],
)
def test_views_alternate_with_their_rays(images, cameras, mask):
    frames = task_frames("views", list(images), cameras=cameras)
    assert [frame.kind for frame in frames] == ["image", "rays"] * (len(mask) // 2)
    assert [int(not frame.is_clean) for frame in frames] == mask


def test_the_raw_form_fills_the_zeros_in_order():
    frames = frames_of_mask([1, 0, 0], ["a", "b"], kind="depth")
    assert [frame.content for frame in frames] == [None, "a", "b"]
    assert [frame.kind for frame in frames] == ["image", "depth", "depth"]
    frames = frames_of_mask([0, 0, 1, 0], ["a"], ["camera 0", "camera 1"])
    assert [frame.content for frame in frames] == ["a", "camera 0", None, "camera 1"]


@pytest.mark.parametrize(
    ("task", "frames", "item", "prompt"),
    [
        ("text_to_image", [ImageFrame.generate()], None, "[[text2image]] a cat"),
        ("depth", task_frames("depth", "x"), None, "[[depth2image]] a cat"),
        ("canny", task_frames("canny", "x", inverse=True), None, "[[canny2image]] a cat"),
        (
            "segmentation",
            task_frames("segmentation", "x", legend={"cat": "cyan", "sofa": "#12ab34"}),
            None,
            "[[semanticmap2image]] <#00FFFF cyan mask: cat> <#12AB34 mask: sofa> a cat",
        ),
        (
            "boxes",
            task_frames("boxes", "x", inverse=True, legend={"cat": "teal"}),
            None,
            "[[boundingbox2image]] <#008080 teal boundingbox: cat> a cat",
        ),
        ("subject", task_frames("subject", "x"), None, "[[subject_driven]] a cat"),
        (
            "subject",
            task_frames("subject", "x", captions=["a cat on a sofa"]),
            "cat",
            "[[subject_driven]] <item: cat> [[img0]] a cat [[img1]] a cat on a sofa",
        ),
        (
            "identity",
            task_frames("identity", ["x", "y"], captions=["a woman", "a woman in snow"]),
            None,
            "[[faceid]] [[img0]] a cat [[img1]] a woman [[img2]] a woman in snow",
        ),
    ],
)
def test_prompts_are_what_the_model_was_taught(task, frames, item, prompt):
    assert task_prompt(task, "a cat", frames, item) == prompt
    plain = [ImageFrame(frame.kind, frame.content) for frame in frames]
    assert task_prompt(task, prompt, plain) == prompt  # a raw prompt is taken as it is
    assert task_prompt(None, "anything", plain) == "anything"


def test_an_empty_caption_leaves_the_token_alone():
    assert task_prompt("views", "", task_frames("views", cameras=[1])) == "[[multiview]]"


def test_kinds_tell_the_task():
    assert infer_task([ImageFrame.generate()]) == "text_to_image"
    assert infer_task([ImageFrame.generate(), ImageFrame.clean("x", "hed")]) == "hed"
    assert infer_task(task_frames("views", cameras=[1])) == "views"
    assert infer_task([ImageFrame.generate(), ImageFrame.clean("x")]) is None
    condition = ImageFrame.clean("x", adapter="subject")
    assert infer_task([ImageFrame.clean("y"), ImageFrame.generate("depth"), condition]) == "depth"


def test_colours_are_the_published_twenty():
    assert len(COLOURS) == len(set(COLOURS.values())) == 20
    assert hex_colour("gold") == "#FFD700" and hex_colour("#ffd700") == "#FFD700"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: task_frames("dept", "x"), "'dept'; did you mean 'depth'"),
        (lambda: task_frames("depth", ["x", "y"]), "takes 1 given image.* got 2"),
        (lambda: task_frames("depth"), "takes 1 given image.* got 0"),
        (lambda: task_frames("text_to_image", "x"), "takes 0 given"),
        (lambda: task_frames("text_to_image", "x", inverse=True), "no inverse"),
        (lambda: task_frames("depth", "x", cameras=[1]), "cameras are for the task 'views'"),
        (lambda: task_frames("depth", "x", captions=["a"]), "captions of given images"),
        (lambda: task_frames("identity", ["x", "y"], captions=["a"]), "1 captions for 2 given"),
        (lambda: task_frames("depth", "x", legend={"cat": "cyan"}), "a legend belongs to"),
        (lambda: task_frames("segmentation", "x", legend={"cat": "cian"}), "'cian'; did you mean 'cyan'"),
        (lambda: task_frames("views", ["a", "b"], cameras=[1]), "2 images for 1 cameras"),
        (lambda: task_frames("views", ["a"], inverse=True), "views have no inverse"),
        (lambda: ImageFrame.generate("dpth"), "'dpth'; did you mean 'depth'"),
        (lambda: ImageFrame.clean(None), "needs its content"),
        (lambda: frames_of_mask([1, 0, 0], ["x"]), "2 places for images, got 1"),
        (lambda: frames_of_mask([1, 0], ["x", "y"]), "1 places for images, got 2"),
        (lambda: frames_of_mask([1, 0, 1, 0], (), ["c"]), "2 places for cameras, got 1"),
        (lambda: frames_of_mask([1, 2], ["x"]), "a 1 for each frame"),
        (lambda: check_frames("depth", [ImageFrame.clean("x", "depth"), ImageFrame.generate()]), "an image first"),
        (lambda: check_frames("depth", [ImageFrame.generate()]), "has 2 frames, got 1"),
        (lambda: check_frames("views", [ImageFrame.generate("rays"), ImageFrame.generate()]), "in this order"),
        (lambda: task_prompt("depth", "[[depth2img]] x", ()), r"'\[\[depth2img\]\]'; did you mean"),
        (lambda: task_prompt("depth", "[[canny2image]] x", ()), "the token of 'canny', but the frames are of 'depth'"),
        (lambda: task_prompt("subject", "[[subject_driven]] x", (), item="cat"), "write item and captions into it"),
        (lambda: task_prompt("depth", "x", (), item="cat"), "item names what the task 'subject' keeps"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
