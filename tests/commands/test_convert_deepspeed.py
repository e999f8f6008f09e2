"""`convert-deepspeed` against DeepSpeed's recipes, its formula and its logs."""

from fractions import Fraction

import pytest

from megatron_rltd.commands.convert_deepspeed.budget import DeepSpeedRun
from megatron_rltd.config import RandomLTDConfig
from megatron_rltd.resolved_config import ModelFacts, resolve
from megatron_rltd.schedule import LayerTokenCost
from tests.commands.deepspeed_recipes import (
    FULL,
    GPT2,
    GPT2_MEDIUM,
    GPT3,
    RECIPES,
    VIT,
    bert,
    changed,
    convert,
    deepspeed,
    deepspeed_iterations,
    deepspeed_lengths,
    gpt3,
    parse,
    random_ltd,
)


@pytest.mark.parametrize("name", RECIPES)
def test_flags_of_the_published_recipes(name):
    config, line, flags = RECIPES[name]
    assert " ".join(convert(config, line).flags) == flags


@pytest.mark.parametrize("name", RECIPES)
def test_kept_lengths_are_deepspeeds_at_every_step(name):
    config, line, _ = RECIPES[name]
    ltd = config["data_efficiency"]["data_routing"]["random_ltd"]
    options, rest = parse(convert(config, line).flags)
    seq_length = int(rest[rest.index("--seq-length") + 1])
    resolved = resolve(options, ModelFacts(seq_length, ltd["total_layer_num"]))
    assert [n - 1 for n in resolved.dropped_layers] == ltd["random_ltd_layer_id"]
    steps = options.ramp_iters * 11 // 10
    lengths = list(deepspeed_lengths(config, steps))
    ours = resolved.schedule
    assert lengths[-1] == seq_length > lengths[0] == ours.min_tokens
    if steps < 300_000:
        assert [ours.kept_tokens(step) for step in range(steps)] == lengths
    else:  # the same in a tenth of the time
        starts = dict(ours.levels())
        assert starts == {i: n for i, n in enumerate(lengths) if not i or n != lengths[i - 1]}


@pytest.mark.parametrize(
    ("config", "layers", "log"),
    # DeepSpeed's published logs; they count micro-batches of 2, two of which make a step.
    [(GPT2, 12, (1344, 2_148_032)), (GPT2_MEDIUM, 24, (1373, 2_147_024))],
)
def test_logs_of_gpt2_finetuning(config, layers, log):
    budget = 1048 * 2 * 1024
    assert deepspeed_iterations(config, layers, budget, 2, micro_batches=2) == log
    schedule = resolve(parse(convert(config).flags)[0], ModelFacts(1024, layers)).schedule
    run = DeepSpeedRun(schedule, layers, layers - 2, batch_size=4)
    assert run.deepspeed_steps(budget) == run.steps(budget) == -(-log[0] // 2)
    warnings = convert(config, f"--random-ltd --train-tokens {budget}").warnings
    assert not [w for w in warnings if "rounds the tokens" in w]


def test_log_of_vit_finetuning():
    options, _ = parse(convert(VIT).flags)
    schedule = resolve(options, ModelFacts(197, 12)).schedule
    assert LayerTokenCost(schedule, 12, 10).after(5474, 32).layer_tokens == 305_784_192


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("GPT-3 1.3B, 300B tokens", 372_789, 372_757),
        ("GPT-3 1.3B, 200B tokens", None, None),
        ("BERT-large, 524B tokens", None, None),
    ],
)
def test_iterations_of_the_budget(name, theirs, ours):
    config, line, _ = RECIPES[name]
    result = convert(config, line)
    budget = int(result.flags[result.flags.index("--train-layer-tokens") + 1])
    batch = config["train_batch_size"]
    simulated, _ = deepspeed_iterations(config, 24, budget, batch)
    exact, consumed, s = 0, 0, int(result.flags[-1])
    for length in deepspeed_lengths(config, simulated + 1):
        if consumed >= budget * 24:
            break
        consumed += batch * (2 * s + 22 * length)
        exact += 1
    assert (simulated, exact) == (theirs or simulated, ours or exact)
    assert simulated > exact
    (found,) = [w for w in result.warnings if "rounds the tokens of an iteration down" in w]
    assert f" is {simulated:,} iterations there; " in found
    assert f"here, {exact:,} iterations, {simulated - exact:,} fewer" in found


