"""LayerToken budgets in Megatron's loop, against sums by hand."""

import pytest

from megatron_rltd.patching import versions
from megatron_rltd.schedule import LayerTokenCost, Schedule
from tests.megatron.test_training import FORMAT, LAYERS, MODEL, SEQ, error_of
from tests.parallel import Training, train

SCHEDULE = Schedule(SEQ, 16, 9, 8)
OPTIONS = (
    "--random-ltd --random-ltd-min-tokens 16 --random-ltd-increment 8 --random-ltd-strata 8 "
    "--layer-token-lr"
)
IN_ITERS, IN_SAMPLES = "--random-ltd-ramp-iters 9", "--random-ltd-ramp-samples 72"
RUN = (
    "--micro-batch-size 2 --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine --log-interval 1 "
    "--eval-interval 100 --eval-iters 1"
)
BASE = f"{MODEL} {RUN}"
BUDGET = 4000  # LayerTokens per layer


def steps_by_hand(ramp: str, batch_size, budget=BUDGET, iteration=0, samples=0, layer_tokens=0):
    """Return [(batch, LayerTokens so far)] of each step until the budget is used up."""
    schedule = Schedule(SEQ, 16, 9 if ramp == IN_ITERS else 72, 8)
    steps = []
    while layer_tokens < budget * LAYERS:
        batch = batch_size(samples)
        kept = schedule.kept_tokens(iteration if ramp == IN_ITERS else samples)
        layer_tokens += batch * (2 * SEQ + 2 * kept)
        iteration, samples = iteration + 1, samples + batch
        steps.append((batch, layer_tokens))
    return steps


@pytest.mark.parametrize("ramp", [IN_ITERS, IN_SAMPLES])
@pytest.mark.parametrize("unit", ["iters", "samples"])
def test_a_run_ends_when_its_budget_is_used_up(ramp, unit):
    warmup = "--lr-warmup-iters 1" if unit == "iters" else "--lr-warmup-samples 8"
    ours = train(
        f"{BASE} {OPTIONS} {ramp} {warmup} --global-batch-size 8 --train-layer-tokens {BUDGET}"
    )
    steps = steps_by_hand(ramp, lambda samples: 8)
    assert len(ours.losses) == len(steps)
    assert ours.layer_tokens == steps[-1][1]
    assert ours.learning_rates[-1] == 1e-4 < ours.learning_rates[-2]
    if unit == "samples":
        assert ours.arguments["train_samples"] == 8 * len(steps)
    assert ours.arguments["train_iters"] == len(steps)
    assert ours.arguments["lr_decay_steps"] == BUDGET / SEQ
    assert f"iteration{len(steps):9d}/{len(steps):8d} |" in ours.output  # progress


RAMP_UP = f"--step-batch-size-schedule 0:4,{16 * SEQ}:8"
if versions.release() < (0, 18):
    RAMP_UP = "--global-batch-size 8 --rampup-batch-size 4 4 15"


def ramp_up(samples: int) -> int:
    return 4 if samples < 16 else 8


@pytest.mark.thorough
@pytest.mark.parametrize("ramp", [IN_ITERS, IN_SAMPLES])
def test_batch_size_ramp_up(ramp, tmp_path):
    line = f"{BASE} {OPTIONS} {ramp} {RAMP_UP} --train-layer-tokens {BUDGET}"
    ours = train(f"{line} --save {tmp_path} --save-interval 7 {FORMAT}")
    steps = steps_by_hand(ramp, ramp_up)
    assert [batch for batch, _ in steps] != [8] * len(steps)
    assert len(ours.losses) == len(steps)
    assert ours.layer_tokens == steps[-1][1]
    # From the checkpoint of the middle it is the same run.
    rewind_to(tmp_path, 7)
    resumed = train(f"{line} --load {tmp_path} {FORMAT}")
    assert resumed.losses == ours.losses[7:]
    assert resumed.learning_rates == ours.learning_rates[7:]
    assert resumed.layer_tokens == ours.layer_tokens


