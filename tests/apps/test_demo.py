"""The demo's endpoints with a tiny model: what they make, what they refuse, and what they survive."""

import copy
import io
import json
import math
import random
import re
import struct
import zlib
from pathlib import Path

import httpx
import pytest
import torch
from gradio import FileData, processing_utils
from gradio.components.image_editor import EditorData, EditorDataBlobs
from gradio.data_classes import ImageData
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageColor
from tiny_control import flux, sd3, with_texts
from tiny_runs import small_pipeline, with_concepts

from imgdit.apps.demo import any_to_any, app, examples, features, limits, widgets
from imgdit.apps.jobs.conditions import drawn_map, lines_on_black
from imgdit.apps.jobs.png import read_origin
from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.defaults import GUIDANCE, STEPS
from imgdit.images import fit, open_image
from imgdit.scenes.meanings import KINDS
from imgdit.scenes.tasks import PALETTE
from imgdit.scenes.world import OBJECTS

SAMPLING = {"steps": 2, "guidance": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Address of a running demo, its model, and a folder to write in."""
    folder = tmp_path_factory.mktemp("demo")
    model = with_concepts(small_pipeline(folder))
    page, address, holder = app.serve(Session(Shelf(model)), results=folder / "mup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_utils, "save_pil_to_cache", _written_again)
        yield address, holder, folder
    page.close(verbose=False)
    holder.close()


def _written_again(*_, **__):
    raise AssertionError("gradio writes an image to the same file each time, also while that is sent; hand on files")


@pytest.fixture(scope="module")
def client(demo):
    return Client(demo[0], verbose=False)


@pytest.fixture(scope="module")
def photo(demo):
    file = demo[2] / "photo.png"
    Image.effect_noise((160, 128), 60).convert("RGB").save(file)
    return file


def drawing(file):
    return {"background": handle_file(file), "layers": [], "composite": handle_file(file)}


def create(client, **changes):
    said = {"prompt": "a red cube", "negative": "", "width": 64, "height": 96, "count": 1, **SAMPLING, **changes}
    return client.predict(api_name="/create", **said)


def test_every_tab_is_a_documented_endpoint(client):
    found = client.view_api(return_format="dict")["named_endpoints"]
    expected = "create control any_to_any other_view unlearn search_features feature_images steer coordinate_check"
    assert {f"/{name}" for name in [*expected.split(), "recorded_plots", "caption", "ask"]} == set(found)
    for name, endpoint in found.items():
        assert all(parameter["label"] and parameter["python_type"]["type"] for parameter in endpoint["parameters"])
        assert endpoint["returns"], name
        assert endpoint["description"].strip()


def test_create_makes_images_that_repeat(demo, client):
    last, gallery, status = create(client, count=2)
    assert status.startswith("Done. The model was taught 128x128; at 64x96 ") and len(gallery) == 2
    origin = read_origin(gallery[1]["image"])
    assert origin.request.seed == 4 and (origin.request.width, origin.request.height) == (64, 96)
    again = demo[1].session.generate(origin.request).images[0]
    assert same_pixels(again, open_image(gallery[1]["image"])) and same_pixels(again, open_image(last))


def test_create_begins_at_an_image(client, photo):
    last, _, _ = create(client, start=handle_file(photo), strength=0.5)
    request = read_origin(last).request
    assert request.strength == 0.5 and same_pixels(request.image, fit(open_image(photo), (64, 96)))
    with pytest.raises(AppError, match="Value 2 is greater than maximum value 1"):
        create(client, start=handle_file(photo), strength=2)


def test_each_preview_has_a_file_of_its_own_until_the_request_is_over(demo):
    seen, written = [], {}
    for shown in demo[1].make([Request("a red cube", steps=3, seed=seed) for seed in range(2)], None):
        if shown.preview is not None:
            file = Path(shown.preview)
            seen.append(file)
            open_image(file)
            assert written.setdefault(file, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
    assert len(written) == 4 < len(seen) and not any(file.exists() for file in written)
    assert all(Path(file).exists() for file in shown.files)


def test_control_follows_an_image(client, photo):
    for kind in ("depth", "mask"):
        condition, slider, file, status = client.predict(
            prompt="a cone", drawing=drawing(photo), kind=kind, find=True, strength=1.0, start=0.0, end=1.0,
            second=None, second_kind="canny", second_strength=1.0, **SAMPLING, api_name="/control",
        )  # fmt: skip
        assert status == "Done." and condition and len(slider) == 2
        assert read_origin(file).request.controls[0].kind == kind


@pytest.mark.parametrize(
    ("image_is", "other_is", "made"), [("given", "to be generated", 1), ("to be generated", "given", 1)]
)
def test_any_to_any_makes_what_is_not_given(client, photo, image_is, other_is, made):
    frames, status = client.predict(
        prompt="", image_is=image_is, image=handle_file(photo), kind="depth", other_is=other_is,
        other=handle_file(photo), **SAMPLING, api_name="/any_to_any",
    )  # fmt: skip
    assert status == "Done." and len(frames) == made


def test_another_view(client, photo):
    frames, status = client.predict(
        prompt="", image=handle_file(photo), turn=20, rise=5, **SAMPLING, api_name="/other_view"
    )
    assert status == "Done." and len(frames) == 1


def test_unlearning_stands_beside_the_plain_image(client):
    plain, without, heat, status = client.predict(
        prompt="a neon cube", chosen=["neon"], mode="scale", multiplier=-20, **SAMPLING, api_name="/unlearn"
    )
    assert status == "Done." and open_image(heat).size == open_image(plain).size
    assert read_origin(without).request.concepts == ("neon",) and not read_origin(plain).request.concepts


def test_features_are_found_shown_and_steered(client, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 1)
    table, feature, said = client.predict(words="a neon cube", against="a photo", api_name="/search_features")
    assert feature == int(table["data"][0][0]) and f"Feature {feature} is chosen" in said
    images, note = client.predict(feature=feature, api_name="/feature_images")
    assert "active on" in note and len(images) <= 6
    plain, steered, status = client.predict(
        prompt="a cube", feature=feature, factor=0.0, **SAMPLING, api_name="/steer"
    )
    assert status == "Done." and read_origin(steered).request.features == ((feature, 0.0),) and plain


def test_the_check_draws_and_tells_slopes(client):
    plot, table, _ = client.predict(widths=[64, 96], steps=2, api_name="/coordinate_check")
    assert open_image(plot).width > 200 and len(table["data"][0]) == 3
    assert "imgdit mup coord-check" in client.predict(api_name="/recorded_plots")[1]


# What a stranger may send


def png_of_size(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    return data + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def hostile_files(folder, photo):
    """Random bytes, cut images of every format, huge headers, names like paths."""
    rng = random.Random(0)
    image = Image.open(photo)
    for i in range(70):
        kind = i % 7
        if kind < 3:
            format = ("PNG", "WEBP", "GIF")[kind]
            file = folder / f"cut{i}.{format.lower()}"
            image.save(file, format)
            data = file.read_bytes()
            file.write_bytes(data[: rng.randrange(len(data) - 60)])
        elif kind == 3:
            file = folder / f"huge{i}.png"
            file.write_bytes(png_of_size(rng.choice((60_000, 5_000, 2**31 - 1)), 60_000))
        elif kind == 4:
            file = folder / f"drawing{i}.svg"
            file.write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
        elif kind == 5:
            file = folder / f"..%2f..%2fetc{i}.png"
            file.write_bytes(rng.randbytes(rng.randrange(1, 3000)))
        else:
            file = folder / f"thin{i}.png"
            Image.new("RGB", (rng.randrange(1, 8), 3000)).save(file)
        yield file


def hostile_values():
    """Arguments of `create` that no page would send."""
    rng = random.Random(1)
    odd = [
        None,
        "",
        "../../etc/passwd",
        "x" * 100_000,
        "🙂" * 999,
        -1,
        10**30,
        1.5,
        True,
        [],
        {"path": "/etc/passwd"},
    ]
    names = ["prompt", "negative", "width", "height", "steps", "guidance", "seed", "count"]
    while True:
        name, value = rng.choice(names), rng.choice(odd)
        if name in ("prompt", "negative"):  # a text box makes a text of whatever comes
            fine = not isinstance(value, str) or len(value) <= limits.LIMITS.prompt
        else:
            fine = name in ("guidance", "seed") and value in (1.5, True)  # the seed is rounded
        if not fine:
            yield {name: value}


@pytest.mark.slow
def test_hostile_inputs_leave_the_server_serving(demo, client, photo, tmp_path):
    told = []

    def refused(call, given):
        try:
            call()
        except Exception as error:
            told.append(str(error))
        else:
            pytest.fail(f"was taken: {str(given)[:80]}")

    for file in hostile_files(tmp_path, photo):
        said = {"prompt": "", "image": handle_file(file), "turn": 0, "rise": 0, **SAMPLING}
        refused(lambda said=said: client.predict(**said, api_name="/other_view"), file)
    values = hostile_values()
    for _ in range(100):
        given = next(values)
        refused(lambda given=given: create(client, **given), given)
    for i in range(30):
        kind = ["../../x", "depth\0", "🙂", "x" * 5000, None, 7][i % 6]
        said = {"prompt": "", "image_is": "given", "image": None, "kind": kind, "other_is": "given", "other": None}
        refused(lambda said=said: client.predict(**said, **SAMPLING, api_name="/any_to_any"), kind)
    assert len(told) == 200
    assert not [text for text in told if "Traceback" in text or "log of the server" in text]
    assert create(client)[2].startswith("Done.")
    assert {file.suffix for file in demo[1].folder.iterdir()} <= {".png"}


@pytest.mark.parametrize(
    ("background", "stroke", "seen", "hole"),
    [
        ((9, 8, 7, 255), None, (9, 8, 7), 0),
        ((255, 0, 0, 51), None, (255, 204, 204), 0),
        (None, (255,) * 4, (255,) * 3, 255),
        (None, None, None, 0),
    ],
    ids=["a photo", "a cut-out", "drawn on nothing", "nothing"],
)
def test_a_canvas_is_read_as_a_browser_sends_it(tmp_path, background, stroke, seen, hole):
    """Parts of their own, and no composite where nothing was drawn."""

    def part(name, colour):
        Image.new("RGBA", (16, 16), colour or (0, 0, 0, 0)).save(tmp_path / name)
        return (tmp_path / name).read_bytes()

    sent = EditorDataBlobs(background=part("b.png", background), layers=[part("l.png", stroke)], composite=None)
    box = widgets.canvas("Draw", 64, 100)
    box.blob_storage["1"] = sent
    read = widgets.read_drawing(box.preprocess(EditorData(background=None, layers=[], composite=None, id="1")))
    if seen is None:
        assert read is None
        return
    assert read.image.getpixel((3, 3)) == seen and read.drawn.getpixel((3, 3)) == hole
    assert (read.below is not None) == (background is not None)


def test_what_gradio_makes_anew_for_a_visitor_reads_as_before(photo):
    """It makes a component of the class again from its arguments where a handler changes it."""
    box, place = widgets.canvas("Draw", 64, 100), widgets.upload("Image", 100)
    box, place = (type(one)(**one.constructor_args) for one in (box, place))
    sent = EditorData(background=FileData(path=str(photo)), layers=[], composite=None)
    assert widgets.read_drawing(box.preprocess(sent)).below.size == (160, 128)
    assert limits.image(place.preprocess(ImageData(path=str(photo)))).size == (160, 128)
    assert (box.get_block_name(), place.get_block_name()) == ("imageeditor", "image")
    assert not list(Path(widgets.__file__).parent.glob("*.pyi"))


def parts(colour, alpha=255, background="white"):
    """A canvas with a bar of a colour drawn across empty paper, or on another background."""
    stroke = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    stroke.paste((*colour, alpha), (4, 0, 12, 16))
    data = []
    for image in (Image.new("RGBA", (16, 16), background), stroke):
        file = io.BytesIO()
        image.save(file, "PNG")
        data.append(file.getvalue())
    return EditorDataBlobs(background=data[0], layers=[data[1]], composite=None)


@pytest.mark.parametrize("background", ["white", (0, 0, 0, 0)], ids=["paper", "transparent"])
def test_a_drawing_arrives_as_it_is_seen(background):
    drawing = widgets.read_drawing(parts((0, 0, 0), background=background))
    assert drawing.below is None and not drawing.is_blank
    assert drawing.image.getpixel((1, 1)) == (255, 255, 255) and drawing.image.getpixel((8, 8)) == (0, 0, 0)
    white = widgets.read_drawing(parts((255, 255, 255), background=background))
    assert white.is_blank == (background == "white")  # a program's white on nothing is a map
    if not white.is_blank:
        found, inverted = drawn_map("canny", white.image, white.strokes)
        assert not inverted and (found.getpixel((8, 8)), found.getpixel((1, 1))) == ((255,) * 3, (0,) * 3)
    on_photo = widgets.read_drawing(parts((255, 255, 255), background=(9, 8, 7, 255)))
    assert not on_photo.is_blank and on_photo.below.getpixel((8, 8)) == (9, 8, 7)


@pytest.mark.parametrize(
    ("kind", "colour", "made", "inverted"),
    [
        ("canny", (0, 0, 0), (255, 255, 255), True),
        ("depth", (100, 100, 100), (155, 155, 155), True),
        ("segmentation", (255, 0, 0), (255, 0, 0), False),
        ("subject", (0, 0, 0), (0, 0, 0), False),
    ],
)
def test_a_drawing_becomes_the_map_that_is_read(kind, colour, made, inverted):
    drawing = widgets.read_drawing(parts(colour))
    found, told = drawn_map(kind, drawing.image, drawing.strokes)
    ground = (255, 255, 255) if kind == "subject" else (0, 0, 0)
    assert (found.getpixel((8, 8)), found.getpixel((1, 1)), told) == (made, ground, inverted)


def test_a_whole_that_a_program_sends_alone_is_an_upload():
    lines = Image.new("RGBA", (16, 16), "black")
    lines.paste("white", (2, 0, 4, 16))
    file = io.BytesIO()
    lines.save(file, "PNG")
    sent = widgets.read_drawing(EditorDataBlobs(background=None, layers=[], composite=file.getvalue()))
    assert sent.below is not None and not sent.is_blank
    assert sent.image.tobytes() == lines.convert("RGB").tobytes()


def test_colours_that_mean_something_are_neither_black_nor_mixed():
    drawing = widgets.read_drawing(parts((0, 0, 0)))
    with pytest.raises(ValueError, match="choose one for the brush"):
        drawn_map("segmentation", drawing.image, drawing.strokes)
    drawing = widgets.read_drawing(parts((255, 0, 0), alpha=200))
    assert drawn_map("segmentation", drawing.image, drawing.strokes)[0].getpixel((8, 8)) == (255, 0, 0)


def test_lines_on_a_light_ground_are_inverted_for_edges_alone():
    dark, light = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    for image, line in ((dark, "white"), (light, "black")):
        image.paste(line, (2, 0, 3, 8))
    assert lines_on_black("canny", light)[0].tobytes() == dark.tobytes()
    for kind, image in (("canny", dark), ("depth", light)):
        found, inverted = lines_on_black(kind, image)
        assert found is image and not inverted


def test_what_is_refused_is_said_once_and_programs_get_an_error(demo, client):
    empty = {"background": None, "layers": [], "composite": None}
    said = {"prompt": "a cone", "drawing": empty, "kind": "depth", "find": True, "strength": 1.0, "start": 0.0}
    said |= {"end": 1.0, "second": None, "second_kind": "canny", "second_strength": 1.0}
    job = client.submit(**said, **SAMPLING, api_name="/control")
    with pytest.raises(Exception, match="draw or upload an image first"):
        job.result(timeout=60)
    assert job.outputs()[-1][-1] == "Draw or upload an image first."


def test_a_word_that_was_never_taught_is_told(client):
    status = create(client, prompt="a white cat", width=128, height=128, steps=1)[2]
    assert status.startswith('Done. The model was never taught "white" ') and '"cat"' in status


def above(node, number):
    """Numbers of what a component lies in."""
    if node["id"] == number:
        return [number]
    inner = next(filter(None, (above(child, number) for child in node.get("children", ()))), None)
    return inner and [node["id"], *inner]


def test_the_defaults_are_those_of_the_command_line(demo):
    """And widths and heights that were never taught are not offered."""
    config = httpx.get(f"{demo[0]}config").json()["components"]
    sliders = [c["props"] for c in config if c["type"] == "slider"]
    steps = {p["value"] for p in sliders if p["label"] == "Steps" and p["maximum"] == limits.LIMITS.steps}
    assert steps == {STEPS} == {Request().steps}
    assert {p["value"] for p in sliders if p["label"] == "Guidance"} == {GUIDANCE}
    hidden = {c["id"] for c in config if c["props"].get("visible") is False}
    layout = httpx.get(f"{demo[0]}config").json()["layout"]
    for label in ("Width", "Height"):
        size = next(c["id"] for c in config if c["props"].get("label") == label)
        assert hidden & set(above(layout, size))


def test_a_feature_that_is_never_active_says_so(demo, client, monkeypatch):
    sae = demo[1].session.unlearner.saes[demo[1].session.seen_at]
    monkeypatch.setattr(sae, "encoder", copy.deepcopy(sae.encoder))
    with torch.no_grad():
        sae.encoder.bias[7] = -1e4
    said = {"prompt": "a cube", "feature": 7, **SAMPLING}
    assert "feature 7 is never active in this image" in client.predict(**said, factor=3.0, api_name="/steer")[2]


@pytest.mark.parametrize(
    ("prompt", "word", "kind", "found"),
    [
        ("a red cube, neon style", "sphere", "object", "a red sphere, neon style"),
        ("a red cube and a blue sphere", "cone", "object", "a red cube and a blue sphere, cone"),
        ("a cube", "green", "colour", "a cube, green"),
        ("a cube at night", "at sunset", "background", "a cube at sunset"),
        ("", "cube", "object", "cube"),
    ],
)
def test_a_chip_replaces_the_only_word_of_its_kind(prompt, word, kind, found):
    assert widgets.with_word(prompt, word, KINDS[kind]) == found


def test_a_slider_reaches_as_far_as_its_feature_needs():
    assert features._reach(100.0) == 4 and features._reach(5.0) == 20 and features._reach(0.0) == features.REACH


def test_every_task_of_a_pair_has_a_meaning():
    kinds = ["depth", "canny"]
    meanings = [any_to_any._meaning(task, kinds) for task in any_to_any._tasks(kinds)]
    assert len(set(meanings)) == 6 and meanings[0] == ("depth", True, False)
    with pytest.raises(limits.Refused, match="the task must be one of"):
        any_to_any._meaning("a cube of an image", kinds)


def test_the_legend_names_the_palette():
    """`green` is what the web calls lime."""
    exact = [ImageColor.getrgb({"green": "lime", "grey": "#808080"}.get(name, name)) for name in examples.SHADES]
    assert [tuple(round(v * 255 + 0.01) for v in colour) for colour in PALETTE] == exact
    assert all(kind in examples.legend() for kind in OBJECTS)


@pytest.mark.parametrize("make", [flux, sd3])
def test_other_models_get_their_own_examples_and_only_tabs_with_something_in_them(make, tmp_path):
    folder = tmp_path / "model"
    pipe = with_texts(make())
    pipe.save_pretrained(folder)
    page, address, holder = app.serve(Session(Shelf(folder)), results=tmp_path / "mup")
    try:
        text = json.dumps(httpx.get(f"{address}config").json()["components"], ensure_ascii=False)
        assert not re.search("octahedr|pyramid|torus|What this model can draw", text)
        tabs = re.findall(r'"type": "tabitem".*?"label": "(.*?)"', text)
        assert tabs == ["Create", "Caption & Ask"]
        assert "no condition adapters" in text and "no sparse autoencoder" in text
    finally:
        page.close(verbose=False)
        holder.close()


@pytest.mark.parametrize("make", [flux, sd3])
def test_features_and_concepts_of_other_models(make, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 1)
    folder = tmp_path / "model"
    with_texts(make()).save_pretrained(folder)
    session = Session(Shelf(with_concepts(folder, 32)))
    session.pipe.default_sample_size = 8
    page, address, holder = app.serve(session, results=tmp_path / "mup")
    try:
        client = Client(address, verbose=False)
        _, feature, said = client.predict(words="a cat", against="a dog", api_name="/search_features")
        assert f"Feature {feature} is chosen" in said
        made = {"prompt": "a red cube", **SAMPLING}
        assert client.predict(**made, feature=feature, factor=-1.0, api_name="/steer")[2].startswith("Done.")
        dead = (int(feature) + 1) % 32
        with torch.no_grad():
            session.unlearner.saes[session.seen_at].encoder.bias[dead] = -1e4
        images, said = client.predict(feature=dead, api_name="/feature_images")
        assert images == [] and f"Feature {dead} was not active on any" in said
        assert "active on" in client.predict(feature=feature, api_name="/feature_images")[1]
        options = {"chosen": ["neon"], "mode": "scale", "multiplier": -1.0}
        plain, _, heat, said = client.predict(**made, **options, api_name="/unlearn")
        assert said.startswith("Done.") and open_image(heat).size == open_image(plain).size
    finally:
        page.close(verbose=False)
        holder.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "7", None, 10**400])
def test_numbers_are_finite_and_bounded(value):
    with pytest.raises(limits.Refused):
        limits.number(value, "steps", 1, 50)


def test_a_header_is_looked_at_before_the_image(tmp_path):
    file = tmp_path / "huge.png"
    file.write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(limits.Refused, match=r"cannot be read|million pixels"):
        limits.image(str(file))
    file.write_bytes(png_of_size(5_000, 5_000))
    with pytest.raises(limits.Refused, match="million pixels"):
        limits.image(str(file))


def test_files_outside_cannot_be_read(demo):
    address, _, folder = demo
    secret = folder / "secret.txt"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", f"{folder}/model/../secret.txt"):
        answer = httpx.get(f"{address}gradio_api/file={path}")
        assert answer.status_code in (403, 404)


def test_the_page_asks_nothing_of_the_network(demo):
    page = httpx.get(demo[0]).text
    config = json.loads(httpx.get(f"{demo[0]}config").text)
    assert config["analytics_enabled"] is False
    assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*\.(?:js|css)', page)
