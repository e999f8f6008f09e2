import argparse
import dataclasses

import pytest

from megatron_rltd.config import ConfigError, RandomLTDConfig, parse_layers
from megatron_rltd.resolved_config import ModelFacts, resolve
from megatron_rltd.schedule import Progress, Schedule
from megatron_rltd.training.arguments import add_arguments, config_from_args

MODEL = ModelFacts(seq_length=256, num_layers=8)
GOOD = RandomLTDConfig(min_tokens=64, ramp_iters=100, increment=16)


def changed(**options):
    return dataclasses.replace(GOOD, **options)


def test_defaults_of_a_resolved_config():
    resolved = resolve(GOOD, MODEL)
    assert resolved.dropped_layers == (2, 3, 4, 5, 6, 7)
    assert resolved.strata == 1
    assert resolved.seed == 1234
    assert resolved.schedule == Schedule(256, 64, 100, 16, 1)
    assert resolved.layer_tokens.position(Progress(iteration=5, samples=80)) == 5


def test_ramp_in_samples_and_constant():
    resolved = resolve(changed(ramp_iters=None, ramp_samples=800), MODEL)
    assert resolved.schedule.ramp_length == 800
    assert resolved.layer_tokens.position(Progress(iteration=5, samples=80)) == 80
    constant = resolve(changed(ramp_iters=None, constant=True), MODEL)
    assert constant.schedule.kept_tokens(10**9) == 64


@pytest.mark.parametrize(
    ("tp", "cp", "asked", "strata"),
    [(1, 1, 0, 1), (2, 1, 0, 2), (1, 2, 0, 4), (4, 2, 0, 16), (2, 2, 16, 16), (1, 1, 16, 16)],
)
def test_strata_of_a_layout(tp, cp, asked, strata):
    model = dataclasses.replace(MODEL, sequence_parallel_size=tp, context_parallel_size=cp)
    assert resolve(changed(strata=asked), model).strata == strata


@pytest.mark.parametrize(
    ("text", "layers"),
    [(None, (2, 3, 4, 5, 6, 7)), ("3", (3,)), ("2-4,6, 8", (2, 3, 4, 6, 8)), ("5,3-4", (3, 4, 5))],
)
def test_layers(text, layers):
    assert parse_layers(text, 8) == layers


@pytest.mark.parametrize(("layers", "dropped"), [(12, range(7, 12)), (5, (3, 4)), (3, (2,))])
def test_layers_of_token_bypass(layers, dropped):
    resolved = resolve(changed(policy="token-bypass"), ModelFacts(256, layers))
    assert resolved.dropped_layers == tuple(dropped)
    assert resolved.crossed_layer == dropped[0] - 1
    assert resolve(GOOD, MODEL).crossed_layer is None


@pytest.mark.parametrize(
    ("config", "model", "messages"),
    [
        (
            changed(ramp_iters=None),
            MODEL,
            ["exactly one of --random-ltd-ramp-iters", "given: none"],
        ),
        (
            changed(ramp_samples=5),
            MODEL,
            ["given: --random-ltd-ramp-iters, --random-ltd-ramp-samples"],
        ),
        (changed(constant=True), MODEL, ["--random-ltd-ramp-iters, --random-ltd-constant"]),
        (changed(ramp_iters=0), MODEL, ["--random-ltd-ramp-iters 0 must be positive"]),
        (changed(increment=0), MODEL, ["--random-ltd-increment 0 must be positive"]),
        (changed(root_degree=0), MODEL, ["--random-ltd-root-degree 0 must be positive"]),
        (changed(min_tokens=512), MODEL, ["--random-ltd-min-tokens 512", "--seq-length 256"]),
        (changed(min_tokens=0), MODEL, ["--random-ltd-min-tokens 0 must be between 1"]),
        (changed(layers="2-9"), MODEL, ["--random-ltd-layers 2-9", "from 1 to 8", "[9]"]),
        (changed(layers="0"), MODEL, ["from 1 to 8", "[0]"]),
        (changed(layers="2,2-3"), MODEL, ["at most once; wrong: [2]"]),
        (changed(layers="two"), MODEL, ["'two' is neither a number nor a range"]),
        (changed(layers="3-"), MODEL, ["'3-' is neither a number nor a range"]),
        (changed(layers="5-3"), MODEL, ["'5-3' is neither a number nor a range"]),
        (
            changed(policy="token-bypass", layers="2,4"),
            MODEL,
            ["--random-ltd-layers 2,4", "token-bypass needs neighbouring layers", "such as 5-7"],
        ),
        (changed(policy="token-bypass", layers="1-3"), MODEL, ["at least one layer before them"]),
        (changed(policy="token-bypass"), ModelFacts(256, 2), ["has no middle layer"]),
        (changed(bypass_random_share=0.5), MODEL, ["does nothing without --random-ltd-policy"]),
        (
            changed(policy="token-bypass", bypass_random_share=1.5),
            MODEL,
            ["--random-ltd-bypass-random-share 1.5 must be from 0 to 1"],
        ),
        (GOOD, ModelFacts(256, 2), ["--num-layers 2 has no middle layer", "--random-ltd-layers"]),
        (changed(strata=-1), MODEL, ["--random-ltd-strata -1 must not be negative"]),
        (
            changed(strata=6),
            ModelFacts(256, 8, sequence_parallel_size=4),
            ["--random-ltd-strata 6 must be a multiple of 4"],
        ),
        (changed(strata=3), MODEL, ["--seq-length 256 must be a multiple", "strata, 3"]),
        (changed(min_tokens=60, strata=8), MODEL, ["--random-ltd-min-tokens 60 must be"]),
        (changed(increment=4, strata=8), MODEL, ["--random-ltd-increment 4 must be"]),
        (changed(seed=-1), MODEL, ["--random-ltd-seed -1 must be between 0 and 2**64 - 1"]),
        (changed(seed=2**64), MODEL, [f"--random-ltd-seed {2**64} must be between"]),
        (
            changed(increment=8),
            ModelFacts(256, 8, sequence_parallel_size=2, context_parallel_size=4),
            ["--random-ltd-increment 8 must be a multiple of the number of strata, 16"],
        ),
        (
            GOOD,
            ModelFacts(256, 8, micro_batch_size=2, row_multiple=32, context_parallel_size=2),
            ["--random-ltd-increment 16 must be a multiple of 32", "FP8"],
        ),
    ],
)
def test_wrong_options_are_named(config, model, messages):
    with pytest.raises(ConfigError) as error:
        resolve(config, model)
    for message in messages:
        assert message in str(error.value)