def test_rounding_of_the_learning_rate_is_said():
    warnings = convert(*gpt3(150, 100_000)).warnings
    assert (
        "--lr-warmup-samples is 1,464,843.75 samples of 2,048 tokens, rounded to 1,464,844"
        in warnings
    )
    assert (
        "--lr-decay-samples is 73,242,187.50 samples of 2,048 tokens, rounded to 73,242,188"
        in warnings
    )
    assert not [w for w in convert(*bert(2)).warnings if "rounded to" in w]


def test_warm_up_in_iterations_ends_at_the_same_iteration():
    # 1,000 iterations of a ramp of 2,000: the layers' LayerTokens are summed step by step here.
    config = deepspeed(6, 64, 256, 2000, 16, 8)
    line = "--train-tokens 100000000 --lr-decay-tokens 100000000 --seq-length 256 "
    total = sum(8 * (2 * 256 + 4 * length) for length in deepspeed_lengths(config, 1000))
    samples = int(Fraction(total, 6 * 256) + Fraction(1, 2))
    for flag in ("--lr-warmup-iters 1000", "--lr-warmup-samples 8000", "--lr-warmup-samples 7999"):
        flags = convert(config, line + flag).flags
        assert flags[flags.index("--lr-warmup-samples") + 1] == str(samples)
        assert flags.count("--lr-warmup-samples") == 1


@pytest.mark.parametrize(
    ("ids", "layers"),
    [
        (list(range(1, 23)), None),
        (list(range(22, 0, -1)), None),
        ([0], "1"),
        ([1, 2, 3, 5, 7, 8], "2-4,6,8-9"),
        (list(range(24)), "1-24"),
        (list(range(2, 23)), "3-23"),
    ],
)
def test_layers_count_from_one(ids, layers):
    config = changed(RECIPES["GPT-3 1.3B, 300B tokens"][0], "random_ltd_layer_id", ids)
    config = changed(config, "random_ltd_layer_num", len(ids))
    options, _ = parse(convert(config).flags)
    assert options.layers == layers
    dropped = resolve(options, ModelFacts(2048, 24)).dropped_layers
    assert [n - 1 for n in dropped] == sorted(ids)


def test_constant_length():
    config = changed(GPT2, "random_ltd_schedule.max_value", 128)
    result = convert(config, "--random-ltd --seq-length 1024 --num-layers 12")
    assert " ".join(result.flags) == (
        "--random-ltd --random-ltd-min-tokens 128 --random-ltd-constant "
        "--global-batch-size 4 --seq-length 1024"
    )
    assert parse(result.flags)[0] == RandomLTDConfig(min_tokens=128, constant=True)


def below_minimum(low, increment):
    config = changed(GPT2, "random_ltd_schedule.min_value", low)
    return changed(config, "random_ltd_schedule.schedule_config.seq_per_step", increment)


OUTER = {**GPT3, "data_efficiency": {**GPT3["data_efficiency"], "enabled": False}}
CURRICULUM = {
    **GPT3,
    "data_efficiency": {**GPT3["data_efficiency"], "data_sampling": {"enabled": True}},
}


@pytest.mark.parametrize(
    ("config", "line", "messages"),
    [
        (GPT3, "", ["same positions; here every sample has its own"]),
        (
            below_minimum(66, 8),
            "",
            ["the first 3 iterations keep 66 tokens here; DeepSpeed kept 64, and keeps 72 since"],
        ),
        (below_minimum(8, 16), "", ["keep 8 tokens here; DeepSpeed kept 0, and keeps 16 since"]),
        (VIT, "", ["seq_per_step 8 does not divide 197", "at iteration 3,982, not 3,910"]),
        (VIT, "", ["a model outside Megatron", "logs count micro-batches"]),
        (OUTER, "", ["data_efficiency.enabled is not true; DeepSpeed drops tokens anyway"]),
        (CURRICULUM, "", ["data_efficiency.data_sampling is not converted"]),
        (
            {**GPT3, "curriculum_learning": {"enabled": True}},
            "",
            ["curriculum_learning is not converted"],
        ),
        (
            changed(GPT3, "layer_token_lr_schedule", {"enabled": True}),
            "",
            ["layer_token_lr_schedule is not converted", "--layer-token-lr"],
        ),
        (
            changed(GPT3, "seed", 1),
            "",
            ["unknown keys in data_efficiency.data_routing.random_ltd", "seed"],
        ),
        (
            changed(GPT3, "random_ltd_schedule.schedule_config.root_degree", 2),
            "",
            ["unknown keys in", "random_ltd_schedule.schedule_config, ", ": root_degree"],
        ),
        (GPT3, FULL.replace("24", "36"), ["total_layer_num is 24, but --num-layers 36 is used"]),
        (
            GPT3,
            FULL.replace("512", "256"),
            ["train_batch_size is 512, but --global-batch-size 256"],
        ),
        (GPT3, "--seq-length 2048", ["the launch line has no --random-ltd"]),
        (
            GPT3,
            FULL + "--train-tokens 300000000000 --train-iters 300000",
            [
                "after 300,000 iterations",
                "use --train-samples 153600000",
                "use --lr-decay-samples",
            ],
        ),
    ],
)
def test_what_differs_is_said(config, line, messages):
    warnings = convert(config, line).warnings
    for message in messages:
        assert [w for w in warnings if message in w], warnings


