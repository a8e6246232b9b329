"""Dialogues as tokens, against recorded ones of LLaDA-V and LaViDa."""

import pytest
from transformers import PreTrainedTokenizerFast
from vision_cases import CASES, FIXTURES, named, recorded

from imgdit.models.image_rows import IMAGE_PLACE
from imgdit.pipelines.dialogues import (
    SpecialTokens,
    caption_ids,
    check_messages,
    dialogue_ids,
    label,
    with_images,
)


def tokenizer_of(name):
    return PreTrainedTokenizerFast.from_pretrained(FIXTURES / CASES[name]["set"] / "model")


def messages_of(turns):
    """Messages of turns as LLaVA's files have them."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = turns[next(n for n, (who, _) in enumerate(turns) if who == "human") :]  # as published
    return check_messages([{"role": roles[who], "content": said} for who, said in turns])


@pytest.mark.parametrize("name", named("prompt"))
def test_prompts(name):
    options, want = CASES[name]["options"], recorded(name, "out")["input_ids"].tolist()
    tokenizer = tokenizer_of(name)
    messages = with_images(check_messages([{"role": "user", "content": options["question"]}]), 1)
    assert messages[0]["content"] == options["system"]
    assert dialogue_ids(tokenizer, messages, drops_line_break=True) == want
    kept = dialogue_ids(tokenizer, messages)
    assert len(kept) == len(want) + 1
    place = kept.index(IMAGE_PLACE) + 1
    assert kept[:place] + kept[place + 1 :] == want and tokenizer.decode(kept[place]) == "\n"


@pytest.mark.parametrize("name", named("labels"))
def test_labels(name):
    case, want = CASES[name], recorded(name, "out")
    tokenizer = tokenizer_of(name)
    if "caption" in case["options"]:
        ids, labels = caption_ids(tokenizer, case["options"]["caption"])
    else:
        messages = messages_of(case["options"]["conversation"])
        lavida = case["set"] == "lavida"
        messages = with_images(messages, 1) if lavida else messages
        ids = dialogue_ids(tokenizer, messages, answers=True)
        labels = label(tokenizer, ids, SpecialTokens.of(tokenizer), "answer" if lavida else "turns")
    assert ids == want["input_ids"].tolist()
    assert labels.targets == want["labels"].tolist()
    if "conversation_ids" in want:
        assert labels.turns == want["conversation_ids"].tolist()
