"""`caption_all` of a folder, killed by SIGKILL at every file operation of its captions, and started again. Each job is
a fork of this process."""

import os
import signal
from pathlib import Path

import pytest
import torch
from dual_diffusion_cases import pipeline
from forks import forked
from tiny_vision import noise_image

from imgdit.apps.jobs import captions

COUNT, OPTIONS = 3, {"num_inference_steps": 1}


def folder(place: Path) -> Path:
    place.mkdir()
    for n in range(COUNT):
        noise_image(20 + n, 18, n).save(place / f"{n}.png")
    return place


def found(place: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(place.glob("*.txt"))}


def run(place: Path) -> None:
    torch.set_num_threads(1)
    list(captions.caption_all(place, "tiny", options=OPTIONS, length=8, batch=2))


def killed_at(place: Path, point: int) -> int:
    """Status of a job that dies in its operation number `point`: half of a caption written, or none of it moved."""
    calls = 0
    write, move = Path.write_text, Path.replace

    def die_at(after) -> None:
        nonlocal calls
        calls += 1
        if calls == point:
            after()
            os.kill(os.getpid(), signal.SIGKILL)

    def write_text(path, text, **options):
        die_at(lambda: write(path, text[: len(text) // 2], **options))
        return write(path, text, **options)

    def replace(path, target):
        die_at(lambda: None)
        return move(path, target)

    def work():
        Path.write_text, Path.replace = write_text, replace
        run(place)

    return forked(work)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_job_goes_on_without_loss(tmp_path, monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(captions, "load_image_text_pipeline", lambda *given: pipe)
    whole = folder(tmp_path / "whole")
    assert forked(lambda: run(whole)) == 0 and len(found(whole)) == COUNT
    point = 1
    while True:
        parts = folder(tmp_path / str(point))
        status = killed_at(parts, point)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        before = found(parts)
        assert len(before) < COUNT and before.items() <= found(whole).items()
        assert forked(lambda there=parts: run(there)) == 0 and found(parts) == found(whole)
        point += 1
    assert point - 1 == 6  # file operations