def rewind_to(folder, iteration: int) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("ramp", "batch", "world_size", "warmup"),
    [
        (IN_ITERS, 12, 1, "--lr-warmup-samples 8"),
        (IN_ITERS, 4, 2, "--lr-warmup-fraction 0.1"),
        (IN_SAMPLES, 12, 1, "--lr-warmup-fraction 0.1"),
        (IN_SAMPLES, 4, 2, "--lr-warmup-samples 8"),
    ],
)
def test_another_batch_size_from_the_middle(tmp_path, ramp, batch, world_size, warmup):
    line = f"{BASE} {OPTIONS} {ramp} {warmup} --train-layer-tokens {BUDGET} {FORMAT}"
    first = train(f"{line} --global-batch-size 8 --save {tmp_path} --save-interval 3")
    rewind_to(tmp_path, 3)
    resumed = train(f"{line} --global-batch-size {batch} --load {tmp_path}", world_size)
    before = steps_by_hand(ramp, lambda samples: 8)[:3]
    after = steps_by_hand(ramp, lambda samples: batch, BUDGET, 3, 24, before[-1][1])
    assert resumed.layer_tokens == after[-1][1]
    assert len(resumed.losses) == len(after)
    assert resumed.arguments["train_samples"] == 24 + batch * len(after)
    assert resumed.learning_rates[-1] == 1e-4 < resumed.learning_rates[-2]
    assert first.arguments["lr_decay_steps"] == resumed.arguments["lr_decay_steps"]


@pytest.mark.thorough
@pytest.mark.skipif(versions.release() < (0, 19), reason="a flag of Megatron 0.19")
def test_a_run_that_is_rewound_counts_from_its_schedule(tmp_path):
    line = f"{BASE} {OPTIONS} {IN_ITERS} --global-batch-size 8 --train-layer-tokens {BUDGET}"
    whole = train(f"{line} {FORMAT} --save {tmp_path} --save-interval 5")
    rewind_to(tmp_path, 5)
    again = train(f"{line} {FORMAT} --load {tmp_path} --override-ckpt-iteration 2")
    assert again.kept == whole.kept[2:]
    assert again.layer_tokens == whole.layer_tokens


@pytest.mark.thorough
def test_a_budget_that_is_used_up_trains_no_further(tmp_path):
    line = f"{BASE} {OPTIONS} {IN_ITERS} --global-batch-size 8 {FORMAT} --lr-decay-samples 40"
    whole = train(f"{line} --train-layer-tokens {BUDGET} --save {tmp_path} --save-interval 100")
    again = train(f"{line} --train-layer-tokens {BUDGET} --load {tmp_path}")
    assert again.losses == []
    assert again.layer_tokens == whole.layer_tokens
    further = f"{line} --train-layer-tokens {BUDGET + 512} --load {tmp_path}"
    message = error_of(further)
    assert f"was trained with --train-layer-tokens {BUDGET}, not {BUDGET + 512}: " in message
    more = train(f"{further} --override-opt-param-scheduler")
    assert len(more.losses) == 1


