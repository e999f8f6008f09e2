"""--early-bird in Megatron's own loop: the same masks everywhere, resume, the end of the run."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_rltd.early_bird import history
from tests.megatron.test_training import BASE, LTD
from tests.parallel import RankError, run_all, train, train_on_this_rank

import hf_checkpoint  # isort: skip  from tools, which tests.parallel puts on the path
import draw_ticket
import ticket_checkpoint

STEPS = 8
RUN = BASE.replace("--train-iters 6", f"--train-iters {STEPS}") + " --ckpt-format torch_dist"
MODEL = (
    "--num-attention-heads 8 --group-query-attention --num-query-groups 4 --swiglu "
    "--ffn-hidden-size 96 --disable-bias-linear --normalization RMSNorm"
)
KEEP = "--early-bird-num-attention-heads 4 --early-bird-ffn-hidden-size 32"
SEARCH = f"--early-bird {KEEP} --early-bird-interval 1 --early-bird-window 3"
NEVER, SOON = "--early-bird-threshold 0", "--early-bird-threshold 0.5"
OTHERS = {"2:4": {"pattern": "2:4"}, "p30": {"pattern": "unstructured", "ratio": 0.3}}


def search_with_other_patterns(arguments: list[str], folder: str) -> dict:
    """Train with a search; at each check, write the masks of `OTHERS` to `folder`, too."""
    from megatron_rltd.early_bird import training
    from megatron_rltd.early_bird.model import Ranks
    from megatron_rltd.early_bird.target import Target

    take = training.take_mask

    def taken(iteration, layers, target, *rest):
        for name, options in OTHERS.items():
            other = Target(**options)
            mask = take(iteration, layers, other, *rest)
            ranks = Ranks(torch.device("cpu"))
            ranks.require_equal(mask)
            whole = ranks.whole(mask)
            if whole is not None:
                history.write(Path(folder) / name, whole, other, 1)
        return take(iteration, layers, target, *rest)

    training.take_mask = taken
    return train_on_this_rank("pretrain_gpt", arguments)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run without a search, saved at iterations 2 and 4 and 8."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    run = train(f"{RUN} {MODEL} --save {folder} --save-interval 2")
    return folder, run


def from_iteration(dense, folder, iteration=2):
    """Return a copy of a run whose latest checkpoint is that of an iteration."""
    shutil.copytree(dense[0] / f"iter_{iteration:07d}", folder / f"iter_{iteration:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def masks_in(folder) -> dict:
    """Return {iteration: {kind: {layer: bits as bytes}}} of a run's files."""
    found = {}
    for iteration in history.iterations(Path(folder)):
        content = torch.load(history.file_of(Path(folder), iteration), weights_only=True)
        found[iteration] = {
            kind: {number: bytes(bits) for number, bits in layers.items()}
            for kind, layers in content["pruned"].items()
        }
    return found


def of_checkpoint(folder, iteration, targets) -> list:
    """Return the masks that the tool takes from a checkpoint, as `masks_in` does."""
    with hf_checkpoint.alone():
        chosen = ticket_checkpoint.Dense(folder / f"iter_{iteration:07d}")
        taken = [chosen.mask(target) for target in targets]
    return [
        {kind: {n: bytes(b) for n, b in layers.items()} for kind, layers in mask.pruned.items()}
        for mask in taken
    ]


