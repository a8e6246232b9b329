"""The commands that generate images: folders, controls, frames, and an image again from what it tells."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_control import flux, lora_file, sd3, with_texts
from tiny_runs import small_pipeline
from typer.testing import CliRunner

from imgdit import images
from imgdit.apps import session
from imgdit.apps.cli import app
from imgdit.apps.jobs.png import read_origin, write_png
from imgdit.apps.jobs.request import Control, Request, frame_row
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.images import fit, open_image
from imgdit.lora import files as lora_files
from imgdit.lora.files import AdapterInfo

QUICK = ["--steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a pipeline with a random adapter for depth."""
    folder = tmp_path_factory.mktemp("pictures")
    made = small_pipeline(folder)
    pipe = session.load_pipeline(made)
    (folder / "pipeline/adapters").mkdir()
    info = AdapterInfo(task="depth", mode="independent")
    lora_file(folder / "pipeline/adapters/near.safetensors", pipe.transformer, r".*attn\.to_[qkv]", info=info)
    return folder / "pipeline"


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


def photo(path, size=(128, 128)):
    Image.effect_noise(size, 80).convert("RGB").save(path)
    return path


@pytest.mark.parametrize(
    ("given", "made", "turn", "guidance"),
    [
        ((), (), False, 3.0),
        (("depth",), ("image",), False, 3.0),
        ((), ("image", "depth"), False, 3.0),
        (("image",), ("depth",), False, 1.0),
        (("image",), ("image",), True, 1.0),
        ((), ("image", "image"), True, 3.0),
    ],
)
def test_nothing_is_guided_that_a_given_image_tells(model, tmp_path, given, made, turn, guidance):
    image = Image.open(photo(tmp_path / "given.png"))
    cameras = [(0.0, 24.0), (30.0, 24.0)] if turn else []
    frames = frame_row([(kind, image) for kind in given], made, cameras) if given or made else ()
    one = session.Session(Shelf(model))
    assert one.settled(Request("a cone", frames=frames)).guidance == guidance
    assert one.settled(Request("a cone", frames=frames, guidance=2.0)).guidance == 2.0


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (["generate", "a red cube", "--negative", "blue", "--size", "64x96"], []),
        (["generate", "a red cube", "--control"], ["depth"]),
        (["control", "a red cube", "--strength", "0.5", "--end", "0.6", "--with"], ["depth"]),
        (["any", "--generate", "canny", "--condition"], ["image"]),
        (["any", "a cone", "--condition"], ["blur"]),
        (["any", "--camera", "0,24", "--camera", "30,24", "--condition"], ["image"]),
    ],
    ids=lambda value: " ".join(value[:2]) if len(value) > 1 else "".join(value),
)
def test_an_image_repeats_bitwise_from_itself(model, tmp_path, command, given):
    file = photo(tmp_path / "given.png", (200, 150))
    done = run(*command, *(f"{kind}={file}" for kind in given), "--model", model, "--out", tmp_path / "a.png", *QUICK)
    assert done.exit_code == 0, done.output
    file.unlink()  # the image carries what it was made from
    done = run("generate", "--like", tmp_path / "a.png", "--out", tmp_path / "b.png", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["same"] is True
    assert same_pixels(open_image(tmp_path / "a.png"), open_image(tmp_path / "b.png"))


OLD = {"control": ("depth", "controls"), "blur": ("blur", "frames"), "view": ("image", "frames")}


@pytest.mark.parametrize("name", OLD)
def test_images_of_the_previous_version_are_generated_again(name, tmp_path):
    """By version 0.1 with the embedded model; bitwise on one machine, nearly so on others."""
    file = Path(__file__).parent / "old" / f"{name}.png"
    kind, among = OLD[name]
    stored, origin = json.loads(Image.open(file).info["imgdit"]), read_origin(file)
    assert origin.request.to_dict() == stored["request"]
    assert kind in [one.kind for one in getattr(origin.request, among)]
    run("generate", "--like", file, "--out", tmp_path / "again.png")
    again = read_origin(tmp_path / "again.png")
    assert (again.asked, again.request.to_dict()) == (stored["asked"], stored["request"])
    difference = np.asarray(open_image(file), int) - np.asarray(open_image(tmp_path / "again.png"), int)
    assert np.abs(difference).mean() < 1


def test_a_control_file_is_opened_once(model, tmp_path, monkeypatch):
    file, opened = photo(tmp_path / "given.png"), []
    of_image, of_header = images.open_image, lora_files.read_info
    monkeypatch.setattr(images, "open_image", lambda path, *more: opened.append(path) or of_image(path, *more))
    monkeypatch.setattr(lora_files, "read_info", lambda path: opened.append(path) or of_header(path))
    command = ["generate", "a cone", "--control", f"depth={file}", "--model", model, "--out", tmp_path / "a.png"]
    assert run(*command, *QUICK).exit_code == 0
    assert [Path(path).name for path in opened] == ["given.png", "near.safetensors"]


def test_one_pipeline_is_loaded_and_another_made_for_frames_only(model):
    one = session.Session(Shelf(model))
    one.quiet()
    one.generate(Request("a cone", steps=1))
    assert "frames_pipe" not in vars(one)
    one.generate(Request("a cone", steps=1, frames=frame_row([], ["depth", "image"])))
    assert all(part is one.pipe.components[name] for name, part in one.frames_pipe.components.items())


def test_another_machine_is_told(model, tmp_path, monkeypatch):
    assert run("generate", "a cone", "--model", model, "--out", tmp_path / "a.png", *QUICK).exit_code == 0
    image, origin = Image.open(tmp_path / "a.png"), read_origin(tmp_path / "a.png")
    changed = Image.fromarray(255 - np.asarray(image))
    origin.made_with["torch"] = "0.1"
    write_png(changed, tmp_path / "a.png", origin)
    done = run("generate", "--like", tmp_path / "a.png", "--out", tmp_path / "b.png")
    assert done.exit_code == 1 and "torch was 0.1" in done.output


def test_a_folder_goes_on_where_it_stopped(model, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    photo(tmp_path / "depth.png")
    wanted = [
        "a red cube",
        json.dumps({"prompt": "a cone", "seed": 9, "name": "cone", "num_images": 2}),
        json.dumps({"prompt": "a torus", "control": {"depth": "depth.png"}, "steps": 1}),
    ]
    lines.write_text("\n\n".join(wanted))
    command = ["generate", "--prompts", lines, "--out", tmp_path / "out", "--model", model, "--json", *QUICK]
    done = run(*command)
    assert done.exit_code == 0, done.output
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["seed"], line["made"]) for line in told] == [(0, True), (9, True), (10, True), (3, True)]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"000.png", "cone-0.png", "cone-1.png", "003.png", "sheet.png"}
    (tmp_path / "out/cone-1.png").unlink()
    again = [json.loads(line) for line in run(*command).stdout.splitlines()]
    assert [line["seed"] for line in again if line["made"]] == [10]
    done = run(*command[:-1], "3")
    assert done.exit_code == 2 and "--overwrite" in done.output