def test_length_and_budget_must_agree(tmp_path):
    steps = len(steps_by_hand(IN_ITERS, lambda samples: 8))
    line = f"{BASE} {OPTIONS} {IN_ITERS} --global-batch-size 8 --train-layer-tokens {BUDGET}"
    message = error_of(f"{line} --train-iters 6")
    assert f"--train-layer-tokens {BUDGET} takes --train-iters {steps} from" in message
    assert "not 6: omit --train-iters" in message
    message = error_of(f"{line} --train-samples 48")
    assert f"--train-layer-tokens {BUDGET} takes --train-samples {8 * steps} from" in message
    message = error_of(f"{line} --lr-warmup-iters 1 --lr-decay-samples 5")
    assert "--lr-decay-samples samples: give all of them in one unit" in message
    message = error_of(f"{line} --lr-warmup-samples 70")
    assert "--lr-warmup-samples 70 is 70 samples, but the learning rate decays" in message
    assert f"decays over {BUDGET / SEQ} samples" in message
    message = error_of(f"{line} --lr-warmup-samples 7 --lr-warmup-fraction 0.1")
    assert "give one of --lr-warmup-fraction and --lr-warmup-samples" in message
    message = error_of(f"{line} --iterations-to-skip 3")
    assert "--iterations-to-skip makes a run shorter than --train-layer-tokens" in message
    growing = line.replace("--global-batch-size 8", RAMP_UP)
    message = error_of(f"{growing} --lr-warmup-iters 1")
    assert "--lr-warmup-iters counts iterations, but the batch grows" in message
    message = error_of(f"{line} --train-iters 9 --lr-warmup-samples 7")
    assert "--train-iters counts iterations and --lr-warmup-samples samples: omit" in message
    assert "omit --train-iters" in message
    if versions.release() >= (0, 18):
        message = error_of(f"{line} --rampup-batch-size 4 4 15")
        assert "this Megatron ignores --rampup-batch-size" in message
    message = error_of(line.replace(f"--train-layer-tokens {BUDGET}", ""))
    assert "give --train-iters, --train-samples or --train-layer-tokens" in message
    message = error_of(line.replace(f"--train-layer-tokens {BUDGET}", "--train-layer-tokens -1"))
    assert "--train-layer-tokens -1 must be positive" in message
    agreed = train(f"{line} --train-iters {steps}")
    assert len(agreed.losses) == steps


def test_nothing_of_it_works_without_random_ltd():
    message = error_of(f"{BASE} --global-batch-size 8 --train-layer-tokens 4001")
    assert "--train-layer-tokens 4001 needs --random-ltd" in message
    assert "--train-samples 63" in message
    message = error_of(f"{BASE} --global-batch-size 8 --train-iters 3 --layer-token-lr")
    assert "--layer-token-lr does nothing without --random-ltd" in message


def test_budget_without_its_learning_rate():
    # Megatron's own defaults then: the schedule runs over the samples of the run.
    line = f"{BASE} {OPTIONS} {IN_ITERS} --global-batch-size 8 --train-layer-tokens {BUDGET}"
    ours: Training = train(line.replace("--layer-token-lr", ""))
    steps = steps_by_hand(IN_ITERS, lambda samples: 8)
    assert len(ours.losses) == len(steps)
    assert ours.arguments["lr_decay_steps"] == 8 * len(steps)
    assert ours.learning_rates[-1] == 1e-4


@pytest.mark.thorough
def test_another_batch_size_without_its_learning_rate(tmp_path):
    options = OPTIONS.replace("--layer-token-lr", "--weight-decay-incr-style linear")
    options += " --start-weight-decay 0.01 --end-weight-decay 0.1"
    line = f"{BASE} {options} {IN_ITERS} --train-layer-tokens {BUDGET} {FORMAT}"
    first = train(f"{line} --global-batch-size 8 --save {tmp_path} --save-interval 3")
    rewind_to(tmp_path, 3)
    resumed = train(f"{line} --global-batch-size 4 --load {tmp_path}")
    assert resumed.arguments["lr_decay_steps"] == first.arguments["lr_decay_steps"]
    assert resumed.layer_tokens >= BUDGET * LAYERS
    # Its end moves with the run's if the command line is to win.
    moved = train(f"{line} --global-batch-size 4 --load {tmp_path} --override-opt-param-scheduler")
    assert moved.arguments["lr_decay_steps"] == moved.arguments["train_samples"]
    assert moved.learning_rates[-1] == 1e-4 < moved.learning_rates[-2]
    assert moved.weight_decays[-1] == 0.1 > moved.weight_decays[-2]


def test_a_budget_is_quick_to_plan_at_any_size():
    tokens = LayerTokenCost(Schedule(131_072, 1024, 1_000_000, 16), 128, 126)
    calls = []

    def batch_size(samples: int) -> int:
        calls.append(samples)
        return 512 if samples < 10**7 else 2048

    end = tokens.until(lambda p: p.layer_tokens >= 15 * 10**12 * 128, batch_size)
    assert end.layer_tokens >= 15 * 10**12 * 128
    assert len(calls) < 300
