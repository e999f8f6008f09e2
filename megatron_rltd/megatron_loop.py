"""What happens at each seam of Megatron's training loop; `patches` lists the seams.

State lives where Megatron keeps its own: the options and the LayerTokens consumed are plain values
on Megatron's ``args``, which every checkpoint holds. One `RandomLTD` per process, made once the
arguments are valid.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron_rltd import metrics
from megatron_rltd.config import (
    FIELDS,
    FLAG_PREFIX,
    ConfigError,
    RandomLTDConfig,
    config_from_args,
    flag,
    model_from_args,
    options_in_force,
    resolve,
)
from megatron_rltd.preflight import arguments_with_preflight
from megatron_rltd.random_ltd import RandomLTD
from megatron_rltd.refusals import validate

_LAYER_TOKENS = "random_ltd_layer_tokens"

_random_ltd: RandomLTD | None = None
_preflight_due = False


def start(args: Any) -> None:
    """Check Megatron's validated arguments and make the runtime object.

    Raises:
        ConfigError: A flag is wrong, or combined with a feature that random-LTD refuses.
    """
    global _random_ltd, _preflight_due
    _random_ltd = None
    if not args.random_ltd:
        changed = [
            n for n in FIELDS if getattr(args, FLAG_PREFIX + n) != getattr(RandomLTDConfig, n)
        ]
        if changed:
            raise ConfigError(
                [f"{flag(name)} does nothing without --random-ltd: add it" for name in changed]
            )
        return
    _use(RandomLTD(config_from_args(args), validate(args)), args)
    setattr(args, _LAYER_TOKENS, 0)
    _preflight_due = args.random_ltd_preflight


def _use(random_ltd: RandomLTD, args: Any) -> None:
    global _random_ltd
    _random_ltd = random_ltd
    # What the checkpoint must hold is what the run does, not what was left to a default.
    args.random_ltd_strata = random_ltd.resolved.strata
    args.random_ltd_seed = random_ltd.resolved.seed


def active() -> RandomLTD | None:
    """Return this process's runtime object, or None if the run is without random-LTD."""
    return _random_ltd


def attach(model: Any) -> None:
    """Attach the runtime to the model chunks that Megatron has built.

    Raises:
        ConfigError: The model is not one that random-LTD works on.
    """
    if _random_ltd is None:
        return
    try:
        _random_ltd.attach(model)
    except RuntimeError as error:
        raise ConfigError([str(error)]) from error


def resume(checkpoint_args: Any) -> None:
    """Take over state from a checkpoint and check that it continues the same run.

    Megatron's convention for the learning rate decides disagreements about the options: with
    ``--override-opt-param-scheduler`` the command line wins, with
    ``--use-checkpoint-opt-param-scheduler`` the checkpoint, without either they are an error.

    Raises:
        ConfigError: The checkpoint was trained with other options, or its strata do not fit the
            layout.
    """
    from megatron.training import get_args, print_rank_0

    if _random_ltd is None:
        return
    args, model = get_args(), _random_ltd.resolved.model
    samples = getattr(checkpoint_args, "consumed_train_samples", 0)
    dense = samples * model.seq_length * model.num_layers
    setattr(args, _LAYER_TOKENS, getattr(checkpoint_args, _LAYER_TOKENS, dense))
    if not getattr(checkpoint_args, "random_ltd", False):
        print_rank_0(
            f"random-LTD: the checkpoint was trained without it; its {samples} samples count as "
            f"{dense} LayerTokens, and the schedule continues from its iteration and samples"
        )
        return
    asked, saved = _random_ltd.config, config_from_args(checkpoint_args)
    ours, theirs = (options_in_force(c, model.num_layers) for c in (asked, saved))
    # Left open on the command line: the checkpoint's value is the one to continue with.
    left_open = [name for name, value in (("strata", 0), ("seed", None)) if ours[name] == value]
    differing = [n for n in FIELDS if n not in left_open and ours.get(n) != theirs.get(n)]
    if differing and args.override_opt_param_scheduler:
        print_rank_0(f"random-LTD: the command line overrides {_listed(differing, saved, asked)}")
        chosen = asked
    elif differing and not args.use_checkpoint_opt_param_scheduler:
        raise ConfigError(
            [
                f"the checkpoint was trained with other options: "
                f"{_listed(differing, saved, asked)}; give the checkpoint's, or add "
                "--override-opt-param-scheduler to use the command line's or "
                "--use-checkpoint-opt-param-scheduler to use the checkpoint's"
            ]
        )
    else:
        chosen = saved
    taken = {name: getattr(saved, name) for name in left_open}
    free = {name: getattr(asked, name) for name in ("backend", "preflight")}
    config = dataclasses.replace(chosen, **taken, **free)
    for name in FIELDS:
        setattr(args, FLAG_PREFIX + name, getattr(config, name))
    _use(RandomLTD(config, resolve(config, model_from_args(args))), args)


def _listed(names: list[str], saved: RandomLTDConfig, asked: RandomLTDConfig) -> str:
    return ", ".join(
        f"{flag(n)} {getattr(asked, n)} (checkpoint: {getattr(saved, n)})" for n in names
    )


def train_step(original: Callable, *call: Any, **kwargs: Any) -> Any:
    """Run one training step with its kept length, then count and log it.

    Args:
        original: ``megatron.training.training.train_step``.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    global _preflight_due
    if _random_ltd is None:
        return original(*call, **kwargs)
    args = get_args()
    samples = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
    begin_step = functools.partial(
        _random_ltd.begin_step, args.curr_iteration, args.consumed_train_samples
    )
    # Not in the first step: the optimizer's state, which counts, does not exist yet.
    if _preflight_due and args.curr_iteration > args.iteration:
        _preflight_due = False
        bound = arguments_with_preflight(original, call, kwargs, _random_ltd, begin_step)
        call, kwargs = bound.args, bound.kwargs
    begin_step()
    try:
        result = original(*call, **kwargs)
    finally:
        _random_ltd.end_step()
    losses, should_exit = result[0], result[3]
    if not should_exit:  # else Megatron does not count the step either
        kept = _random_ltd.kept_tokens
        tokens = samples * metrics.sample_layer_tokens(_random_ltd.resolved, kept)
        setattr(args, _LAYER_TOKENS, getattr(args, _LAYER_TOKENS) + tokens)
        metrics.add_kept_tokens(losses, kept)
        metrics.write_layer_tokens(getattr(args, _LAYER_TOKENS), args.curr_iteration + 1)
    return result


def begin_micro_batch(index: int) -> None:
    """Tell the runtime which micro-batch Megatron's schedule runs next."""
    if _random_ltd is not None:
        _random_ltd.begin_micro_batch(index)


def floating_point_operations(
    original: Callable, args: Any, batch_size: int, *rest: Any, **kwargs: Any
) -> float:
    """Count a global batch of the step that was run last.

    Args:
        original: ``megatron.training.training.num_floating_point_operations``.
    """
    if _random_ltd is None or _random_ltd.kept_tokens == args.seq_length:
        return original(args, batch_size, *rest, **kwargs)
    return metrics.floating_point_operations(
        original,
        _random_ltd.resolved,
        _random_ltd.kept_tokens,
        args,
        batch_size,
        *rest,
        **kwargs,
    )
