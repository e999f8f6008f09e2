"""Several micro-batches of a step in one pass: ``--random-ltd-grow-micro-batch``.

Layers that keep few tokens give a GPU too little to do: small matrix products, many launches. So
Megatron's pipeline schedule gets fewer and larger micro-batches. The training script does not
notice. For each pass, its forward step is called once for every micro-batch of the run, with a
stand-in for the model that only records its arguments. Then the model runs once on all of them,
laid end to end, and each of the script's own loss functions gets its part of the output. So data,
masks, losses and the weights of the losses are those of the run's micro-batches.

    forward_backward_func = join_micro_batches(get_forward_backward_func(), random_ltd)

Shapes: s sequence length, b micro batch, n micro-batches of a pass.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.config import flag
from megatron_rltd.model import routers
from megatron_rltd.model.random_ltd import RandomLTD

FLAG = flag("grow_micro_batch")


def join_micro_batches(
    forward_backward_func: Callable, random_ltd: RandomLTD, is_packed: bool = False
) -> Callable:
    """Return Megatron's forward-backward function with passes of as many micro-batches as fit.

    Args:
        forward_backward_func: From ``megatron.core.pipeline_parallel.get_forward_backward_func``.
        random_ltd: Attached; its config says how many micro-batches a pass may take.
        is_packed: Whether a micro-batch's samples are laid end to end, as [1, b * s] tokens.

    Raises:
        RuntimeError: During a pass, if the script's forward step does not fit; see the message.
    """

    @functools.wraps(forward_backward_func)
    def forward_backward(**passes: Any) -> Any:
        count = 1
        if not passes.get("forward_only"):
            count = random_ltd.micro_batches_per_pass(passes["num_microbatches"])
        if count == 1:
            return forward_backward_func(**passes)
        # The shapes that pipeline stages send each other.
        sizes = ("seq_length", "decoder_seq_length") if is_packed else ("micro_batch_size",)
        grown = {name: passes[name] * count for name in sizes if passes.get(name) is not None}
        grown["num_microbatches"] = passes["num_microbatches"] // count
        tokens = passes["micro_batch_size"] * passes["seq_length"] if is_packed else None
        grown["forward_step_func"] = _joined(
            passes["forward_step_func"], count, passes["micro_batch_size"], tokens
        )
        with random_ltd.joining(count, passes["micro_batch_size"]), routers.logging_each(count):
            return forward_backward_func(**{**passes, **grown})

    return forward_backward


def _joined(
    forward_step_func: Callable, count: int, micro_batch_size: int, packed_tokens: int | None
) -> Callable:
    """Return a forward step for `count` micro-batches, made from the script's step for one.

    Args:
        packed_tokens: Tokens of a micro-batch, if its samples are laid end to end.
    """
    from megatron.core.utils import get_model_config

    @functools.wraps(forward_step_func)
    def forward_step(data_iterator: Any, model: Any, *rest: Any, **kwargs: Any) -> tuple:
        stand_in = _StandIn(model)
        loss_funcs: list[Callable] = []
        for _ in range(count):
            output, loss_func = forward_step_func(data_iterator, stand_in, *rest, **kwargs)
            if not isinstance(output, _Output) or len(stand_in.calls) != len(loss_funcs) + 1:
                raise RuntimeError(_not_joined("does not return the output of one model call"))
            loss_funcs.append(loss_func)
        args, arguments = _join_calls(stand_in.calls, micro_batch_size, packed_tokens)
        dim = 0 if packed_tokens is None else 1
        is_summed = get_model_config(model).calculate_per_token_loss
        return model(*args, **arguments), functools.partial(_loss, loss_funcs, dim, is_summed)

    return forward_step


def _not_joined(why: str) -> str:
    return (
        f"random-LTD: {FLAG} cannot join micro-batches, because the script's forward step {why}: "
        f"omit {FLAG}"
    )


class _Output:
    """Stands for the output of a model that has not run."""

    def _is_used(self, *args: Any) -> Any:
        raise RuntimeError(_not_joined("uses the model's output before it returns it"))

    __getattr__ = __getitem__ = __iter__ = __call__ = _is_used
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __truediv__ = _is_used


class _StandIn:
    """Stands for a model: it has the model's attributes and records the arguments of its calls."""

    def __init__(self, model: Any):
        self._model = model
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        self.calls.append((args, kwargs))
        return _Output()


