"""Megatron's own training loop, with real processes, against itself."""

import math
import re
import shutil

import pytest

from megatron_rltd.schedule import LayerTokenCost, Schedule
from tests.parallel import Training, train

STEPS, GLOBAL_BATCH, SEQ, LAYERS = 6, 8, 64, 4
MODEL = (
    f"--num-layers {LAYERS} --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ} "
    "--max-position-embeddings 64 --position-embedding-type rope --attention-dropout 0 "
    "--hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 "
    "--make-vocab-size-divisible-by 8 --split 90,5,5 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader"
)
RUN = (
    f"--micro-batch-size 2 --global-batch-size {GLOBAL_BATCH} --train-iters {STEPS} --lr 3e-3 "
    "--min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 1 --clip-grad 1.0 --log-interval 1 "
    "--eval-interval 100 --eval-iters 1"
)
BASE = f"{MODEL} {RUN}"
LTD = (
    "--random-ltd --random-ltd-min-tokens 16 --random-ltd-ramp-iters 9 --random-ltd-increment 8 "
    "--random-ltd-strata 8"
)
TOKENS = LayerTokenCost(Schedule(SEQ, 16, 9, 8), LAYERS, LAYERS - 2)
KEPT = [Schedule(SEQ, 16, 9, 8).kept_tokens(t) for t in range(STEPS)]


@pytest.fixture(scope="module")
def dense() -> Training:
    return train(BASE)


@pytest.fixture(scope="module")
def alone() -> Training:
    """random-LTD in one process: what every layout must equal."""
    return train(f"{BASE} {LTD}")


