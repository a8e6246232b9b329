"""The data set "user_images": what people bring, read through caches."""

from imgdit.training.user_images.dataset import UserImages
from imgdit.training.user_images.settings import UserImagesSettings, settings_of

__all__ = ["UserImages", "UserImagesSettings", "settings_of"]
