"""Tab: what a model says of an image: captions, answers, and which of some answers is most likely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import gradio as gr
import torch
from PIL import Image

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.holder import DEVICE, Holder
from imgdit.apps.session import Session
from imgdit.pipelines.image_text import ImageTextPipeline
from imgdit.pipelines.image_text_loading import length_option, load_image_text_pipeline
from imgdit.pipelines.text_frames import find_text_frames
from imgdit.pipelines.text_to_image import ImgDiTPipeline

TITLE = "Caption & Ask"
LONGEST = 256
"""Tokens."""
LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches: who asks there may read its folders anyway."""
NO_MODEL = "this demo's model writes no texts about images; name the folder of one that does"
OWN_ONLY = "this demo answers by its own model alone; a demo that listens at this machine alone takes others"


class Ask(NamedTuple):
    """What other tabs use of this one."""

    image: widgets.Upload


def writes(session: Session) -> bool:
    """Whether the demo's own model writes texts about images."""
    pipe = session.pipe
    if not isinstance(pipe, ImgDiTPipeline):
        return False
    return bool(pipe.transformer.config.get("text_vocab_size")) or find_text_frames(pipe) is not None


def build(holder: Holder, takes_models: bool) -> Ask:
    """Lay the tab out.

    Args:
        takes_models: people may name a folder or Hub repository of another model.
    """
    own = writes(holder.session)
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="pair"):
                image = widgets.upload("Image", height=None, classes=["source"])
                with gr.Column():
                    said = gr.Textbox(
                        label="Caption", interactive=False, lines=3, elem_classes="answer",
                        placeholder="Give an image and press Caption.",
                    )  # fmt: skip
                    answer = gr.Textbox(
                        label="Answer", interactive=False, lines=3, elem_classes="answer",
                        placeholder="Write a question, or take one of the list, and press Ask.",
                    )  # fmt: skip
                    likely = gr.Label(label="How likely each answer is", visible=False)
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                question = widgets.prompt_box(label="Question", lines=1)
                with gr.Column():
                    ask = gr.Button("Ask", variant="primary", min_width=80, elem_classes="make")
                    caption = gr.Button("Caption", size="sm", min_width=80)
        with gr.Column(elem_classes="drawers"):
            if holder.examples:
                gr.Examples([[file] for file in holder.examples], [image], label="Example images")
            widgets.chips(examples.texts(holder.session).questions, "Questions", question)
            choices = widgets.prompt_box(label="Answers to choose among, commas between them (may be empty)", lines=1)
            with gr.Accordion("Model and sampling", open=False):
                model = widgets.prompt_box(
                    label="Model: a folder or Hub id" + ("; empty: this demo's own" if own else ""), lines=1
                )
                model.visible = takes_models
                length = gr.Slider(0, LONGEST, 0, step=1, label="Tokens at most; 0: the model's own number")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
    handlers = _Handlers(holder, own, takes_models)
    given = [model, length, seed]
    caption.click(
        limits.refusing(status)(handlers.caption), [image, *given], [said, status],
        api_name="caption", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    gr.on(
        [ask.click, question.submit], limits.refusing(status)(handlers.ask), [image, question, choices, *given],
        [answer, likely, status], api_name="ask", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    return Ask(image)


class _Handlers:
    """What the buttons of the tab do.

    Args:
        holder: of the demo's model.
        own: that one writes.
        takes_models: others may be named.
    """

    def __init__(self, holder: Holder, own: bool, takes_models: bool):
        self.holder, self.own, self.takes_models = holder, own, takes_models
        self._loaded: tuple[str, Any] | None = None

    def caption(
        self, image: str | None, model: str, length: int, seed: int, person: gr.Request
    ) -> Iterator[tuple[Any, str]]:
        """Say what an image shows.

        Args:
            image: to look at.
            model: folder or Hub id of a model that writes; empty: the demo's own.
            length: tokens at most; 0: the model's own number.
            seed: of the draws.

        Returns:
            the caption, and how far it is.
        """
        shown, name, tokens, number = self._given(image, model, length, seed, person)
        yield gr.skip(), "Reading the image."
        with self._pipe(name, person) as pipe:
            text = _text(pipe.caption([shown], **_options(pipe, tokens, number)))
        yield text, "Done." if text else "The model wrote nothing."

    def ask(
        self, image: str | None, question: str, choices: str, model: str, length: int, seed: int, person: gr.Request
    ) -> Iterator[tuple[Any, Any, str]]:
        """Answer a question about an image, or say how likely some answers are.

        Args:
            image: to look at.
            question: about it.
            choices: answers to choose among, commas between them; empty: the model writes one.
            model: folder or Hub id of a model that writes; empty: the demo's own.
            length: tokens at most; 0: the model's own number.
            seed: of the draws.

        Returns:
            the answer, the probability of each choice, and how far it is.
        """
        shown, name, tokens, number = self._given(image, model, length, seed, person)
        asked = limits.text(question, "the question")
        if not asked:
            raise limits.Refused("write a question, or press Caption")
        among = [one.strip() for one in limits.text(choices, "the answers").split(",") if one.strip()]
        if len(among) == 1:
            raise limits.Refused("give two answers or more to choose among, or none")
        yield gr.skip(), gr.skip(), "Reading the image."
        with self._pipe(name, person) as pipe:
            if among:
                found = pipe.choose([shown], asked, among)
                chances = dict(zip(among, found.log_likelihoods.softmax(1)[0].tolist()))
                text = among[found.best[0]]
            else:
                chances, text = {}, _text(pipe.answer([shown], [asked], **_options(pipe, tokens, number)))
        yield text, gr.Label(chances or None, visible=bool(chances)), "Done." if text else "The model wrote nothing."

    def _given(
        self, image: str | None, model: str, length: int, seed: int, person: gr.Request
    ) -> tuple[Image.Image, str, int, int]:
        """What both need, checked."""
        shown = limits.image(image)
        if shown is None:
            raise limits.Refused("upload an image first, or take one from the examples")
        name = limits.text(model, "the model")
        if name and not (self.takes_models and _is_here(person)):
            raise limits.Refused(OWN_ONLY)
        if not name and not self.own:
            raise limits.Refused(NO_MODEL)
        tokens = limits.whole(length, "the number of tokens", 0, LONGEST)
        return shown, name, tokens, limits.whole(seed, "the seed", 0, 2**31 - 1)

    @contextmanager
    def _pipe(self, name: str, person: gr.Request) -> Iterator[Any]:
        """The model while it is this person's turn; the last one that was named stays loaded."""
        session = self.holder.session
        with self.holder.busy(person):
            if not name and isinstance(session.pipe, ImageTextPipeline):
                yield session.pipe
                return
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # two large models may not fit
                # Of its own: text frames change a transformer, and images must stay what they are.
                pipe = load_image_text_pipeline(name or str(session.shelf.places["model"]), session.loading)
                pipe.set_progress_bar_config(disable=True)
                self._loaded = (name, pipe)
            yield self._loaded[1]


def _is_here(person: gr.Request) -> bool:
    """Whether a request came to this machine's own address, not to one that a proxy passes on."""
    return urlsplit(f"//{person.headers.get('host', '')}").hostname in LOCAL


def _options(pipe: Any, tokens: int, seed: int) -> dict[str, Any]:
    generator = [torch.Generator().manual_seed(seed)]
    return {"generator": generator, **length_option(pipe, tokens or None)}


def _text(output: Any) -> str:
    return " ".join(output.texts[0].split())
