"""The demo's endpoints with a tiny model: what they make, what they refuse, and what they survive."""

import json
import math
import random
import re
import struct
import zlib

import pytest
from gradio.components.image_editor import EditorData, EditorDataBlobs
from gradio_client import Client, handle_file
from PIL import Image
from tiny_runs import small_pipeline

from imgdit.apps.demo import app, features, limits, widgets
from imgdit.apps.generate import same_pixels
from imgdit.apps.request import read_origin
from imgdit.apps.studio import Studio
from imgdit.images import open_image
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner

SAMPLING = {"steps": 2, "guidance": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Address of a running demo, its model, and a folder to write in."""
    folder = tmp_path_factory.mktemp("demo")
    model = small_pipeline(folder)
    studio = Studio(model)
    studio.quiet()
    width = studio.pipe.transformer.inner_dim
    sae = SparseAutoencoder(SAEConfig(width, 32, 4, hookpoint="transformer.transformer_blocks.0"))
    learner = ConceptUnlearner({"transformer.transformer_blocks.0": sae})
    learner.learn(studio.pipe, {"neon": ["a neon cube"], "photo": ["a photo"]}, top_n=2, num_inference_steps=1)
    learner.save_pretrained(model / "sae")
    page, address, holder = app.serve(Studio(model), results=folder / "mup")
    yield address, holder, folder
    page.close(verbose=False)
    holder.close()


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
    expected = "create control any_to_any other_view unlearn search_features feature_pictures steer coordinate_check"
    assert {f"/{name}" for name in [*expected.split(), "recorded_plots"]} == set(found)
    for name, endpoint in found.items():
        assert all(parameter["label"] and parameter["python_type"]["type"] for parameter in endpoint["parameters"])
        assert endpoint["returns"], name
        assert endpoint["description"].strip()


def test_create_makes_pictures_that_repeat(demo, client):
    _, gallery, status = create(client, count=2)
    assert status == "Done." and len(gallery) == 2
    origin = read_origin(gallery[1]["image"])
    assert origin.request.seed == 4 and (origin.request.width, origin.request.height) == (64, 96)
    again = demo[1].studio.make(origin.request).pictures[0]
    assert same_pixels(again, open_image(gallery[1]["image"]))


def test_control_follows_a_picture(client, photo):
    for kind in ("depth", "mask"):
        condition, slider, file, status = client.predict(
            prompt="a cone", drawing=drawing(photo), kind=kind, find=True, strength=1.0, start=0.0, end=1.0,
            second=None, second_kind="canny", second_strength=1.0, **SAMPLING, api_name="/control",
        )  # fmt: skip
        assert status == "Done." and condition and len(slider) == 2
        assert read_origin(file).request.controls[0].kind == kind


@pytest.mark.parametrize(("picture_is", "other_is", "made"), [("given", "to be made", 1), ("to be made", "given", 1)])
def test_any_to_any_makes_what_is_not_given(client, photo, picture_is, other_is, made):
    frames, status = client.predict(
        prompt="", picture_is=picture_is, picture=handle_file(photo), kind="depth", other_is=other_is,
        other=handle_file(photo), **SAMPLING, api_name="/any_to_any",
    )  # fmt: skip
    assert status == "Done." and len(frames) == made


def test_another_view(client, photo):
    frames, status = client.predict(
        prompt="", picture=handle_file(photo), turn=20, rise=5, **SAMPLING, api_name="/other_view"
    )
    assert status == "Done." and len(frames) == 1


def test_unlearning_stands_beside_the_plain_picture(client):
    plain, without, heat, status = client.predict(
        prompt="a neon cube", chosen=["neon"], mode="scale", multiplier=-20, **SAMPLING, api_name="/unlearn"
    )
    assert status == "Done." and open_image(heat).size == open_image(plain).size
    assert read_origin(without).request.concepts == ("neon",) and not read_origin(plain).request.concepts


def test_features_are_found_shown_and_steered(client, monkeypatch):
    monkeypatch.setattr(features, "bank", lambda: ["a neon cube", "a photo", "a red cone"])
    monkeypatch.setattr(features, "STEPS", 2)
    table = client.predict(words="a neon cube", against="a photo", api_name="/search_features")
    feature = int(table["data"][0][0])
    pictures, note = client.predict(feature=feature, api_name="/feature_pictures")
    assert "active on" in note and len(pictures) <= 6
    plain, steered, status = client.predict(
        prompt="a cube", feature=feature, factor=0.0, **SAMPLING, api_name="/steer"
    )
    assert status == "Done." and read_origin(steered).request.features == ((feature, 0.0),) and plain


def test_the_check_draws_and_tells_slopes(client):
    plot, table = client.predict(widths=[64, 96], steps=2, api_name="/coordinate_check")
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
    """Random bytes, cut pictures of every format, huge headers, names like paths."""
    rng = random.Random(0)
    picture = Image.open(photo)
    for i in range(70):
        kind = i % 7
        if kind < 3:
            format = ("PNG", "WEBP", "GIF")[kind]
            file = folder / f"cut{i}.{format.lower()}"
            picture.save(file, format)
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
        said = {"prompt": "", "picture": handle_file(file), "turn": 0, "rise": 0, **SAMPLING}
        refused(lambda said=said: client.predict(**said, api_name="/other_view"), file)
    values = hostile_values()
    for _ in range(100):
        given = next(values)
        refused(lambda given=given: create(client, **given), given)
    for i in range(30):
        kind = ["../../x", "depth\0", "🙂", "x" * 5000, None, 7][i % 6]
        said = {"prompt": "", "picture_is": "given", "picture": None, "kind": kind, "other_is": "given", "other": None}
        refused(lambda said=said: client.predict(**said, **SAMPLING, api_name="/any_to_any"), kind)
    assert len(told) == 200
    assert not [text for text in told if "Traceback" in text or "log of the server" in text]
    assert create(client)[2] == "Done."
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
    read = box.preprocess(EditorData(background=None, layers=[], composite=None, id="1"))
    if seen is None:
        assert read is None
        return
    assert read.picture.getpixel((3, 3)) == seen and read.drawn.getpixel((3, 3)) == hole
    assert (read.below is not None) == (background is not None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "7", None, 10**400])
def test_numbers_are_finite_and_bounded(value):
    with pytest.raises(limits.Refused):
        limits.number(value, "steps", 1, 50)


def test_a_header_is_looked_at_before_the_picture(tmp_path):
    file = tmp_path / "huge.png"
    file.write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(limits.Refused, match=r"cannot be read|million pixels"):
        limits.picture(str(file))
    file.write_bytes(png_of_size(5_000, 5_000))
    with pytest.raises(limits.Refused, match="million pixels"):
        limits.picture(str(file))


def test_files_outside_cannot_be_read(demo):
    import httpx

    address, _, folder = demo
    secret = folder / "secret.txt"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", f"{folder}/model/../secret.txt"):
        answer = httpx.get(f"{address}gradio_api/file={path}")
        assert answer.status_code in (403, 404)


def test_the_page_asks_nothing_of_the_network(demo):
    import httpx

    page = httpx.get(demo[0]).text
    config = json.loads(httpx.get(f"{demo[0]}config").text)
    assert config["analytics_enabled"] is False
    assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*\.(?:js|css)', page)
