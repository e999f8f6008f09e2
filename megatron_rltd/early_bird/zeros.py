"""Keep the zeros of a checkpoint at zero while training: masks of single weights, enforced.

The mask is the zeros themselves, so it needs no state of its own: whatever saves and loads the
weights keeps it. A hook of the optimizer inside Megatron's applies it after each of its steps, to
the main parameters. Megatron copies these to the model and to other ranks afterwards
(MixedPrecisionOptimizer.step_with_ready_grads in megatron/core/optimizer/optimizer.py). A step
that is skipped changes no weight and calls no hook.

This saves no time, no memory and no FLOPs: the products of zeros are computed like all others.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.config import ConfigError
from megatron_rltd.early_bird.masks import STRUCTURED
from megatron_rltd.early_bird.model import layers_of
from megatron_rltd.early_bird.refusals import find_refused
from megatron_rltd.early_bird.target import TICKET
from megatron_rltd.refusals import Refusal

FLAG = "--early-bird-keep-zeros"
NAME = "early_bird_keep_zeros"

_REFUSED = (
    Refusal(
        "--use-precision-aware-optimizer",
        lambda a: getattr(a, "use_precision_aware_optimizer", None),
        "keeps the main parameters where the zeros cannot be set",
        "omit it",
    ),
    Refusal(
        "--optimizer-cpu-offload",
        lambda a: getattr(a, "optimizer_cpu_offload", None),
        "steps copies of the main parameters",
        "omit it",
    ),
    Refusal(
        "--optimizer-cuda-graph",
        lambda a: getattr(a, "optimizer_cuda_graph", None),
        "replays the optimizer's step without the hook that sets the zeros",
        "omit it",
    ),
)


def check_arguments(args: Any) -> None:
    """Check Megatron's validated arguments of a run that is to keep zeros.

    Raises:
        ConfigError: It names every feature with which the zeros would be lost.
    """
    problems = find_refused(args)
    problems += [refusal.message for refusal in _REFUSED if refusal.used(args)]
    if not args.load:
        problems.append("keeps the zeros of the checkpoint that it loads: give --load")
    if problems:
        raise ConfigError([f"{FLAG}: {problem}" for problem in problems])


def require_choice(checkpoint_args: Any, args: Any) -> None:
    """Refuse to train a checkpoint that is sparse on purpose unless the flag says what is wanted.

    Without any flag of ours, Megatron is not touched, and trains all weights.

    Args:
        checkpoint_args: Those of the run or the draw that wrote it.
        args: Megatron's.

    Raises:
        ConfigError: The zeros would be lost in the first step, and nobody said so.
    """
    if getattr(args, NAME, None) is not None or getattr(args, "skip_train", False):
        return
    ticket = getattr(checkpoint_args, TICKET, None) or {}
    is_sparse = ticket.get("pattern", STRUCTURED) != STRUCTURED
    if is_sparse or getattr(checkpoint_args, NAME, None):
        raise ConfigError(
            [
                f"the checkpoint has weights that were pruned to zero: add {FLAG} to keep them "
                f"there, or --no{FLAG[1:]} to train all weights again"
            ]
        )


def keep(model: Any, optimizer: Any) -> float:
    """Keep the weights of all layers' matrices that are zero now at zero from here on.

    Takes a byte for each of the main parameters that this rank steps.

    Args:
        model: The list of model chunks of this rank, loaded.
        optimizer: Megatron's, loaded.

    Returns:
        The share of these weights that is zero, over all ranks.

    Raises:
        ConfigError: None is.
    """
    weights = [w for layer in layers_of(model).values() for w in layer.values()]
    counts = torch.zeros(2, dtype=torch.int64, device=next(model[0].parameters()).device)
    found = []
    for inner, parameters in _main_parameters(optimizer, weights):
        masks = [(main, main == 0) for main in parameters]
        for _, zeros in masks:
            counts += torch.stack([zeros.sum(), torch.tensor(zeros.numel(), device=zeros.device)])
        found.append((inner, [(main, zeros) for main, zeros in masks if zeros.any()]))
    # Replicas are counted as often as the weights that they replicate.
    torch.distributed.all_reduce(counts)
    zero, size = counts.tolist()
    if not zero:
        raise ConfigError(
            [
                f"{FLAG}: no weight of the loaded layers is zero, so that there is nothing to "
                "keep: load a ticket that draw_ticket.py --pattern drew, or omit the flag"
            ]
        )
    for inner, masks in found:
        inner.register_step_post_hook(functools.partial(_set_to_zero, masks))
    return zero / size


@torch.no_grad()
def _set_to_zero(masks: Sequence[tuple[Tensor, Tensor]], *_: Any) -> None:
    for main, zeros in masks:
        main.masked_fill_(zeros, 0)


def _main_parameters(
    optimizer: Any, weights: Sequence[Tensor]
) -> Iterator[tuple[torch.optim.Optimizer, list[Tensor]]]:
    """Yield each optimizer inside Megatron's, with what it steps of the weights on this rank."""
    for own in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        if own.optimizer is None:  # it has no parameters on this rank
            continue
        groups = own.optimizer.param_groups
        # The distributed optimizer's shards; of many weights a rank has none.
        shards = getattr(own, "model_param_group_index_map", None)
        if shards is not None:
            places = [shards[weight] for weight in weights if weight in shards]
            yield own.optimizer, [groups[group]["params"][i] for group, i in places]
            continue
        stepped = {id(p) for group in groups for p in group["params"]}
        mains = [getattr(weight, "main_param", weight) for weight in weights]
        yield own.optimizer, [main for main in mains if id(main) in stepped]
