"""Megatron's samples from labelled images: which image is which sample, and what stands in.

Which image a sample is, and how it is cropped and mirrored, is a function of (seed, epoch, place in
the epoch) alone. So a run that continues, and every layout, sees the same samples.

Shapes: c channels, h height, w width.
"""

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_rltd.config import RankConfigError
from megatron_rltd.vision.images import Images
from megatron_rltd.vision.transforms import Transform

Sample = dict[str, Any]  # image [c, h, w] uint8; label, weight: int64
ENDLESS = 2**48  # samples: more than a run evaluates


class ImageReader:
    """Reads the images of a set, and names those that it cannot read, each once on this rank."""

    def __init__(self, images: Images):
        self.images = images
        self._ignores_sigterm = False
        # Shared with the data loader's processes.
        self._unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def _ignore_sigterm(self) -> None:
        """In a data loader's process, ignore the signal by which SLURM asks a job to stop.

        It goes to every process of the job. Without its workers, the run could not save.
        """
        if torch.utils.data.get_worker_info() is not None and not self._ignores_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._ignores_sigterm = True

    def read(
        self, index: int, transform: Callable[[Image.Image], np.ndarray]
    ) -> tuple[np.ndarray, int] | None:
        """Return an image's pixels, [c, h, w] uint8, and its label; None if it is unreadable."""
        self._ignore_sigterm()
        try:
            image, label = self.images.load(index)
            return transform(image), label
        except Exception as error:  # a damaged file can make a decoder raise anything
            if not self._unreadable[index]:
                self._unreadable[index] = True
                print(
                    f"finetune_vit: unreadable image, {int(self._unreadable.sum())} of "
                    f"{len(self)} so far: {self.images.name(index)}: "
                    f"{type(error).__name__}: {error}",
                    file=sys.stderr,
                    flush=True,
                )
            return None

    def check(self, transform: Transform) -> None:
        """Raise RankConfigError if no image at all is readable."""
        if not any(self.read(i, transform.for_validation) for i in range(len(self))):
            raise RankConfigError(
                [f"none of {len(self)} images can be read; the first is {self.images.name(0)}"]
            )


class TrainingSamples(torch.utils.data.Dataset):
    """As many epochs as a run takes, each in an order of its own.

    In the place of an unreadable image stands the next one of the set that is readable.
    """

    def __init__(self, reader: ImageReader, transform: Transform, seed: int, samples: int):
        """Say what the samples are.

        Args:
            samples: Of the whole run.
        """
        self._reader, self._transform, self._seed = reader, transform, seed
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> Sample:
        epoch, place = divmod(sample, len(self._reader))
        index = int(_order(self._seed, epoch, len(self._reader))[place])
        for stand_in in range(len(self._reader)):
            random = np.random.default_rng((self._seed, epoch, place))
            found = self._reader.read(
                (index + stand_in) % len(self._reader),
                functools.partial(self._transform.for_training, random=random),
            )
            if found is not None:
                return _sample(*found)
        raise RuntimeError("finetune_vit: no image of the training set can be read any more")


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    """Return the order of an epoch, [images] int64."""
    return np.random.default_rng((seed, epoch)).permutation(images)


class ValidationSamples(torch.utils.data.Dataset):
    """The set over and over; Megatron counts on through all evaluations.

    Samples that fill up the last batch of an evaluation, and unreadable images, have the weight 0.
    """

    def __init__(self, reader: ImageReader, transform: Transform, samples: int):
        """Say what the samples are.

        Args:
            samples: Of one evaluation.
        """
        self._reader, self._transform, self._samples = reader, transform, samples

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, sample: int) -> Sample:
        index, transform = sample % self._samples, self._transform
        found = None
        if index < len(self._reader):
            found = self._reader.read(index, transform.for_validation)
        if found is not None:
            return _sample(*found)
        shape = (transform.channels, transform.height, transform.width)
        return _sample(np.zeros(shape, np.uint8), 0, weight=0)


def _sample(pixels: np.ndarray, label: int, weight: int = 1) -> Sample:
    return {"image": torch.from_numpy(pixels), "label": label, "weight": weight}
