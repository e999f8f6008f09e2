"""What a run with dropped tokens reports: kept tokens, LayerTokens and FLOPs."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from megatron_rltd.config import Resolved
from megatron_rltd.schedule import layer_tokens

KEPT_TOKENS = "random-ltd kept tokens"
LAYER_TOKENS = "random-ltd layer tokens"


def sample_layer_tokens(resolved: Resolved, kept: int) -> int:
    """Return the LayerTokens of one sample at kept length `kept`."""
    model = resolved.model
    return layer_tokens(model.seq_length, kept, model.num_layers, len(resolved.dropped_layers))


def add_kept_tokens(losses: dict[str, torch.Tensor], kept: int) -> None:
    """Add the kept length to the losses of a training step.

    Megatron prints and logs whatever is in this dict, as the mean since its last log line
    (``megatron/training/training.py:training_log``). It is empty on all but the last pipeline
    stage.
    """
    if losses:
        device = next(iter(losses.values())).device
        losses[KEPT_TOKENS] = torch.full((1,), float(kept), device=device)


def write_layer_tokens(layer_tokens_so_far: int, iteration: int) -> None:
    """Write the LayerTokens consumed to TensorBoard and W&B where Megatron has writers open."""
    from megatron.training import get_args, get_tensorboard_writer
    from megatron.training.global_vars import get_wandb_writer

    if iteration % get_args().tensorboard_log_interval:
        return
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        writer.add_scalar(LAYER_TOKENS, layer_tokens_so_far, iteration)
    if wandb:
        wandb.log({LAYER_TOKENS: layer_tokens_so_far}, iteration)


def floating_point_operations(
    original: Callable,
    resolved: Resolved,
    kept: int,
    args: Any,
    batch_size: int,
    seqlen_squared_sum_in_batch: float | None = None,
    total_real_tokens_in_batch: float | None = None,
) -> float:
    """Return the floating-point operations of a global batch of which layers drop tokens.

    Megatron's own count, less each dropped layer at full length, plus the same layer on `kept`
    tokens. What Megatron counts for one layer is the difference between two layers and one.

    Args:
        original: ``megatron.training.training.num_floating_point_operations``.
        args: Megatron's arguments.
        batch_size: Samples.
        seqlen_squared_sum_in_batch, total_real_tokens_in_batch: What Megatron gives for packed
            sequences: sums over documents. Of a document's tokens, k / s are taken to be kept.
    """
    packed = [seqlen_squared_sum_in_batch, total_real_tokens_in_batch]
    if packed == [None, None]:
        packed = []  # Megatron before 0.18 knows no such arguments

    def layer(tokens: int, is_moe: int | None) -> float:
        share = tokens / args.seq_length
        sums = [n and n * scale for n, scale in zip(packed, (share**2, share), strict=False)]
        return _layer_operations(original, args, batch_size, tokens, is_moe, sums)

    total = original(args, batch_size, *packed)
    for is_moe, layers in _dropped_by_kind(resolved, args).items():
        total -= layers * (layer(args.seq_length, is_moe) - layer(kept, is_moe))
    return total


def _dropped_by_kind(resolved: Resolved, args: Any) -> dict[int | None, int]:
    """Return the number of dropped layers of each kind: None dense model, else 0 dense, 1 MoE."""
    if args.num_experts is None:
        return {None: len(resolved.dropped_layers)}
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [int(i % frequency == 0) for i in range(args.num_layers)]
    kinds = [frequency[number - 1] for number in resolved.dropped_layers]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def _layer_operations(
    original: Callable,
    args: Any,
    batch_size: int,
    seq_length: int,
    is_moe: int | None,
    sums: list[float | None],
) -> float:
    def count(num_layers: int) -> float:
        changed = copy.copy(args)
        changed.num_layers = num_layers
        changed.seq_length = seq_length
        changed.mtp_num_layers = None
        if is_moe is not None:
            changed.moe_layer_freq = [is_moe] * num_layers
        return original(changed, batch_size, *sums)

    return count(2) - count(1)
