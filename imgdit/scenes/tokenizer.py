"""The tokenizers of scenes: a token for every word of captions, for every task, and for every word of questions; bytes
for all others."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from imgdit.pipelines.texts import BYTES
from imgdit.prompts.facts import KEY
from imgdit.scenes.captions import vocabulary
from imgdit.scenes.meanings import scene_facts
from imgdit.scenes.questions import NEW_WORDS
from imgdit.tasks import TASK_TOKENS

SPECIAL = ("<pad>", "</s>", "<unk>")


def caption_tokenizer(max_length: int = 128) -> PreTrainedTokenizerFast:
    """Lower-cased words and punctuation; a word outside `captions.vocabulary` becomes its UTF-8 bytes, so no prompt
    fails. It carries the facts by which `imgdit.prompts` reads free-form prompts.

    Args:
        max_length: tokens that a prompt may have.
    """
    names = [*SPECIAL, *BYTES, ",", *vocabulary()]
    # Without merges the model knows only whole words (`ignore_merges` looks them up first) and falls back to bytes.
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece(cleanup=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in TASK_TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        **{KEY: scene_facts()},
    )


def text_tokenizer(max_length: int = 128) -> PreTrainedTokenizerFast:
    """`caption_tokenizer` for language models: with a mask token, and a token that begins texts in the place of
    the one that ends them."""
    tokenizer = caption_tokenizer(max_length)
    tokenizer.init_kwargs.pop(KEY)
    tokenizer.add_special_tokens({"bos_token": "<s>", "mask_token": "<mask>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def question_tokenizer(max_length: int = 128) -> PreTrainedTokenizerFast:
    """`caption_tokenizer` with the tokens of `text_tokenizer`, and behind them those of questions and answers: the ids
    of all three agree. Texts end with the end token and begin with nothing."""
    tokenizer = text_tokenizer(max_length)
    ends = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    whole = [AddedToken(word, normalized=True, single_word=word.isalpha()) for word in NEW_WORDS]
    tokenizer.add_tokens(whole)
    return tokenizer
