"""Turn a DeepSpeed random-LTD configuration into the flags of megatron_rltd.

    python -m megatron_rltd convert-deepspeed ds_config.json
    python -m megatron_rltd convert-deepspeed ds_config.json -- --num-layers 24 --train-tokens ...
    python -m megatron_rltd convert-deepspeed ds_config.json --launch launch.sh --pass-through

The first argument is the JSON file with data_efficiency.data_routing.random_ltd. Give the launch
line of Megatron-DeepSpeed after --, or in the file of --launch, with or without launcher and
script. Its budget and learning rate are then converted too. The flags go to standard output, in one
line. Standard error says what is removed and what will differ. If something cannot be converted,
the exit status is 2 and no flags are printed.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import cast

from megatron_rltd.commands.convert_deepspeed.budget import (
    Conversion,
    DeepSpeedRun,
    convert_budget,
    convert_learning_rate,
)
from megatron_rltd.commands.convert_deepspeed.launch import (
    INSTEAD,
    ConversionError,
    Launch,
    is_foreign,
    parse_text,
    parse_words,
)
from megatron_rltd.commands.convert_deepspeed.recipe import (
    Recipe,
    read_json,
    read_recipe,
    read_text,
)
from megatron_rltd.config import ConfigError, RandomLTDConfig, flag, parse_layers
from megatron_rltd.resolved_config import ModelFacts, ResolvedConfig, resolve

ALWAYS = (
    "which tokens are kept: DeepSpeed seeds its draws alike on all data-parallel ranks, so that "
    "they keep the same positions; here every sample has its own"
)


def layer_ranges(layers: tuple[int, ...]) -> str:
    """Return ascending layer numbers as --random-ltd-layers takes them, such as 2-11,14."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def random_ltd_config(recipe: Recipe, seq_length: int, num_layers: int) -> RandomLTDConfig:
    """Return the options that do what a recipe does.

    Raises:
        ConversionError: There are none, because here the kept length grows to the sequence length.
    """
    low, high, ramp = recipe.min_value, recipe.max_value, recipe.require_steps
    default = recipe.layers == parse_layers(None, num_layers)
    layers = None if default else layer_ranges(recipe.layers)
    if low > high or low >= seq_length:
        raise ConversionError(
            f"nothing to convert: min_value {low}, max_value {high} and --seq-length {seq_length} "
            "drop nothing"
        )
    if low == high:
        return RandomLTDConfig(min_tokens=low, constant=True, layers=layers)
    if high != seq_length:
        as_steep = round(Fraction(ramp * (seq_length - low), high - low))
        raise ConversionError(
            f"max_value is {high}, but here the kept length grows to --seq-length {seq_length}: "
            f"set max_value to that (require_steps {as_steep} is as steep as now)"
        )
    return RandomLTDConfig(
        min_tokens=low, ramp_iters=ramp, increment=recipe.seq_per_step, layers=layers
    )


def schedule_warnings(resolved: ResolvedConfig) -> Iterator[str]:
    """Say where the kept length is not DeepSpeed's or not what one may expect."""
    config, schedule = resolved.config, resolved.schedule
    low, step, s = config.min_tokens, config.increment, schedule.seq_length
    if config.constant:
        return
    if low % step:
        below, above = low // step * step, min(s, -(-low // step) * step)
        yield (
            f"min_value {low} is not a multiple of seq_per_step {step}: the first "
            f"{schedule.first_position(above):,} iterations keep {low} tokens here; DeepSpeed kept "
            f"{below}, and keeps {above} since a fix in 2026"
        )
    full = schedule.first_position(s)
    if full != config.ramp_iters:
        yield (
            f"seq_per_step {step} does not divide {s}: the full length starts at iteration "
            f"{full:,}, not {config.ramp_iters:,}, as in DeepSpeed"
        )


