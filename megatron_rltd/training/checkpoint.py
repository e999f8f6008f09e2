"""What a checkpoint says about a run, and whether a command line continues that run.

All of it is stored on Megatron's ``args``, and every checkpoint holds all of them: the options, and
the LayerTokens consumed as plain integers.
"""

import dataclasses
from typing import Any

from megatron_rltd.config import FIELDS, FREE, ConfigError, RandomLTDConfig, flag, options_in_force
from megatron_rltd.groups import count_groups
from megatron_rltd.training.arguments import config_from_args

_LAYER_TOKENS = "random_ltd_layer_tokens"
_DENSE = "random_ltd_dense_layer_tokens"
_SCHEDULER = "random_ltd_scheduler_settings"


def consumed(args: Any, otherwise: int = 0) -> tuple[int, int]:
    """Return the LayerTokens consumed, and how many they would be if nothing had been dropped.

    Args:
        args: Megatron's arguments, of this run or of a checkpoint.
        otherwise: The value of both if the arguments do not hold them.
    """
    return getattr(args, _LAYER_TOKENS, otherwise), getattr(args, _DENSE, otherwise)


def set_consumed(args: Any, layer_tokens: int, dense: int) -> None:
    """Set the LayerTokens consumed."""
    setattr(args, _LAYER_TOKENS, layer_tokens)
    setattr(args, _DENSE, dense)


def continued_config(asked: RandomLTDConfig, checkpoint_args: Any, args: Any) -> RandomLTDConfig:
    """Return the config to continue a random-LTD checkpoint with.

    Disagreements are settled as Megatron does for the learning rate. With
    ``--override-opt-param-scheduler`` the command line wins. With
    ``--use-checkpoint-opt-param-scheduler`` the checkpoint wins. Without either it is an error.

    Raises:
        ConfigError: The checkpoint was trained with other options.
    """
    from megatron.training import print_rank_0

    saved = config_from_args(checkpoint_args)
    ours, theirs = (options_in_force(config, count_groups(args)) for config in (asked, saved))
    # If the command line leaves these open, the run continues with the checkpoint's values.
    left_open = [name for name, value in (("strata", 0), ("seed", None)) if ours[name] == value]
    # The default of one option may depend on another; then only the other is named.
    given = [n for n in FIELDS if n not in left_open and getattr(asked, n) != getattr(saved, n)]
    differing = [n for n in given if ours.get(n) != theirs.get(n)]
    listed = ", ".join(
        f"{flag(n)} {getattr(asked, n)} (checkpoint: {getattr(saved, n)})" for n in differing
    )
    chosen = saved
    if differing and args.override_opt_param_scheduler:
        print_rank_0(f"random-LTD: the command line overrides {listed}")
        chosen = asked
    elif differing and not args.use_checkpoint_opt_param_scheduler:
        raise ConfigError(
            [
                f"the checkpoint was trained with other options: {listed}; give the same ones, or "
                "add --override-opt-param-scheduler to use those of the command line, or "
                "--use-checkpoint-opt-param-scheduler to use those of the checkpoint"
            ]
        )
    taken = {name: getattr(saved, name) for name in left_open}
    free = {name: getattr(asked, name) for name in FREE}
    return dataclasses.replace(chosen, **taken, **free)


def check_learning_rate(checkpoint_args: Any, args: Any) -> None:
    """Check that the learning rate and the length of the run are the checkpoint's.

    Raises:
        ConfigError: The learning rate followed LayerTokens and now follows samples, or the reverse,
            or the budget is another one.
    """
    # In a dense checkpoint LayerTokens and samples count the same.
    if not getattr(checkpoint_args, "random_ltd", False) or args.override_opt_param_scheduler:
        return
    saved = getattr(checkpoint_args, "layer_token_lr", False)
    problems = []
    if saved != args.layer_token_lr:
        problems.append(
            f"the checkpoint was trained {'with' if saved else 'without'} --layer-token-lr: "
            f"{'add it' if saved else 'omit it'}, or add --override-opt-param-scheduler to "
            "change how the learning rate advances from here"
        )
    budgets = [getattr(a, "train_layer_tokens", None) for a in (checkpoint_args, args)]
    if None not in budgets and budgets[0] != budgets[1]:
        problems.append(
            f"the checkpoint was trained with --train-layer-tokens {budgets[0]}, not {budgets[1]}: "
            "give the same, or add --override-opt-param-scheduler to change the length of the run "
            "and of its learning rate"
        )
    if problems:
        raise ConfigError(problems)


def set_scheduler_settings(args: Any, settings: dict[str, int | float]) -> None:
    """Store the settings that follow from the length of the run, for the next checkpoint."""
    setattr(args, _SCHEDULER, settings)


def scheduler_settings(checkpoint_args: Any, args: Any) -> dict[str, int | float] | None:
    """Return the checkpoint's scheduler settings if the run continues with them, or None.

    It does if the checkpoint's run has the same length and learning rate. The batch size may have
    changed, and new settings would depend on it.
    """
    if args.override_opt_param_scheduler:
        return None
    given = ["layer_token_lr", "train_layer_tokens", "lr_warmup_fraction"]
    if args.train_layer_tokens is None:
        given.append("train_iters" if args.train_samples is None else "train_samples")
    if any(getattr(args, name) != getattr(checkpoint_args, name, None) for name in given):
        return None
    ours, saved = (getattr(a, _SCHEDULER, {}) for a in (args, checkpoint_args))
    return saved if saved.keys() == ours.keys() else None
