"""`imgdit write`, `imgdit embed`, `imgdit convert llada`, and the pipelines they load."""

import json

import pytest
import torch
from block_text_cases import FIXTURES as BLOCK_DIFFUSION
from masked_text_cases import FIXTURES as LLADA
from safetensors.torch import load_file
from tiny_text import make_model, make_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from imgdit import BlockTextPipeline, DiffusionPipeline, MaskedTextPipeline
from imgdit.apps.cli import app
from imgdit.benchmarks.scenes.language import caption_nats, perplexity
from imgdit.checkpoints import SCENES
from imgdit.models.masked_lm import load_masked_lm
from imgdit.models.text_embeddings import embed_texts
from imgdit.pipelines.text_loading import load_text_pipeline, with_holes
from imgdit.scenes.texts import SceneTexts
from imgdit.training.text_rows import collate_text_rows


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "llada"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_write_continues_prompts_by_their_own_seeds(folder):
    both = run("write", "w1 w2", "w3", "--model", folder, "--length", 6, "--steps", 3, "--seed", 4)
    alone = run("write", "w3", "--model", folder, "--length", 6, "--steps", 3, "--seed", 5)
    assert both.exit_code == 0, both.output
    first, second = both.stdout.splitlines()
    assert first.startswith("w1 w2 ") and alone.stdout.splitlines() == [second]


@pytest.mark.parametrize("command", [("write", "w1"), ("caption", "a.png"), ("answer", "a.png", "what is it?")])
def test_a_seed_beyond_those_of_generators_is_refused_before_loading(command):
    found = run(*command, "--seed", 2**63)
    assert found.exit_code == 2 and str(2**63 - 1) in "".join(found.output.replace("│", "").split())


def test_write_fills_holes_and_prints_json(folder):
    found = run("write", "w1 _ w2 _", "--fill", "--model", folder, "--json")
    words = json.loads(found.stdout)["text"].split()
    assert (words[0], words[2], len(words)) == ("w1", "w2", 4) and "_" not in words
    assert run("write", "w1 w2", "--fill", "--model", folder).exit_code == 2
    assert run("write", "w1 snake_case", "--fill", "--model", folder).exit_code == 2
    pipe = load_text_pipeline(folder)
    mask = pipe.tokenizer.convert_ids_to_tokens(pipe.mask_token_id)
    assert with_holes(pipe, "(_, w1\n\n_:  __ a_b_ _") == f"({mask}, w1\n\n{mask}:  __ a_b_ {mask}"


def test_embed_prints_similarities_and_writes_vectors(folder, tmp_path):
    shown = run("embed", "w1 w2", "w1 w2", "w30 w9 w4", "--model", folder)
    rows = [list(map(float, line.split()[:3])) for line in shown.stdout.splitlines()]
    assert rows[0][0] == rows[0][1] == 1.0 and rows[0][2] < 0.999
    long = run("embed", "w1", "w1 " * 1000, "--model", folder)
    assert long.exit_code == 2 and "text 1 has 1000 tokens" in " ".join(long.output.replace("│", " ").split())
    assert run("embed", "w1 w2", "w3", "--model", folder, "--out", tmp_path / "v.safetensors").exit_code == 0
    vectors = load_file(tmp_path / "v.safetensors")["embeddings"]
    assert vectors.shape == (2, 32) and torch.allclose(vectors.norm(dim=1), torch.ones(2))


def test_embeddings_do_not_depend_on_the_batch(folder):
    pipe = load_text_pipeline(folder)
    texts = ["w1", "w2 w3 w4 w5", "w6 w7"]
    together = embed_texts(pipe.model, pipe.tokenizer, texts)
    for text, vector in zip(texts, together):
        torch.testing.assert_close(embed_texts(pipe.model, pipe.tokenizer, [text])[0], vector, rtol=0, atol=1e-5)
    small = embed_texts(pipe.model, pipe.tokenizer, texts, batch_size=2)
    torch.testing.assert_close(small, together, rtol=0, atol=1e-5)


def test_convert_writes_a_folder_that_plain_transformers_loads(tmp_path):
    done = run("convert", "llada", LLADA / "mha", tmp_path / "out")
    assert done.exit_code == 0, done.output
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.is_causal is False
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, load_masked_lm(LLADA / "mha")(ids).logits)
    assert run("convert", "llada", LLADA / "mha", LLADA / "mha").exit_code == 2
    assert run("convert", "llada", tmp_path, tmp_path / "other").exit_code == 2


def test_saved_pipelines_and_published_folders_are_loaded(folder, tmp_path):
    pipe = load_text_pipeline(folder)
    assert isinstance(pipe, MaskedTextPipeline)
    pipe.save_pretrained(tmp_path / "pipe")
    assert isinstance(load_text_pipeline(tmp_path / "pipe"), MaskedTextPipeline)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "pipe"), MaskedTextPipeline)
    assert isinstance(load_text_pipeline(BLOCK_DIFFUSION / "bd3lm", tokenizer=folder), BlockTextPipeline)


def test_what_writes_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer"):
        load_text_pipeline(BLOCK_DIFFUSION / "bd3lm")
    with pytest.raises(ValueError, match="writes no text"):
        load_text_pipeline(SCENES)
    with pytest.raises(ValueError, match="no folder"):
        load_text_pipeline(tmp_path / "nothing")


def test_block_diffusion_has_no_holes_on_the_command_line(folder):
    options = ("--model", BLOCK_DIFFUSION / "bd3lm", "--tokenizer", folder)
    assert run("write", "w1 _", "--fill", *options).exit_code == 2
    assert run("embed", "w1", *options).exit_code == 2


def test_the_packaged_block_diffusion_writes_and_is_small():
    words = run("write", "a cartoon of", "--model", "blocks", "--seed", 3).stdout.split()
    assert words[:3] == ["a", "cartoon", "of"] and len(words) > 3 and not set(words) & {"<mask>", "</s>", "<s>"}
    pipe = load_text_pipeline("blocks")
    assert isinstance(pipe, BlockTextPipeline) and pipe.model.dtype == torch.float32
    rows = collate_text_rows([SceneTexts(100_000, "heldout", 32, False)[n] for n in range(8)])
    found = perplexity(caption_nats(pipe.model, rows, draws=1)["perplexity"], rows.counted[:, 1:].sum(1), rounds=2)
    assert found.value < 3.2  # 2.91; new weights: 360
    files = [file for file in (SCENES / "text").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20
    stored = load_file(SCENES / "text" / "blocks" / "model" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_the_packaged_model_writes_fills_and_embeds_captions():
    words = set(run("write", "a cartoon of", "--seed", 3).stdout.split())
    assert {"a", "cartoon", "of"} < words and not words & {"<mask>", "</s>", "<s>"}
    filled = run("write", "--fill", "a _ of a red _ left of a blue cube", "--temperature", 0).stdout.split()
    assert filled[4:] == ["red", filled[5], "left", "of", "a", "blue", "cube"] and "_" not in filled
    rows = run("embed", "a red cube at night", "at night, a red cube", "a blue cone by day").stdout.splitlines()
    close, far = (float(value) for value in rows[0].split()[1:3])
    assert close > far
