"""Tab: texts that a masked language model continues or fills, with the order in which their tokens were revealed."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch

from imgdit.apps.demo import limits, widgets
from imgdit.apps.demo.holder import DEVICE, Holder
from imgdit.apps.session import Session
from imgdit.hub import INDEX
from imgdit.pipelines.masked_text import MaskedTextPipeline, MaskedTextPipelineOutput
from imgdit.pipelines.text_loading import HOLE, TEXT, load_text_pipeline, with_holes

LONGEST = 32
"""New tokens, and tokens of a block."""
EXAMPLES = (
    "a cartoon of",
    "a sketch of a red cube",
    "a _ of a red _ left of a blue _",
    "_ _ _ cone at night, neon style",
)


class Revealed(NamedTuple):
    """A text, and how it came about."""

    text: str
    tokens: list[str]
    """In their order, without end tokens."""
    order: list[int]
    """Of each token: the step that revealed it, from 1; 0 if it was given."""
    steps: int
    """Passes of the model."""


def text_folder(session: Session) -> Path | None:
    """Folder of the language model beside the demo's model; `None` if there is none."""
    model = session.shelf.places["model"]
    folder = None if model is None else Path(model) / TEXT
    return folder if folder is not None and (folder / INDEX).is_file() else None


@lru_cache(maxsize=1)
def _pipeline(folder: Path) -> MaskedTextPipeline:
    pipe = load_text_pipeline(folder)
    assert isinstance(pipe, MaskedTextPipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reveal(pipe: MaskedTextPipeline, prompt: str, length: int, block: int, temperature: float, seed: int) -> Revealed:
    """Continue a prompt, or fill its holes.

    Args:
        pipe: with a tokenizer.
        prompt: with words `_` for holes, or without.
        length: new tokens, where there are no holes.
        block: tokens that are revealed in any order before the next ones are.
        temperature: 0: the most probable tokens.
        seed: of the draws.
    """
    holes = HOLE in prompt.split()
    inputs = with_holes(pipe, prompt) if holes else prompt
    mask, steps = pipe.mask_token_id, 0
    revealed: dict[int, int] = {}

    def watch(pipe: Any, call: int, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps = call + 1
        for place in (tensors["block_x"][0] != mask).nonzero().flatten().tolist():
            revealed.setdefault(place, steps)
        return {}

    ids = pipe.tokenizer(inputs, return_tensors="pt")["input_ids"]
    known = (ids[0] != mask).nonzero().flatten().tolist()
    revealed.update(dict.fromkeys(known, 0))
    output = pipe(
        input_ids=ids, gen_length=0 if holes else length, block_length=block,
        num_inference_steps=int((ids == mask).sum()) if holes else block, temperature=temperature, threshold=2.0,
        generator=torch.Generator().manual_seed(seed), output_type="seq", return_dict=True,
        callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["block_x"],
    )  # fmt: skip
    assert isinstance(output, MaskedTextPipelineOutput)
    tokens = output.sequences[0].tolist()
    whole = tokens if holes else [*ids[0].tolist(), *tokens]
    special = set(pipe.tokenizer.all_special_ids)
    kept = [place for place, token in enumerate(whole) if token not in special]
    words = [str(pipe.tokenizer.decode([whole[place]])).strip() for place in kept]
    text = str(pipe.tokenizer.decode([whole[place] for place in kept]))
    return Revealed(text, words, [revealed.get(place, steps) for place in kept], steps)


def drawn(found: Revealed) -> str:
    """The tokens as HTML: each with its step below it, the later the darker; given ones are grey."""
    boxes = []
    for token, step in zip(found.tokens, found.order):
        shade = 0.12 + 0.68 * step / max(found.steps, 1)
        colour = f"rgba(13, 148, 136, {shade:.2f})" if step else "rgba(128, 128, 128, 0.18)"
        boxes.append(
            f'<span style="display:inline-block;margin:2px;padding:2px 6px;border-radius:4px;text-align:center;'
            f'background:{colour}">{html.escape(token)}<br><small>{step or "given"}</small></span>'
        )
    about = "The number below a word is the step that revealed it; the darker, the later."
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in history(found))
    shown = f'<div style="line-height:1.5">{"".join(boxes)}</div>'
    return f'{shown}<p class="note">{about}</p><p>After each step:</p><ol start="0">{lines}</ol>'


def history(found: Revealed) -> list[str]:
    """The text before the first step and after each; what is still masked is `_`."""
    lines = []
    for step in range(max(found.order, default=0) + 1):
        words = [token if when <= step else HOLE for token, when in zip(found.tokens, found.order)]
        lines.append(" ".join(words).replace(" ,", ","))
    return lines


def build(holder: Holder, folder: Path) -> None:
    """Lay the tab out, for the language model in a folder."""
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            text = gr.Textbox(
                label="Text", interactive=False, lines=3, elem_classes="answer",
                placeholder="Write the beginning of a caption below, or one with holes, and press Write.",
            )  # fmt: skip
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(EXAMPLES[2], f"Beginning of a caption, or with {HOLE} for words to fill")
                with gr.Column():
                    make = gr.Button("Write", variant="primary", min_width=80, elem_classes="make")
            order = gr.HTML(label="Order")
        with gr.Column(elem_classes="drawers"):
            widgets.chips(EXAMPLES, "Examples", prompt)
            with gr.Accordion("Sampling", open=True):
                length = gr.Slider(1, LONGEST, 24, step=1, label="New tokens, where there is nothing to fill")
                block = gr.Slider(1, LONGEST, 4, step=1, label="Tokens of a block; 1 writes from left to right")
                temperature = gr.Slider(0, 2, 0.7, step=0.1, label="Temperature")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)

    @limits.refusing(status)
    def write(
        prompt: str, length: int, block: int, temperature: float, seed: int, person: gr.Request
    ) -> Iterator[tuple[str, str, str]]:
        """Continue the beginning of a caption, or fill its holes.

        Args:
            prompt: the beginning, or a caption whose words to fill are _.
            length: new tokens, where there is nothing to fill.
            block: tokens that are revealed in any order before the next ones are.
            temperature: 0: the most probable tokens.
            seed: of the draws.

        Returns:
            the text, its tokens with the steps that revealed them as HTML, and how far it is.
        """
        inputs = limits.text(prompt)
        numbers = (
            limits.whole(length, "the number of new tokens", 1, LONGEST),
            limits.whole(block, "the tokens of a block", 1, LONGEST),
            float(limits.number(temperature, "the temperature", 0, 2)),
            limits.whole(seed, "the seed", 0, 2**31 - 1),
        )
        with holder.busy(person):
            found = reveal(_pipeline(folder), inputs, *numbers)
        yield found.text, drawn(found), f"Done in {found.steps} steps."

    gr.on(
        [make.click, prompt.submit], write, [prompt, length, block, temperature, seed],
        [text, order, status], api_name="write", trigger_mode="once", **DEVICE,
    )  # fmt: skip
