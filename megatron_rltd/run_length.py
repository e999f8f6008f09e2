"""How long a run is: LayerToken budgets in Megatron's iterations and samples.

``--train-layer-tokens N`` ends a run when N LayerTokens per layer are consumed. What that takes in
iterations and samples follows from the schedule and is put into Megatron's own arguments before it
sizes data sets and learning rates by them.
"""

import inspect
from fractions import Fraction
from typing import Any

from megatron_rltd.config import ConfigError, Resolved
from megatron_rltd.schedule import BatchSize, Progress

_IN_ITERATIONS = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
_IN_SAMPLES = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")


def set_length(args: Any, resolved: Resolved) -> tuple[str, ...]:
    """Set the iterations or samples of a run and, under ``--layer-token-lr``, its decay.

    Iterations if the learning rate or the length is given in them, else samples.

    Args:
        args: Megatron's validated arguments.

    Returns:
        The settings of Megatron's scheduler that follow from the run's LayerTokens. With another
        batch size they would be others, so a run that goes on takes its checkpoint's.

    Raises:
        ConfigError: The budget contradicts another argument, or the schedule of the learning rate
            does not fit in.
    """
    problems: list[str] = []
    follow: list[str] = []
    if args.train_layer_tokens is not None:
        problems += _set_budget(args, resolved)
    if args.layer_token_lr and not problems and (args.train_iters or args.train_samples):
        if args.lr_decay_iters is None and args.lr_decay_samples is None:
            follow.append("lr_decay_steps")
        if args.weight_decay_incr_style != "constant":
            follow.append("wd_incr_steps")
        problems += _set_decay(args, resolved)
    if problems:
        raise ConfigError(problems)
    return tuple(follow)


def is_the_same(args: Any, checkpoint_args: Any) -> bool:
    """Return whether a checkpoint is of a run that was given the same length and learning rate."""
    if args.train_layer_tokens is not None:
        given = ["train_layer_tokens"]
    else:
        given = ["train_iters" if args.train_samples is None else "train_samples"]
    given.append("layer_token_lr")
    return all(getattr(args, name) == getattr(checkpoint_args, name, None) for name in given)


def _set_budget(args: Any, resolved: Resolved) -> list[str]:
    budget = f"--train-layer-tokens {args.train_layer_tokens}"
    if args.train_layer_tokens <= 0:
        return [f"{budget} must be positive"]
    iterations, samples = ([n for n in names if getattr(args, n, None)] for names in _UNITS)
    if args.train_iters:
        iterations.append("train_iters")
    if args.train_samples:
        samples.append("train_samples")
    if iterations and samples:
        flags = ["--" + name.replace("_", "-") for name in (iterations[0], samples[0])]
        return [f"{flags[0]} counts iterations and {flags[1]} samples: give all in one unit"]
    end = end_of_budget(args, resolved, Progress())
    for name, needed in (("train_iters", end.iteration), ("train_samples", end.samples)):
        given = getattr(args, name)
        if given and given != needed:
            what = f"--{name.replace('_', '-')}"
            return [f"{budget} takes {what} {needed}, not {given}: leave {what} away"]
    if iterations:
        args.train_iters = end.iteration
    else:
        args.train_samples = end.samples
    return []


_UNITS = (_IN_ITERATIONS, _IN_SAMPLES)


def end_of_budget(args: Any, resolved: Resolved, start: Progress) -> Progress:
    """Return where a run that is at `start` stands when ``--train-layer-tokens`` are consumed."""
    tokens = args.train_layer_tokens * resolved.model.num_layers
    return resolved.layer_tokens.until(
        lambda progress: progress.layer_tokens >= tokens, batch_size(args), start
    )


def end_of_run(args: Any, resolved: Resolved) -> Progress:
    """Return where a run ends that has its length in Megatron's arguments."""

    if not args.train_samples:
        return after_iterations(args, resolved, args.train_iters)
    return resolved.layer_tokens.until(
        lambda progress: progress.samples >= args.train_samples, batch_size(args)
    )


def after_iterations(args: Any, resolved: Resolved, iterations: int) -> Progress:
    """Return where a run stands after that many iterations from its start."""
    return resolved.layer_tokens.until(
        lambda progress: progress.iteration >= iterations, batch_size(args)
    )


def share_of_dense(args: Any, resolved: Resolved) -> Fraction:
    """Return the LayerTokens of a run in those of a dense one on the same samples."""
    end = end_of_run(args, resolved)
    tokens = end.layer_tokens
    if args.train_layer_tokens is not None:
        # Not the few more of the last step: those would differ with the batch size.
        tokens = args.train_layer_tokens * resolved.model.num_layers
    return Fraction(tokens, end.samples * resolved.layer_tokens.dense)


def _set_decay(args: Any, resolved: Resolved) -> list[str]:
    """Let the learning rate decay over the LayerTokens of the run unless the user says otherwise.

    Megatron takes the samples of the run, of which the schedule would only get a share.
    """
    unit = "samples" if args.train_samples else "iters"
    decay, warmup = f"lr_decay_{unit}", f"lr_warmup_{unit}"
    if getattr(args, decay) is None:
        total = getattr(args, f"train_{unit}")
        setattr(args, decay, int(total * share_of_dense(args, resolved)))
    if getattr(args, decay) <= getattr(args, warmup):
        return [
            f"--lr-{warmup[3:].replace('_', '-')} {getattr(args, warmup)} must be less than "
            f"--lr-{decay[3:].replace('_', '-')} {getattr(args, decay)}, which under "
            "--layer-token-lr counts dense samples and defaults to the LayerTokens of the run"
        ]
    return []


def batch_size(args: Any) -> BatchSize:
    """Return the global batch size that Megatron will use, by the samples consumed.

    Of its own calculator, which also knows ``--step-batch-size-schedule`` (until 0.17
    ``--rampup-batch-size``) and ``--decrease-batch-size-if-needed``.
    """
    from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator

    # Its parameters differ between releases; all but the rank, which is for logging, are arguments.
    names = [n for n in inspect.signature(_build_num_microbatches_calculator).parameters]
    calculator = _build_num_microbatches_calculator(
        **{name: -1 if name == "rank" else getattr(args, name) for name in names}
    )

    def of(consumed_samples: int) -> int:
        calculator.update(consumed_samples, consistency_check=False)
        return calculator.get_current_running_global_batch_size()

    return of
