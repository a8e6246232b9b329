"""imgdit as a plug-in of the installed eval-unlearn: its runner finds technique, data set and metric."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import eval_unlearn
import pytest
from eval_unlearn.registry import local
from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner
from PIL import Image

from imgdit.benchmarks.unlearning.eval_unlearn import ScenesMetric, UnlearningTechnique, load_scenes
from imgdit.benchmarks.unlearning.plan import cells
from imgdit.images import to_image
from imgdit.scenes.render import render
from imgdit.scenes.world import OBJECTS, STYLES, Scene, SceneObject

ROOT = Path(__file__).resolve().parents[2]
FEW = {"erase_concept": "neon", "styles": ["neon", "photo"], "objects": ["cube", "torus"]}


@pytest.fixture
def registered(monkeypatch):
    """What this package declares, as eval-unlearn registers it when the package is installed."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for kind in ("technique", "dataset", "metric"):
        (entry,) = groups[f"eval_unlearn.{kind}s"].items()
        module, _, name = entry[1].partition(":")
        monkeypatch.setitem(getattr(local, f"_{kind.upper()}S"), entry[0], getattr(import_module(module), name))


def test_its_runner_runs_ours(registered, tmp_path):
    technique = {"erase_concept": "neon", "num_inference_steps": 1, "guidance_scale": 1.5, "mode": "remove"}
    config = {**FEW, "batch_size": 3}
    report = SingleBenchmarkRunner("imgdit", "imgdit_scenes", technique, config, str(tmp_path)).run()
    result = report["metric_result"]
    assert result["details"]["images"] == 4 and 0 <= result["value"] <= 1
    scores = [result["details"][name] for name in ("UA", "IRA", "CRA")]
    assert result["value"] == pytest.approx(sum(scores) / 3)
    saved = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert [path.parts[-2] for path in saved] == ["retain"] * 2 + ["target"] * 2
    assert json.loads(next(tmp_path.rglob("*_report.json")).read_text())["erase_concept"] == "neon"


@pytest.mark.slow
def test_its_command_finds_and_runs_ours(tmp_path):
    """`eval-unlearn run` of a process that knows nothing but the metadata of the installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site" / "imgdit-0.0.dist-info"  # before the installed one, which may be older
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: imgdit\nVersion: 0.0\n")
    groups = {name: found for name, found in project["entry-points"].items() if name.startswith("eval_unlearn.")}
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in found.items()) for group, found in groups.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    technique = {"erase_concept": "neon", "num_inference_steps": 1, "guidance_scale": 1.5}
    config = {
        "output_dir": str(tmp_path / "results"),
        "technique": {"name": "imgdit", "config": technique},
        "metric": {"name": "imgdit_scenes", "config": FEW},
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    done = subprocess.run(
        [Path(sys.executable).with_name("eval-unlearn"), "run", "--config", tmp_path / "run.json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(metadata.parent), str(ROOT)]), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "results" / "imgdit_neon_latest_report.json").read_text())
    assert report["metric_result"]["details"]["images"] == 4
    assert len(list((tmp_path / "results").rglob("target/*.png"))) == 2


def test_images_do_not_depend_on_batches_and_differ_from_the_plain_ones():
    technique = UnlearningTechnique(erase_concept="neon, cube", num_inference_steps=1)
    prompts = ["a red cube, neon style", "a blue torus, neon style"]
    together = technique.generate(prompts)
    again = technique.generate(prompts[1:], seed=1)
    assert together[1].tobytes() == again[0].tobytes()
    assert technique.generate(prompts[1:])[0].tobytes() != again[0].tobytes()  # counted on: seed 3
    plain = UnlearningTechnique(erase_concept="", num_inference_steps=1)
    assert plain.generate(prompts)[0].tobytes() != together[0].tobytes()


def rendered(style, kind):
    return to_image(render([Scene((SceneObject(kind, "red"),), style=style)]).rgb[0])


def test_scores_of_true_scenes():
    """Renders of what was asked for: nothing is unlearned, everything else is kept; grey images: the reverse."""
    metric = ScenesMetric(**FEW, batch_size=2)
    for batch in metric.load_dataset():
        metric.update([rendered(*cell[:2]) for cell in batch.metadata["cells"]], batch.prompts, batch.metadata)
    details = metric.compute().details
    assert (details["UA"], details["IRA"], details["CRA"]) == (0.0, 1.0, 1.0)
    blank = ScenesMetric(**FEW)
    (batch,) = blank.load_dataset()
    blank.update([Image.new("RGB", (128, 128), "grey")] * 4, batch.prompts, batch.metadata)
    assert blank.compute().details["UA"] == 1.0
    with pytest.raises(ValueError, match="1 images of 4 prompts"):
        blank.update([Image.new("RGB", (128, 128))], batch.prompts, batch.metadata)
    with pytest.raises(ValueError, match="data set 'imgdit_scenes', got 'i2p'"):
        blank.update([], [], {"source": "i2p"})


def test_prompts_are_those_of_our_benchmark():
    batches = list(load_scenes(erase_concept="cube", seeds=2, batch_size=50))
    assert [prompt for batch in batches for prompt in batch.prompts] == [cell.prompt for cell in cells((188, 189))]
    categories = [category for batch in batches for category in batch.metadata["categories"]]
    assert categories.count("target") == 2 * len(STYLES) and len(categories) == 2 * len(STYLES) * len(OBJECTS)


@pytest.mark.parametrize(
    "make, config, said",
    [
        (UnlearningTechnique, {"erase_concept": "nudity"}, "nudity"),
        (UnlearningTechnique, {"erase_concept": "neon", "modes": "scale"}, "mode"),
        (UnlearningTechnique, {}, "erase_concept is missing"),
        (UnlearningTechnique, {"erase_concept": "neon", "model": "nobody/else"}, "sae must name"),
        (load_scenes, {"erase_concept": "dog"}, "style or object"),
        (ScenesMetric, {"erase_concept": "neon", "styles": ["photo", "sketch"]}, "must be asked for"),
        (ScenesMetric, {"erase_concept": "neon", "seeds": 0}, "at least 1, got 0"),
    ],
)
def test_configurations_that_are_refused(make, config, said):
    with pytest.raises(ValueError, match=said):
        make(**config)


@pytest.mark.parametrize(("version", "refused"), [("1.0.9", True), ("2.0.0", True), ("1.1", False), ("1.12b1", False)])
def test_other_versions_are_refused_before_anything_is_loaded(version, refused, monkeypatch):
    monkeypatch.setattr(eval_unlearn, "__version__", version)
    for make in (UnlearningTechnique, load_scenes, ScenesMetric):
        said = f"eval-unlearn {version} is installed" if refused else "erase_concept is missing"
        with pytest.raises(ValueError, match=re.escape(said)):
            make()
