"""Published language models as stock transformers models, against recorded numbers of their own code."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from imgdit.models.masked_lm import load_masked_lm

FIXTURES = Path(__file__).parents[1] / "parity" / "llada"
TOLERANCE = 1e-4  # the fixture's, for logits and hidden states
CASES = {case["id"]: case for case in json.loads((FIXTURES / "cases.json").read_text())["cases"]}
DREAM = {case["id"]: case for case in json.loads((FIXTURES / "dream_cases.json").read_text())["cases"]}


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


@cache
def model(name: str):
    return load_masked_lm(FIXTURES / name)


def recorded(name: str, case: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{case}/"): value for key, value in tensors(name).items() if key.startswith(f"{case}/")}


def compare(output, found: dict[str, torch.Tensor], real: torch.Tensor) -> None:
    """Logits and hidden states of the real tokens (B, L)."""
    torch.testing.assert_close(output.logits[real], found["logits"][real], rtol=0, atol=TOLERANCE)
    for n, hidden in enumerate(output.hidden_states):
        if f"hidden_states.{n}" in found:
            torch.testing.assert_close(hidden[real], found[f"hidden_states.{n}"][real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case["kind"] == "forward"])
@torch.no_grad()
def test_llada_computes_what_its_own_code_does(case):
    found = recorded("cases", case)
    given = {name: found[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in found}
    if "attention_bias" in found:
        given["attention_mask"] = found["attention_bias"]
    output = model(CASES[case]["checkpoint"])(**given, output_hidden_states=True)
    compare(output, found, torch.ones(output.logits.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("case", [name for name, case in DREAM.items() if case["kind"] == "dream_forward"])
@torch.no_grad()
def test_dream_computes_what_its_own_code_does(case):
    found = recorded("dream_cases", case)
    given = {name: found[name] for name in ("input_ids", "attention_mask", "position_ids") if name in found}
    output = model("dream")(**given, output_hidden_states=True)
    compare(output, found, found.get("attention_mask", torch.ones_like(found["input_ids"])).bool())


@pytest.mark.parametrize("name", ["mha", "gqa", "dream"])
@torch.no_grad()
def test_plain_transformers_loads_what_is_saved(name, tmp_path):
    ours = model(name)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = load_masked_lm(tmp_path)
    assert type(theirs) is type(ours) and theirs.config.mask_token_id == ours.config.mask_token_id
    ids = torch.arange(10)[None]
    assert torch.equal(theirs(ids).logits, ours(ids).logits) and torch.equal(again(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_shards_and_half_precision(tmp_path):
    weights = load_file(FIXTURES / "mha" / "model.safetensors")
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves):
        save_file(half, tmp_path / name, {"format": "pt"})
    table = {key: name for name, half in zip(names, halves) for key in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (tmp_path / "config.json").write_text((FIXTURES / "mha" / "config.json").read_text())
    ids = torch.arange(10)[None]
    assert torch.equal(load_masked_lm(tmp_path)(ids).logits, model("mha")(ids).logits)
    assert load_masked_lm(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def folder(tmp_path: Path, **changes) -> Path:
    """The `mha` folder with a changed configuration."""
    values = json.loads((FIXTURES / "mha" / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / "mha" / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "alibi is True; the published LLaDA checkpoints have False"),
        ({"mask_token_id": ...}, "names no mask_token_id"),
        ({"mask_token_id": 160}, "mask_token_id is 160, the vocabulary has 160 entries"),
        ({"n_layers": 4}, "lacks 9 of the weights"),
        ({"d_model": ...}, "neither d_model"),
        ({"rope_theta": ..., "n_heads": ...}, "lacks n_heads, rope_theta"),
        ({"model_type": "llada_moe"}, "mixture of experts .* MaskedTextPipeline"),
        ({"model_type": "llada2_moe"}, "causal over blocks of 32 tokens .*LLaDA2Pipeline"),
    ],
)
def test_foreign_folders_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_masked_lm(folder(tmp_path, **changes))


def test_a_mixture_of_experts_is_read_by_its_own_class_where_there_is_one(tmp_path, monkeypatch):
    class MoEConfig(LlamaConfig):
        model_type = "llada2_moe"

    class MoE(LlamaForCausalLM):
        config_class = MoEConfig

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llada2_moe", MoEConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, MoEConfig, MoE)
    kept = MoE(MoEConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    kept.save_pretrained(tmp_path)
    found = load_masked_lm(tmp_path, mask_token_id=7)
    assert type(found) is MoE and not found.training and found.config.mask_token_id == 7
    assert torch.equal(found.lm_head.weight, kept.lm_head.weight)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_masked_lm(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_masked_lm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="must hold an object"):
        load_masked_lm(tmp_path)
    with pytest.raises(ValueError, match="there is no folder 'nowhere/nothing' here"):
        load_masked_lm("nowhere/nothing")
