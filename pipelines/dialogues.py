"""Dialogues about images as rows of tokens: prompts, and for training targets and turns.

Messages are `{"role": "user", "content": "<image>\\nWhat is it?"}`. The tokenizer's own chat template writes them; the
ids of special tokens are its too. LLaDA-V, arXiv 2505.16933; LaViDa, arXiv 2505.16839.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from imgdit.models.image_rows import IMAGE_PLACE
from imgdit.models.vision_language import MASK
from imgdit.naming import check_choice, shown

IMAGE = "<image>"
"""Stands in a message where an image goes."""
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""First message of every dialogue that the published models were trained on."""
ROLES = ("system", "user", "assistant")
GAP, FILL = "<|reserved_token_1|>", "<|reserved_token_2|>"
"""LaViDa's tokens that end a gap and that fill it up."""
START, END, TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
"""Around the role of a message, and behind a message."""
Targets = Literal["turns", "answer"]
NO_TARGET = -100

Message = Mapping[str, str]


class SpecialTokens(NamedTuple):
    """Ids of a tokenizer."""

    bos: int
    eos: int
    mask: int
    start: int
    end: int
    turn: int
    gap: int

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Those of a tokenizer.

        Raises:
            ValueError: it lacks one.
        """
        known = tokenizer.get_vocab()
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        wanted = (bos, eos, MASK, START, END, TURN, GAP)
        lacking = [name for name in wanted if name not in known]
        if lacking:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no token {lacking[0]!r}; expected the one of LLaDA, "
                "which comes with the model"
            )
        return cls(*(known[name] for name in wanted))


def check_messages(messages: Any) -> list[Message]:
    """A dialogue as it was given, with the published system message in front unless it has one.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(messages, Sequence) or not messages or isinstance(messages, str):
        raise ValueError(f"a dialogue is a list of messages with role and content, got {shown(messages)}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message has role and content, got {shown(message)}")
        check_choice("role", message["role"], ROLES)
        if not isinstance(message["content"], str):
            raise ValueError(f"the content of a message is a text, got {shown(message['content'])}")
    if messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": SYSTEM}, *messages]


def with_images(messages: Sequence[Message], images: int) -> list[Message]:
    """A dialogue whose first message of the user begins with its images, unless the texts say where they stand.

    Raises:
        ValueError: the texts name another number of them.
    """
    places = sum(message["content"].count(IMAGE) for message in messages)
    if places in (0, images) and any(message["role"] == "user" for message in messages):
        if places == images:
            return list(messages)
        first = next(n for n, message in enumerate(messages) if message["role"] == "user")
        placed = f"{IMAGE}\n" * images + messages[first]["content"]
        return [*messages[:first], {**messages[first], "content": placed}, *messages[first + 1 :]]
    raise ValueError(f"the messages say {IMAGE} {places} times, for {images} images; say it as often, or not at all")


def dialogue_ids(
    tokenizer: Any, messages: Sequence[Message], *, answers: bool = False, drops_line_break: bool = False
) -> list[int]:
    """Tokens of a dialogue, `IMAGE_PLACE` where an image stands.

    Args:
        answers: the dialogue holds its answers and ends with the last of them; otherwise the header of an answer
            follows.
        drops_line_break: leave out the first token behind the first image, as the published inference code does by
            mistake; training keeps it.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat_template; give input_ids")
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=not answers, tokenize=False)
    if answers:  # some templates append the header of an answer whatever they are asked
        text = text[: text.rindex(TURN) + len(TURN)]
    first, *others = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(IMAGE))
    row = list(first)
    for n, part in enumerate(others):
        row += [IMAGE_PLACE, *(part[1:] if drops_line_break and n == 0 else part)]
    return row


class Labels(NamedTuple):
    """What is learnt of a dialogue's tokens."""

    targets: list[int]
    """The token, or `NO_TARGET`."""
    turns: list[int]
    """Number of each token's turn, a question with its answer, from 0; system messages are of the first."""


def label(tokenizer: Any, ids: Sequence[int], special: SpecialTokens, targets: Targets) -> Labels:
    """Targets and turns of a dialogue with answers.

    Args:
        ids: of `dialogue_ids`.
        targets: "turns" (LLaDA-V): all tokens of the assistant's messages, and of the others the special ones;
            "answer" (LaViDa): the last message behind its header.
    """
    found = [NO_TARGET] * len(ids)
    marks = {special.bos, special.start, special.end, special.turn}
    turns, turn, answered, n = [], 0, False, 0
    last = None
    while n < len(ids):
        if ids[n] != special.start:
            turns.append(turn)
            n += 1
            continue
        header = ids.index(special.end, n) if special.end in ids[n:] else len(ids) - 1
        stop = ids.index(special.turn, header) + 1 if special.turn in ids[header:] else len(ids)
        role = tokenizer.decode(ids[n + 1 : header]).strip()
        if role == "user" and answered:
            turn, answered = turn + 1, False
        if role == "assistant":
            answered, last = True, (header + 1, stop)
            if targets == "turns":
                found[n:stop] = ids[n:stop]
        turns += [turn] * (stop - n)
        n = stop
    if targets == "turns":
        found = [token if token in marks else known for token, known in zip(ids, found)]
    elif last is not None:
        found[slice(*last)] = ids[slice(*last)]
    return Labels(found, turns)


def caption_ids(tokenizer: Any, caption: str) -> tuple[list[int], Labels]:
    """Tokens and labels of an image and its caption without a dialogue, by which projectors are trained first."""
    ids = tokenizer(f"{caption}\n", add_special_tokens=False)["input_ids"]
    return [IMAGE_PLACE, *ids], Labels([NO_TARGET, *ids], [0] * (len(ids) + 1))
