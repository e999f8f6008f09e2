"""What a run with dropped tokens reports: kept tokens, LayerTokens and FLOPs."""

import collections
import copy
from collections.abc import Callable
from typing import Any

import torch

from megatron_rltd.resolved_config import ResolvedConfig
from megatron_rltd.training import tags

_ADVANCED, _SKIPPED = "advanced iterations", "skipped iterations"  # in Megatron's sums


def add_value(losses: dict[str, torch.Tensor], name: str, value: float) -> None:
    """Add a value to the losses of a training step.

    Megatron prints and logs whatever is in this dict, as the mean since its last log line
    (``megatron/training/training.py:training_log``). It is empty on all but the last pipeline
    stage.
    """
    if losses:
        device = next(iter(losses.values())).device
        losses[name] = torch.full((1,), float(value), device=device)


def add_to_log_line(
    total_losses: dict[str, Any], skipped: int, layer_tokens: int, share: float
) -> None:
    """Make Megatron print these values as they are, next to its means, in its next log line.

    Args:
        total_losses: Megatron's sums since the last line. Megatron will divide them by the number
            of steps that were not skipped.
        skipped: Whether the step that Megatron is about to add was skipped.
        layer_tokens: LayerTokens consumed by the run.
        share: The same as a share of what a dense run would have consumed.
    """
    values = {tags.LAYER_TOKENS: layer_tokens, tags.SHARE_OF_DENSE: share}
    add_exactly(total_losses, skipped, values)


def add_exactly(total_losses: dict[str, Any], skipped: int, values: dict[str, float]) -> None:
    """Do the same for any values, by name."""
    steps = max(1, total_losses.get(_ADVANCED, 0) + (not skipped))
    for name, value in values.items():
        total_losses[name] = torch.tensor([float(value * steps)], dtype=torch.float64)


def write_scalars(
    losses: dict[str, torch.Tensor],
    learning_rate: float | None,
    iteration: int,
    layer_tokens: int,
    share: float,
) -> None:
    """Write to TensorBoard and W&B if Megatron has writers open, with tags in its style.

    LayerTokens are a third axis next to Megatron's steps and samples. W&B has only one axis, so it
    gets them as a value, as Megatron does with samples.
    """
    from megatron.training import get_args, get_tensorboard_writer
    from megatron.training.global_vars import get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if not writer or iteration % get_args().tensorboard_log_interval:
        return
    for name, value in ((tags.LAYER_TOKENS, layer_tokens), (tags.SHARE_OF_DENSE, share)):
        writer.add_scalar(name, value, iteration)
        if wandb:
            wandb.log({name: value}, iteration)
    if learning_rate is not None:
        writer.add_scalar("learning-rate" + tags.VS_LAYER_TOKENS, learning_rate, layer_tokens)
    for name, loss in losses.items():
        writer.add_scalar(name + tags.VS_LAYER_TOKENS, loss, layer_tokens)


def steps_since_log(total_losses: dict[str, Any]) -> int:
    """Return how many steps a log line covers, with the one that Megatron is about to add.

    Args:
        total_losses: Megatron's sums since the last line.
    """
    return total_losses.get(_ADVANCED, 0) + total_losses.get(_SKIPPED, 0) + 1


def floating_point_operations(
    original: Callable,
    resolved: ResolvedConfig,
    kept: int,
    args: Any,
    batch_size: int,
    seqlen_squared_sum_in_batch: float | None = None,
    total_real_tokens_in_batch: float | None = None,
) -> float:
    """Return the floating-point operations of a global batch if layers drop tokens.

    It is Megatron's own count, less each dropped layer at full length, plus the same layer on
    `kept` tokens. Megatron's count for one layer, or for a
    group of a HybridModel, is the difference between two of them and one. If nothing is
    dropped, the result is exactly Megatron's count. In a HybridModel, Megatron counts nothing for
    the symbols + and D.

    Args:
        original: ``megatron.training.training.num_floating_point_operations``.
        args: Megatron's arguments.
        batch_size: Samples.
        seqlen_squared_sum_in_batch, total_real_tokens_in_batch: What Megatron gives for packed
            sequences: sums over documents. A share k / s of each document is assumed to be kept.
    """
    packed = [seqlen_squared_sum_in_batch, total_real_tokens_in_batch]
    if packed == [None, None]:
        packed = []  # Megatron before 0.18 knows no such arguments

    def layer(tokens: int, kind: Any) -> float:
        share = tokens / args.seq_length
        sums = [n and n * scale for n, scale in zip(packed, (share**2, share), strict=False)]
        return _layer_operations(original, args, batch_size, tokens, kind, sums)

    total = original(args, batch_size, *packed)
    if kept == args.seq_length:
        return total
    for kind, layers in _dropped_by_kind(resolved, args).items():
        total -= layers * (layer(args.seq_length, kind) - layer(kept, kind))
    return total


def _dropped_by_kind(resolved: ResolvedConfig, args: Any) -> dict[Any, int]:
    """Return the number of dropped layers of each kind.

    None in a dense GPTModel, 0 for a dense and 1 for an MoE layer in a model with experts, the
    symbols of the group in a HybridModel.
    """
    dropped = resolved.dropped_layers
    if resolved.model.groups:
        return collections.Counter(resolved.model.groups[number - 1] for number in dropped)
    if args.num_experts is None:
        return {None: len(dropped)}
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [int(i % frequency == 0) for i in range(args.num_layers)]
    return collections.Counter(frequency[number - 1] for number in dropped)


def _layer_operations(
    original: Callable,
    args: Any,
    batch_size: int,
    seq_length: int,
    kind: Any,
    sums: list[float | None],
) -> float:
    def count(layers: int) -> float:
        changed = copy.copy(args)
        changed.num_layers = layers
        changed.seq_length = seq_length
        changed.mtp_num_layers = None
        if isinstance(kind, str):
            changed.hybrid_layer_pattern = kind * layers
        elif kind is not None:
            changed.moe_layer_freq = [kind] * layers
        return original(changed, batch_size, *sums)

    return count(2) - count(1)
