"""Megatron's command line: add our flags to its parser, and read its validated arguments."""

import argparse
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_rltd.config import FIELDS, FLAG_PREFIX, ConfigError, RandomLTDConfig, flag
from megatron_rltd.patching.versions import UNTESTED_FLAG
from megatron_rltd.refusals import find_refused
from megatron_rltd.resolved_config import ModelFacts, ResolvedConfig, resolve


def whole_number(text: str) -> int:
    """Return the integer of a text such as 300000000000 or 300e9.

    Raises:
        ValueError: It is not a whole number.
    """
    try:
        number = Decimal(text)
        if number == number.to_integral_value():
            return int(number)
    except (InvalidOperation, OverflowError):
        pass
    raise ValueError(f"{text!r} is not a whole number")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--random-ltd`` and a flag for each field; do nothing if they are already there.

    You can use it as Megatron's ``extra_args_provider``.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    class PrefixedGroupFactory(ArgumentGroupFactory):
        """Megatron's dataclass-to-flags factory, with our prefix on flag and namespace name."""

        def _build_argparse_kwargs_from_field(self, attribute):
            kwargs = super()._build_argparse_kwargs_from_field(attribute)
            return {
                **kwargs,
                "arg_names": [flag(attribute.name)],
                "dest": FLAG_PREFIX + attribute.name,
            }

    if any("--random-ltd" in action.option_strings for action in parser._actions):
        return parser
    group = PrefixedGroupFactory(RandomLTDConfig).build_group(parser, title="random-LTD")
    group.add_argument(
        "--random-ltd",
        action="store_true",
        help="Train with random layerwise token dropping. Evaluation never drops.",
    )
    group.add_argument(
        "--layer-token-lr",
        action="store_true",
        help="Let warm-up, decay and weight-decay increments advance by LayerTokens instead of "
        "samples. LayerTokens are the tokens that each layer processed, summed over layers. In "
        "--lr-warmup-samples and similar flags, a sample then stands for the LayerTokens of a "
        "sample that drops nothing. By default the decay takes the LayerTokens of the run.",
    )
    group.add_argument(
        "--train-layer-tokens",
        type=whole_number,
        metavar="N",
        help="Train until each layer has processed N tokens on average (N LayerTokens per layer). "
        "The paper gives the length of a run in this unit. Use it instead of --train-iters or "
        "--train-samples.",
    )
    group.add_argument(
        UNTESTED_FLAG,
        action="store_true",
        help="Run on a Megatron whose sources random-LTD was not tested with, if the functions "
        "that it replaces have the parameters that it needs. A warning says what differs.",
    )
    return parser


def config_from_args(args: Any) -> RandomLTDConfig:
    """Return the config that a parsed Megatron namespace holds.

    A checkpoint of an older version has no value for an option that is newer: it gets the default.
    """
    values = {name: FLAG_PREFIX + name for name in FIELDS if hasattr(args, FLAG_PREFIX + name)}
    return RandomLTDConfig(**{name: getattr(args, held) for name, held in values.items()})


def facts_from_args(args: Any) -> ModelFacts:
    """Return what Megatron's validated arguments say about the model and its layout."""
    return ModelFacts.of(
        args,
        seq_length=args.seq_length,
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
        pattern=getattr(args, "hybrid_layer_pattern", None),
    )


def resolve_args(args: Any) -> ResolvedConfig:
    """Return what a run with Megatron's validated arguments needs.

    Raises:
        ConfigError: It names every unsupported feature and every wrong option.
    """
    problems = find_refused(args)
    try:
        resolved = resolve(config_from_args(args), facts_from_args(args))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return resolved


def refuse_without_random_ltd(args: Any) -> None:
    """Refuse our flags if ``--random-ltd`` is absent, because they would do nothing.

    Raises:
        ConfigError: It names the flags.
    """
    changed = [
        flag(n) for n in FIELDS if getattr(args, FLAG_PREFIX + n) != getattr(RandomLTDConfig, n)
    ]
    if args.layer_token_lr:
        changed.append("--layer-token-lr")
    problems = [
        f"{name} does nothing without --random-ltd: add --random-ltd or omit {name}"
        for name in changed
    ]
    if args.train_layer_tokens is not None:
        samples = -(-args.train_layer_tokens // args.seq_length)
        problems.append(
            f"--train-layer-tokens {args.train_layer_tokens} needs --random-ltd: add --random-ltd, "
            f"or use --train-samples {samples} for a dense run of as many LayerTokens"
        )
    if problems:
        raise ConfigError(problems)