def test_sections_that_are_not_read_are_said():
    removed = convert({**GPT3, "bf16": {"enabled": True}, "zero_optimization": {}}).removed
    assert "Megatron's own flags" in removed["bf16, zero_optimization"]


def test_batch_ramp_up_is_said_to_be_ignored():
    config, line, _ = RECIPES["GPT-3 1.3B, 300B tokens"]
    said = convert(config, f"{line} --rampup-batch-size 32 32 1953125").warnings
    assert any("--step-batch-size-schedule" in warning for warning in said)
    assert not any("iterations there" in warning for warning in said)


def test_a_plain_recipe_has_one_warning():
    assert len(convert(GPT3).warnings) == 1
    assert len(convert(GPT3, FULL).warnings) == 1


def test_unaligned_minimum_counts_as_deepspeed_counted_it():
    config = below_minimum(70, 16)
    config = changed(config, "random_ltd_schedule.schedule_config.require_steps", 4000)
    iterations, _ = deepspeed_iterations(config, 12, 2_000_000, 4)
    warnings = convert(config, "--random-ltd --train-tokens 2000000").warnings
    assert [w for w in warnings if f"is {iterations:,} iterations there" in w], warnings


def test_no_kept_tokens_at_all_are_counted():
    # Every layer drops, and DeepSpeed's first length is 0: it made no progress for a while.
    config = changed(below_minimum(8, 16), "random_ltd_layer_id", list(range(12)))
    config = changed(config, "random_ltd_layer_num", 12)
    config = changed(config, "random_ltd_schedule.schedule_config.require_steps", 4000)
    warnings = convert(config, "--random-ltd --train-tokens 10000").warnings
    assert [w for w in warnings if "--train-tokens 10000 is " in w]


@pytest.mark.parametrize("batch", ["auto", None])
def test_unknown_batch_size(batch):
    config = {**GPT3, "train_batch_size": "auto"}
    if batch is None:
        del config["train_batch_size"]
    flags = convert(config, "--random-ltd --train-tokens 3000000000").flags
    assert " ".join(flags) == (
        random_ltd(128, 200_000, 16) + "--train-layer-tokens 3000000000 --seq-length 2048"
    )


def test_a_limit_in_iterations_alone_becomes_samples():
    line = FULL + "--train-iters 1000 --lr-warmup-tokens 2048 --lr-decay-tokens 2048000"
    result = convert(GPT3, line)
    assert " ".join(result.flags).endswith(
        "--train-samples 512000 --layer-token-lr --lr-warmup-samples 1 --lr-decay-samples 1000 "
        "--global-batch-size 512 --seq-length 2048"
    )
    assert "--train-iters 1000" in result.removed
    # Without a learning rate that follows tokens, iterations stay what they were.
    plain = convert(GPT3, FULL + "--train-iters 1000 --lr-decay-iters 900", pass_through=True)
    assert "--train-samples" not in plain.flags
    assert " ".join(plain.flags).endswith("--train-iters 1000 --lr-decay-iters 900")


def test_a_constant_learning_rate_follows_tokens_while_it_warms_up():
    line = FULL + "--train-tokens 3000000000 --lr-warmup-tokens 2048000 --lr-decay-style constant"
    flags = " ".join(convert(GPT3, line).flags)
    assert (
        "--train-layer-tokens 3000000000 --layer-token-lr --lr-warmup-samples 1000 --glo" in flags
    )


def test_overridden_learning_rate_flags_go():
    line = FULL + "--lr-warmup-tokens 2048 --lr-decay-tokens 4096 --lr-decay-iters 7"
    result = convert(GPT3, line + " --lr-warmup-samples 9", pass_through=True)
    assert (
        result.flags.count("--lr-decay-samples") == result.flags.count("--lr-warmup-samples") == 1
    )
    assert result.removed["--lr-decay-iters 7"] == "--lr-decay-tokens overrides it"
    assert result.removed["--lr-warmup-samples 9"] == "--lr-warmup-tokens overrides it"
