import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tiny_images import DEFECTS, ODDITIES, image, write_folder
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.data.buckets import bucket_sizes, nearest_bucket
from imgdit.data.linter import check
from imgdit.data.opening import decode_image
from imgdit.data.sources import open_rows
from imgdit.images import fit


def encoded(image, form="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_images_of_every_kind():
    plain = image(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = decode_image(encoded(plain, exif=exif))
    assert turned.notes == ("rotated",) and turned.image.size == plain.size[::-1]
    assert np.array_equal(np.asarray(turned.image), np.rot90(np.asarray(plain), -1))
    clear = plain.copy()
    clear.putalpha(0)
    seen = decode_image(encoded(clear))
    assert seen.notes == ("alpha",) and np.asarray(seen.image).min() == 255  # white, not what hides behind
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    deep = decode_image(encoded(Image.fromarray(ramp)))
    assert deep.notes == ("16 bit",) and np.array_equal(np.asarray(deep.image)[0, :, 0], np.arange(256))
    printed = decode_image(encoded(plain.convert("CMYK"), "jpeg", quality=100))
    assert printed.notes == ("cmyk",)
    assert np.abs(np.asarray(printed.image).astype(int) - np.asarray(plain)).mean() < 6
    moving = decode_image(encoded(plain, "gif", save_all=True, append_images=[image(1)]))
    assert "animated" in moving.notes and moving.image.mode == "RGB"
    assert np.abs(np.asarray(moving.image).astype(int) - np.asarray(plain)).mean() < 12
    assert decode_image(encoded(plain.convert("P"))).image.mode == "RGB"
    assert decode_image(encoded(plain.convert("1"))).image.mode == "RGB"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or no image"),
        (b"text", "damaged or no image"),
        (encoded(image(0))[:70], "damaged or no image"),
        (encoded(Image.new("F", (4, 4), 7.5), "tiff"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "tiff"), "-5 to -5, not 16 bits"),
    ],
)
def test_images_that_cannot_be_read(data, message):
    with pytest.raises(ValueError, match=message):
        decode_image(data)


@pytest.mark.parametrize("base", [64, 100, 512, 1000, 1024])
def test_buckets_have_the_area_of_the_base(base):
    sizes = bucket_sizes(base, 16)
    assert (round(base / 16) * 16,) * 2 in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % 16 == height % 16 == 0 and max(width, height) <= 2 * min(width, height)
        assert 0.8 < width * height / base**2 < 1.25
        assert (height, width) in sizes
    assert nearest_bucket((1600, 900), sizes)[0] > nearest_bucket((900, 1600), sizes)[0]
    assert nearest_bucket((500, 500), sizes) == (round(base / 16) * 16,) * 2


def test_fitting_crops_the_middle():
    image = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(50, 0))
    cut = np.asarray(fit(image, (50, 50)))
    assert cut.shape == (50, 50) and abs(int(cut[0, 0]) - 25) <= 1 and abs(int(cut[0, -1]) - 74) <= 1
    with pytest.raises(ValueError, match="less than a token, which has 16"):
        bucket_sizes(8, 16)


def test_the_linter_finds_every_kind(tmp_path):
    """40 rows, two of every kind of defect and one of every oddity."""
    truth = write_folder(tmp_path, 40, {**dict.fromkeys(DEFECTS, 2), **dict.fromkeys(ODDITIES, 1)})
    report = check(open_rows(tmp_path), min_side=8)
    broken = {name: kind for name, kind in truth.items() if kind in DEFECTS}
    assert Counter(problem.kind for problem in report.problems) == Counter(dict.fromkeys(DEFECTS, 2))
    assert {p.name: p.kind for p in report.problems if p.kind != "duplicate"} == {
        name: kind for name, kind in broken.items() if kind != "duplicate"
    }
    assert report.rows == 40 - 2 * len(DEFECTS)
    assert {kind: report.repaired[kind] for kind in ODDITIES} == dict.fromkeys(ODDITIES, 1)
    assert "words: 3 to 3" in str(report) and "cube" in str(report)


def test_commands(tmp_path):
    write_folder(tmp_path / "data", 12, {"broken": 1, "caption": 1, "alpha": 1})
    run = CliRunner().invoke
    said = run(app, ["data", "check", str(tmp_path / "data"), "--min-side", "8", "--out", str(tmp_path / "report")])
    assert said.exit_code == 1
    assert "10 usable rows, 2 problems" in said.output and "broken: the image: " in said.output
    assert Image.open(tmp_path / "report" / "sheet.png").width > 128
    assert "handled: 1 alpha" in (tmp_path / "report" / "check.txt").read_text()
    allowed = ["data", "check", str(tmp_path / "data"), "--min-side", "8", "--max-broken", "0.2"]
    assert run(app, allowed).exit_code == 0
    assert run(app, ["data", "convert", str(tmp_path / "data"), str(tmp_path / "shards")]).exit_code == 2
    said = run(app, ["data", "convert", str(tmp_path / "data"), str(tmp_path / "shards"), "--skip-broken"])
    assert said.exit_code == 0 and "wrote 11 rows" in said.output
    said = run(app, ["data", "preview", str(tmp_path / "p.png"), "--source", str(tmp_path / "shards")])
    assert said.exit_code == 0 and (tmp_path / "p.png").exists()