def test_one_sentence_after_another_needs_no_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/images").mkdir(parents=True)
    (tmp_path / "outputs/images/a-cone.png").write_bytes(b"somebody's")
    for sentences, found in (
        (["a red cube, neon style"], {"a-red-cube-neon-style.png"}),
        (["a torus"], {"a-torus.png"}),
        (["a torus"], set()),
        (["a torus", "--seed", "5"], {"a-torus-2.png"}),
        (["a TORUS", "a torus!"], {"a-torus-3.png", "a-torus-2-2.png", "sheet.png"}),
        (["a cone"], {"a-cone-2.png"}),
    ):
        before = set(Path("outputs/images").iterdir())
        done = run("generate", *sentences, "--model", model, *QUICK)
        assert done.exit_code == 0, done.output
        assert {file.name for file in set(Path("outputs/images").iterdir()) - before} == found
    assert Path("outputs/images/a-cone.png").read_bytes() == b"somebody's"


def test_what_is_done_loads_no_model(model, tmp_path, monkeypatch):
    command = ["generate", "a cone", "--model", model, "--out", tmp_path / "a.png", *QUICK]
    assert run(*command).exit_code == 0
    monkeypatch.setattr(session, "load_pipeline", None)
    done = run(*command)
    assert done.exit_code == 0 and "found" in done.output