def _join_calls(
    calls: Sequence[tuple[tuple, dict[str, Any]]], micro_batch_size: int, packed_tokens: int | None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of one call of the model in place of several.

    Tensors are [b, ...], with the samples in the first dimension, or [1, b * s], end to end.
    """
    if len({(len(args), tuple(kwargs)) for args, kwargs in calls}) > 1:
        raise RuntimeError(_not_joined("does not always call the model in the same way"))

    def join(what: str, values: Sequence[Any]) -> Any:
        if all(map(_is_packed, values)):
            if packed_tokens is None:
                raise RuntimeError(_not_joined("packs sequences without is_packed=True"))
            return _join_packed(values, packed_tokens)
        if all(isinstance(value, Tensor) and value.dim() > 1 for value in values):
            sizes = {value.size(0) for value in values}
            if packed_tokens is not None and sizes == {1}:
                return torch.cat(list(values), dim=1)
            if packed_tokens is None and sizes <= {1, micro_batch_size}:
                return torch.cat([_of_each_sample(v, micro_batch_size) for v in values])
        elif not any(isinstance(value, Tensor) for value in values):
            if all(value == values[0] for value in values):  # None, above all
                return values[0]
        raise RuntimeError(_not_joined(f"passes the model {what}, which cannot be laid end to end"))

    args = [
        join(f"its argument {i + 1}", [call[0][i] for call in calls])
        for i in range(len(calls[0][0]))
    ]
    return args, {name: join(name, [call[1][name] for call in calls]) for name in calls[0][1]}


def _of_each_sample(values: Tensor, micro_batch_size: int) -> Tensor:
    if values.size(0) == 1 and micro_batch_size > 1:  # a mask that all of them share
        return values.expand(micro_batch_size, *values.shape[1:])
    return values


def _is_packed(value: Any) -> bool:
    from megatron.core.packed_seq_params import PackedSeqParams

    return isinstance(value, PackedSeqParams)


def _join_packed(params: Sequence[Any], tokens: int) -> Any:
    """Return the ``PackedSeqParams`` of micro-batches of `tokens` tokens, laid end to end."""
    joined: dict[str, Any] = {}
    made: dict[int, Tensor] = {}  # if two offsets are one tensor, they stay one: see `packed`
    for name in ("q", "kv", "q_padded", "kv_padded"):
        offsets = [getattr(p, f"cu_seqlens_{name}") for p in params]
        if offsets[0] is None:
            continue
        if id(offsets[0]) not in made:
            # Megatron lays samples end to end in the same way: a micro-batch begins where the one
            # before ends (``megatron/core/utils.py:_merge_cu_seqlens_across_micro_batch``).
            later = [own[1:] + i * tokens for i, own in enumerate(offsets[1:], 1)]
            made[id(offsets[0])] = torch.cat([offsets[0], *later])
        joined[f"cu_seqlens_{name}"] = made[id(offsets[0])]
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        longest = [getattr(p, name) for p in params]
        if longest[0] is not None:
            joined[name] = max(longest)
    fields = {field.name for field in dataclasses.fields(params[0])}
    # These are set afterwards: Megatron waits for the GPU to make seq_idx from total_tokens.
    joined |= dict.fromkeys(fields & {"total_tokens", "seq_idx"})
    result = dataclasses.replace(params[0], **joined)
    if getattr(params[0], "seq_idx", None) is not None:
        result.total_tokens = sum(p.total_tokens for p in params)
        before = itertools.accumulate(p.cu_seqlens_q.numel() for p in params)
        later = [p.seq_idx + n for p, n in zip(params[1:], before, strict=False)]
        result.seq_idx = torch.cat([params[0].seq_idx, *later], dim=1)
    return result


def _part(output: Any, index: int, count: int, dim: int) -> Any:
    """Return one micro-batch's part of the model's output for `count` of them."""
    if isinstance(output, Tensor):
        size = output.size(dim) // count
        return output.narrow(dim, index * size, size)
    if isinstance(output, (tuple, list)):
        return type(output)(_part(each, index, count, dim) for each in output)
    return output


def _loss(loss_funcs: Sequence[Callable], dim: int, is_summed: bool, output: Any) -> tuple:
    """Return for all micro-batches of a pass what a loss function returns for one.

    Megatron divides a loss by the tokens of its micro-batch and by the number of micro-batches.
    Under ``--calculate-per-token-loss`` it divides the sum of all losses by all tokens
    (``megatron/core/pipeline_parallel/schedules.py:forward_step_calc_loss``). So the mean over the
    micro-batches of a pass stands for each of them.

    Args:
        is_summed: Whether the losses are divided by all tokens later.
        output: The output of the model.
    """
    count = len(loss_funcs)
    results = [loss(_part(output, i, count, dim)) for i, loss in enumerate(loss_funcs)]
    losses = [result[0] for result in results]
    report = _report([result[-1] for result in results])
    if len(results[0]) == 2:
        return sum(losses) / count, report
    tokens = [result[1] for result in results]
    if is_summed:
        return sum(losses), sum(tokens), report
    means = [loss / torch.clamp(n, min=1) for loss, n in zip(losses, tokens, strict=True)]
    return sum(means) / count, torch.ones_like(tokens[0]), report


def _report(reports: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the reports of micro-batches as one report that Megatron logs in the same way.

    Megatron adds up pairs of a sum and a number of tokens, and takes the mean of single values
    (``megatron/training/training.py:train_step``).
    """
    joined = {}
    for name in reports[0]:
        values = torch.stack([torch.as_tensor(report[name]).reshape(-1) for report in reports])
        joined[name] = values.sum(0) if values.size(1) == 2 else values.mean(0)
    return joined
