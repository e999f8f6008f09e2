"""Labelled images on a disk: folders, CIFAR's binary files, and Parquet files of Hugging Face.

    train, validation = find_images("/data/cifar10")

`find_images` recognises the layout by what is in the folder. Every kind of set has the same four
members; see `Images`. Files are opened when an image is asked for, so that a set can go to other
processes.
"""

import io
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from megatron_rltd.config import RankConfigError

SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .jp2 .avif".split())
LAYOUTS = (
    "train/CLASS/*.jpg and val/CLASS/*.jpg (or .png and so on); the .bin files of CIFAR-10 or "
    "CIFAR-100; or Parquet files train*.parquet and validation*.parquet (or test*.parquet)"
)


class Images(Protocol):
    """A set of labelled images.

    Attributes:
        classes: The name of each class; labels are positions in it.
    """

    classes: list[str]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its label. A damaged image raises what Pillow raises."""
        ...

    def name(self, index: int) -> str:
        """Return what the user knows an image by."""
        ...


def find_images(folder: str) -> tuple[Images, Images]:
    """Return the training and the validation set in a folder.

    Raises:
        RankConfigError: They are not there, or do not fit each other.
    """
    path = Path(folder)
    if not path.is_dir():
        raise _wrong(folder, "there is no such folder")
    parquet = {name: _parquet_files(path, name) for name in ("train", "validation", "val", "test")}
    cifar = [found for names in CIFAR for found in [_cifar_files(path, *names)] if found]
    train: Images
    validation: Images
    if (path / "train").is_dir() and not parquet["train"]:
        train = FolderImages(path / "train")
        validation = FolderImages(path / "val", train.classes)
    elif cifar:
        train, validation = (CifarImages(files, cifar[0][2]) for files in cifar[0][:2])
    elif parquet["train"]:
        held_out = next((f for f in list(parquet.values())[1:] if f), [])
        if not held_out:
            raise _wrong(folder, "there is no validation*.parquet or test*.parquet")
        train, validation = ParquetImages(parquet["train"]), ParquetImages(held_out)
    else:
        raise _wrong(folder, f"there are no images in a known layout: {LAYOUTS}")
    for what, images in (("training", train), ("validation", validation)):
        if not len(images):
            raise _wrong(folder, f"the {what} set has no image")
    unknown = [name for name in validation.classes if name not in train.classes]
    if unknown:
        listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise _wrong(folder, f"validation has classes that training lacks: {listed}")
    return train, validation


def _wrong(folder: Any, why: str) -> RankConfigError:
    return RankConfigError([f"--data-path {folder}: {why}"])


class FolderImages:
    """One folder for each class, with images in it at any depth."""

    def __init__(self, folder: Path, classes: list[str] | None = None):
        """List the files, in the order of their names.

        Args:
            classes: Of the training set, if this is a validation set. It may lack some.

        Raises:
            RankConfigError: There is no class, or one without an image.
        """
        if not folder.is_dir():
            raise _wrong(folder, "there is no such folder")
        with os.scandir(folder) as entries:
            found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise _wrong(folder, "there is no folder in it; each class is a folder of images")
        files = {name: _image_files(folder / name) for name in found}
        empty = [name for name in found if not files[name]]
        if empty and classes is None:
            raise _wrong(folder, f"the class {empty[0]} has no image; remove its folder")
        # A class that only this set has is reported by `find_images`.
        names = classes or []
        self.classes = names + [name for name in found if name not in names]
        labels = {name: label for label, name in enumerate(self.classes)}
        self._folder = str(folder)
        # Millions of Python strings would be copied into every worker as they are counted.
        paths = [str(Path(name, file)) for name in found for file in files[name]]
        lengths = [len(os.fsencode(path)) for path in paths]
        self._ends: np.ndarray = np.cumsum(lengths, dtype=np.int64)
        self._paths = b"".join(map(os.fsencode, paths))
        self._labels: np.ndarray = np.repeat(
            [labels[n] for n in found], [len(files[n]) for n in found]
        )

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """Return the path of a file."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self._folder, os.fsdecode(self._paths[start : self._ends[index]]))

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded, and its label."""
        with Image.open(self.name(index)) as image:
            image.load()
            return image, int(self._labels[index])


def _image_files(folder: Path) -> list[str]:
    """Return the images below a folder, relative to it, in order."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        below = os.path.relpath(parent, folder)
        found += [
            os.path.normpath(os.path.join(below, name))
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return found


# Training files, test file, names of the classes, and bytes of labels before the image.
CIFAR = (
    ([f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", "batches.meta.txt", 1),
    (["train.bin"], "test.bin", "fine_label_names.txt", 2),
)


def _cifar_files(
    folder: Path, training: list[str], test: str, names: str, label_bytes: int
) -> tuple[list[Path], list[Path], tuple[Path, int]] | None:
    """Return the files of CIFAR-10 or CIFAR-100 in a folder or right below it, if they are there.

    Raises:
        RankConfigError: Some are there, others are not.
    """
    for parent in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        files = [parent / name for name in (*training, test, names)]
        missing = [file for file in files if not file.is_file()]
        if len(missing) < len(files):
            if missing:
                raise _wrong(folder, f"of CIFAR's files, {missing[0]} is missing")
            return files[: len(training)], [parent / test], (parent / names, label_bytes)
    return None


class CifarImages:
    """The binary version of CIFAR-10 or CIFAR-100 (its fine labels).

    A record is the label bytes, of which the last counts, and 3 * 32 * 32 bytes: channel by
    channel, row by row.
    """

    def __init__(self, files: list[Path], kind: tuple[Path, int]):
        """Check the files.

        Args:
            kind: The file of the classes' names, and the number of label bytes.

        Raises:
            RankConfigError: A file is no whole number of records, or a label has no name.
        """
        names, self._label_bytes = kind
        self.classes = [line.strip() for line in names.read_text().splitlines() if line.strip()]
        self._files = [str(file) for file in files]
        self._size = self._label_bytes + 3 * 32 * 32
        sizes = [file.stat().st_size for file in files]
        for file, size in zip(files, sizes, strict=True):
            if size % self._size:
                raise _wrong(file, f"its {size} bytes are no multiple of {self._size}")
        self._ends: np.ndarray = np.cumsum([size // self._size for size in sizes])
        for file in files:
            records: np.ndarray = np.fromfile(file, np.uint8).reshape(-1, self._size)
            labels = records[:, self._label_bytes - 1]
            if len(labels) and labels.max() >= len(self.classes):
                raise _wrong(file, f"label {labels.max()} has no name in {names}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[str, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[file], index - (int(self._ends[file - 1]) if file else 0)

    def name(self, index: int) -> str:
        """Return the file and the number of the record in it, from 0."""
        file, record = self._place(index)
        return f"{file}, record {record}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its label."""
        file, record = self._place(index)
        values: np.ndarray = np.fromfile(file, np.uint8, self._size, offset=record * self._size)
        pixels = values[self._label_bytes :].reshape(3, 32, 32).transpose(1, 2, 0)
        return Image.fromarray(pixels.copy()), int(values[self._label_bytes - 1])


def _parquet_files(folder: Path, split: str) -> list[str]:
    """Return the files of a split, in a folder or right below it, as on the Hugging Face hub."""
    for pattern in (f"{split}[-_.0-9]*parquet", f"*/{split}[-_.0-9]*parquet"):
        files = sorted(str(file) for file in folder.glob(pattern))
        if files:
            return files
    return []


class ParquetImages:
    """Parquet files with a column of images, as struct(bytes, path), and one of labels.

    Hugging Face's ``datasets`` reads them. It keeps an Arrow copy in its cache
    (``HF_DATASETS_CACHE``), so that any row can be read at once.
    """

    def __init__(self, files: list[str]):
        """Open the files.

        Raises:
            RankConfigError: ``datasets`` is missing, a file is damaged, or a column is.
        """
        try:
            import datasets
        except ImportError as error:
            raise _wrong(files[0], "Parquet files need pip install datasets") from error
        datasets.disable_progress_bars()
        try:
            self._rows: Any = datasets.Dataset.from_parquet(files)
        except Exception as error:  # of several libraries
            cause = error.__cause__ or error
            raise _wrong(files[0], f"cannot be read: {cause}") from error
        features = self._rows.features
        images = [name for name, kind in features.items() if _is_image(kind)]
        labels = [name for name in ("label", "fine_label", "labels") if name in features]
        if not images or not labels:
            raise _wrong(
                files[0],
                "there must be a column of images, as struct(bytes, path), and a column label (or "
                f"fine_label); there are: {', '.join(features)}",
            )
        self._image, self._label, self._file = images[0], labels[0], files[0]
        if isinstance(features[self._image], datasets.Image):
            undecoded = datasets.Image(decode=False)
            self._rows = self._rows.cast_column(self._image, undecoded)
        values = np.asarray(self._rows.with_format("numpy")[self._label][:])
        if len(values) and values.min() < 0:
            raise _wrong(files[0], "some labels are negative: is it a test set without labels?")
        names = getattr(features[self._label], "names", None)
        # Without names, Megatron's --num-classes decides.
        highest = int(values.max()) + 1 if len(values) else 0
        self.classes = names or [str(label) for label in range(highest)]

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Return the number of the row, from 0, and the path that it gives."""
        path = self._rows[index][self._image].get("path")
        return f"{os.path.dirname(self._file)}, row {index}" + (f" ({path})" if path else "")

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded, and its label."""
        row = self._rows[index]
        with Image.open(io.BytesIO(row[self._image]["bytes"])) as image:
            image.load()
            return image, int(row[self._label])


def _is_image(kind: Any) -> bool:
    if type(kind).__name__ == "Image":
        return True
    return isinstance(kind, dict) and {"bytes", "path"} <= set(kind)
