"""Sheets of samples with their conditions, drawn while a model trains, and folders of other trainers."""

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from tiny_images import image
from typer.testing import CliRunner

from imgdit import Frame, FrameLayout
from imgdit.apps.chores import user_sheet
from imgdit.apps.cli import app
from imgdit.io.checkpoints import find_checkpoint, read_tensors
from imgdit.training import loop, sampling
from imgdit.training.batches import Batch, Text


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_velocities_lead_back_to_the_image(monkeypatch, shift):
    """With v = (x - data) / sigma, Euler's steps are exact; conditions stay clean at level 0."""
    layout = FrameLayout.build([Frame((2, 3)), Frame((2, 3), sigma=0.0, adapter="a")], 1)
    data = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def velocity(model, tokens, text, sigmas, layout, guidance):
        assert torch.equal(tokens[:, 6:], data[:, 6:]) and not sigmas[:, 1].any()
        seen.append(float(sigmas[0, 0]))
        return (tokens[:, :6] - data[:, :6]) / sigmas[:, :1, None]

    monkeypatch.setattr(sampling, "predict_velocity", velocity)
    batch = Batch(data, layout, Text(torch.zeros(2, 1, 8), torch.zeros(2, 8)))
    generator = torch.Generator().manual_seed(1)
    found = sampling.sample_first_frame(torch.nn.Identity(), batch, steps=4, generator=generator, shift=shift)
    torch.testing.assert_close(found, data[:, :6])
    assert seen == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25)])


def test_a_run_on_a_folder_of_another_trainer_draws_sheets(tmp_path, monkeypatch):
    """With them the weights are the same to the bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_sheet, "STEPS", 2)
    tiny_pipeline().save_pretrained("model")
    for name in ("2_cube/a.png", "b.png", "control/a.png", "control/b.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(len(name), (32, 32)).save(path)
        path.with_suffix(".txt").write_text("a red cube")
    fields = ["run.steps=2", "run.mixed_precision=no", "model.pretrained=model", "schedule.warmup=0"]
    fields += ["data.arguments.model=model", "data.arguments.base=32", "data.arguments.samples=3"]
    fields += ["data.arguments.condition=depth", "data.arguments.preprocessor=null", "run.tracker=tensorboard"]

    def run(folder, *more):
        words = [word for field in (*fields, *more) for word in ("--set", field)]
        done = CliRunner().invoke(
            app, ["train", "own/condition_lora", "--from-kohya", "images", "--folder", folder, *words]
        )
        assert done.exit_code == 0, done.output
        return read_tensors(find_checkpoint(folder) / "model.safetensors")

    drawn, plain = run("drawn", "run.sample_every=1"), run("plain")
    assert all(torch.equal(drawn[name], plain[name]) for name in plain) and drawn.keys() == plain.keys()
    sheets = sorted((tmp_path / "drawn/samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000001.png", "step-00000002.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width == 3 * 32 + 2 * 8  # condition, generated, image, and the margins
    logged = list((tmp_path / "drawn").rglob("events.out.tfevents*"))
    assert any(b"samples" in path.read_bytes() for path in logged)
    assert not (tmp_path / "plain/samples").exists()


def test_a_folder_that_is_not_there_is_named():
    done = CliRunner().invoke(app, ["train", "own/condition_lora", "--from-comfy", "nowhere"])
    assert done.exit_code == 2 and "no folder 'nowhere' of images" in " ".join(done.output.replace("│", " ").split())


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(ImportError, match=f"run.tracker is '{name}', which is not installed: pip install"):
            loop._trackers(name)
    assert loop._trackers("auto") == loop._trackers("none") == []
