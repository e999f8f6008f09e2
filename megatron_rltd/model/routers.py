"""Mixture-of-experts routers in passes of several micro-batches.

A router balances the load of its experts over a micro-batch (or a sample, or all micro-batches so
far). That loss is not a sum over tokens. So in a pass of several micro-batches, each micro-batch
gets its own auxiliary loss, with the weight that it has in a pass of its own.

Shapes: s tokens of a sample on this rank, b micro batch, n micro-batches of a pass, e experts.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Of ``megatron/core/transformer/moe/router.py:TopKRouter``.
_LOSSES = ("_apply_aux_loss", "_apply_seq_aux_loss", "_apply_global_aux_loss")
_Z_LOSS = "z_loss"


def routers_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the routers of a model's layers."""
    from megatron.core.transformer.moe.router import TopKRouter

    yield from (module for module in model.modules() if isinstance(module, TopKRouter))


def balance_each(router: Any, in_pass: Callable[[], tuple[int, int]]) -> None:
    """Make a router compute its auxiliary losses for each micro-batch of a pass.

    Args:
        in_pass: Returns the number of micro-batches of the current pass, and b.
    """
    for name in _LOSSES:
        setattr(router, name, functools.partial(_apply_each, getattr(router, name), in_pass))


def undo(router: Any) -> None:
    """Give a router its own functions back."""
    for name in _LOSSES:
        del vars(router)[name]


def _apply_each(
    original: Callable,
    in_pass: Callable[[], tuple[int, int]],
    probs: Tensor,
    scores_for_aux_loss: Tensor,
    routing_map: Tensor,
    *sizes: int,
    **kwargs: Any,
) -> Tensor:
    """Attach the auxiliary loss of each micro-batch to probs.

    Args:
        probs: [s * n * b, e]; the loss is attached to it.
        scores_for_aux_loss, routing_map: The same shape.
        sizes: s and n * b, for the loss of each sample.
    """
    count, batch = in_pass()
    if count == 1:
        return original(probs, scores_for_aux_loss, routing_map, *sizes, **kwargs)
    if sizes:
        sizes = (sizes[0], sizes[1] // count)

    def part(values: Tensor, index: int) -> Tensor:
        return values.view(-1, count, batch, values.size(-1))[:, index].flatten(0, 1)

    for index in range(count):
        scores = part(scores_for_aux_loss, index)
        if scores.requires_grad:
            # Megatron gives the loss of a pass the weight of all its micro-batches.
            scores.register_hook(lambda grad: grad / count)
        probs = original(probs, scores, part(routing_map, index), *sizes, **kwargs)
    return probs


@contextlib.contextmanager
def logging_each(count: int) -> Iterator[None]:
    """Log the routers' z-loss as if each pass were `count` micro-batches, not one.

    The loss is a mean over tokens, and its gradient is already right. But Megatron divides the sum
    of the logged values by the number of micro-batches of the run.
    """
    before = {name: values.clone() for name, values in auxiliary_losses().items()}
    yield
    values = auxiliary_losses().get(_Z_LOSS)
    if values is not None:
        start = before.get(_Z_LOSS, torch.zeros_like(values))
        values.add_((values - start) * (count - 1))


def auxiliary_losses() -> dict[str, Tensor]:
    """Return the sums of the routers' auxiliary losses since Megatron's last log line."""
    from megatron.core.transformer.moe import moe_utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in 0.19, but what every version has
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    return {name: entry["values"] for name, entry in tracker.items()}
