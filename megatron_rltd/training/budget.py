"""How long a run is: LayerToken budgets in Megatron's iterations and samples.

``--train-layer-tokens N`` ends a run when it has consumed N LayerTokens per layer. The schedule
says how many iterations and samples that takes. They are put into Megatron's own arguments before
Megatron sizes data sets by them. Megatron derives settings of the learning rate from the samples of
a run; here they follow from how far its schedule will have advanced.
"""

import inspect
from fractions import Fraction
from typing import Any

from megatron_rltd.config import ConfigError, to_flag
from megatron_rltd.patching import versions
from megatron_rltd.resolved_config import ResolvedConfig
from megatron_rltd.schedule import BatchSize, Progress

_UNITS = {
    unit: [f"lr_decay_{unit}", f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}", f"train_{unit}"]
    for unit in ("iters", "samples")
}


def set_length(args: Any, resolved: ResolvedConfig) -> None:
    """Set the iterations or samples that ``--train-layer-tokens`` takes.

    It sets iterations if the learning rate or the length is given in iterations, otherwise samples.

    Args:
        args: Megatron's validated arguments.

    Raises:
        ConfigError: The budget contradicts another argument, or the learning rate does not fit in.
    """
    if not follows_layer_tokens(args):
        return
    problems = _set_budget(args, resolved) if args.train_layer_tokens is not None else []
    if not problems and args.layer_token_lr and (args.train_iters or args.train_samples):
        problems = _learning_rate_problems(args, resolved)
    if problems:
        raise ConfigError(problems)


def follows_layer_tokens(args: Any) -> bool:
    """Return whether the length of the run or its learning rate is given in LayerTokens."""
    return args.layer_token_lr or args.train_layer_tokens is not None


def check_units(args: Any) -> None:
    """Check the units of a run's length and of its learning rate, before Megatron does.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ConfigError: The units do not fit together.
    """
    problems = _unit_problems(args) if follows_layer_tokens(args) else []
    if problems:
        raise ConfigError(problems)


def _unit_problems(args: Any) -> list[str]:
    problems = []
    budget = args.train_layer_tokens
    iterations, samples = (
        [n for n in names if getattr(args, n, None)] for names in _UNITS.values()
    )
    if budget is not None and budget <= 0:
        problems.append(f"--train-layer-tokens {budget} must be positive")
    if iterations and samples:
        both = f"{to_flag(iterations[0])} counts iterations and {to_flag(samples[0])} samples: "
        length = next((n for n in (iterations[-1], samples[-1]) if n.startswith("train")), None)
        if budget is not None and length:
            both += (
                f"omit {to_flag(length)}, because --train-layer-tokens sets the length of the run"
            )
        else:
            both += "give all of them in one unit"
        problems.append(both)
    ramp_up_is_ignored = versions.release() >= (0, 18)
    grows = args.step_batch_size_schedule if ramp_up_is_ignored else args.rampup_batch_size
    if iterations and grows:
        problems.append(
            f"{to_flag(iterations[0])} counts iterations, but the batch grows: give lengths in "
            "samples (--train-samples, --lr-warmup-samples, ...)"
        )
    if ramp_up_is_ignored and getattr(args, "rampup_batch_size", None):
        problems.append(
            "this Megatron ignores --rampup-batch-size: use --step-batch-size-schedule, which "
            "replaces --global-batch-size"
        )
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        if args.lr_warmup_fraction is not None and getattr(args, name):
            problems.append(f"give one of --lr-warmup-fraction and {to_flag(name)}, not both")
    if budget is not None and getattr(args, "iterations_to_skip", None):
        problems.append(
            "--iterations-to-skip makes a run shorter than --train-layer-tokens: use --train-iters "
            "or --train-samples for the length of the run"
        )
    return problems


def _set_budget(args: Any, resolved: ResolvedConfig) -> list[str]:
    end = end_of_budget(args, resolved, Progress())
    for name, needed in (("train_iters", end.iteration), ("train_samples", end.samples)):
        given = getattr(args, name)
        if given and given != needed:
            return [
                f"--train-layer-tokens {args.train_layer_tokens} takes {to_flag(name)} {needed} "
                f"from the start of a run, not {given}: omit {to_flag(name)}"
            ]
    if any(getattr(args, name, None) for name in _UNITS["iters"]):
        args.train_iters = end.iteration
    else:
        args.train_samples = end.samples
    return []


