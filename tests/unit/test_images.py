"""Images from a disk, and which of them is which sample. None of it needs Megatron."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_rltd.config import RankConfigError
from megatron_rltd.vision import images
from megatron_rltd.vision.datasets import ImageReader, TrainingSamples, ValidationSamples
from megatron_rltd.vision.transforms import Transform


def save(path, size=(9, 8), mode="RGB", value=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if len(mode) == 1 else (value,) * len(mode)).save(path)


def folders(root, train=("a", "b"), val=("a", "b"), count=3):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            for number in range(count):
                save(root / split / name / f"{number}.png", value=10 * number + ord(name[0]))
    return root


def test_folders(tmp_path):
    folders(tmp_path, val=("b",))
    save(tmp_path / "train/a/deeper/x.JPG")
    (tmp_path / "train/a/notes.txt").write_text("not an image")
    (tmp_path / "train/.cache").mkdir()
    train, validation = images.find_images(str(tmp_path))
    assert train.classes == validation.classes == ["a", "b"]
    names = [train.name(i)[len(str(tmp_path)) :] for i in range(len(train))]
    assert names == [
        "/train/a/0.png",
        "/train/a/1.png",
        "/train/a/2.png",
        "/train/a/deeper/x.JPG",
        "/train/b/0.png",
        "/train/b/1.png",
        "/train/b/2.png",
    ]
    assert [train.load(i)[1] for i in range(len(train))] == [0, 0, 0, 0, 1, 1, 1]
    image, label = validation.load(1)
    assert (image.getpixel((0, 0)), label) == ((ord("b") + 10,) * 3, 1)


def write_cifar(folder, classes, label_bytes, files, records=4):
    """Write files whose record i has the label i and pixels of (channel, row, column)."""
    folder.mkdir()
    channel, row, column = np.indices((3, 32, 32), np.uint8)
    pixels = (100 * channel + 2 * row + column % 2).astype(np.uint8)
    for file in files:
        labels = [[9] * (label_bytes - 1) + [i % classes] for i in range(records)]
        rows = [np.concatenate([np.array(n, np.uint8), pixels.ravel()]) for n in labels]
        np.concatenate(rows).tofile(folder / file)
    return pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes):
    training, test, names, label_bytes = images.CIFAR[classes == 100]
    folder = tmp_path / "cifar-binary"
    pixels = write_cifar(folder, classes, label_bytes, [*training, test])
    (folder / names).write_text("".join(f"class {n}\n" for n in range(classes)) + "\n")
    train, validation = images.find_images(str(tmp_path))
    assert len(train.classes) == classes and len(validation) == 4
    assert len(train) == 4 * len(training)
    last = len(train) - 1
    assert train.name(last) == f"{folder / training[-1]}, record 3"
    image, label = train.load(last)
    assert label == 3 and np.array_equal(np.asarray(image), pixels)
    (folder / test).write_bytes((folder / test).read_bytes()[:-1])
    with pytest.raises(RankConfigError, match="bytes are no multiple of 307"):
        images.find_images(str(tmp_path))
    (folder / test).unlink()
    with pytest.raises(RankConfigError, match=f"of CIFAR's files, .*{test} is missing"):
        images.find_images(str(tmp_path))


def write_parquet(path, labels, column="label", names=None):
    """Write what the Hugging Face hub has: struct(bytes, path), label, and the features."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(len(labels)):
        file = io.BytesIO()
        Image.new("RGB", (6, 5), (number, 0, 0)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": f"{number}.png"})
    table = pa.table({"image": rows, column: pa.array(labels, pa.int64())})
    if names:
        features = {
            "image": {"_type": "Image"},
            column: {"names": names, "_type": "ClassLabel"},
        }
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, path)


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_parquet(tmp_path, monkeypatch, names):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    column = "label" if names else "fine_label"
    for part in (0, 1):
        write_parquet(tmp_path / f"data/train-0000{part}-of-00002.parquet", [0, 1], column, names)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [1], column, names)
    train, validation = images.find_images(str(tmp_path))
    assert (len(train), len(validation)) == (4, 1)
    assert train.classes == (names or ["0", "1"])
    image, label = train.load(3)
    assert (image.size, image.getpixel((0, 0)), label) == ((6, 5), (1, 0, 0), 1)
    assert train.name(3).endswith("data, row 3 (1.png)")
    write_parquet(tmp_path / "data/train-00002-of-00002.parquet", [-1], column, names)
    with pytest.raises(RankConfigError, match="some labels are negative"):
        images.find_images(str(tmp_path))
    write_parquet(tmp_path / "other/train.parquet", [1], "answer")
    with pytest.raises(RankConfigError, match="there is no validation"):
        images.find_images(str(tmp_path / "other"))
    write_parquet(tmp_path / "other/test.parquet", [1], "answer")
    with pytest.raises(RankConfigError, match="there must be a column of images.*: image, answer"):
        images.find_images(str(tmp_path / "other"))
    (tmp_path / "other/train.parquet").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(RankConfigError, match="cannot be read"):
        images.find_images(str(tmp_path / "other"))


