"""The bundled ViT script in Megatron's own loop: layouts, resume, heads, damaged images."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from megatron_rltd.schedule import Schedule
from tests.megatron.test_training import assert_same
from tests.parallel import RankError, train

CLASSES, TRAINING, VALIDATION = 3, 21, 10
TOKENS, LAYERS, GLOBAL_BATCH, STEPS = 17, 4, 8, 6
MODEL = (
    f"--num-layers {LAYERS} --hidden-size 32 --num-attention-heads 4 --attention-dropout 0 "
    "--hidden-dropout 0 --img-h 8 --img-w 8 --patch-dim 2"
)
RUN = (
    f"--micro-batch-size 2 --global-batch-size {GLOBAL_BATCH} --lr 3e-3 --min-lr 1e-4 "
    "--lr-decay-style cosine --lr-warmup-fraction 0.2 --clip-grad 1.0 --log-interval 1 "
    "--eval-interval 3 --num-workers 0 --image-resize 9 --image-padding 1"
)
LTD = "--random-ltd --random-ltd-min-tokens 5 --random-ltd-increment 2 --random-ltd-ramp-iters 9"


def write_images(folder, training=TRAINING, validation=VALIDATION, classes=CLASSES):
    """Write images of several sizes, each class brighter than the one before."""
    random = np.random.default_rng(1)
    for split, count in (("train", training), ("val", validation)):
        for number in range(count):
            label = number % classes
            path = folder / split / f"class{label}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (8 + number % 5, 9 + number % 3, 3)
            pixels = random.integers(0, 60, shape) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def finetune(images, options="", world_size=1, classes=CLASSES, length=f"--train-iters {STEPS}"):
    line = f"{MODEL} {RUN} {length} --data-path {images} --num-classes {classes} {options}"
    return train(line, world_size, script="finetune_vit")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(images, saved):
    """One process: what every layout must equal."""
    return finetune(images, f"{LTD} --save {saved} --save-interval 3")


def test_it_logs_accuracy_and_evaluates_the_whole_set(alone):
    schedule = Schedule(TOKENS, 5, 9, 2)
    assert alone.kept == [schedule.kept_tokens(step) for step in range(STEPS)]
    assert alone.layer_tokens == sum(GLOBAL_BATCH * 2 * (TOKENS + int(k)) for k in alone.kept)
    assert "random-LTD: layers that drop: 2-3 of 4" in alone.output
    assert "21 images of 3 classes, and 10 for validation; an evaluation takes 10" in alone.output
    shares = alone.accuracies
    assert len(shares) == STEPS + 3  # the last two evaluations are of the same weights
    logged = re.findall(r"accuracy(?: value)?: (\S+)", alone.output)
    logged[1] = shares[1]  # Megatron's second line is the mean of two steps
    assert [float(value) for value in logged] == pytest.approx(shares, rel=1e-5)
    for step in shares[:3]:
        assert step * GLOBAL_BATCH == pytest.approx(round(step * GLOBAL_BATCH))
    # Of ten images, not of the sixteen that two batches hold.
    assert shares[3] * VALIDATION == pytest.approx(round(shares[3] * VALIDATION), abs=1e-5)
    assert alone.validation[-1] == alone.validation[-2]


LAYOUTS = {
    "TP": (2, "--tensor-model-parallel-size 2"),
    "DP, distributed optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "full recompute, one sample at once": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--micro-batch-size 1",
    ),
    "micro-batches joined": (1, "--random-ltd-grow-micro-batch 4"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_one_process(name, images, alone):
    world_size, options = LAYOUTS[name]
    ours = finetune(images, f"{LTD} {options}", world_size)
    assert_same(ours, alone, 1e-5)
    assert ours.accuracies == pytest.approx(alone.accuracies, rel=1e-6)
    assert ours.kept == alone.kept


def start_at(folder, saved, iteration=3):
    """Return a copy of a folder of checkpoints whose newest is that of an iteration."""
    shutil.copytree(saved / f"iter_{iteration:07}", folder / f"iter_{iteration:07}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


@pytest.mark.parametrize(
    ("world_size", "options"), [(1, ""), (2, "--tensor-model-parallel-size 2")]
)
def test_resume_equals_the_whole_run(world_size, options, images, alone, saved, tmp_path):
    folder = start_at(tmp_path, saved)
    resumed = finetune(images, f"{LTD} --load {folder} {options}", world_size)
    tolerance = 0 if world_size == 1 else 1e-5
    for name in ("losses", "grad_norms", "kept"):
        whole = getattr(alone, name)[3:]
        assert getattr(resumed, name) == pytest.approx(whole, rel=tolerance, abs=0)
    assert resumed.validation == pytest.approx(alone.validation[1:], rel=tolerance, abs=0)


def test_a_budget_in_layer_tokens_with_its_learning_rate(images):
    ours = finetune(images, f"{LTD} --layer-token-lr", length="--train-layer-tokens 600")
    assert 600 * LAYERS <= ours.layer_tokens < 600 * LAYERS + GLOBAL_BATCH * TOKENS * LAYERS
    assert len(ours.losses) == len(ours.kept) < 600
    assert ours.learning_rates[-1] < max(ours.learning_rates)
