"""The nodes by ComfyUI's interface: what its server reads of a class, and how it runs a graph."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_control import TARGETS, flux, folder_of, image, lora_file, with_texts

from imgdit import Condition, DiffusionPipeline
from imgdit.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from imgdit.apps.comfyui.nodes import ApplyCondition, Generate, LoadConditionAdapter, Loaded, LoadPipeline, Unlearn
from imgdit.checkpoints import SCENES
from imgdit.lora.files import AdapterInfo, loaded_adapters
from imgdit.sae.unlearning import ConceptUnlearner

WORKFLOW = Path(__file__).resolve().parents[2] / "docs/examples/comfyui.json"
EDGES = image(size=128).movedim(0, -1)[None]  # (1, H, W, 3)


class LoadImage:
    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": (["edges.png"],)}}

    def load(self, image):
        return EDGES, torch.zeros(1, 128, 128)


class SaveImage:
    RETURN_TYPES, FUNCTION = (), "save"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {})}}

    def save(self, images, filename_prefix):
        return (images,)


NODES = {**NODE_CLASS_MAPPINGS, "LoadImage": LoadImage, "SaveImage": SaveImage}


def inputs_of(node):
    found = node.INPUT_TYPES()
    assert found.keys() <= {"required", "optional", "hidden"}
    return found["required"], found.get("optional", {})


def run(graph):
    """The outputs of a graph in the format of ComfyUI's API, whose links are [node, output]."""
    done = {}

    def outputs(name):
        if name not in done:
            node, given = NODES[graph[name]["class_type"]], {}
            required, optional = inputs_of(node)
            assert required.keys() <= graph[name]["inputs"].keys() <= required.keys() | optional.keys()
            for key, value in graph[name]["inputs"].items():
                kind = (required | optional)[key][0]
                if isinstance(value, list):
                    source, number = value
                    assert NODES[graph[source]["class_type"]].RETURN_TYPES[number] == kind
                    value = outputs(source)[number]
                elif isinstance(kind, list):
                    assert value in kind
                given[key] = value
            done[name] = getattr(node(), node.FUNCTION)(**given)
        return done[name]

    return {name: outputs(name) for name in graph}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_is_what_the_server_expects(name):
    node = NODE_CLASS_MAPPINGS[name]
    required, optional = inputs_of(node)
    for kind, *options in (required | optional).values():
        assert isinstance(kind, str) or (isinstance(kind, list) and kind)
        assert len(options) <= 1 and all(isinstance(one, dict) for one in options)
        if isinstance(kind, list):
            assert options[0]["default"] in kind
    json.dumps(node.INPUT_TYPES())  # the page asks for it
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES) and isinstance(node.RETURN_TYPES, tuple)
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    code = getattr(node, node.FUNCTION).__wrapped__ if name == "imgditGenerate" else getattr(node, node.FUNCTION)
    names = code.__code__.co_varnames[1 : code.__code__.co_argcount]
    assert list(names) == [*required, *optional] and len(code.__defaults__ or ()) == len(optional)
    assert node.CATEGORY == "imgdit" and node.DESCRIPTION and name in NODE_DISPLAY_NAME_MAPPINGS


def test_the_workflow_of_the_docs_equals_the_pipeline():
    graph = json.loads(WORKFLOW.read_text())
    graph["7"]["inputs"]["steps"] = 1
    (found,) = run(graph)["8"]
    assert found.shape == (1, 128, 128, 3) and found.dtype == torch.float32 and 0 <= found.min() <= found.max() <= 1
    pipe = DiffusionPipeline.from_pretrained(SCENES)
    pipe.load_control(SCENES / "adapters/canny.safetensors", adapter_name="canny")
    with ConceptUnlearner.from_pretrained(SCENES / "sae").attach(pipe, ["neon"]):
        expected = pipe(
            graph["7"]["inputs"]["prompt"],
            conditions=[Condition(EDGES[0].movedim(-1, 0), "canny")],
            num_inference_steps=1,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=0)


def test_conditions_in_a_stock_pipeline(tmp_path):
    """Chained, with a mask; nothing acts without them, and a node that runs again loads nothing twice."""
    pipe = with_texts(flux())
    folder_of(pipe, tmp_path / "flux")
    lora_file(tmp_path / "edges.safetensors", pipe.transformer, TARGETS, info=AdapterInfo(position="subject"))
    (loaded,) = LoadPipeline().load(str(tmp_path / "flux"), "fp32", "none", "none")
    given = {
        "prompt": "a cube",
        "negative_prompt": "",
        "width": 16,
        "height": 16,
        "steps": 2,
        "guidance": 1.0,
        "seed": 3,
    }
    plain = Generate().generate(loaded, **given)[0]
    pair = LoadConditionAdapter().load(loaded, str(tmp_path / "edges.safetensors"))
    again = LoadConditionAdapter().load(loaded, str(tmp_path / "edges.safetensors"))
    assert again[1] is pair[1] and loaded_adapters(loaded.pipe.transformer) == ["edges"]
    apply = ApplyCondition().apply
    picture = image().movedim(0, -1)[None]
    (first,) = apply(pair[1], picture, 1.0, 0.0, 1.0, "as trained", torch.ones(1, 16, 16))
    (both,) = apply(pair[1], picture, 0.5, 0.0, 1.0, "aligned", conditions=first)
    assert [one.position for one in both] == ["subject", "aligned"]
    assert not torch.equal(Generate().generate(loaded, **given, conditions=both)[0], plain)
    assert torch.equal(Generate().generate(loaded, **given)[0], plain)
    with pytest.raises(ValueError, match="one mask"):
        apply(pair[1], picture, 1.0, 0.0, 1.0, "as trained", torch.ones(2, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        apply(pair[1], picture[0], 1.0, 0.0, 1.0, "as trained")


def test_a_pipeline_without_conditions_says_so():
    with pytest.raises(ValueError, match="takes no conditions"):
        LoadConditionAdapter().load(Loaded(types.SimpleNamespace(), None), "edges.safetensors")


def test_progress_and_cancel_are_comfyuis(monkeypatch):
    """As its modules `comfy.utils` and `comfy.model_management` offer them."""
    steps, interrupted = [], [False]

    def check():
        if interrupted[0]:
            raise InterruptedError

    bar = types.SimpleNamespace(update=lambda n: steps.append(n))
    comfy = types.ModuleType("comfy")
    comfy.__spec__ = types.SimpleNamespace(name="comfy")
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    utils = types.SimpleNamespace(ProgressBar=lambda total: steps.append(total) or bar)
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    monkeypatch.setitem(
        sys.modules, "comfy.model_management", types.SimpleNamespace(throw_exception_if_processing_interrupted=check)
    )
    (loaded,) = LoadPipeline().load("embedded", "auto", "none", "none")
    given = {"prompt": "a cube", "negative_prompt": "", "width": 32, "height": 32, "guidance": 1.0, "seed": 0}
    Generate().generate(loaded, **given, steps=2)
    assert steps == [2, 1, 1]
    interrupted[0] = True
    with pytest.raises(InterruptedError):
        Generate().generate(loaded, **given, steps=2)


def test_unknown_concepts_are_refused_with_the_known_ones():
    (loaded,) = LoadPipeline().load("embedded", "auto", "none", "none")
    (edit,) = Unlearn().unlearn(ConceptUnlearner.from_pretrained(SCENES / "sae"), "neon, nen", "scale")
    with pytest.raises(ValueError, match="nen"):
        Generate().generate(loaded, "a cube", "", 32, 32, 1, 1.0, 0, unlearning=edit)
