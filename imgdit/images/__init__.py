"""One way from any image to pixels: files (`opening`), modes and number types (`convert`), masks (`masks`), another
size (`fitting`)."""

from imgdit.images.convert import to_image, to_pixels, to_rgb, to_rgba
from imgdit.images.fitting import fit, fit_pixels
from imgdit.images.masks import to_mask
from imgdit.images.opening import open_image

__all__ = ["fit", "fit_pixels", "open_image", "to_image", "to_mask", "to_pixels", "to_rgb", "to_rgba"]