def assert_same(ours: Training, theirs: Training, tolerance: float = 0.0) -> None:
    for name in ("losses", "grad_norms", "validation"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert len(a) == len(b) > 0
        worst = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
        assert worst <= tolerance, f"{name}: {a} != {b}"


def test_without_the_flag_nothing_is_patched(dense):
    assert "patched symbols" not in dense.output
    assert "random-ltd" not in dense.output
    assert dense.layer_tokens is None
    assert len(dense.losses) == STEPS


def test_full_length_is_bit_identical(dense):
    full = train(f"{BASE} --random-ltd --random-ltd-constant --random-ltd-min-tokens {SEQ}")
    assert_same(full, dense)
    assert full.flops == dense.flops
    assert full.layer_tokens == STEPS * GLOBAL_BATCH * SEQ * LAYERS


def test_dropout_and_recomputation_at_full_length_are_bit_identical():
    options = (
        f"{BASE.replace('dropout 0', 'dropout 0.1')} --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1"
    )
    ours = train(f"{options} --random-ltd --random-ltd-constant --random-ltd-min-tokens {SEQ}")
    assert_same(ours, train(options))


def test_kept_tokens_and_layer_tokens_are_counted(alone, dense):
    assert alone.kept == KEPT
    assert KEPT[0] < KEPT[-1] < SEQ
    expected = sum(GLOBAL_BATCH * TOKENS.per_sample(k) for k in KEPT)
    assert alone.layer_tokens == expected
    assert max(abs(a - b) for a, b in zip(alone.losses, dense.losses, strict=True)) > 1e-4
    assert "random-ltd kept tokens" in alone.output
    assert "schedules:set_current_microbatch" in alone.output  # the table of patches


def test_floating_point_operations_are_those_of_the_kept_tokens(alone, dense):
    hidden, vocabulary = 32, 128
    for kept, ours, full in zip(KEPT, alone.flops, dense.flops, strict=True):
        # A layer: QKV, projection and MLP are linear in its tokens, attention quadratic (causal).
        def layer(tokens):
            linear = 6 * tokens * (4 * hidden**2 + 8 * hidden**2)
            return linear + 6 * tokens**2 * hidden

        head = 6 * SEQ * hidden * vocabulary
        expected = GLOBAL_BATCH * (2 * layer(SEQ) + 2 * layer(kept) + head)
        assert ours == pytest.approx(expected, rel=1e-12)
        assert full == pytest.approx(GLOBAL_BATCH * (4 * layer(SEQ) + head), rel=1e-12)


LAYOUTS = {
    "TP": (2, "--tensor-model-parallel-size 2"),
    "TP + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "CP": (2, "--context-parallel-size 2"),
    "CP + TP + SP": (
        4,
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "DP, distributed optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "micro-batch 1": (1, "--micro-batch-size 1"),
    "recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "recompute groups": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 4",
    ),
    "TP + recompute": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --distribute-saved-activations "
        "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_the_same_tokens(alone, layout):
    world_size, flags = LAYOUTS[layout]
    flags = flags.replace("--sequence-parallel --distribute", "--distribute")
    assert_same(train(f"{BASE} {LTD} {flags}", world_size), alone, tolerance=1e-5)


def test_hidden_dropout_is_the_same_on_all_tensor_parallel_ranks():
    # Megatron draws it from one stream; attention's, and all under SP, from each rank's own.
    arguments = f"{BASE.replace('--hidden-dropout 0', '--hidden-dropout 0.1')} {LTD}"
    alone = train(arguments)
    assert_same(train(f"{arguments} --tensor-model-parallel-size 2", 2), alone, tolerance=1e-5)


def test_masks_made_by_the_data_loader_change_nothing(alone):
    arguments = f"{BASE} {LTD}".replace("--no-create-attention-mask-in-dataloader", "")
    assert_same(train(arguments), alone)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random-LTD run saved after half its steps, and continued without interruption."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = train(f"{BASE} {LTD} --save {folder} --save-interval 3 {FORMAT}")
    rewind(folder)
    return folder, whole


def rewind(folder) -> None:
    """Forget the last checkpoint, as if the run had been killed after the first."""
    shutil.rmtree(folder / "iter_0000006")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")


FORMAT = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"


def second_half(whole: Training) -> Training:
    return Training(
        losses=whole.losses[3:],
        grad_norms=whole.grad_norms[3:],
        validation=whole.validation,
        flops=whole.flops[3:],
        logged_flops=whole.logged_flops[3:],
        kept=whole.kept[3:],
        learning_rates=whole.learning_rates[3:],
        weight_decays=whole.weight_decays[3:],
        arguments=whole.arguments,
        layer_tokens=whole.layer_tokens,
        accuracies=[],
        output="",
    )


def test_resume_is_bit_exact(checkpoint):
    folder, whole = checkpoint
    resumed = train(f"{BASE} {LTD} --load {folder} {FORMAT}")
    assert_same(resumed, second_half(whole))
    assert resumed.kept == whole.kept[3:]
    assert resumed.layer_tokens == whole.layer_tokens


PIPELINES = {
    "PP": (2, "--pipeline-model-parallel-size 2"),
    "PP, interleaved": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "PP, stages without layers": (
        2,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|tt|tt|L",
    ),
    "PP + recompute": (
        2,
        "--pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
    "TP + SP + PP, interleaved": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    "TP, from one process": (2, "--tensor-model-parallel-size 2"),
}


@pytest.mark.parametrize("layout", PIPELINES)
def test_resume_on_another_layout(checkpoint, layout):
    # Initial weights differ between pipeline layouts, so they are compared from a checkpoint.
    folder, whole = checkpoint
    world_size, flags = PIPELINES[layout]
    resumed = train(f"{BASE} {LTD} --load {folder} {FORMAT} {flags}", world_size)
    assert_same(resumed, second_half(whole), tolerance=1e-5)
    assert resumed.layer_tokens == whole.layer_tokens


def test_options_that_mean_the_same_resume(checkpoint):
    folder, whole = checkpoint
    resumed = train(f"{BASE} {LTD} --random-ltd-layers 2,3 --load {folder} {FORMAT}")
    assert_same(resumed, second_half(whole))


def test_seed_zero_is_a_seed(checkpoint):
    folder, _ = checkpoint
    message = error_of(f"{BASE} {LTD} --random-ltd-seed 0 --load {folder} {FORMAT}")
    assert "--random-ltd-seed 0 (checkpoint: 1234)" in message


def test_strata_left_open_come_from_the_checkpoint(checkpoint):
    folder, whole = checkpoint
    options = LTD.replace(" --random-ltd-strata 8", "")
    resumed = train(f"{BASE} {options} --load {folder} {FORMAT}")
    assert_same(resumed, second_half(whole))


def error_of(arguments: str, world_size: int = 1) -> str:
    with pytest.raises(AssertionError) as error:
        train(arguments, world_size)
    return str(error.value)


def test_other_options_than_the_checkpoint_are_an_error(checkpoint):
    folder, _ = checkpoint
    options = LTD.replace("--random-ltd-ramp-iters 9", "--random-ltd-ramp-iters 20")
    message = error_of(f"{BASE} {options} --load {folder} {FORMAT}")
    assert "--random-ltd-ramp-iters 20 (checkpoint: 9)" in message
    assert "--override-opt-param-scheduler" in message
    message = error_of(f"{BASE} {LTD.replace('strata 8', 'strata 4')} --load {folder} {FORMAT}")
    assert "--random-ltd-strata 4 (checkpoint: 8)" in message


def test_command_line_or_checkpoint_can_be_made_to_win(checkpoint):
    folder, whole = checkpoint
    options = LTD.replace("--random-ltd-ramp-iters 9", "--random-ltd-ramp-iters 5")
    line = f"{BASE} {options} --load {folder} {FORMAT}"
    overridden = train(f"{line} --override-opt-param-scheduler")
    assert overridden.kept == [Schedule(SEQ, 16, 5, 8).kept_tokens(t) for t in (3, 4, 5)]
    assert "the command line overrides --random-ltd-ramp-iters 5 (checkpoint: 9)" in (
        overridden.output
    )
    taken = train(f"{line} --use-checkpoint-opt-param-scheduler")
    assert_same(taken, second_half(whole))


def test_strata_that_do_not_fit_a_new_layout_are_an_error(tmp_path):
    options = LTD.replace("strata 8", "strata 2")
    train(f"{BASE} {options} --save {tmp_path} --save-interval 6 {FORMAT}")
    message = error_of(
        f"{BASE} {options.replace(' --random-ltd-strata 2', '')} --load {tmp_path} {FORMAT} "
        "--train-iters 8 --tensor-model-parallel-size 4 --sequence-parallel",
        4,
    )
    assert "--random-ltd-strata 2 must be a multiple of 4" in message


def test_checkpoints_are_ordinary_both_ways(checkpoint, tmp_path):
    folder, whole = checkpoint
    # A checkpoint of ours in vanilla Megatron: dense from there on.
    vanilla = train(f"{BASE} --load {folder} --save {tmp_path} --save-interval 3 {FORMAT}")
    assert len(vanilla.losses) == 3
    # Its second half at full length equals random-LTD that keeps everything.
    constant = f"--random-ltd --random-ltd-constant --random-ltd-min-tokens {SEQ}"
    ours = train(f"{BASE} {constant} --load {folder} {FORMAT} --override-opt-param-scheduler")
    assert_same(ours, vanilla)
    # A vanilla checkpoint continues with random-LTD, its samples counted at full length.
    more = f"{FORMAT} --train-iters 7 --override-opt-param-scheduler"
    back = train(f"{BASE} {LTD} --load {tmp_path} {more}")
    assert len(back.losses) == 1
    assert back.kept == [Schedule(SEQ, 16, 9, 8).kept_tokens(6)]
    dense = 6 * GLOBAL_BATCH * SEQ * LAYERS
    assert back.layer_tokens == dense + GLOBAL_BATCH * TOKENS.per_sample(int(back.kept[0]))
    assert "was trained without it" in back.output


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, ""),
        (1, ""),
        (2, "--tensor-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
    ],
)
def test_distributed_optimizer_resumes(distributed_checkpoint, world_size, flags):
    folder, whole = distributed_checkpoint
    resumed = train(
        f"{BASE} {LTD} --use-distributed-optimizer --load {folder} {FORMAT} {flags}", world_size
    )
    assert_same(resumed, second_half(whole), tolerance=1e-5 if flags or world_size == 1 else 0)


@pytest.fixture(scope="module")
def distributed_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    options = f"--use-distributed-optimizer --save {folder} --save-interval 3 {FORMAT}"
    whole = train(f"{BASE} {LTD} {options}", 2)
    rewind(folder)
    return folder, whole


@pytest.mark.parametrize("world_size", [1, 2])
def test_preflight_changes_nothing(world_size):
    layout = "--pipeline-model-parallel-size 2" if world_size == 2 else ""
    arguments = f"{BASE.replace('dropout 0', 'dropout 0.1')} {LTD} {layout}"
    ours = train(f"{arguments} --random-ltd-preflight", world_size)
    assert "preflight with 56 and 64 kept tokens passed" in ours.output
    assert_same(ours, train(arguments, world_size))


def test_preflight_with_the_distributed_optimizer():
    arguments = (
        f"{BASE} {LTD} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    )
    assert_same(train(f"{arguments} --random-ltd-preflight", 2), train(arguments, 2))


def test_preflight_leaves_what_is_logged_and_the_statistics_of_routers_alone():
    options = (
        "--num-experts 4 --moe-router-topk 2 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05 "
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 "
        "--disable-bias-linear --mtp-num-layers 1"
    )
    plain = train(f"{BASE} {LTD} {options}")
    ours = train(f"{BASE} {LTD} {options} --random-ltd-preflight")
    logged = [re.findall(r"mtp_1 loss: (\S+)", run.output) for run in (ours, plain)]
    assert logged[0] == logged[1]
    assert len(logged[0]) == STEPS
    assert "preflight with" in ours.output
    assert_same(ours, plain)

    def balance(run):
        return re.findall(r"seq_load_balancing_loss: ([\d.E+-]+)", run.output)

    assert balance(ours) == balance(plain)
    assert len(balance(ours)) == STEPS


def test_bf16_and_experts_train():
    options = (
        "--bf16 --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
        "--moe-aux-loss-coeff 0.01 --normalization RMSNorm --swiglu --disable-bias-linear "
        "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights"
    )
    alone = train(f"{BASE} {options} {LTD}")
    assert alone.losses[-1] < alone.losses[0] - 0.2
    # Experts on two ranks: the same tokens for the same experts, in bf16.
    spread = train(f"{BASE} {options} {LTD} --expert-model-parallel-size 2", 2)
    assert spread.kept == alone.kept
    worst = max(abs(a - b) for a, b in zip(spread.losses, alone.losses, strict=True))
    assert worst < 0.1
    assert all(math.isfinite(loss) for loss in spread.losses)


def test_log_lines_count_the_steps_since_the_last(alone, dense):
    assert dense.logged_flops[-1] == dense.flops[-1]
    seldom = train(f"{BASE} {LTD}".replace("--log-interval 1", "--log-interval 3"))
    assert seldom.flops == alone.flops
    # Megatron also logs the first step by itself, without starting anew after it.
    means = [sum(seldom.flops[:3]) / 3, sum(seldom.flops[3:]) / 3]
    assert seldom.logged_flops == pytest.approx([seldom.flops[0], *means], rel=1e-12)
    both = sum(alone.flops[:2]) / 2
    assert alone.logged_flops == pytest.approx([alone.flops[0], both, *alone.flops[2:]], rel=1e-12)


def test_logs_have_layer_tokens_as_a_third_axis(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(f"{BASE} {LTD} --tensorboard-dir {tmp_path} --tensorboard-log-interval 1")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    kept = events.Scalars("random-ltd kept tokens")
    tokens = events.Scalars("random-ltd layer tokens")
    share = events.Scalars("random-ltd share of dense")
    steps = list(range(1, STEPS + 1))
    assert [e.step for e in kept] == [e.step for e in tokens] == [e.step for e in share] == steps
    assert [e.value for e in kept] == run.kept
    sums = [sum(GLOBAL_BATCH * TOKENS.per_sample(k) for k in KEPT[:n]) for n in steps]
    assert [e.value for e in tokens] == sums
    shares = [s / (GLOBAL_BATCH * TOKENS.dense * n) for n, s in zip(steps, sums, strict=True)]
    assert [e.value for e in share] == pytest.approx(shares, rel=1e-6)
    for tag in ("learning-rate", "lm loss"):
        by_tokens = events.Scalars(f"{tag} vs layer tokens")
        assert [e.step for e in by_tokens] == sums
        assert [e.value for e in by_tokens] == [e.value for e in events.Scalars(tag)]
        assert [e.step for e in events.Scalars(f"{tag} vs samples")] == [8 * n for n in steps]
    # The console's line: the mean kept length, and what has been consumed when it is printed.
    seldom = train(f"{BASE} {LTD}".replace("--log-interval 1", "--log-interval 3")).output
    lines = re.findall(
        r"random-ltd layer tokens: (\S+) \| random-ltd share of dense: (\S+) ", seldom
    )
    assert [float(a) for a, _ in lines[-2:]] == [sums[2], sums[5]]
    assert [float(b) for _, b in lines[-2:]] == pytest.approx([shares[2], shares[5]], rel=1e-6)
    means = [float(kept) for kept in re.findall(r"random-ltd kept tokens: (\S+)", seldom)]
    assert means[-2:] == pytest.approx([sum(KEPT[:3]) / 3, sum(KEPT[3:]) / 3], rel=1e-6)