@pytest.mark.parametrize(
    ("command", "as_sentence"),
    [
        (["generate", "x", "--out", "a.jpg"], "PNG"),
        (["generate", "x", "y", "--out", "a.png"], "folder"),
        (["generate", "x", "--size", "12x"], "WIDTHxHEIGHT"),
        (["generate", "x", "--control", "depth"], "KIND=FILE"),
        (["generate", "x", "--control", "depth=none.png"], "no image"),
        (["generate", "x", "--control", "deepth=p.png", "--out", "b.png"], "did you mean 'depth'"),
        (["generate", "--like", "p.png"], "does not tell"),
        (["generate", "--like", "p.png", "--prompts", "x"], "leave out"),
        (["generate", "--prompts", "bad.jsonl"], "line 1"),
        (["control", "x", "--with", "canny=p.png", "--strength", "2", "--out", "b.png"], "belong to adapters"),
        (["control", "x", "--with", "canny=p.png", "--with", "depth=p.png", "--out", "b.png"], "alone"),
        (["any", "--condition", "image=p.png", "--camera", "a,b"], "AZIMUTH"),
        (["any", "--condition", "image=p.png", "--generate", "image"], "call one of two"),
        (["unlearn", "x", "--concept", "neon", "--out", "b.png"], "no sparse autoencoder"),
    ],
)
def test_mistakes_are_one_sentence(model, tmp_path, monkeypatch, command, as_sentence):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "p.png")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "sead": 3}')
    done = run(*command, *([] if "--like" in command else ["--model", model]))
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert as_sentence in " ".join(done.output.replace("│", " ").split())
    assert not list(tmp_path.glob("[ab].*g"))


def test_find_writes_the_condition(model, tmp_path):
    file = photo(tmp_path / "p.png")
    done = run(
        *["control", "a cone", "--find", "--with", f"grey={file}", "--model", model],
        *["--out", tmp_path / "a.png", *QUICK],
    )
    assert done.exit_code == 0, done.output
    red, green, blue = open_image(tmp_path / "a-grey.png").split()
    assert same_pixels(red, green) and same_pixels(red, blue)


