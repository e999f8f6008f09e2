"""What happens at each seam of Megatron's training loop; `patches` lists the seams.

State lives where Megatron keeps its own: the options and the LayerTokens consumed are plain values
on Megatron's ``args``, which every checkpoint holds. One `RandomLTD` per process, made once the
arguments are valid.
"""

import functools
import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megatron_rltd.config import (
    FIELDS,
    FLAG_PREFIX,
    ConfigError,
    RandomLTDConfig,
    Resolved,
    config_from_args,
    flag,
    resolve,
)
from megatron_rltd.model.micro_batches import join_micro_batches
from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.refusals import model_from_args, packs, validate
from megatron_rltd.schedule import Progress
from megatron_rltd.training import budget, checkpoint, metrics
from megatron_rltd.training.learning_rate import LayerTokenScheduler
from megatron_rltd.training.preflight import add_preflight

_random_ltd: RandomLTD | None = None
_scheduler: Any = None  # a LayerTokenScheduler under --layer-token-lr, else Megatron's
_megatrons_scheduler: Any = None
_is_decay_given = False
_flops = metrics.FlopsSinceLog()
_preflight_due = False


def validate_args(original: Callable, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Check the flags, what Megatron would say less clearly before it does.

    Args:
        original: ``megatron.training.arguments.validate_args``.

    Raises:
        ConfigError: See `start`.
    """
    if getattr(args, "random_ltd", False):
        budget.check_units(args)
    result = original(args, *rest, **kwargs)
    start(args)
    return result


def start(args: Any) -> None:
    """Check Megatron's validated arguments, make the runtime object and set the run's length.

    Raises:
        ConfigError: A flag is wrong, or combined with a feature that random-LTD refuses.
    """
    global _random_ltd, _scheduler, _is_decay_given, _flops, _preflight_due
    _random_ltd = _scheduler = None
    _flops = metrics.FlopsSinceLog()
    if not args.random_ltd:
        _refuse_without_random_ltd(args)
        return
    resolved = validate(args)
    lengths = (args.train_iters, args.train_samples, args.train_layer_tokens)
    if not any(lengths) and not args.skip_train:
        raise ConfigError(["give --train-iters, --train-samples or --train-layer-tokens"])
    _is_decay_given = args.lr_decay_iters is not None or args.lr_decay_samples is not None
    budget.set_length(args, resolved)
    _use(RandomLTD(config_from_args(args), resolved), args)
    checkpoint.set_consumed(args, 0, 0)
    _preflight_due = args.random_ltd_preflight


def _refuse_without_random_ltd(args: Any) -> None:
    changed = [
        flag(n) for n in FIELDS if getattr(args, FLAG_PREFIX + n) != getattr(RandomLTDConfig, n)
    ]
    if args.layer_token_lr:
        changed.append("--layer-token-lr")
    problems = [f"{name} does nothing without --random-ltd: add it" for name in changed]
    if args.train_layer_tokens is not None:
        samples = -(-args.train_layer_tokens // args.seq_length)
        problems.append(
            f"--train-layer-tokens {args.train_layer_tokens} needs --random-ltd: a dense run of as "
            f"many LayerTokens takes --train-samples {samples}"
        )
    if problems:
        raise ConfigError(problems)


def _use(random_ltd: RandomLTD, args: Any) -> None:
    global _random_ltd
    _random_ltd = random_ltd
    if isinstance(_scheduler, LayerTokenScheduler):
        _scheduler.random_ltd = random_ltd
    # What the checkpoint must hold is what the run does, not what was left to a default.
    args.random_ltd_strata = random_ltd.resolved.strata
    args.random_ltd_seed = random_ltd.resolved.seed


def active() -> RandomLTD | None:
    """Return this process's runtime object, or None if the run is without random-LTD."""
    return _random_ltd


def begin_training(model: Any) -> None:
    """Attach the runtime to the model chunks that Megatron has built, and set what is left to do.

    Raises:
        ConfigError: The model is not one that random-LTD works on.
    """
    if _random_ltd is None:
        return
    try:
        _random_ltd.attach(model)
    except RuntimeError as error:
        raise ConfigError([str(error)]) from error
    if _random_ltd.config.grow_micro_batch > 1:
        _say_what_is_joined(_random_ltd.resolved)
    continue_run()


def _say_what_is_joined(resolved: Resolved) -> None:
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import print_rank_0

    print_rank_0(f"random-LTD: {resolved.joined_in_words(get_num_microbatches())}")


def schedule_learning_rate(scheduler: Any) -> Any:
    """Return what is to schedule the learning rate in place of Megatron's scheduler."""
    from megatron.training import get_args

    global _scheduler, _megatrons_scheduler
    if _random_ltd is None or not budget.follows_layer_tokens(get_args()):
        return scheduler
    args = get_args()
    _scheduler = LayerTokenScheduler(scheduler, _random_ltd) if args.layer_token_lr else scheduler
    _megatrons_scheduler = scheduler
    _set_scheduler(budget.scheduler_settings(args, _random_ltd.resolved, _is_decay_given))
    return _scheduler


def _set_scheduler(settings: dict[str, int | float]) -> None:
    from megatron.training import get_args

    checkpoint.set_scheduler_settings(get_args(), settings)
    for name, value in settings.items():
        setattr(_megatrons_scheduler, name, value)


def continue_run() -> None:
    """Set what is left of the run once a checkpoint may have been loaded.

    It may have got there with another batch size or schedule.
    """
    from megatron.training import get_args, print_rank_0

    if _random_ltd is None or not budget.follows_layer_tokens(get_args()):
        return
    args, resolved = get_args(), _random_ltd.resolved
    # What Megatron, which runs later, makes of a checkpoint without a count of samples.
    samples = args.consumed_train_samples or args.iteration * args.global_batch_size
    here = Progress(args.iteration, samples, checkpoint.consumed(args)[0])
    if args.train_layer_tokens is not None:
        end = budget.end_of_budget(args, resolved, here)
        args.train_iters = end.iteration
        # The size of the data set, which Megatron else takes to be the iterations' at this batch.
        if args.train_samples or end.samples > end.iteration * args.global_batch_size:
            args.train_samples = end.samples
        print_rank_0(
            f"random-LTD: --train-layer-tokens {args.train_layer_tokens} ends the run after "
            f"{end.iteration} iterations and {end.samples} samples, of which it has done "
            f"{here.iteration} and {here.samples}"
        )
    if here.iteration and args.override_opt_param_scheduler and _scheduler is not None:
        advanced = Fraction(_scheduler.num_steps)
        if args.layer_token_lr:
            advanced = Fraction(_scheduler.layer_tokens, resolved.layer_tokens.dense)
        _set_scheduler(
            budget.scheduler_settings(args, resolved, _is_decay_given, here, advanced)
        )
        _scheduler.step(0)


def resume(checkpoint_args: Any) -> None:
    """Take over state from a checkpoint and check that it continues the same run.

    Raises:
        ConfigError: The checkpoint was trained with other options, or its strata do not fit the
            layout.
    """
    from megatron.training import get_args, print_rank_0

    if _random_ltd is None:
        return
    args = get_args()
    samples = getattr(checkpoint_args, "consumed_train_samples", 0)
    dense = samples * _random_ltd.resolved.layer_tokens.dense
    checkpoint.set_consumed(args, *checkpoint.consumed(checkpoint_args, dense))
    checkpoint.check_learning_rate(checkpoint_args, args)
    settings = checkpoint.scheduler_settings(checkpoint_args, args)
    if _scheduler is not None and settings is not None:
        _set_scheduler(settings)
    if not getattr(checkpoint_args, "random_ltd", False):
        print_rank_0(
            f"random-LTD: the checkpoint was trained without it; its {samples} samples count as "
            f"{dense} LayerTokens, and the schedule continues from its iteration and samples"
        )
        return
    asked = _random_ltd.config
    config = checkpoint.continued_config(asked, checkpoint_args, args)
    for name in FIELDS:
        setattr(args, FLAG_PREFIX + name, getattr(config, name))
    resolved = resolve(config, model_from_args(args))
    _use(RandomLTD(config, resolved), args)
    rewound = getattr(args, "override_ckpt_iteration", None)
    if rewound is not None:
        end = budget.after_iterations(args, resolved, rewound)
        checkpoint.set_consumed(args, end.layer_tokens, end.samples * resolved.layer_tokens.dense)


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
    begin_step = functools.partial(
        _random_ltd.begin_step, args.curr_iteration, args.consumed_train_samples
    )
    bound = _signature(original).bind(*call, **kwargs)
    if _random_ltd.config.grow_micro_batch > 1:
        bound.arguments["forward_backward_func"] = join_micro_batches(
            bound.arguments["forward_backward_func"], _random_ltd, is_packed=packs(args)
        )
    # Not in the first step: the optimizer's state, which counts, does not exist yet.
    if _preflight_due and args.curr_iteration > args.iteration:
        _preflight_due = False
        add_preflight(bound.arguments, _random_ltd, begin_step)
    begin_step()
    try:
        joined = _random_ltd.micro_batches_per_pass(get_num_microbatches())
        result = original(*bound.args, **bound.kwargs)
    finally:
        _random_ltd.end_step()
    losses, should_exit = result[0], result[3]
    if not should_exit:  # else Megatron does not count the step either
        kept = _random_ltd.kept_tokens
        samples = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
        counted = _random_ltd.resolved.layer_tokens
        tokens, dense = checkpoint.consumed(args)
        tokens += samples * counted.per_sample(kept)
        checkpoint.set_consumed(args, tokens, dense + samples * counted.dense)
        metrics.add_value(losses, metrics.KEPT_TOKENS, kept)
        if _random_ltd.config.grow_micro_batch > 1:
            metrics.add_value(losses, metrics.MICRO_BATCHES, joined)
        _flops.begin_step()
    return result


def training_log(original: Callable, *call: Any, **kwargs: Any) -> Any:
    """Add to what Megatron logs after each step.

    Args:
        original: ``megatron.training.training.training_log``.
    """
    from megatron.training import get_args

    if _random_ltd is not None:
        args = get_args()
        bound = _signature(original).bind(*call, **kwargs).arguments
        tokens, dense = checkpoint.consumed(args)
        share = tokens / dense
        metrics.add_to_log_line(bound["total_loss_dict"], bound["skipped_iter"], tokens, share)
        _flops.is_reset_by_log = not bound.get("is_first_iteration", False)
        metrics.write_scalars(
            bound["loss_dict"], bound["learning_rate"], bound["iteration"], tokens, share
        )
    return original(*call, **kwargs)


_signature = functools.cache(inspect.signature)


def begin_micro_batch(index: int) -> None:
    """Tell the runtime which micro-batch Megatron's schedule runs next."""
    if _random_ltd is not None:
        _random_ltd.begin_micro_batch(index)


def floating_point_operations(
    original: Callable, args: Any, batch_size: int, *rest: Any, **kwargs: Any
) -> float:
    """Count a global batch of the step that was run last; for the log line, of those it is about.

    Args:
        original: ``megatron.training.training.num_floating_point_operations``.
    """
    if _random_ltd is None:
        return original(args, batch_size, *rest, **kwargs)
    if _flops.is_for_log:
        return _flops.mean()
    flops = metrics.floating_point_operations(
        original,
        _random_ltd.resolved,
        _random_ltd.kept_tokens,
        args,
        batch_size,
        *rest,
        **kwargs,
    )
    _flops.add(flops)
    return flops
