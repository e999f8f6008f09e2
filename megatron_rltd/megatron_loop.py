"""What happens at each seam of Megatron's training loop; `patches` lists the seams.

State lives where Megatron keeps its own: the options and the LayerTokens consumed are plain values
on Megatron's ``args``, which every checkpoint holds. One `RandomLTD` per process, made once the
arguments are valid.
"""

import contextlib
from collections.abc import Callable, Iterator
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
    resolve,
)
from megatron_rltd.random_ltd import RandomLTD
from megatron_rltd.refusals import validate

_LAYER_TOKENS = "random_ltd_layer_tokens"
# Options that do not change what a run computes, and may differ after a restart.
_FREE = {"backend", "preflight"}

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
            raise ConfigError([f"{flag(changed[0])} does nothing without --random-ltd: add it"])
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
    """Attach the runtime to the model chunks that Megatron has built."""
    if _random_ltd is not None:
        _random_ltd.attach(model)


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
    differing = [
        name
        for name in FIELDS
        if name not in _FREE
        # Left open on the command line: the checkpoint's value is the one to continue with.
        and not (name in ("strata", "seed") and not getattr(asked, name))
        and getattr(asked, name) != getattr(saved, name)
    ]
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
    # The seed and strata that the checkpoint was trained with, unless the user overrides them.
    options = {name: getattr(chosen, name) for name in FIELDS}
    for name in ("strata", "seed"):
        options[name] = options[name] or getattr(saved, name)
    for name in _FREE:
        options[name] = getattr(asked, name)
    config = RandomLTDConfig(**options)
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
    if _preflight_due and args.curr_iteration > args.iteration:
        _preflight_due = False
        preflight(*call)
    samples = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
    _random_ltd.begin_step(args.curr_iteration, args.consumed_train_samples)
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


def preflight(
    forward_step_func: Callable,
    data_iterator: Any,
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    config: Any,
    forward_backward_func: Callable,
    *rest: Any,
) -> None:
    """Run one forward and backward at full length and forget it: no update, no sample used up.

    Takes what ``train_step`` takes. Called before the second step, when the optimizer's state
    exists, so that the memory it reaches is the memory of the run's longest steps.
    """
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args, print_rank_0

    args = get_args()
    # As Megatron does around its evaluation: results outside of a step are not to be rerun.
    rerun = get_rerun_state_machine()
    mode = rerun.get_mode()
    rerun.set_mode(RerunMode.DISABLED)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    with _replayed(data_iterator):
        forward_backward_func(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=False,
        )
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1])
    tracker.set_states(states[2])
    rerun.set_mode(mode)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print_rank_0(
        f"random-LTD: preflight at full length --seq-length {args.seq_length} passed"
        + (f"; peak memory on rank 0: {peak:.1f} GiB" if torch.cuda.is_available() else "")
    )


@contextlib.contextmanager
def _replayed(data_iterator: Any) -> Iterator[None]:
    """Have data iterators give what they gave inside the with-statement once more after it.

    Megatron's iterators read from ``RerunDataIterator.iterable``, which is replaced meanwhile.
    """
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    iterators = [i for i in iterators if i is not None]
    sources = [i.iterable for i in iterators]
    given: list[list[Any]] = [[] for _ in iterators]

    def record(source: Any, items: list[Any]) -> Iterator[Any]:
        for item in source:
            items.append(item if not isinstance(item, dict) else dict(item))
            yield item

    def replay(iterator: Any, source: Any, items: list[Any]) -> Iterator[Any]:
        yield from items
        iterator.iterable = source
        yield from source

    for iterator, source, items in zip(iterators, sources, given, strict=True):
        iterator.iterable = record(source, items)
    try:
        yield
    finally:
        for iterator, source, items in zip(iterators, sources, given, strict=True):
            iterator.iterable = replay(iterator, source, items)
