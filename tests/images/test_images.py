"""One way from any image to pixels: every mode and number type, files of every sort, other sizes."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageCms

from imgdit.data.convert import ending
from imgdit.data.opening import decode_image
from imgdit.images import fit, fit_pixels, open_image, to_image, to_pixels, to_rgb

GREY, RED = (102, 102, 102), (255, 0, 0)


def new(mode, value):
    return Image.new(mode, (3, 2), value)


def with_info(image, **info):
    image.info.update(info)
    return image


def palette(**info):
    image = new("P", 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return with_info(image, **info)


def sixteen(mode, value):
    kind = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (3, 2), np.full((2, 3), value, kind).tobytes())


MODES = {
    "1": (new("1", 1), (255, 255, 255)),
    "L": (new("L", 102), GREY),
    "L, one value transparent": (with_info(new("L", 7), transparency=7), (255, 255, 255)),
    "LA": (new("LA", (0, 51)), (204, 204, 204)),
    "La": (new("LA", (0, 51)).convert("La"), (204, 204, 204)),
    "P": (palette(), RED),
    "P, its colour transparent": (palette(transparency=1), (255, 255, 255)),
    "P, half transparent": (palette(transparency=b"\xff\x33"), (255, 204, 204)),
    "PA": (palette().convert("PA"), RED),
    "RGB": (new("RGB", RED), RED),
    "RGB, its colour transparent": (with_info(new("RGB", RED), transparency=RED), (255, 255, 255)),
    "RGBA": (new("RGBA", (0, 255, 0, 0)), (255, 255, 255)),
    "RGBA, half": (new("RGBA", (255, 0, 0, 51)), (255, 204, 204)),
    "RGBa": (new("RGBA", (255, 0, 0, 51)).convert("RGBa"), (255, 204, 204)),
    "RGBX": (new("RGBX", (*RED, 0)), RED),
    "CMYK": (new("CMYK", (0, 255, 255, 0)), RED),
    "YCbCr": (new("RGB", GREY).convert("YCbCr"), GREY),
    "HSV": (new("HSV", (0, 255, 255)), RED),
    "LAB": (new("LAB", (255, 128, 128)), (255, 255, 255)),
    "I;16": (sixteen("I;16", 102 * 257), GREY),
    "I;16L": (sixteen("I;16L", 102 * 257), GREY),
    "I;16B": (sixteen("I;16B", 102 * 257), GREY),
    "I;16N": (sixteen("I;16N", 102 * 257), GREY),
    "I;16, one value transparent": (with_info(sixteen("I;16", 300), transparency=300), (255, 255, 255)),
    "I of 16 bits": (new("I", 102 * 257), GREY),
    "I of 0 and 1": (new("I", 1), (255, 255, 255)),
    "F": (new("F", 0.4), GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    image, colour = MODES[mode]
    if image.mode == "CMYK":
        assert "icc_profile" not in image.info
    made = to_rgb(image)
    assert made.mode == "RGB" and made.size == (3, 2)
    assert np.abs(np.asarray(made).astype(int) - colour).max() <= 1
    pixels = to_pixels(image)
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 2, 3)
    assert torch.equal(pixels, to_pixels(made)) and to_image(pixels[0]).tobytes() == made.tobytes()


NUMBERS = {
    "uint8": (np.full((2, 3), 102, np.uint8), 0.4),
    "uint8 with opacity": (np.full((2, 3, 2), (0, 51), np.uint8), 0.8),
    "bool": (np.ones((2, 3), bool), 1.0),
    "uint16": (np.full((2, 3), 26214, np.uint16), 0.4),
    "uint16, big-endian": (np.full((2, 3), 26214, ">u2"), 0.4),
    "uint16, nearly black": (np.full((2, 3), 13, np.uint16), 13 / 65535),
    "int32 of 16 bits": (np.full((2, 3), 26214, np.int32), 0.4),
    "uint32 of 16 bits": (np.full((2, 3), 26214, np.uint32), 0.4),
    "int64 of 0 and 1": (np.ones((2, 3), np.int64), 1.0),
    "float16": (np.full((2, 3), 0.5, np.float16), 0.5),
    "float32": (np.full((2, 3), 0.4, np.float32), 0.4),
    "float64, rounded": (np.full((2, 3), 1.0000001), 1.0),
    "float32 with opacity": (np.full((2, 3, 2), (0.0, 0.25), np.float32), 0.75),
    "one channel": (np.full((2, 3, 1), 102, np.uint8), 0.4),
    "three channels": (np.full((2, 3, 3), 102, np.uint8), 0.4),
    "four channels": (np.full((2, 3, 4), 255, np.uint8), 1.0),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_number_type_as_array_and_tensor(kind):
    array, value = NUMBERS[kind]
    pixels = to_pixels(array)
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 2, 3)
    torch.testing.assert_close(pixels, torch.full_like(pixels, value), atol=1e-6, rtol=0)
    if array.dtype.byteorder != ">":
        tensor = torch.from_numpy(array)
        tensor = tensor if tensor.ndim == 2 else tensor.movedim(-1, 0)
        assert torch.equal(to_pixels(tensor), pixels)
        assert torch.equal(to_pixels(torch.stack([tensor, tensor])[:, None] if tensor.ndim == 2 else tensor[None]),
                           pixels.expand(2 if tensor.ndim == 2 else 1, -1, -1, -1))  # fmt: skip


REFUSED = {
    "floats of 0 to 255": (np.full((2, 3), 200.0), r"values in \[0, 1\].*got 200 to 200; divide"),
    "metres": (new("F", 7.5), r"values in \[0, 1\].*7.5.*metres"),
    "below black": (torch.full((3, 2, 3), -0.5), r"got -0.5"),
    "NaN": (np.full((2, 3), np.nan), "not finite"),
    "infinity": (new("F", float("inf")), "not finite"),
    "8 bits in 32": (new("I", 200), "may be 8 or 16 bits; say which"),
    "8 bits in int64": (np.full((2, 3), 200), "may be 8 or 16 bits; say which"),
    "32 bits": (np.full((2, 3), 70_000), "to 70000, not 16 bits"),
    "negative": (new("I", -5), "-5 to -5, not 16 bits"),
    "five channels": (np.zeros((2, 3, 5), np.uint8), r"shape \(2, 3, 5\); expected \(H, W\)"),
    "nothing": (np.zeros((0, 3), np.uint8), r"shape \(0, 3\)"),
    "complex numbers": (np.zeros((2, 3), complex), "array of complex128"),
    "strings": (np.array([["a"]]), "is of numbers"),
    "a path": ("edges.png", "PIL image, an array or a tensor, got str"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_known_black_and_white_is_refused(kind):
    image, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        to_pixels(image)


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(4))))
def test_opacity_is_the_same_in_an_array_and_in_a_pil_image(array):
    of_image, of_array = to_pixels(Image.fromarray(array), "#4080C0"), to_pixels(array, "#4080C0")
    assert (of_image - of_array).abs().max() <= 1.01 / 255


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_16_bits_are_scaled_whatever_carries_them(array):
    expected = torch.from_numpy(array.astype(np.float32) / 65535)
    for image in (array, Image.fromarray(array), open_image(file_of(Image.fromarray(array)))):
        assert (to_pixels(image)[0] - expected).abs().max() <= 0.51 / 255
    opened = Image.open(io.BytesIO(file_of(Image.fromarray(array))))
    opened.load()
    old = Image.fromarray(np.asarray(opened).astype(np.int32))  # as older versions of Pillow open the same file
    old.format = "PNG"
    assert torch.equal(to_pixels(old), to_pixels(opened))


def file_of(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png(depth, colour, row, clear):
    """A PNG of one row, with the value that is transparent."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)), (b"tRNS", clear)]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_the_transparent_value_of_16_bit_pngs():
    grey = png(16, 0, struct.pack(">2H", 300, 26214), struct.pack(">H", 300))
    colour = png(16, 2, struct.pack(">6H", 300, 40000, 1, 26214, 26214, 26214), struct.pack(">3H", 300, 40000, 1))
    for data in (grey, colour):
        assert np.asarray(to_rgb(open_image(data)))[0].tolist() == [[255, 255, 255], list(GREY)]


