"""How a TransformerBlock takes one micro-batch through its layers.

Where runs of dropped layers end, and which layers are checkpointed one by one around their kept
tokens instead of by the block around the whole hidden states.
"""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.model.layer import KeptTokens, forward


def check_layers(block: Any) -> None:
    """Raise RuntimeError unless every layer of a block is a transformer layer not yet attached."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    if "forward" in vars(block):
        raise RuntimeError("random-LTD: this model is attached already")
    for layer in block.layers:
        if not isinstance(layer, TransformerLayer):
            raise RuntimeError(
                f"random-LTD: layer {layer.layer_number} is a {type(layer).__name__}, not a "
                "TransformerLayer"
            )


def plan_recomputation(
    block: Any, kept: dict[int, KeptTokens], rows: int
) -> tuple[frozenset[int], bool]:
    """Decide where a block's layers are checkpointed under full recomputation.

    Megatron stores the hidden states, s rows, once for each group of layers. Checkpointing every
    layer by itself stores k rows for a dropped one; that is done where it stores less in all.

    Returns:
        Numbers of the layers to checkpoint one by one, and whether Megatron checkpoints groups
        instead. Then the hidden states between layers must be the real ones.
    """
    config = block.config
    if config.recompute_granularity != "full":
        return frozenset(), False
    if config.fp8 or getattr(config, "fp4", None):
        return frozenset(), True
    layers = list(block.layers)
    if config.recompute_method == "block":
        layers, group = layers[: config.recompute_num_layers], 1
    else:
        group = config.recompute_num_layers
    stored = sum(
        kept[n.layer_number].rows.size(1) if n.layer_number in kept else rows for n in layers
    )
    if stored > rows * -(-len(layers) // group):
        return frozenset(), True
    return frozenset(n.layer_number for n in layers), False


def plan_angles(
    rotary: Any, kept: dict[int, KeptTokens], hidden_states: Tensor, recomputed: bool
) -> bool:
    """Decide whether the rotary angles of all dropped layers are gathered at once.

    That is one gather for a micro-batch instead of one for each layer, and each layer's angles
    last as long as any's. Where layers are recomputed they last until then, beside the hidden
    states of the kept tokens; that is done if both together take no more memory than the hidden
    states of all tokens would, so that a step that drops nothing still needs the most. Else each
    layer gathers its own, and gathers them again in recomputation.

    Args:
        rotary: The block's ``rotary_pos_emb``: None, angles or a tuple of them.
        hidden_states: [s, b, h], those of this rank.
        recomputed: Whether any layer is recomputed as a whole.
    """
    given = rotary if isinstance(rotary, (tuple, list)) else (rotary,)
    tables = {id(table): table for table in given if table is not None}.values()
    if not kept or not tables or not recomputed:
        return bool(kept and tables)
    layer = next(iter(kept.values()))  # all keep equally many
    samples, tokens = layer.local.shape
    angles = sum(tokens * max(samples, t.size(1)) * t.size(-1) * t.itemsize for t in tables)
    rows, batch, width = hidden_states.shape
    dropped_rows = rows - layer.rows.size(1)
    return angles <= dropped_rows * batch * width * hidden_states.itemsize


def plan_run_ends(
    block: Any, dropped: set[int], extracted: Iterable[int], grouped: bool
) -> frozenset[int]:
    """Return the dropped layers after which the hidden states must be the real ones.

    Those are the last of each row of neighbours, and any layer whose output something else reads.
    """
    ends = set()
    layers = list(block.layers)  # none, if a pipeline stage is embedding or loss only
    for layer, after in zip_longest(layers, layers[1:]):
        number = layer.layer_number
        if number in dropped and (
            after is None
            or after.layer_number not in dropped
            or grouped
            or number - 1 in extracted
            or _is_watched(layer)
            or _is_watched(after)
        ):
            ends.add(number)
    return frozenset(ends)


def _is_watched(layer: torch.nn.Module) -> bool:
    """Return whether something other than Megatron's own hooks sees a layer's input or output."""
    if getattr(layer.forward, "func", None) is not forward:
        return True  # replaced since `attach`, by a profiler say
    hooks = [
        *layer._forward_hooks.values(),
        *layer._forward_pre_hooks.values(),
        *layer._backward_hooks.values(),
        *layer._backward_pre_hooks.values(),
        *torch.nn.modules.module._global_forward_hooks.values(),
        *torch.nn.modules.module._global_forward_pre_hooks.values(),
        *torch.nn.modules.module._global_backward_hooks.values(),
        *torch.nn.modules.module._global_backward_pre_hooks.values(),
    ]
    # Megatron's DDP gathers parameters in hooks that never look at their arguments.
    return any(
        not getattr(h, "__module__", "").startswith("megatron.core.distributed") for h in hooks
    )