def _learning_rate_problems(args: Any, resolved: ResolvedConfig) -> list[str]:
    """Return problems of the learning rate's lengths that Megatron asserts on, or overlooks."""
    unit = "samples" if args.train_samples else "iters"
    size = 1 if args.train_samples else args.global_batch_size
    given = getattr(args, f"lr_decay_{unit}")
    decay = _remaining(args, resolved, Progress()) if given is None else given * size
    problems = []
    for name in (f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}"):
        length = (getattr(args, name, None) or 0) * size
        if length > decay or (length == decay and "warmup" in name and length):
            problems.append(
                f"{to_flag(name)} {length // size} is {length} samples, but the learning rate "
                f"decays over {float(decay):.10g} samples: give less. Under --layer-token-lr a "
                "sample stands for its LayerTokens, and the decay defaults to those of the run"
            )
    return problems


def end_of_budget(args: Any, resolved: ResolvedConfig, start: Progress) -> Progress:
    """Return where a run that starts at `start` has consumed ``--train-layer-tokens``."""
    tokens = args.train_layer_tokens * resolved.model.num_layers
    return resolved.layer_tokens.until(
        lambda progress: progress.layer_tokens >= tokens, batch_size(args), start
    )


def after_iterations(
    args: Any,
    resolved: ResolvedConfig,
    iterations: int,
    start: Progress = Progress(),  # noqa: B008
) -> Progress:
    """Return where a run that is at `start` stands after its `iterations`-th iteration."""
    return resolved.layer_tokens.until(
        lambda progress: progress.iteration >= iterations, batch_size(args), start
    )


def _remaining(args: Any, resolved: ResolvedConfig, start: Progress) -> Fraction:
    """Return how far the learning rate's schedule advances until the end of the run.

    The unit is samples. Under ``--layer-token-lr`` it is LayerTokens, in units of a sample that
    drops nothing.
    """
    counted = resolved.layer_tokens
    if args.train_layer_tokens is not None:
        if args.layer_token_lr:
            # Without the few extra tokens of the last step: they depend on the batch size.
            tokens = args.train_layer_tokens * resolved.model.num_layers - start.layer_tokens
            return Fraction(max(0, tokens), counted.dense)
        return Fraction(end_of_budget(args, resolved, start).samples - start.samples)
    if args.train_samples and not start.iteration:
        # Megatron's learning rate runs over all samples, including an incomplete last batch.
        end = counted.until(lambda p: p.samples >= args.train_samples, batch_size(args))
        return Fraction(end.layer_tokens * args.train_samples, end.samples * counted.dense)
    end = after_iterations(args, resolved, args.train_iters, start)
    return Fraction(end.layer_tokens - start.layer_tokens, counted.dense)


def scheduler_settings(
    args: Any,
    resolved: ResolvedConfig,
    is_decay_given: bool,
    start: Progress = Progress(),  # noqa: B008
    advanced: Fraction = Fraction(0),
) -> dict[str, int | float]:
    """Return the settings of Megatron's scheduler that follow from the length of the run.

    They depend on the batch size.

    Args:
        is_decay_given: Whether a flag says how long the learning rate decays.
        start: Where the run stands.
        advanced: How far the schedule has advanced by then, in samples.
    """
    length = advanced + _remaining(args, resolved, start)
    whole = int(length) if length.denominator == 1 else float(length)
    settings: dict[str, int | float] = {"wd_incr_steps": whole}
    if not is_decay_given:
        settings["lr_decay_steps"] = whole
        if args.lr_warmup_fraction is not None:
            settings["lr_warmup_steps"] = args.lr_warmup_fraction * whole
    return settings


def batch_size(args: Any) -> BatchSize:
    """Return the global batch size that Megatron will use, by the samples consumed.

    It comes from Megatron's own calculator, which also handles ``--step-batch-size-schedule``
    (until 0.17 ``--rampup-batch-size``) and ``--decrease-batch-size-if-needed``.
    """
    from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator

    # Its parameters differ between releases; all but the rank, which is for logging, are arguments.
    names = inspect.signature(_build_num_microbatches_calculator).parameters
    calculator = _build_num_microbatches_calculator(
        **{name: -1 if name == "rank" else getattr(args, name) for name in names}
    )

    def of(consumed_samples: int) -> int:
        calculator.update(consumed_samples, consistency_check=False)
        size = calculator.get_current_running_global_batch_size()
        if size <= 0:
            raise ConfigError(
                [
                    f"the global batch of a step is smaller than --micro-batch-size "
                    f"{args.micro_batch_size} on each of {args.data_parallel_size} data-parallel "
                    "ranks: use a larger batch or a smaller --micro-batch-size"
                ]
            )
        return size

    return of