# Files


def photo():
    """Left red, right blue, lying as a camera stores it that was turned (EXIF orientation 6)."""
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    return image, exif


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_turned_as_the_camera_was_held(form, tmp_path):
    image, exif = photo()
    path = tmp_path / "photo"
    image.save(path, form, exif=exif, **({"quality": 100} if form == "JPEG" else {}))
    for made in (to_rgb(open_image(path)), to_rgb(Image.open(path)), decode_image(path.read_bytes()).image):
        assert made.size == (4, 8)
        assert np.asarray(made)[0, 0, 0] > 200 and np.asarray(made)[-1, 0, 2] > 200


def test_paths_bytes_and_open_files_are_the_same_image(tmp_path):
    image = Image.effect_noise((6, 5), 60)
    image.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        file.read(3)
        opened = [open_image(x) for x in (tmp_path / "a.png", str(tmp_path / "a.png"), file_of(image), file)]
    assert all(one.tobytes() == image.tobytes() for one in opened)


def test_cmyk_goes_through_its_profile_and_a_damaged_profile_costs_the_shade_only():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = to_rgb(new("CMYK", (0, 255, 255, 0)))
    for damaged in (profile, profile[:40]):  # of another colour space, and cut
        assert to_rgb(with_info(new("CMYK", (0, 255, 255, 0)), icc_profile=damaged)).tobytes() == plain.tobytes()


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(file_of(Image.effect_noise((60, 60), 60))[:900])
    for read in (lambda: open_image(path), lambda: to_rgb(Image.open(path)), lambda: to_pixels(Image.open(path))):
        with pytest.raises(ValueError, match=r"half\.png' cannot be read, it is damaged or no image: .*truncated"):
            read()
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png' cannot be read.*no known format"):
        open_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"there is no image '.*none\.png'"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a folder; name an image file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="the upload cannot be read"):
        open_image(b"", "the upload")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, before our error
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch):
    data = file_of(Image.new("1", (400, 300)))
    with pytest.raises(ValueError, match=r"^the upload has 400x300 pixels, at most 0 million pixels are read"):
        open_image(data, "the upload", most=1000)
    for limit in (100_000, 50_000):  # beyond twice the limit Pillow refuses by itself
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        (tmp_path / "bomb.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"bomb\.png' has .* pixels, at most .*raise PIL.Image.MAX_IMAGE_PIXELS"):
            open_image(tmp_path / "bomb.png")


def test_heic_is_read_or_its_package_is_named(tmp_path):
    """Bytes of a HEIC file's header: with pillow-heif they are a damaged file, without it the package is named."""
    data = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(40)
    assert ending(data) == "heic"
    with pytest.raises(ValueError, match=r"phone\.heic' (is a HEIC image.*pip install pillow-heif|cannot be read)"):
        (tmp_path / "phone.heic").write_bytes(data)
        open_image(tmp_path / "phone.heic")


def test_a_heic_photo():
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(photo()[0].resize((64, 32), Image.Resampling.NEAREST)).save(stream, quality=100)
    made = np.asarray(to_rgb(open_image(stream.getvalue())))
    assert made.shape == (32, 64, 3) and made[16, 8, 0] > 200 and made[16, 56, 2] > 200
    assert "HEIF" not in Image.OPEN  # nothing was registered


# Another size


def test_fitting_is_the_same_for_everything_that_holds_an_image():
    array = np.random.default_rng(0).integers(60, 200, (6, 10, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    for size in ((8, 8), (20, 12), (3, 5), (10, 6)):
        expected = to_pixels(fit(image, size))
        assert expected.shape == (1, 3, size[1], size[0])
        tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
        for given_ in (image, array, tensor, tensor[None]):
            assert torch.equal(fit_pixels(given_, size), expected)
        smooth = fit_pixels(tensor / 255, size)
        assert smooth.min() >= 0 and smooth.max() <= 1 and (smooth - expected).abs().mean() < 2 / 255
    assert torch.equal(fit_pixels(array / 255, (10, 6)), to_pixels(array / 255))
