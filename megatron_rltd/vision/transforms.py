"""From an image of any size and mode to the pixels that the model gets, with Pillow.

What is random is drawn from a generator that the caller made for this image and epoch.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps


@dataclass(frozen=True)
class Transform:
    """What is done with each image; sizes in pixels.

    Attributes:
        height, width: Of the result.
        channels: 1 for gray, 3 for RGB.
        resize: The shorter side, before the crop.
        padding: Of the black border that is added in training.
        flip: Whether training mirrors every second image.
    """

    height: int
    width: int
    channels: int
    resize: int
    padding: int = 0
    flip: bool = True

    def for_training(self, image: Image.Image, random: np.random.Generator) -> np.ndarray:
        """Return a random crop, perhaps mirrored: [channels, height, width] uint8."""
        image = self._resized(image)
        if self.padding:
            image = ImageOps.expand(image, self.padding)
        free = (image.width - self.width, image.height - self.height)
        left, top = (int(random.integers(space + 1)) for space in free)
        image = self._cropped(image, left, top)
        if self.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        return self._pixels(image)

    def for_validation(self, image: Image.Image) -> np.ndarray:
        """Return the middle of an image: [channels, height, width] uint8."""
        image = self._resized(image)
        left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
        return self._pixels(self._cropped(image, left, top))

    def _resized(self, image: Image.Image) -> Image.Image:
        if image.mode in ("I", "I;16", "F"):  # more than 8 bits, which convert would clip
            raise ValueError(f"mode {image.mode}: only images of 8 bits a channel are read")
        image = image.convert("L" if self.channels == 1 else "RGB")
        scale = self.resize / min(image.size)
        size = tuple(max(self.resize, int(side * scale)) for side in image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)

    def _cropped(self, image: Image.Image, left: int, top: int) -> Image.Image:
        return image.crop((left, top, left + self.width, top + self.height))

    def _pixels(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image)
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