TP = "--tensor-model-parallel-size 2"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
VPP = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
LAYOUTS = {
    "TP, SP, PP, VPP": (4, f"{TP} --sequence-parallel {VPP}"),
    "CP": (2, "--context-parallel-size 2"),
}
MORE = {
    "one": (1, ""),
    "TP": (2, TP),
    "PP": (2, "--pipeline-model-parallel-size 2"),
    "DP": (2, ""),
    "CP, TP, SP": (4, f"{TP} --sequence-parallel --context-parallel-size 2"),
}


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.thorough) for name in MORE)]
)
def test_every_layout_finds_the_bits_of_the_checkpoint(dense, tmp_path, layout):
    from megatron_rltd.early_bird.target import Target

    ranks, flags = {**LAYOUTS, **MORE}[layout]
    load, save = from_iteration(dense, tmp_path / "load"), tmp_path / "save"
    ends = "--save-interval 100 --exit-interval 3"
    command = f"{RUN} {MODEL} {SEARCH} {NEVER} {flags} --load {load} --save {save} {ends}"
    run_all(ranks, search_with_other_patterns, command.split(), str(tmp_path))
    targets = [
        Target(num_attention_heads=4, ffn_hidden_size=32),
        *(Target(**options) for options in OTHERS.values()),
    ]
    expected = of_checkpoint(load, 2, targets)
    found = [masks_in(folder) for folder in (save, *(tmp_path / name for name in OTHERS))]
    assert found == [{2: bits} for bits in expected]
    assert sorted(found[0][2]["ffn"]) == [1, 2, 3, 4]


def test_overlapped_gathers_are_waited_for(tmp_path):
    # Fails if weights are read after the optimizer's step, where ranks hold different ones.
    save = tmp_path / "run"
    command = f"{RUN} {MODEL} {SEARCH} {NEVER} {DISTRIBUTED} --bf16 --save {save}"
    found = train(f"{command} --save-interval 4 --exit-interval 7", 2)
    masks = masks_in(save)
    assert list(masks) == [1, 2, 3, 4, 5, 6]
    assert len({str(mask) for mask in masks.values()}) > 1
    # The flag that a ticket needs is set, so that the checkpoint can be drawn from.
    from megatron_rltd.early_bird.target import Target

    target = Target(num_attention_heads=4, ffn_hidden_size=32)
    with hf_checkpoint.alone():
        ticket_checkpoint.Dense(save / "iter_0000004").require_optimizer()
    assert of_checkpoint(save, 4, [target]) == [masks[4]]
    assert found.output.count("mask distance") == 6
    assert train(f"{RUN} {MODEL} {DISTRIBUTED} --bf16 --exit-interval 7", 2).losses == found.losses


def checks_in(output) -> list[str]:
    return re.findall(r"^early-bird: (iteration .*: mask distance .*)$", output, re.M)


def test_resumed_with_random_ltd_is_as_uninterrupted(tmp_path):
    whole, folder, moved = tmp_path / "whole", tmp_path / "resumed", tmp_path / "moved"
    options = f"{RUN} {MODEL} {LTD} {SEARCH} --early-bird-threshold 0.02 --no-early-bird-exit"
    uninterrupted = train(f"{options} --save {whole} --save-interval 4")
    first = train(f"{options} --save {folder} --save-interval 4 --exit-interval 4")
    # The search goes on in another folder, which gets what it needs of the masks.
    second = train(f"{options} --load {folder} --save {moved} --save-interval 100")
    assert first.losses + second.losses == uninterrupted.losses
    checks = checks_in(uninterrupted.output)
    assert len(checks) == STEPS - 1
    # The mask of iteration 4 is taken in the step after it, so that it is there once.
    assert checks_in(first.output) + checks_in(second.output) == checks
    assert "continues with the masks of iterations 2, 3" in second.output
    assert masks_in(moved) == {n: mask for n, mask in masks_in(whole).items() if n > 1}