def forms():
    """A depth map, and how else the same may be kept."""
    ramp = np.linspace(0, 255, 128).round().astype(np.uint8)[None].repeat(128, 0)
    plain = Image.fromarray(ramp).convert("RGB")
    clear = np.dstack([np.zeros((128, 128, 3), np.uint8), np.where(ramp > 250, 0, 255)]).astype(np.uint8)
    on_white = Image.fromarray(np.where(ramp > 250, 255, 0).astype(np.uint8)).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 3
    return {
        "16 bit": (Image.fromarray(ramp.astype(np.uint16) * 257), {}, plain),
        "grey": (Image.fromarray(ramp), {}, plain),
        "palette": (Image.fromarray(ramp).convert("P"), {}, plain),
        "transparent": (Image.fromarray(clear), {}, on_white),
        "turned": (plain.transpose(Image.Transpose.ROTATE_180), {"exif": turned}, plain),
        "half as large": (plain.resize((64, 64)), {}, fit(plain.resize((64, 64)), (128, 128))),
        "larger": (plain.resize((200, 200)), {}, fit(plain.resize((200, 200)), (128, 128))),
        "wider": (plain.resize((256, 128)), {}, fit(plain.resize((256, 128)), (128, 128))),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_a_control_is_the_same_however_it_is_kept(model, tmp_path, form):
    image, options, expected = forms()[form]
    image.save(tmp_path / "map.png", **options)
    one = session.Session(Shelf(model))
    controls = (Control("depth", open_image(tmp_path / "map.png")),)
    (read,) = one.settled(Request("a cone", controls=controls)).controls
    assert read.image.mode == "RGB" and same_pixels(read.image, expected)
    if form == "half as large":
        one.quiet()
        made = [one.generate(Request("a cone", steps=1, controls=(Control("depth", x),))) for x in (image, expected)]
        assert same_pixels(*(x.images[0] for x in made))


@pytest.mark.parametrize("make", [flux, sd3])
def test_flux_and_sd3_folders_make_images_under_conditions(make, tmp_path):
    pipe = with_texts(make())
    pipe.save_pretrained(tmp_path / "model")
    targets = r".*attn\.to_[qkv]"
    lora_file(tmp_path / "model/adapters/canny.safetensors", pipe.transformer, targets, info=AdapterInfo(task="canny"))
    file = photo(tmp_path / "edges.png", (16, 16))
    command = ["generate", "a cube", "--model", tmp_path / "model", "--size", "16", *QUICK]
    for name, more in (("plain", []), ("control", ["--control", f"canny={file}"])):
        done = run(*command, *more, "--out", tmp_path / f"{name}.png")
        assert done.exit_code == 0, done.output
        assert run("generate", "--like", tmp_path / f"{name}.png", "--out", tmp_path / f"{name}-2.png").exit_code == 0
    assert not same_pixels(open_image(tmp_path / "plain.png"), open_image(tmp_path / "control.png"))
    done = run("any", "--generate", "depth", "--condition", f"image={file}", *command[2:], "--out", tmp_path / "c.png")
    assert done.exit_code == 2 and "any-to-any" in done.output


def test_watching_previews_and_stops(model):
    one = session.Session(Shelf(model))
    one.quiet()
    seen = []

    def watch(step, steps, draw):
        seen.append((step, steps, draw().size))
        return step < 2

    with pytest.raises(session.Stopped):
        one.generate(Request("a cone", steps=4), watch)
    assert seen == [(1, 4, (128, 128)), (2, 4, (128, 128))]
    assert one.generate(Request("a cone", steps=1)).images


def test_generate_begins_at_an_image(model, tmp_path):
    start, out = photo(tmp_path / "start.png"), tmp_path / "out.png"
    command = ("generate", "a cone", "--model", model, "--steps", 8)
    done = run(*command, "--image", start, "--strength", 0.1, "--out", out)
    assert done.exit_code == 0, done.output
    near, first = (np.asarray(open_image(file).convert("RGB"), float) for file in (out, start))
    assert done.exit_code == 0 and run(*command, "--out", tmp_path / "plain.png").exit_code == 0
    far = np.asarray(open_image(tmp_path / "plain.png").convert("RGB"), float)
    assert abs(near - first).mean() < abs(far - first).mean()
    origin = read_origin(out)
    assert origin.request.strength == 0.1 and same_pixels(origin.request.image, open_image(start))
    again = run("generate", "--like", out, "--out", tmp_path / "again.png")
    assert again.exit_code == 0 and "the same bit for bit" in again.output
    refused = run(*command, "--strength", 0.5)
    assert refused.exit_code == 2 and "--strength tells" in refused.output


def test_models_that_begin_at_noise_alone_say_so(tmp_path):
    with_texts(flux()).save_pretrained(tmp_path / "flux")
    start = photo(tmp_path / "start.png")
    done = run(
        "generate", "a cone", "--model", tmp_path / "flux", "--image", start, *QUICK, "--out", tmp_path / "o.png"
    )
    assert done.exit_code == 2 and "begins at noise alone" in done.output


def test_previews_of_a_late_start_are_of_its_own_steps(model, monkeypatch):
    one = session.Session(Shelf(model))
    one.quiet()
    aims = []
    monkeypatch.setattr(type(one.pipe), "decode_latents", lambda pipe, latents, *_: aims.append(latents) or [None])
    request = Request("a cone", steps=4, image=Image.new("RGB", (128, 128)), strength=0.5)
    with pytest.raises(session.Stopped):
        one.generate(request, lambda step, steps, draw: draw() or (step, steps) == (1, 2))
    monkeypatch.undo()
    final = one.pipe(
        "a cone", num_inference_steps=4, image=request.image, strength=0.5, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    torch.testing.assert_close(aims[1], final)  # the last step aims at where it ends


def test_a_request_survives_the_file(tmp_path):
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    controls = (Control("depth", image, 0.5),)
    request = Request("ü 🙂", seed=2**62, controls=controls, features=((3, 2.0),), image=image, strength=0.3)
    again = Request.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again.to_dict() == request.to_dict() and same_pixels(again.controls[0].image, image)
    assert same_pixels(again.image, image) and again.strength == 0.3
    assert "picture" not in Request("a cube").to_dict()
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        Request.from_dict({"sed": 1})
    with pytest.raises(ValueError, match="damaged"):
        Request.from_dict({"controls": [{"kind": "depth", "picture": "AAAA"}]})


def test_rows_of_frames_begin_with_the_image():
    image = Image.new("RGB", (4, 4))
    kinds = [frame.kind for frame in frame_row([("depth", image)], [])]
    assert kinds == ["image", "depth"]
    assert [f.kind for f in frame_row([], ["depth", "image"])] == ["image", "depth"]


def test_doctor_finds_this_machine():
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["core"]["torch"] and "native" in found["attention"]["cpu"]
    assert (done.exit_code == 0) == (not found["problems"])
