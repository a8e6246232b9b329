"""A mask means the same however it is kept: white counts."""

import numpy as np
import pytest
import torch
from PIL import Image

from imgdit.images import to_mask
from imgdit.images.masks import mask_values

WANTED = np.zeros((4, 6), bool)
WANTED[1:3, 2:] = True
BYTES = WANTED.astype(np.uint8)


def coloured(mode, on, off):
    image = Image.new(mode, (6, 4), off)
    image.paste(on, mask=Image.fromarray(BYTES * 255))
    return image


def palette():
    image = Image.fromarray(BYTES)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([0, 0, 0, 255, 255, 255])
    return image


MASKS = {
    "bool": WANTED,
    "list": WANTED.tolist(),
    "uint8": BYTES * 255,
    "uint8 of 0 and 1": BYTES,
    "uint8 of two greys": np.where(WANTED, 200, 40).astype(np.uint8),
    "uint16": BYTES.astype(np.uint16) * 65535,
    "uint16 of 0 and 255": BYTES.astype(np.uint16) * 255,
    "uint16 of two greys": np.where(WANTED, 40_000, 300).astype(np.uint16),
    "int64 of 0 and 255": BYTES.astype(np.int64) * 255,
    "float": WANTED.astype(np.float32),
    "soft": np.where(WANTED, 0.7, 0.3),
    "(H, W, 1)": BYTES[..., None] * 255,
    "(H, W, 3)": np.repeat(BYTES[..., None] * 255, 3, 2),
    "(1, H, W) tensor": torch.from_numpy(WANTED)[None].float(),
    "(1, 1, H, W) tensor": torch.from_numpy(WANTED)[None, None],
    "PIL 1": Image.fromarray(WANTED),
    "PIL L": Image.fromarray(BYTES * 255),
    "PIL L of 0 and 1": Image.fromarray(BYTES),
    "PIL I;16": Image.fromarray(BYTES.astype(np.uint16) * 65535),
    "PIL I;16 of 0 and 255": Image.fromarray(BYTES.astype(np.uint16) * 255),
    "PIL I;16 of two greys": Image.fromarray(np.where(WANTED, 40_000, 300).astype(np.uint16)),
    "PIL I": Image.fromarray(BYTES.astype(np.int32) * 255),
    "PIL F": Image.fromarray(WANTED.astype(np.float32)),
    "PIL P": palette(),
    "PIL RGB": coloured("RGB", "white", "black"),
    "PIL RGB, yellow on blue": coloured("RGB", "yellow", "blue"),
    "PIL CMYK": coloured("RGB", "white", "black").convert("CMYK"),
    "PIL RGBA, all of it opaque": coloured("RGBA", "white", "black"),
    "PIL RGBA, white strokes": coloured("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
    "PIL RGBA, black strokes": coloured("RGBA", (0, 0, 0, 255), (255, 255, 255, 0)),
    "PIL LA": coloured("LA", (255, 255), (0, 0)),
    "array (H, W, 4)": np.stack([BYTES * 90, BYTES * 20, BYTES, BYTES * 255], -1),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind(kind):
    assert torch.equal(mask_values(MASKS[kind]), torch.from_numpy(WANTED))


def test_a_cut_out_masks_what_is_opaque():
    noise = np.asarray(Image.effect_noise((6, 4), 200).convert("RGB"))
    cut = Image.fromarray(np.concatenate([noise, BYTES[..., None] * 255], -1))
    assert torch.equal(mask_values(cut), torch.from_numpy(WANTED))


SPLIT = np.stack([BYTES * 255, np.full_like(BYTES, 255)])  # grey and opacity
SPLIT[:, 0, 0] = 0
REFUSED = {
    "black, white and transparent": (torch.from_numpy(SPLIT), "may mean two things"),
    "beyond its range": (np.full((4, 6), 9.5), r"values in \[0, 1\]"),
    "not finite": (np.full((4, 6), np.nan), "not finite"),
    "negative": (np.full((4, 6), -1), "no negative values"),
    "one for each sample": (torch.ones(2, 1, 4, 6), "one mask serves all samples, got 2"),
    "of another aspect": (np.ones((4, 5)), r"of shape \(4, 5\).*4x6 tokens.*8x12 pixels.*aspect"),
    "nothing": (np.zeros((4, 6)), "leaves no token"),
    "a file's name": ("mask.png", "a mask is a PIL image, an array or a tensor, got str"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_masks_that_say_nothing_are_refused(kind):
    mask, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        to_mask(mask, (4, 6), 2)


def test_a_token_counts_if_all_its_pixels_do():
    pixels = WANTED.repeat(2, 0).repeat(2, 1)
    assert torch.equal(to_mask(pixels, (4, 6), 2), torch.from_numpy(WANTED))
    pixels[2, 4] = False
    assert not to_mask(pixels, (4, 6), 2)[1, 2]
    for times in (2, 3):  # of another size and its image's aspect
        larger = WANTED.repeat(2 * times, 0).repeat(2 * times, 1)
        assert torch.equal(to_mask(larger, (4, 6), 2), torch.from_numpy(WANTED))
    wide = np.zeros((4, 12), bool)  # of an image whose middle is read
    wide[:, 3:9] = WANTED
    assert torch.equal(to_mask(wide, (4, 6), 2, source_size=(4, 12)), torch.from_numpy(WANTED))
