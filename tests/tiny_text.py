"""A tiny masked language model and its tokenizer of words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY, MASK, EOS = 40, 39, 38
WORDS = {f"w{n}": n for n in range(36)} | {"user": 36, "assistant": 37, "<eos>": EOS, "<|mdm_mask|>": MASK}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def make_model(kind: str = "llama", **changes):
    torch.manual_seed(0)
    config, owner = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48, "is_causal": False,
        "mask_token_id": MASK, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None,
        "initializer_range": 0.4, "logit_shift": kind == "dream",
    }  # fmt: skip
    return owner(config(**settings | changes)).eval()


def make_tokenizer(template: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As LLaDA's: the mask token is not registered as one.
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="w0")
    made.chat_template = TEMPLATE if template else None
    return made
