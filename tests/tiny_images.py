"""Small folders of images, sound and broken."""

import json
import random

import numpy as np
from PIL import Image

DEFECTS = ("missing", "broken", "too small", "caption", "duplicate", "metadata", "broken condition", "condition shape")
"""Kinds of rows that cannot be used; the names that the linter gives them."""
ODDITIES = ("rotated", "alpha", "16 bit", "cmyk", "animated")
"""Kinds of images that need work before they can."""


def image(seed, size=(24, 16)):
    """A smooth random image: two colours that blend."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 256, (2, 3))
    weight = np.linspace(0, 1, size[0])[None, :, None] * np.ones((size[1], 1, 1))
    return Image.fromarray((left * (1 - weight) + right * weight).astype(np.uint8))


def write_folder(folder, count, defects=None, seed=0, size=(24, 16), conditions=False):
    """A folder of `count` rows with `text` "a red cube …", of which some are as `defects` says.

    Args:
        defects: kind -> how many; kinds of `DEFECTS` and `ODDITIES`.

    Returns:
        name -> kind of what is not sound.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind, n in (defects or {}).items() for _ in range(n)]
    kinds += [""] * (count - len(kinds))
    random.Random(seed).shuffle(kinds)
    if kinds[0] == "duplicate":  # needs a row before it
        sound = kinds.index("")
        kinds[0], kinds[sound] = kinds[sound], kinds[0]
    lines, said, last = [], {}, ""
    colours = ("red", "green", "blue")
    for i, kind in enumerate(kinds):
        name = f"{i:05d}." + ("jpg" if kind == "cmyk" else "gif" if kind == "animated" else "png")
        line = {"file_name": name, "text": f"a {colours[i % 3]} cube"}
        made = image(i, (size[1], size[0]) if i % 2 else size)
        _write(folder / name, kind, made, i)
        if conditions or kind.endswith(("condition", "shape")):
            line["grey_file_name"] = f"grey-{name}.png"
            grey = made.convert("L").resize((20, 20)) if kind == "condition shape" else made.convert("L")
            grey.save(folder / line["grey_file_name"])
        if kind == "missing":
            (folder / name).unlink()
        elif kind == "broken condition":
            (folder / line["grey_file_name"]).write_bytes(b"no image")
        elif kind == "caption":
            line["text"] = 7
        elif kind == "duplicate":
            line["file_name"] = name = last
        elif not kind:
            last = name
        lines.append('{"file_name": ' if kind == "metadata" else json.dumps(line))
        if kind:
            said[f"metadata.jsonl:{i + 1}" if kind == "metadata" else name] = kind
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return said


def _write(path, kind, made, seed):
    if kind == "broken":
        made.save(path)
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "too small":
        made.resize((4, 4)).save(path)
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        made.save(path, exif=exif)
    elif kind == "alpha":
        made.putalpha(seed % 256)
        made.save(path)
    elif kind == "16 bit":
        values = np.asarray(made.convert("L")).astype(np.uint16) * 257
        Image.fromarray(values).save(path)
    elif kind == "cmyk":
        made.convert("CMYK").save(path, quality=95)
    elif kind == "animated":
        made.save(path, save_all=True, append_images=[image(seed + 1, made.size)])
    else:
        made.save(path)
