"""Reach a run's peak memory at its start: ``--random-ltd-preflight``.

Memory grows with the kept length, so a run could fail after days because memory runs out. The
preflight runs the forward and backward passes of a step at the largest kept lengths and forgets
them: it makes no update, uses up no sample and changes no statistics.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.model.routers import auxiliary_losses
from megatron_rltd.resolved_config import ResolvedConfig


class Preflight:
    """A preflight that is due."""

    def add(self, arguments: dict[str, Any], random_ltd: RandomLTD) -> None:
        """Make a training step run the preflight before its own passes.

        Args:
            arguments: Those of ``megatron.training.training.train_step``; they are changed.
            random_ltd: The runtime that begins the step.
        """
        forward_backward_func = arguments["forward_backward_func"]
        optimizer, config = arguments["optimizer"], arguments["config"]
        is_due = True

        def with_preflight(**passes: Any) -> Any:
            nonlocal is_due
            if is_due and random_ltd.step is not None:
                is_due, step = False, random_ltd.step
                with _forgotten(passes["model"], optimizer, config):
                    lengths = _run(forward_backward_func, passes, random_ltd)
                random_ltd.begin_step(step.iteration, step.consumed_samples)
                _report(lengths)
            return forward_backward_func(**passes)

        arguments["forward_backward_func"] = with_preflight


def largest_steps(resolved: ResolvedConfig, num_micro_batches: int) -> list[tuple[int, int]]:
    """Return (kept tokens, position of the schedule) of the steps that may take the most memory.

    These are the two longest steps: a dropped layer has its own buffers besides its k rows, so the
    longest step of the ramp may take more than a dense one. And the longest step with each number
    of micro-batches in a pass: the layers that do not drop, above all the output layer, grow with
    that number.
    """
    levels = [(kept, start) for start, kept in resolved.schedule.levels()]
    last = {resolved.micro_batches_per_pass(k, num_micro_batches): (k, t) for k, t in levels}
    return sorted({*levels[-2:], *last.values()})


def _run(forward_backward_func: Callable, passes: dict, random_ltd: RandomLTD) -> list[int]:
    """Run the passes at the largest kept lengths; return these."""
    longest = largest_steps(random_ltd.resolved, passes["num_microbatches"])
    for _, position in longest:
        random_ltd.begin_step(position, position)
        with _replayed(passes["data_iterator"]):
            forward_backward_func(**passes)
        _zero_gradients(passes["model"])
    return [kept for kept, _ in longest]


def _report(lengths: list[int]) -> None:
    from megatron.training import print_rank_0

    peak = torch.cuda.max_memory_allocated() / 2**30
    *others, last = map(str, lengths)
    listed = f"{', '.join(others)} and {last}" if others else last
    print_rank_0(
        f"random-LTD: preflight with {listed} kept tokens passed"
        + (f"; peak memory on rank 0: {peak:.1f} GiB" if torch.cuda.is_available() else "")
    )


def _zero_gradients(model: list[Any]) -> None:
    for chunk in model:
        chunk.zero_grad_buffer()


@contextlib.contextmanager
def _forgotten(model: list[Any], optimizer: Any, config: Any) -> Iterator[None]:
    """Undo everything that forward and backward passes leave behind, except memory."""
    from megatron.core import tensor_parallel
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    # As Megatron does around its evaluation: results outside of a step must not be rerun.
    rerun = get_rerun_state_machine()
    mode, finalize = rerun.get_mode(), config.finalize_model_grads_func
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    # Statistics of the routers, such as the counts that their biases follow.
    buffers = [(b, b.clone()) for chunk in model for _, b in chunk.named_buffers()]
    # Sums since the last log line.
    logged = [auxiliary_losses, lambda: _tensors(MTPLossLoggingHelper.tracker)]
    before = [{name: v.clone() for name, v in sums().items()} for sums in logged]

    def finish_reduction(model: list[Any], *args: Any, **kwargs: Any) -> None:
        # Megatron's own would also update the routers' biases.
        for chunk in model:
            chunk.finish_grad_sync()

    rerun.set_mode(RerunMode.DISABLED)
    config.finalize_model_grads_func = finish_reduction
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize
        rerun.set_mode(mode)
        optimizer.zero_grad()
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        tracker.set_states(states[2])
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for sums, old in zip(logged, before, strict=True):
            for name, values in sums().items():
                values.copy_(old[name]) if name in old else values.zero_()


def _tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@contextlib.contextmanager
def _replayed(data_iterator: Any) -> Iterator[None]:
    """Make data iterators give again, after the with-statement, what they gave inside it.

    Megatron's iterators read from ``RerunDataIterator.iterable``, which is replaced here.
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