def test_wrong_folders_are_named(tmp_path):
    def error(what, **names):
        folder = tmp_path / what
        folder.mkdir()
        folders(folder, **names)
        return folder

    cases = {
        str(tmp_path / "nowhere"): "there is no such folder",
        str(tmp_path): "no images in a known layout: train/CLASS.*CIFAR.*Parquet",
    }
    for folder, said in cases.items():
        with pytest.raises(RankConfigError, match=f"--data-path {folder}: .*{said}"):
            images.find_images(folder)
    unknown = error("unknown", val=("b", "c", "d"))
    with pytest.raises(RankConfigError, match="validation has classes that training lacks: c, d"):
        images.find_images(str(unknown))
    flat = tmp_path / "flat"
    save(flat / "train" / "0.png")
    with pytest.raises(RankConfigError, match="train: there is no folder in it; each class is"):
        images.find_images(str(flat))
    without = error("without", val=())
    with pytest.raises(RankConfigError, match="without/val: there is no such folder"):
        images.find_images(str(without))
    (without / "val/a").mkdir(parents=True)
    with pytest.raises(RankConfigError, match="the validation set has no image"):
        images.find_images(str(without))
    (without / "train/z").mkdir()
    with pytest.raises(RankConfigError, match="the class z has no image"):
        images.find_images(str(without))


TRANSFORM = Transform(height=8, width=8, channels=3, resize=10, padding=2)


@pytest.mark.parametrize(
    ("mode", "size"),
    [("RGB", (30, 11)), ("L", (5, 7)), ("RGBA", (8, 8)), ("P", (1, 200)), ("CMYK", (10, 10))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_mode_gives_the_same_shape(mode, size, channels):
    transform = Transform(height=8, width=6, channels=channels, resize=8, padding=1)
    image = Image.new(mode, size)
    for pixels in (
        transform.for_validation(image),
        transform.for_training(image, np.random.default_rng(0)),
    ):
        assert (pixels.shape, pixels.dtype) == ((channels, 8, 6), np.uint8)


def test_crops_and_mirrors_are_all_that_there_are():
    """Every result is one of the 7 * 7 crops of the image with its border, mirrored or not."""
    transform = Transform(height=8, width=8, channels=1, resize=10, padding=2)
    pixels = np.arange(1, 101, dtype=np.uint8).reshape(10, 10)
    padded = np.pad(pixels, 2)
    crops = [padded[y : y + 8, x : x + 8] for y in range(7) for x in range(7)]
    possible = {c.tobytes() for crop in crops for c in (crop, crop[:, ::-1])}
    image = Image.fromarray(pixels)
    drawn = {
        transform.for_training(image, np.random.default_rng(seed)).tobytes() for seed in range(900)
    }
    assert drawn == possible
    middle = transform.for_validation(image)[0]
    assert np.array_equal(middle, pixels[1:9, 1:9])


def samples(reader, count, seed=5, transform=TRANSFORM):
    return TrainingSamples(reader, transform, seed, count)


def test_samples_are_a_function_of_seed_and_place(tmp_path):
    train, _ = images.find_images(str(folders(tmp_path, count=8)))
    first, again = samples(ImageReader(train), 64), samples(ImageReader(train), 64)
    wanted = [first[i] for i in range(48)]
    again = pickle.loads(pickle.dumps(again))  # as it goes to a data loader's process
    for i in reversed(range(48)):
        assert torch.equal(again[i]["image"], wanted[i]["image"])

    # Each epoch has every image once, in another order and with other crops.
    def brightest(epoch):
        return [int(s["image"].max()) for s in wanted[16 * epoch : 16 * epoch + 16]]

    assert sorted(brightest(0)) == sorted(brightest(1)) == sorted(brightest(2))
    assert brightest(0) != brightest(1) != brightest(2)
    # All images are of one size and colour, so this is how they were cropped.
    cropped = [(s["image"] > 0).flatten().tolist() for s in wanted]
    assert cropped[:16] != cropped[16:32]
    other = samples(ImageReader(train), 64, seed=6)
    assert [other[i]["label"] for i in range(16)] != [wanted[i]["label"] for i in range(16)]


def test_an_evaluation_has_every_image_once(tmp_path):
    _, validation = images.find_images(str(folders(tmp_path, count=3)))
    evaluated = ValidationSamples(ImageReader(validation), TRANSFORM, samples=8)
    for start in (0, 8, 1000):
        found = [evaluated[start + i] for i in range(8)]
        assert sum(s["weight"] for s in found) == 6
        values = sorted(int(s["image"].max()) for s in found if s["weight"])
        assert values == sorted(10 * n + ord(name) for n in range(3) for name in "ab")


def test_damaged_images(tmp_path, capsys):
    root = folders(tmp_path, count=2)
    (root / "train/a/0.png").write_bytes((root / "train/a/0.png").read_bytes()[:50])
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(root / "train/b/1.png")
    train, _ = images.find_images(str(root))
    reader = ImageReader(train)
    ours = samples(reader, 12)
    values = {int(ours[i]["image"].max()) for i in range(12)}
    assert values == {ord("a") + 10, ord("b")}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert {line.partition(" so far")[0][-6:] for line in said} == {"1 of 4", "2 of 4"}
    assert any("16: only images of 8 bits" in line for line in said)
    reader.check(TRANSFORM)
    for file in root.glob("train/*/*"):
        file.write_text("")
    with pytest.raises(RankConfigError, match="none of 4 images can be read"):
        ImageReader(train).check(TRANSFORM)
    with pytest.raises(RuntimeError, match="no image of the training set can be read"):
        samples(ImageReader(train), 12)[0]
