"""Commands say what they mean to say, and no other library speaks in between."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from readme import command_line
from tiny_control import flux, lora_file, sd3, with_texts
from tiny_images import write_folder

from imgdit.lora.files import AdapterInfo

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "1"]
OPTIONS = {name: QUICK for name in ("generate", "control", "any", "unlearn", "caption", "answer")}
OPTIONS |= {"train": ["--stop-at", "1"]}
LONG = ("demo", "sae")
"""Groups of README's commands that take minutes, or end with Ctrl-C."""
OURS = (r"condition_lora: step 1 of 400, loss \d\.\d{4}",)
"""What is meant to be said on the standard error stream."""


def spoken(commands, folder):
    """What commands say on the standard error stream, without the lines of `OURS`."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/apps/silent_commands.py"],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in OURS)]


def on_a_folder_of_diffusers(make, folder):
    """Commands on a tiny pipeline with two adapters, which they make in a folder."""
    pipe = with_texts(make())
    pipe.save_pretrained(folder / make.__name__)
    for name in ("canny", "depth"):
        file = folder / make.__name__ / f"adapters/{name}.safetensors"
        lora_file(file, pipe.transformer, r".*attn\.to_[qkv]", info=AdapterInfo(task=name))
    given = ["--with", "canny=scene.png", "--with", "depth=scene.png"]
    return [
        [*command, "--model", make.__name__, "--out", f"{make.__name__}-{command[0]}.png", *QUICK]
        for command in (["generate", "a cube"], ["control", "a cube", *given])
    ]


def test_nobody_else_speaks(tmp_path):
    words = [shlex.split(line, comments=True)[1:] for line in command_line().splitlines()]
    commands = [[*one, *([] if "--like" in one else OPTIONS.get(one[0], []))] for one in words if one[0] not in LONG]
    names = {"generate", "control", "any", "unlearn", "train", "doctor", "models", "caption", "answer"}
    assert {one[0] for one in commands} == names
    (tmp_path / "prompts.jsonl").write_text('a red cube\n{"prompt": "a yellow cone at night"}\n')
    write_folder(tmp_path / "training_images", 8, size=(128, 128), conditions=True)
    lines = tmp_path / "training_images/metadata.jsonl"
    lines.write_text(lines.read_text().replace("grey_file_name", "canny_file_name"))  # OpenCV may not be there
    commands += [*on_a_folder_of_diffusers(flux, tmp_path), *on_a_folder_of_diffusers(sd3, tmp_path)]
    assert spoken(commands, tmp_path) == []
