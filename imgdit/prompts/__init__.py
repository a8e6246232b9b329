"""How free-form prompts become captions of the kind that a model was trained on.

A model that was trained on captions of a small grammar keeps the facts about them with its tokenizer
(`tokenizer_config.json`, key `prompt_words`); `PromptWords` reads them. A model without such facts takes any prompt.
"""

from __future__ import annotations

from imgdit.prompts.facts import PromptWords
from imgdit.prompts.reader import Note, Reading, read_prompt, remark

__all__ = ["Note", "PromptWords", "Reading", "read_prompt", "remark"]
