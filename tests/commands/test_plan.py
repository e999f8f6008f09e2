"""Plans of runs: against the paper's budgets, and against the runs themselves."""

import itertools
import math

import pytest

from megatron_rltd.patching import versions
from megatron_rltd.schedule import LayerTokenCost, Progress, Schedule
from tests.megatron.test_budget import ramp_up
from tests.megatron.test_training import BASE, LTD, MODEL, SEQ
from tests.parallel import run, train

from megatron_rltd.commands.plan.planned_run import PlannedRun, segments  # isort: skip  # of tools/, by tests.parallel

SPLITS_ATTENTION = versions.release() >= (0, 18)
GPT3 = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 "
    "--max-position-embeddings 2048 --micro-batch-size 8 --global-batch-size 512 --lr 2e-4 "
    "--min-lr 1e-6 --lr-decay-style cosine --lr-warmup-samples 1464844 "
    "--random-ltd --random-ltd-min-tokens 128 --random-ltd-increment 16"
)


def _plan(flags: list[str], options: dict) -> dict:
    from megatron_rltd.commands.plan import report as plan_report
    from megatron_rltd.commands.plan.planning import make_plan

    plan = make_plan(flags, **options)
    steps = range(1, plan.run.end.iteration + 1)
    return {
        **plan_report.as_numbers(plan, None),
        "rates": [plan.run.learning_rate(plan.run.at(i)) for i in steps if i < 1000],
        "dense_rates": [
            plan.same_samples.learning_rate(plan.same_samples.at(i))
            for i in steps
            if i < 1000 and plan.same_samples
        ],
        "kept": [s.kept for s in plan.run.segments for _ in range(min(s.steps, 1000))],
    }


def plan_of(flags: str, **options) -> dict:
    """Return a plan as numbers, made in a process of its own: Megatron keeps global state."""
    return run(1, _plan, flags.split(), options)[0]


def flops(numbers: dict, other: str) -> list[float]:
    """Return a run's FLOPs in another's, of full and of causal attention, to three digits."""
    of_it = numbers["run_in_units_of"][other]
    full = of_it["flops_full_attention"] if SPLITS_ATTENTION else math.nan
    return [round(full, 3), round(of_it["flops_causal_attention"], 3)]


@pytest.mark.parametrize(
    ("budget", "ramp", "iterations", "raw", "full", "causal"),
    [
        (300, 200_000, 372_757, 390.9, 1.006, 1.014),
        (200, 133_333, 248_505, 260.6, 0.670, 0.676),
    ],
)
def test_budgets_of_the_paper(budget, ramp, iterations, raw, full, causal):
    line = f"{GPT3} --random-ltd-ramp-iters {ramp} --train-layer-tokens {budget}000000000"
    numbers = plan_of(f"{line} --layer-token-lr", dense_tokens=300 * 10**9)
    ours = numbers["runs"]["run"]
    assert numbers["padded_vocab_size"] == 50304
    assert ours["iterations"] == iterations
    assert round(ours["raw_tokens"] / 1e9, 1) == raw
    assert numbers["runs"]["dense"]["iterations"] == 286_102
    expected = [full if SPLITS_ATTENTION else math.nan, causal]
    assert flops(numbers, "dense") == pytest.approx(expected, nan_ok=True)
    kept = numbers["kept_tokens"]
    assert (kept["first"], kept["distinct"]) == (128, 121)
    assert kept["nothing_dropped_from"]["iteration"] == ramp
    # Of the warm-up: 3B LayerTokens per layer.
    over = numbers["learning_rate"]["warmup_over"]
    assert 0 <= over["layer_tokens_per_layer"] - 1464844 * 2048 < 512 * 2048
    assert numbers["learning_rate"]["minimum_reached"]["iteration"] == iterations
    assert not [note for note in numbers["notes"] if "GPT-2" not in note]


def test_raw_tokens_of_the_paper():
    numbers = plan_of(f"{GPT3} --random-ltd-ramp-iters 200000 --train-samples 146484375")
    ours, saved = numbers["runs"]["run"], numbers["run_in_units_of"]["same_samples"]
    assert ours["iterations"] == 286_102  # Megatron leaves an incomplete batch away
    assert round(ours["layer_tokens_per_layer"] / 1e9, 1) == 209.1
    assert round(1 - saved["layer_tokens"], 3) == 0.303
    expected = [0.703 if SPLITS_ATTENTION else math.nan, 0.711]
    assert flops(numbers, "same_samples") == pytest.approx(expected, nan_ok=True)


def test_attention_is_half_of_full_attention():
    numbers = plan_of(f"{BASE} {LTD}")
    dense = numbers["runs"]["same_samples"]
    # Two products of s * s * h, a multiplication and an addition, forward and twice backward.
    attention = 4 * 48 * 3 * 2 * 2 * SEQ**2 * 32
    if not SPLITS_ATTENTION:
        assert dense["flops_full_attention"] is None
        return
    difference = dense["flops_full_attention"] - dense["flops_causal_attention"]
    assert difference == pytest.approx(attention / 2, rel=1e-12)


