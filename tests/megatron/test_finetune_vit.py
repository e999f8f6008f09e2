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


def test_images_of_weight_0_do_not_count():
    import torch

    from megatron_rltd.pretrain.finetune_vit import loss_func

    logits = torch.tensor([[3.0, 1.0], [2.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    labels, weights = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 0, 1, 1])
    loss, images, reported = loss_func(labels, weights, logits)
    counted = torch.nn.functional.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]])
    assert images == 3 and loss / images == pytest.approx(float(counted))
    assert reported["accuracy"].tolist() == [1, 3]
    assert reported["lm loss"].tolist() == pytest.approx([float(loss), 3])


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


def test_sgd_resumes_with_its_momentum(images, tmp_path):
    sgd = f"{LTD} --optimizer sgd --sgd-momentum 0.9 --save-interval 3"
    whole = finetune(images, f"{sgd} --save {tmp_path / 'saved'}")
    assert "MegatronOptimizer.__init__  with --optimizer sgd" in whole.output
    (tmp_path / "started").mkdir()
    resumed = finetune(images, f"{sgd} --load {start_at(tmp_path / 'started', tmp_path / 'saved')}")
    assert resumed.losses == whole.losses[3:]
    assert resumed.grad_norms == whole.grad_norms[3:]


def test_a_budget_in_layer_tokens_with_its_learning_rate(images):
    ours = finetune(images, f"{LTD} --layer-token-lr", length="--train-layer-tokens 600")
    assert 600 * LAYERS <= ours.layer_tokens < 600 * LAYERS + GLOBAL_BATCH * TOKENS * LAYERS
    assert len(ours.losses) == len(ours.kept) < 600
    assert ours.learning_rates[-1] < max(ours.learning_rates)


def test_weights_of_other_classes_get_a_fresh_head(images, saved, tmp_path, alone):
    other = write_images(tmp_path / "other", classes=5)
    (tmp_path / "weights").mkdir()
    folder, once = start_at(tmp_path / "weights", saved), "--save-interval 1 --exit-interval 1"
    kept = finetune(images, f"--finetune --load {folder} {once}")
    assert f"the head is that of {folder}" in kept.output
    # Its first batch is that of the run that it comes from, but with the weights of step 3.
    assert kept.losses[0] < alone.losses[0]
    fresh = finetune(other, f"--pretrained-checkpoint {folder} --save {tmp_path} {once}", classes=5)
    assert f"the head is fresh: {folder} has 3 classes, this run 5" in fresh.output
    asked = finetune(images, f"--finetune --load {folder} --fresh-head {once}")
    assert f"the head is fresh: {folder} has 3 classes, this run 3" in asked.output
    assert asked.losses[0] != kept.losses[0]
    # What it saves has its own head, and is continued as any run is.
    finetune(other, f"--load {tmp_path} {once}", classes=5)
    with pytest.raises(RankError, match="--num-classes 3, but the run in --load .* has 5"):
        finetune(images, f"--load {tmp_path}")
    with pytest.raises(RankError, match=r"position_embeddings.weight of the shape \(17, 32\)"):
        finetune(images, f"--finetune --load {folder} --img-h 10 --image-resize 10")


def test_unreadable_images_are_named_and_stood_in_for(images, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(images, damaged)
    for name in ("train/class1/004.png", "val/class2/002.png"):
        file = damaged / name
        file.write_bytes(file.read_bytes()[:40])
    (damaged / "train/class0/000.png").write_text("not an image")
    ours = finetune(damaged, LTD)
    assert re.findall(r"unreadable image, (\d of \d+) so far: .*/(\w+/\w+/\w+.png)", ours.output)
    for name in ("train/class1/004.png", "val/class2/002.png", "train/class0/000.png"):
        assert ours.output.count(f"{damaged / name}: ") == 1, name
    assert len(ours.losses) == STEPS
    # The evaluation counts the nine that are left.
    assert ours.accuracies[3] * 9 == pytest.approx(round(ours.accuracies[3] * 9), abs=1e-5)
    other_layout = finetune(damaged, LTD, 2)
    assert_same(other_layout, ours, 1e-5)


REFUSED = {
    "--pipeline-model-parallel-size 2": "--pipeline-model-parallel-size 2 with a ViT .*: use",
    "--context-parallel-size 2": "--context-parallel-size 2 with a ViT.*: use",
    "--tensor-model-parallel-size 2 --sequence-parallel": "--sequence-parallel with a ViT.*: omit",
    "--patch-dim 3": "--img-h 8 and --img-w 8 must be a multiple of --patch-dim 3",
    "--patch-dim 0": "--img-h 8, --img-w 8, --patch-dim 0: all must be positive",
    "--seq-length 16": "--seq-length 16, but .* give 16 patches and a class token, 17 in all",
    "--num-channels 2": "--num-channels 2 must be 1 .gray. or 3",
    "--image-mean 0.1 0.2": "--image-mean 0.1 0.2 must be one number or one for each",
    "--image-std 0": "--image-std 0.0 must be .* above 0",
    "--image-resize 7": "--image-resize 7 is smaller than the crop to --img-h 8",
    "--image-padding -1": "--image-padding -1 must not be negative",
    "--num-experts 2": "--num-experts does not work with finetune_vit",
    "--dataloader-type cyclic": "--dataloader-type cyclic does not work with finetune_vit",
    "--position-embedding-type rope": "--position-embedding-type rope does not work",
}


def test_what_does_not_work_is_refused():
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_rltd.vision.arguments import add_arguments, find_problems

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    assert find_problems(parser.parse_args(MODEL.split())) == []
    for options, said in REFUSED.items():
        found = find_problems(parser.parse_args(f"{MODEL} {options}".split()))
        assert len(found) == 1 and re.search(said, found[0]), (options, found)


def test_refusals_come_before_training(images, tmp_path):
    with pytest.raises(RankError, match="--num-classes 4, but --data-path .* has 3 classes"):
        finetune(images, classes=4)
    with pytest.raises(RankError, match="--patch-dim 3"):
        finetune(images, "--patch-dim 3")
    with pytest.raises(RankError, match="give the folder of the images: --data-path"):
        train(f"{MODEL} {RUN} --train-iters 1", script="finetune_vit")
    unreadable = write_images(tmp_path / "unreadable")
    for file in unreadable.glob("val/*/*"):
        file.write_text("")
    with pytest.raises(RankError, match="none of 10 images can be read; the first is .*000.png"):
        finetune(unreadable)
