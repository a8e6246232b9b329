"""The folder of a model's text frames: what reads and writes text beside a transformer that was trained without it.

adapter.safetensors   LoRA on the rows of the text
head.safetensors      text head and embeddings of its tokens
tokenizer/            with a mask token
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from imgdit import compat
from imgdit.lora.dialects import LoraPair
from imgdit.lora.files import (
    AdapterInfo,
    adapter_pairs,
    attach_adapter,
    legal_name,
    loaded_adapters,
    read_adapter,
    write_adapter,
)
from imgdit.models.mmdit import MMDiT
from imgdit.models.text_head import load_text_head, save_text_head

FOLDER = "text_frames"
"""Where it lies in a pipeline's folder."""
ADAPTER, HEAD, TOKENIZER = "adapter.safetensors", "head.safetensors", "tokenizer"


def find_text_frames(pipe: Any) -> Path | None:
    """The folder beside a pipeline's parts, of which the transformer knows where it is from; `None`: there is none."""
    source = pipe.transformer.config.get("_name_or_path")
    folder = None if not source else Path(source).parent / FOLDER
    return folder if folder is not None and (folder / HEAD).is_file() else None


def load_text_frames(pipe: Any, folder: str | Path) -> tuple[str, PreTrainedTokenizerBase]:
    """Give a pipeline's transformer a text head and the adapter that reads its texts. The adapter acts on texts that
    are generated and on nothing else: images stay bitwise what they are.

    Args:
        pipe: with an `MMDiT` without a text head.
        folder: see above.

    Returns:
        The adapter's name, and the tokenizer of the texts.

    Raises:
        ValueError: another transformer, or files of another model.
    """
    folder, model = Path(folder), compat.unwrapped(pipe.transformer)
    if not isinstance(model, MMDiT):
        raise ValueError(f"text frames are for MMDiT, got {type(model).__name__}")
    adapter = read_adapter(folder / ADAPTER)
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    load_text_head(model, folder / HEAD)
    name = legal_name(FOLDER, loaded_adapters(model))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    attach_adapter(model, adapter, name, pipeline=pipe)
    for parameter in model.parameters():
        # PEFT freezes the model, and torch has another kernel for norms whose weights are frozen.
        parameter.requires_grad_(id(parameter) in trained)
    return name, tokenizer


def save_text_frames(
    model: MMDiT, adapter: str, tokenizer: PreTrainedTokenizerBase, folder: str | Path, info: AdapterInfo | None = None
) -> None:
    """Write a folder of text frames, in half precision.

    Args:
        model: with a text head, and a LoRA of the name `adapter` that reads its texts.
        tokenizer: whose `model_max_length` says how many tokens a text may have.
        info: how the adapter was trained.
    """
    folder = Path(folder)
    pairs = {name: LoraPair(pair.down.half(), pair.up.half()) for name, pair in adapter_pairs(model, adapter).items()}
    write_adapter(folder / ADAPTER, pairs, info or AdapterInfo(task="text"))
    save_text_head(model, folder / HEAD)
    tokenizer.save_pretrained(folder / TOKENIZER)