# A plan equals a run.

IN_SAMPLES = (
    f"{MODEL} --micro-batch-size 2 --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--log-interval 1 --eval-interval 100 --eval-iters 1"
)
SAMPLE_RAMP = LTD.replace("--random-ltd-ramp-iters 9", "--random-ltd-ramp-samples 72")
BATCHES = f"--step-batch-size-schedule 0:4,{16 * SEQ}:8"
if versions.release() < (0, 18):
    BATCHES = "--global-batch-size 8 --rampup-batch-size 4 4 15"
EVALUATION = "--eval-global-batch-size 8" if versions.release() >= (0, 18) else ""
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-layer-freq [0,1,1,0] "
    "--moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 --disable-bias-linear "
    "--moe-shared-expert-intermediate-size 24"
)
GQA = (
    "--group-query-attention --num-query-groups 2 --swiglu --ffn-hidden-size 80 "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights"
)
WSD = BASE.replace("cosine", "WSD --lr-wsd-decay-style minus_sqrt --lr-wsd-decay-iters 2")
BY_TOKENS = "--layer-token-lr --train-layer-tokens 4000"
RUNS = {
    "dense": f"{BASE}",
    "plain learning rate": f"{BASE} {LTD}",
    "LayerToken learning rate": f"{BASE} {LTD} --layer-token-lr",
    "incomplete last batch": f"{IN_SAMPLES} {LTD} --global-batch-size 8 --train-samples 51",
    "samples": f"{IN_SAMPLES} {SAMPLE_RAMP} --layer-token-lr --global-batch-size 8 "
    "--train-samples 80 --lr-warmup-samples 9 --lr-warmup-init 1e-5",
    "budget": f"{IN_SAMPLES} {LTD} {BY_TOKENS} --global-batch-size 8 --lr-warmup-samples 11",
    "budget in iterations": f"{IN_SAMPLES} {LTD} {BY_TOKENS} --global-batch-size 8 "
    "--lr-warmup-iters 2",
    "budget, plain learning rate": f"{IN_SAMPLES} {SAMPLE_RAMP} --global-batch-size 8 "
    "--train-layer-tokens 4000",
    "batch ramp-up": f"{IN_SAMPLES} {LTD} {BY_TOKENS} {BATCHES}",
    "batch ramp-up, ramp in samples": f"{IN_SAMPLES} {SAMPLE_RAMP} {BY_TOKENS} {BATCHES}",
    "batch ramp-up, samples": f"{IN_SAMPLES} {LTD} --train-samples 45 {BATCHES}",
    "batch ramp-up, dense": f"{IN_SAMPLES} --train-samples 45 {BATCHES}",
    "experts": f"{BASE} {EXPERTS} {LTD} --random-ltd-layers 1,3-4 --layer-token-lr",
    "GQA and SwiGLU": f"{BASE} {GQA} {LTD} --layer-token-lr",
    "WSD": f"{WSD} {LTD} --layer-token-lr",
    "WSD, plain": f"{WSD} {LTD}",
    "inverse square root": f"{BASE} {LTD}".replace("cosine", "inverse-square-root"),
    "constant": f"{BASE} --random-ltd --random-ltd-constant --random-ltd-min-tokens 16 "
    "--layer-token-lr".replace("cosine", "constant"),
    "batch made smaller": f"{BASE} {LTD} --layer-token-lr --decrease-batch-size-if-needed "
    f"--global-batch-size 9 {EVALUATION}",
    "budget, batch made smaller": f"{IN_SAMPLES} {LTD} {BY_TOKENS} --decrease-batch-size-if-needed "
    f"--global-batch-size 9 {EVALUATION}",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_is_its_run(name):
    check_plan(plan_of(RUNS[name]), train(RUNS[name]))


@pytest.mark.parametrize(
    "layout", ["", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"]
)
def test_a_plan_for_two_gpus_is_its_run(layout):
    line = f"{IN_SAMPLES} {LTD} {BY_TOKENS} {layout}"  # the global batch is the layout's
    check_plan(plan_of(line, gpus=2), train(line, 2))


def check_plan(numbers: dict, ours) -> None:
    planned = numbers["runs"]["run"]
    assert planned["iterations"] == len(ours.losses) == len(ours.learning_rates)
    assert numbers["rates"] == ours.learning_rates
    assert planned["flops_causal_attention"] == pytest.approx(math.fsum(ours.flops), rel=1e-12)
    if ours.kept:
        assert planned["layer_tokens"] == ours.layer_tokens
        assert numbers["kept"] == ours.kept
    else:
        assert planned["layer_tokens"] == planned["samples"] * SEQ * 4


def test_the_dense_runs_of_a_plan_are_runs():
    line = RUNS["budget"]
    numbers = plan_of(line, dense_tokens=4 * 8 * SEQ + 1)
    iterations = numbers["runs"]["run"]["iterations"]
    assert numbers["runs"]["same_samples"]["iterations"] == iterations
    dense = line.replace(LTD, "").replace(BY_TOKENS, "")
    ours = train(f"{dense} --train-samples {8 * iterations}")
    assert numbers["dense_rates"] == ours.learning_rates
    planned = numbers["runs"]["same_samples"]["flops_causal_attention"]
    assert planned == pytest.approx(math.fsum(ours.flops), rel=1e-12)
    # What is left of a batch is not trained on: 32 samples and one token, 63 for the budget.
    assert numbers["runs"]["dense"]["samples"] == 32
    total = numbers["runs"]["run"]["layer_tokens"]
    same = numbers["runs"]["same_layer_tokens"]
    assert same["samples"] == -(-total // (4 * SEQ)) // 8 * 8
    assert same["layer_tokens"] == same["samples"] * SEQ * 4


def test_a_dense_run_on_the_same_samples_has_the_same_flags():
    line = RUNS["incomplete last batch"]
    ours = train(line.replace(LTD, ""))
    assert len(ours.losses) == 6
    assert plan_of(line)["dense_rates"] == ours.learning_rates


# Without going through the steps.


def walk(tokens: LayerTokenCost, batch_size, iterations: int) -> list[tuple[Progress, int, int]]:
    """Return [(where the run stands after a step, its kept length, its batch size)]."""
    steps, here = [], Progress()
    for iteration in range(iterations):
        size = batch_size(here.samples)
        kept = tokens.schedule.kept_tokens(here.samples if tokens.ramp_in_samples else iteration)
        consumed = here.layer_tokens + size * tokens.per_sample(kept)
        here = Progress(iteration + 1, here.samples + size, consumed)
        steps.append((here, kept, size))
    return steps


@pytest.mark.parametrize("ramp_in_samples", [False, True])
@pytest.mark.parametrize("batch_size", [lambda samples: 3, ramp_up, lambda s: 2 + 2 * (s // 6)])
@pytest.mark.parametrize("schedule", [Schedule(64, 16, 90, 8), Schedule(50, 7, 41, 3, 2)])
def test_segments_are_the_steps(schedule, batch_size, ramp_in_samples):
    tokens = LayerTokenCost(schedule, 6, 4, ramp_in_samples)
    found = segments(tokens, batch_size, 150)
    planned = PlannedRun(schedule.seq_length, 6, found, 0.0, None, lambda: None)
    steps = walk(tokens, batch_size, 150)
    assert planned.end == steps[-1][0]
    assert planned.at(0) == Progress()
    assert [planned.at(i) for i in range(1, 151)] == [at for at, _, _ in steps]
    assert [s.kept for s in found for _ in range(s.steps)] == [kept for _, kept, _ in steps]
    sizes = [(kept, size) for _, kept, size in steps]
    assert [(s.kept, s.batch_size) for s in found] == [pair for pair, _ in itertools.groupby(sizes)]
    for goal in (1, 40, 149, 150):
        at = steps[goal - 1][0]
        assert planned.first(lambda p, at=at: p.layer_tokens >= at.layer_tokens) == at
    assert planned.first(lambda p: p.iteration > 150) is None


LONG = (
    "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --seq-length 8192 "
    "--max-position-embeddings 8192 --micro-batch-size 1 --lr 1e-4 --random-ltd "
    "--random-ltd-ramp-samples 1000000000 --train-layer-tokens 15000000000000 --layer-token-lr"
)


def _plan_a_long_run(flags: list[str]) -> list:
    from megatron_rltd.commands.plan.planning import make_plan

    import megatron.core.num_microbatches_calculator as calculators  # isort: skip

    calls = []
    update = calculators.StepBatchsizeNumMicroBatchesCalculator.update

    def counted(*args, **kwargs):
        calls.append(args)
        return update(*args, **kwargs)

    calculators.StepBatchsizeNumMicroBatchesCalculator.update = counted
    plan = make_plan(flags, dense_tokens=15 * 10**12)
    return [plan.run.end.iteration, len(plan.run.segments), len(calls)]


@pytest.mark.skipif(versions.release() < (0, 18), reason="another ramp-up of the batch size")
def test_fifteen_trillion_tokens_are_planned_at_once():
    flags = f"{LONG} --step-batch-size-schedule 0:256,1T:512,4T:1024"
    iterations, levels, calls = run(1, _plan_a_long_run, flags.split())[0]
    assert iterations > 2_000_000
    assert 500 < levels < 520
    assert calls < 3000  # not one for each iteration


def _both_counts(flags: list[str], samples: list[int]) -> list[list[int]]:
    import copy

    from megatron.training import training

    from megatron_rltd.commands.plan.planning import make_plan

    args = make_plan(flags).args
    ours, found = training.update_train_iters, []
    for n in samples:
        both = copy.copy(args), copy.copy(args)
        for one in both:
            one.train_iters, one.train_samples = None, n
        ours(both[0])
        ours.args[0](both[1])
        found.append([one.train_iters for one in both])
    return found


def test_iterations_of_samples_are_megatrons():
    flags = RUNS["batch ramp-up, samples"].split()
    for ours, megatrons in run(1, _both_counts, flags, list(range(4, 60)))[0]:
        assert ours == megatrons > 0
