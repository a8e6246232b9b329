import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from imgdit.pipelines.texts import BYTES, unknown_words
from imgdit.scenes.answers import NOTHING, SLOTS, SceneCaptions, answers
from imgdit.scenes.captions import words
from imgdit.scenes.tokenizer import caption_tokenizer
from imgdit.scenes.world import Scene
from imgdit.tasks import TASK_TOKENS, task_caption

TOKENIZER = caption_tokenizer()


def test_every_sentence_of_the_grammar_is_whole_words():
    dataset = SceneCaptions()
    for i in range(300):
        caption, _ = dataset[i]
        tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(caption).input_ids)
        task = tokens[:1] if tokens[0] in TASK_TOKENS.values() else []
        assert [t for t in tokens if t.isalpha()] == words(caption.removeprefix("".join(task)))
        assert tokens[-1] == "</s>" and not set(tokens) & {*BYTES, "<unk>"}
        assert unknown_words(TOKENIZER, caption) == []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_no_prompt_fails(text):
    ids = TOKENIZER(text).input_ids
    assert ids[-1] == TOKENIZER.eos_token_id and TOKENIZER.unk_token_id not in ids


def test_unknown_words_are_spelled_and_named():
    prompt = "A red zebra über a RED cube, zebra 猫"
    assert unknown_words(TOKENIZER, prompt) == ["zebra", "über", "猫"]
    assert TOKENIZER.decode(TOKENIZER("a red cube, neon style").input_ids, skip_special_tokens=True) == (
        "a red cube, neon style"
    )
    assert TOKENIZER("RED").input_ids == TOKENIZER("red").input_ids


def test_tokenizer_survives_a_folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a red cube left of a zebra", "", "猫 🙂"):
        assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.pad_token == "<pad>" and loaded.model_max_length == 128


@pytest.mark.parametrize("split", ["train", "heldout", "heldout_triples"])
def test_answers_say_what_the_scene_is(split):
    for seed in range(60):
        scene = Scene.sample(seed, split)
        said = {slot: names[i] for (slot, names), i in zip(SLOTS.items(), answers(scene))}
        order = [scene.objects[i] for i in scene.order]
        assert (said["left object"], said["left colour"]) == (order[0].kind, order[0].colour)
        assert (said["right object"] == NOTHING) == (said["right colour"] == NOTHING) == (len(order) == 1)
        if len(order) == 2:
            assert (said["right object"], said["right colour"]) == (order[1].kind, order[1].colour)
        assert (said["style"], said["background"], said["task"]) == (scene.style, scene.background, NOTHING)
    assert SceneCaptions(split=split)[7] == SceneCaptions(first_seed=3, split=split)[4]


def test_tasks_are_one_token_each():
    for task, token in TASK_TOKENS.items():
        ids = TOKENIZER(task_caption("a red zebra", task)).input_ids
        assert TOKENIZER.convert_ids_to_tokens(ids)[0] == token and len(set(ids) & {TOKENIZER.unk_token_id}) == 0
        assert unknown_words(TOKENIZER, task_caption("a red zebra", task)) == ["zebra"]
        assert task_caption("", task) == token
    said = {slot: names[i] for (slot, names), i in zip(SLOTS.items(), answers(None, task="depth"))}
    assert said.pop("task") == "depth" and set(said.values()) == {NOTHING}
    unsaid = answers(Scene.sample(1), left_out=("place",))
    assert SLOTS["background"][unsaid[5]] == NOTHING and SLOTS["style"][unsaid[4]] == Scene.sample(1).style