def convert(config: object, launch: Launch, pass_through: bool = False) -> Conversion:
    """Convert the content of a DeepSpeed JSON file and a launch line.

    Args:
        config: The JSON.
        launch: The flags of the launch line, empty if there is none.
        pass_through: Return Megatron's own flags of the launch line too, as they are.

    Raises:
        ConversionError: There are no flags that would do the same; see the functions called.
    """
    recipe = read_recipe(config)
    result = Conversion(warnings=[ALWAYS, *recipe.warnings])
    others = [
        key for key in cast(dict, config) if key not in ("train_batch_size", "data_efficiency")
    ]
    if others:
        why = "not part of random-LTD: use Megatron's own flags"
        result.removed[", ".join(others)] = why
    if recipe.not_needed:
        result.removed[", ".join(recipe.not_needed)] = "known from the model"

    num_layers = launch.integer("--num-layers") or recipe.total_layer_num
    if num_layers != recipe.total_layer_num:
        result.warnings.append(
            f"total_layer_num is {recipe.total_layer_num}, but --num-layers {num_layers} is used"
        )
    if recipe.layers[-1] > num_layers:
        raise ConversionError(
            f"random_ltd_layer_id goes up to {recipe.layers[-1] - 1}, but the {num_layers} layers "
            f"are 0 to {num_layers - 1}"
        )
    seq_length = launch.integer("--seq-length", "--encoder-seq-length")
    if seq_length is None:
        if recipe.min_value == recipe.max_value:
            raise ConversionError("min_value equals max_value: add -- --seq-length N")
        seq_length = recipe.max_value
    batch_size = launch.integer("--global-batch-size") or recipe.batch_size
    if recipe.batch_size not in (None, batch_size):
        result.warnings.append(
            f"train_batch_size is {recipe.batch_size}, but --global-batch-size {batch_size} is used"
        )

    options = random_ltd_config(recipe, seq_length, num_layers)
    try:
        resolved = resolve(options, ModelFacts(seq_length, num_layers))
    except ConfigError as error:
        raise ConversionError("; ".join(error.problems)) from None
    result.warnings += schedule_warnings(resolved)
    result.add("--random-ltd")
    result.add(flag("min_tokens"), options.min_tokens)
    if options.constant:
        result.add(flag("constant"))
    else:
        result.add(flag("ramp_iters"), options.ramp_iters)
        result.add(flag("increment"), options.increment)
    if options.layers:
        result.add(flag("layers"), options.layers)

    constant_batch = None if "--rampup-batch-size" in launch else batch_size
    if constant_batch is None and batch_size is not None:
        result.warnings.append(
            "Megatron 0.18 and newer ignore --rampup-batch-size: use --step-batch-size-schedule, "
            "which replaces --global-batch-size; lengths are not compared with the DeepSpeed run"
        )
    run = DeepSpeedRun(resolved.schedule, num_layers, len(resolved.dropped_layers), constant_batch)
    convert_budget(launch, run, result)
    convert_learning_rate(launch, run, result)
    if batch_size is not None:
        result.add("--global-batch-size", batch_size)
    result.add("--seq-length", seq_length)
    result.remove(launch, "--encoder-seq-length", "now --seq-length")
    convert_rest(launch, result, pass_through)
    return result


def convert_rest(launch: Launch, result: Conversion, pass_through: bool) -> None:
    """Remove what Megatron does not have; add what it does, if asked."""
    if launch.options and "--random-ltd" not in launch and "--random_ltd" not in launch:
        result.warnings.append(
            "the launch line has no --random-ltd: Megatron-DeepSpeed did not drop tokens"
        )
    done = {text.split()[0] for text in result.removed} | set(result.flags)
    kept = []
    for name in [name for name in launch.options if name not in done]:
        if is_foreign(name):
            instead = f"; in its place: {INSTEAD[name]}" if name in INSTEAD else ""
            result.remove(launch, name, f"not a flag of Megatron-LM{instead}")
        else:
            kept += [name, *launch.options[name]]
    if pass_through:
        result.flags += kept


def quoted(word: str) -> str:
    """Return a word as it stands in a command line; shell variables stay variables."""
    return word if "$" in word else shlex.quote(word)


def main(argv: list[str] | None = None) -> int:
    """Print the flags; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rltd convert-deepspeed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="JSON", help="the DeepSpeed configuration")
    add("--launch", type=Path, metavar="FILE", help="a file with the launch line, instead of --")
    add("--pass-through", action="store_true", help="also print the other flags of the launch line")
    add("--json", action="store_true", help="print flags, removals and warnings as JSON")
    options = parser.parse_args(argv[:split])
    words = argv[split + 1 :]
    try:
        if options.launch and words:
            raise ConversionError("give the launch line with --launch or after --, not both")
        if options.launch:
            launch = parse_text(read_text(options.launch))
        else:
            launch = parse_words(words) if words else Launch()
        result = convert(read_json(options.config), launch, options.pass_through)
    except ConversionError as error:
        print(f"convert-deepspeed: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(asdict(result), indent=1))
        return 0
    for what, why in result.removed.items():
        print(f"removed: {what}: {why}", file=sys.stderr)
    for line in result.warnings:
        print(f"warning: {line}", file=sys.stderr)
    print(" ".join(map(quoted, result.flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