def test_the_search_changes_nothing_and_ends_the_run(dense, tmp_path, capsys):
    save = tmp_path / "run"
    start = "--early-bird-start 3 --tensorboard-dir " + str(tmp_path / "board")
    command = f"{RUN} {MODEL} {SEARCH} {SOON} {start} --save {save} --load {save}"
    found = train(f"{command} --save-interval 100")
    # Masks of iterations 3, 4 and 5 fill the window; the last is taken in step 6.
    assert list(masks_in(save)) == [3, 4, 5]
    assert found.losses == dense[1].losses[:6]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert "the ticket has emerged at iteration 5" in found.output
    values = scalars(tmp_path / "board")
    drawn = history_of(save, capsys)
    assert [step for step, _ in values["early-bird distance ffn"]] == [4, 5]
    assert [round(v, 4) for _, v in values["early-bird distance ffn"]] == drawn
    # The same command again does not train on.
    again = train(f"{command} --save-interval 100")
    assert again.losses == []
    assert "ended with the masks of iteration 5, and the checkpoint of iteration 6" in again.output
    # Nor does that of another ticket end at once, but it says what is in the way.
    other = command.replace("ffn-hidden-size 32", "ffn-hidden-size 64")
    with pytest.raises(RankError, match="masks_.* was taken for another ticket"):
        train(f"{other} --save-interval 100")
    # What to keep is known from the run.
    arguments = ["--load", str(save), "--save", str(tmp_path / "ticket")]
    assert draw_ticket.main(arguments) == 0
    assert "4 of 8 heads, 32 of 96 FFN neurons" in capsys.readouterr().out


def scalars(folder) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "early-bird" in tag]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def history_of(save, capsys) -> list[float]:
    """Return the FFN's distances that the tool prints of a search."""
    assert draw_ticket.main(["--load", str(save), "--history"]) == 0
    printed = capsys.readouterr().out
    assert "W = 3, threshold 0.5: a ticket has emerged at iteration 5" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    return [float(row[4]) for row in rows[1:]]


def test_no_check_before_the_warm_up_ends_and_a_ticket_at_the_latest(tmp_path):
    save = tmp_path / "run"
    command = f"{RUN} {MODEL} {SEARCH} {NEVER} --lr-warmup-iters 3 --early-bird-until 5"
    found = train(f"{command} --save {save} --save-interval 3")
    assert list(masks_in(save)) == [3, 4, 5]
    assert "the ticket is taken, though it has not emerged, at iteration 5" in found.output
    # Megatron has saved iteration 6 by itself: once is enough.
    assert found.output.count("saving checkpoint at iteration       6") == 1
    assert len(found.losses) == 6


def test_a_run_in_samples_is_as_long_as_its_search_needs(tmp_path):
    samples = RUN.replace(f"--train-iters {STEPS}", "--train-samples 64")
    samples = samples.replace("--lr-warmup-iters", "--lr-warmup-samples")
    save = f"--save {tmp_path} --save-interval 100"
    with pytest.raises(RankError, match="until 8 is not within the 8 iterations of the run"):
        train(f"{samples} {MODEL} {SEARCH} {NEVER} --early-bird-until 8 {save}")
    assert list(tmp_path.iterdir()) == []


def test_masks_of_another_ticket_stop_a_run_before_it_trains(dense, tmp_path):
    folder = from_iteration(dense, tmp_path / "run")
    other = f"{RUN} {MODEL} {SEARCH} {NEVER}"
    from megatron_rltd.early_bird.masks import Mask
    from megatron_rltd.early_bird.target import Target

    target = Target(num_attention_heads=4, ffn_hidden_size=64)
    history.write(folder, Mask(1, {"heads": 4, "ffn": 96}, {"heads": {}, "ffn": {}}), target, 1)
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(RankError, match="masks_0000001.pt was taken for another ticket"):
        train(f"{other} --load {folder} --save {folder} --save-interval 1")
    assert sorted(path for path in folder.rglob("*")) == before


def fail_to_write_masks(arguments: list[str]) -> dict:
    """Train with a disk that is full when the first rank writes masks."""

    def full(*_):
        raise OSError(28, "No space left on device")

    history.write = full
    return train_on_this_rank("pretrain_gpt", arguments)


def test_masks_that_cannot_be_written_do_not_stop_the_ranks(tmp_path):
    command = f"{RUN} {MODEL} {SEARCH} {SOON} --save {tmp_path / 'run'} --save-interval 100"
    first = run_all(2, fail_to_write_masks, command.split())[0]["value"]
    assert len(first["losses"]) == 4  # the masks of iterations 1, 2 and 3 fill the window
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "4"