def test_fp8_rows_count_the_micro_batch():
    model = ModelFacts(256, 8, micro_batch_size=2, row_multiple=32)
    assert resolve(GOOD, model).strata == 1
    with pytest.raises(ConfigError, match="--random-ltd-increment 8 must be a multiple of 16"):
        resolve(changed(increment=8), model)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        resolve(RandomLTDConfig(min_tokens=999, increment=0, layers="x"), MODEL)
    assert len(error.value.problems) == 4


EXPECTED_FLAGS = {
    "--random-ltd": "random_ltd",
    "--random-ltd-min-tokens": "random_ltd_min_tokens",
    "--random-ltd-ramp-iters": "random_ltd_ramp_iters",
    "--random-ltd-ramp-samples": "random_ltd_ramp_samples",
    "--random-ltd-increment": "random_ltd_increment",
    "--random-ltd-root-degree": "random_ltd_root_degree",
    "--random-ltd-constant": "random_ltd_constant",
    "--random-ltd-layers": "random_ltd_layers",
    "--random-ltd-recurrent-layers": "random_ltd_recurrent_layers",
    "--random-ltd-policy": "random_ltd_policy",
    "--random-ltd-bypass-random-share": "random_ltd_bypass_random_share",
    "--random-ltd-strata": "random_ltd_strata",
    "--random-ltd-shared-indices": "random_ltd_shared_indices",
    "--random-ltd-seed": "random_ltd_seed",
    "--random-ltd-backend": "random_ltd_backend",
    "--random-ltd-grow-micro-batch": "random_ltd_grow_micro_batch",
    "--random-ltd-grow-min-micro-batches": "random_ltd_grow_min_micro_batches",
    "--random-ltd-preflight": "random_ltd_preflight",
    "--random-ltd-untested-megatron": "random_ltd_untested_megatron",
    "--layer-token-lr": "layer_token_lr",
    "--train-layer-tokens": "train_layer_tokens",
}


def test_flags_are_frozen():
    parser = add_arguments(argparse.ArgumentParser())
    actions = [a for a in parser._actions if a.option_strings[0] != "-h"]
    assert {a.option_strings[0]: a.dest for a in actions} == EXPECTED_FLAGS
    assert all(len(action.help) > 20 for action in actions)


def test_adding_arguments_twice_is_harmless():
    parser = add_arguments(add_arguments(argparse.ArgumentParser()))
    assert not parser.parse_args([]).random_ltd


def test_flags_make_the_config():
    parser = add_arguments(argparse.ArgumentParser())
    assert config_from_args(parser.parse_args(["--random-ltd"])) == RandomLTDConfig()
    args = parser.parse_args(
        "--random-ltd --random-ltd-grow-micro-batch 4 --random-ltd-grow-min-micro-batches 2 "
        "--random-ltd-min-tokens 64 --random-ltd-ramp-samples 100 "
        "--random-ltd-increment 8 --random-ltd-root-degree 2 --random-ltd-layers 2-3 "
        "--random-ltd-strata 4 --random-ltd-shared-indices --random-ltd-seed 7 "
        "--random-ltd-backend torch --random-ltd-preflight".split()
    )
    assert config_from_args(args) == RandomLTDConfig(
        min_tokens=64,
        ramp_samples=100,
        increment=8,
        root_degree=2,
        layers="2-3",
        strata=4,
        shared_indices=True,
        seed=7,
        backend="torch",
        preflight=True,
        grow_micro_batch=4,
        grow_min_micro_batches=2,
    )


def test_unknown_backend_is_refused(capsys):
    parser = add_arguments(argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--random-ltd-backend", "fast"])
    assert "--random-ltd-backend" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"), [("300e9", 300 * 10**9), ("3.5e3", 3500), ("300_000", 300_000), ("-1", -1)]
)
def test_budgets_may_be_written_with_exponents(text, number):
    parser = add_arguments(argparse.ArgumentParser())
    assert parser.parse_args([f"--train-layer-tokens={text}"]).train_layer_tokens == number


@pytest.mark.parametrize("text", ["1.5", "300B", "", "nan", "inf"])
def test_budgets_that_are_no_whole_numbers(text, capsys):
    parser = add_arguments(argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args([f"--train-layer-tokens={text}"])
    assert "--train-layer-tokens: invalid whole_number value" in capsys.readouterr().err
