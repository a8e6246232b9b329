"""What notebooks show: text is escaped, images are small PNGs without what their files say."""

import base64
import io
import re
from collections import Counter

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_control import flux, lora_file

from imgdit import Condition, Frame, ImageFrame, OmniControl, TextFrame
from imgdit.data.linter import Report
from imgdit.data.rows import Problem
from imgdit.display import SIDE, png

EVIL = "<script>alert('x')</script>"


def test_frames_show_what_differs_from_the_defaults():
    shown = Frame((2, 3), sigma=0.0, adapter=EVIL, mask=torch.ones(2, 3, dtype=torch.bool))._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "2, 3" in shown and "Tensor (2, 3) torch.bool" in shown and "offset" not in shown
    assert "a red cube" in TextFrame.clean("a red cube")._repr_html_()
    long = TextFrame.clean("x" * 10_000)._repr_html_()
    assert len(long) < 1000 and "…" in long
    shown = ImageFrame.generate("segmentation", legend={"<b>": "cyan"})._repr_html_()
    assert "&lt;b&gt;: cyan" in shown and "<img" not in shown


def test_images_are_small_pngs_that_say_nothing():
    info = PngInfo()
    info.add_text("imgdit", "a private prompt")
    stream = io.BytesIO()
    Image.new("RGB", (600, 300), "red").save(stream, "PNG", pnginfo=info)
    image = Image.open(stream)
    for frame in (ImageFrame.clean(image, "depth"), Condition(image, "edges", mask=image)):
        data = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', frame._repr_html_())[1])
        assert data == frame._repr_png_() == png(image)
        shown = Image.open(io.BytesIO(data))
        assert shown.size == (SIDE, SIDE // 2) and not shown.info
    assert ImageFrame.clean([image, image])._repr_html_().count("<img") == 2
    assert ImageFrame.generate()._repr_png_() is None


def test_reports_are_their_text(tmp_path):
    pipe = flux()
    report = OmniControl(pipe).load(lora_file(tmp_path / "edges.safetensors", pipe.transformer))
    assert report._repr_html_().startswith("<pre>edges: ") and report._repr_html_().endswith("</pre>")
    problem = Problem("a.png", EVIL, "x")
    report = Report(EVIL, 1, [problem], [], Counter(), Counter(), [EVIL])
    assert "<script>" not in report._repr_html_() and "1 usable rows" in report._repr_html_()
