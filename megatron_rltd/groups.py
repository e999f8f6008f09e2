"""Groups: the layers of a model that keep the same tokens.

In a GPTModel, a layer holds attention and an MLP, and is a group by itself. In a HybridModel, one
symbol of ``--hybrid-layer-pattern`` is one layer. There a group is an attention or recurrent layer
and the MLP or MoE layers that follow it. So `*-*-` has as many groups as a GPTModel of half as many
layers. Groups are numbered from 1 in the whole model.
"""

from typing import Any

# Symbols of ``megatron/core/models/hybrid/hybrid_layer_allocation.py``.
RECURRENT = {"M": "Mamba-2", "G": "gated delta net"}
SPARSE = {"D": "DeepSeek sparse attention"}
_AFTER_ATTENTION = "-E"


def split_pattern(pattern: str) -> tuple[str, ...]:
    """Return the symbols of each group of a hybrid layer pattern, such as ("*-", "M", "*E").

    Args:
        pattern: With or without "|" between pipeline stages, which may split a group, and with or
            without "/" before the layers of multi-token prediction, which are in no group.
    """
    groups: list[str] = []
    for symbol in pattern.partition("/")[0].replace("|", ""):
        if symbol in _AFTER_ATTENTION and groups:
            groups[-1] += symbol
        else:
            groups.append(symbol)
    return tuple(groups)


def count_groups(args: Any) -> int:
    """Return the number of groups of a model.

    Args:
        args: Megatron's arguments, or an object with the same attributes.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return len(split_pattern(pattern)) if pattern else args.num_layers


def number_layers(groups: tuple[str, ...], num_groups: int) -> dict[int, int]:
    """Return Megatron's layer number, from 1, to the number of its group.

    Args:
        groups: Of `split_pattern`; none if each layer is a group.
        num_groups: All groups of the model.
    """
    symbols = groups or ("",) * num_groups
    of_layer = [number for number, group in enumerate(symbols, 1) for _ in group or "."]
    return dict(enumerate(of_layer, 1))
