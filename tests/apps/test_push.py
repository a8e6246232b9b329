"""Weights to the Hub and back, by a Hub in a folder."""

import json

import pytest
import torch
from hub_stub import HubStub
from PIL import Image
from tiny import tiny_pipeline
from tiny_control import flux, image, lora_file, make
from typer.testing import CliRunner

import imgdit
from imgdit import CardDetails, Condition, DiffusionPipeline, OmniControl
from imgdit.apps.chores.sharing import last_metrics
from imgdit.apps.cli import app
from imgdit.lora.files import AdapterInfo, adapter_pairs, read_info
from imgdit.pipelines.sharing import push_pipeline


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return HubStub(tmp_path / "hub", monkeypatch)


def same(model, other):
    pairs, others = adapter_pairs(model, "edges"), adapter_pairs(other, "edges")
    return pairs.keys() == others.keys() and all(torch.equal(pairs[n].up, others[n].up) for n in pairs)


def test_an_adapter_comes_back_from_the_hub(hub, tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    info = AdapterInfo(task="canny", position="aligned", base_model="someone/base")
    control.load(lora_file(tmp_path / "edges.safetensors", pipe.transformer, info=info), adapter_name="edges")
    details = CardDetails(licence="mit", metrics={"F1": 0.5}, recipe="steps: 1", image=Image.new("RGB", (4, 4)))
    url = control.push_to_hub("me/edges", "edges", details, private=True, message="first")
    assert url == "https://huggingface.co/me/edges"
    assert hub.messages == ["first"] and hub.private == {"me/edges": True}
    text = (hub.snapshot("me/edges") / "README.md").read_text()
    for part in ('control.load("me/edges", adapter_name="edges")', '"someone/base"', "license: mit", "| F1 | 0.5 |"):
        assert part in text, part
    other = OmniControl(flux())
    report = other.load("me/edges", adapter_name="edges")
    assert report.info.licence == "mit" and report.info.task == "canny" and same(pipe.transformer, other.transformer)
    with control.use([Condition(image(), "edges")]), other.use([Condition(image(), "edges")]):
        assert torch.equal(make(pipe), make(other.pipe))


def test_adapters_of_own_pipelines_load_by_their_method(hub, tmp_path):
    pipe = tiny_pipeline()
    info = AdapterInfo(base_model="embedded")
    pipe.load_control(lora_file(tmp_path / "edges.safetensors", pipe.transformer, info=info), adapter_name="edges")
    pipe.push_control("me/edges", "edges")
    text = (hub.snapshot("me/edges") / "README.md").read_text()
    assert "from_pretrained(SCENES)" in text and "import SCENES" in text and 'pipe.load_control("me/edges"' in text
    other = tiny_pipeline()
    other.load_control("me/edges", adapter_name="edges")
    assert same(pipe.transformer, other.transformer)
    with pytest.raises(ValueError, match="no adapter"):
        pipe.push_control("me/edges", "nothing")


def test_a_pipeline_comes_back_from_the_hub(hub):
    pipe = tiny_pipeline()
    push_pipeline(pipe, "me/pipe", CardDetails(description="Tiny."))
    text = (hub.snapshot("me/pipe") / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("me/pipe")' in text and "from imgdit import" in text and "Tiny." in text
    again = DiffusionPipeline.from_pretrained("me/pipe")
    assert type(again) is imgdit.ImgDiTPipeline
    weights, before = again.transformer.state_dict(), pipe.transformer.state_dict()
    assert all(torch.equal(weights[name], before[name]) for name in before)


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_the_command_pushes_a_lora_file_and_a_folder(hub, tmp_path):
    pipe = tiny_pipeline()
    file = lora_file(tmp_path / "edges.safetensors", pipe.transformer, info=AdapterInfo(task="canny"))
    done = push(file, "me/edges", "--license", "mit", "--base-model", "someone/base")
    assert done.exit_code == 0 and "huggingface.co/me/edges" in done.output, done.output
    info = read_info(hub.snapshot("me/edges") / "edges.safetensors")
    assert (info.licence, info.base_model) == ("mit", "someone/base")
    pipe.save_pretrained(tmp_path / "pipe")
    assert push(tmp_path / "pipe", "me/pipe").exit_code == 0
    assert (hub.snapshot("me/pipe") / "model_index.json").is_file()
    done = push(tmp_path / "pipe", "me/pipe", "--out", tmp_path / "x")
    assert done.exit_code == 0 and len(hub.messages) == 2
    for source, name, said in ((tmp_path, "me/x", "no folder of a run"), (file, "x", "owner/name")):
        done = push(source, name)
        assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split()), done.output


def test_the_command_without_a_hub_says_one_sentence(tmp_path):
    file = lora_file(tmp_path / "edges.safetensors", tiny_pipeline().transformer)
    done = push(file, "me/edges")
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert "nothing was uploaded to me/edges" in " ".join(done.output.replace("│", " ").split())


def test_metrics_of_a_run_are_its_last_ones(tmp_path):
    lines = [{"step": 1, "loss": 2.0, "seconds": 3.0}, {"step": 2, "loss": 1.0, "note": "x"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert last_metrics(tmp_path) == {"step": 2, "loss": 1.0}
    assert last_metrics(tmp_path / "nothing") == {}
