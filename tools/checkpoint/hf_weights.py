"""The parameters of Megatron's models and of Hugging Face's: layouts and shapes.

Their names are in `hf_names`.

Shapes: h hidden size, f width of the MLP, g query groups, q query heads of a group, d head size,
v vocabulary. A weight is [outputs, inputs] in Megatron and Llama, [inputs, outputs] in GPT-2.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from hf_names import (
    BATCHED,
    BUFFERS,
    FAMILIES,
    FUSED_QKV,
    GATED,
    HEADS,
    NORM,
    QKV,
    ROWS,
    ROWS_TWICE,
    STACKED_QKV,
    TIED,
    TRANSPOSED,
    UNTIED_BIAS,
    Names,
)
from torch import Tensor


class ConversionError(ValueError):
    """A model or a checkpoint that cannot be converted; the message names flag and way out."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the layout of a model's parameters depends on."""

    layers: int
    heads: int
    groups: int
    vocabulary: int
    """Tokens, without padding."""
    tied: bool
    """Whether the output layer is the embedding."""
    centred_norms: bool = False
    """Whether Megatron holds the norms' weights less one."""
    head: bool = True
    """Whether a ViT has its head."""
    all_heads: int = 0
    """Heads of a GPT-2 that was pruned: heads of zeros are added up to this number."""


def of_model(family: str, shape: Shape) -> Names:
    """Return the parameters outside of the layers."""
    names = dict(FAMILIES[family].of_model)
    if shape.tied:
        names.pop("output_layer.weight", None)
    elif "output_layer.bias" in names:
        names["output_layer.bias"] = UNTIED_BIAS
    if not shape.head:
        names = {name: pair for name, pair in names.items() if not name.startswith("head.")}
    return names


def to_hugging_face(
    family: str, shape: Shape, read: Callable[[str], Tensor], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the Hugging Face model, in order of Megatron's.

    Args:
        read: Returns one of Megatron's tensors by name; that of a layer's parameter holds all
            layers, [layers, ...]. Each is asked for once and let go of when its parts are yielded.
        dtype: Of the parameters; None: as read.
    """
    for name, (kind, theirs) in of_model(family, shape).items():
        yield from zip(theirs, _exported(kind, read(name), shape, dtype), strict=True)
    stored_in = FAMILIES[family]
    for name, (kind, theirs) in stored_in.of_layer.items():
        for i, tensor in enumerate(read(f"{stored_in.layers}.{name}")):
            parts = _exported(kind, tensor, shape, dtype)
            yield from zip((f"{stored_in.theirs}.{i}.{t}" for t in theirs), parts, strict=True)


def to_megatron(
    family: str, shape: Shape, padded_vocabulary: int, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, int | None, Tensor]]:
    """Yield (name, layer from 0 or None, tensor) of Megatron's model.

    Args:
        padded_vocabulary: Rows that the embedding is to have.
        read: Returns a tensor of the Hugging Face model by name.
    """
    for name, (kind, theirs) in of_model(family, shape).items():
        tensor = _imported(kind, [read(t) for t in theirs], shape)
        is_padded = kind in (ROWS, ROWS_TWICE)
        yield name, None, pad(tensor, padded_vocabulary) if is_padded else tensor
    stored_in = FAMILIES[family]
    for i in range(shape.layers):
        for name, (kind, theirs) in stored_in.of_layer.items():
            tensors = [read(f"{stored_in.theirs}.{i}.{t}") for t in theirs]
            yield f"{stored_in.layers}.{name}", i, _imported(kind, tensors, shape)


def pad(rows: Tensor, size: int) -> Tensor:
    """Return a matrix [v, h] or bias [v] with rows added up to `size`, each the mean of the others.

    The logit of such a token is the mean of all logits, so that its probability is at most the
    mean one (Jensen) and the loss changes by at most padding / v. Rows of zeros would have logits
    of zero, where those of a published GPT-2 are far below: its loss would be lost in them.
    """
    mean = rows.mean(0, keepdim=True, dtype=torch.float64).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - len(rows), *rows.shape[1:])])


def _exported(
    kind: str, tensor: Tensor, shape: Shape, dtype: torch.dtype | None
) -> Iterable[Tensor]:
    dtype = dtype or tensor.dtype
    if kind == NORM and shape.centred_norms:
        # Near one bf16 has fewer digits than near zero: the sum is rounded to `dtype` only.
        return [(tensor.double() + 1).to(dtype)]
    tensor = tensor.to(dtype)
    if kind == TRANSPOSED:
        return [tensor.T]
    if kind == HEADS:
        return [_with_all_heads(tensor.T, shape)]
    if kind == ROWS:
        return [tensor[: shape.vocabulary]]
    if kind == ROWS_TWICE:  # not the same memory, or it would be stored once
        return [tensor[: shape.vocabulary], tensor[: shape.vocabulary].clone()]
    if kind == BATCHED:
        return [tensor[None]]
    if kind == GATED:
        return tensor.chunk(2)
    if kind in (QKV, FUSED_QKV):
        parts = _split_qkv(tensor, shape)
        if kind == QKV:
            return parts
        return [_turned(torch.cat([_with_all_heads(part, shape) for part in parts]))]
    return [tensor]


def _imported(kind: str, tensors: list[Tensor], shape: Shape) -> Tensor:
    if kind in (TRANSPOSED, HEADS):
        return tensors[0].T.contiguous()
    if kind == BATCHED:
        return tensors[0][0]
    if kind == GATED:
        return torch.cat(tensors)
    if kind == FUSED_QKV:
        tensors = [*_turned(tensors[0]).chunk(3)]
    if kind == STACKED_QKV:
        tensors = [*tensors[0].chunk(3)]
    if kind in (QKV, STACKED_QKV, FUSED_QKV):
        return _join_qkv(tensors, shape)
    return tensors[0]


def _with_all_heads(rows: Tensor, shape: Shape) -> Tensor:
    """Return rows that are ordered by head, with rows of zeros for the heads that are missing.

    A head whose V and output are zero adds nothing, so that the model computes the same.
    """
    missing = max(shape.all_heads - shape.heads, 0) * (len(rows) // shape.heads)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _turned(tensor: Tensor) -> Tensor:
    """Return a weight transposed, or a bias."""
    return tensor.T if tensor.dim() > 1 else tensor


def _split_qkv(tensor: Tensor, shape: Shape) -> list[Tensor]:
    """Return Q, K and V, each ordered by head, of rows that are ordered by query group.

    Source: ``megatron/core/transformer/attention.py:SelfAttention.get_query_key_value_tensors``.
    """
    queries = shape.heads // shape.groups
    grouped = tensor.unflatten(0, (shape.groups, queries + 2, -1))  # [g, q + 2, d, ...]
    return [part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1)]


def _join_qkv(tensors: list[Tensor], shape: Shape) -> Tensor:
    heads = (shape.heads // shape.groups, 1, 1)
    grouped = [t.unflatten(0, (shape.groups, n, -1)) for t, n in zip(tensors, heads, strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def stored(folder: Path, prefix: str) -> dict[str, Callable[[], Tensor]]:
    """Return what reads each tensor of a folder with safetensors files.

    By the name that it has in the model with its head: a published GPT-2 was saved without, and its
    names lack their beginning. Left out are buffers that older releases saved.

    Args:
        prefix: This beginning.
    """
    from safetensors import safe_open

    tensors: dict[str, Callable[[], Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        opened = safe_open(file, "pt")
        tensors |= {name: partial(opened.get_tensor, name) for name in opened.keys()}
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {prefix + name: read for name, read in tensors.items()}
    return {name: read for name, read in tensors.items() if not name.endswith(BUFFERS)}


def theirs(family: str, shape: Shape) -> set[str]:
    """Return the names of the Hugging Face model's parameters."""
    whole = {name for _, names in of_model(family, shape).values() for name in names}
    stored_in = FAMILIES[family]
    of_layer = [name for _, names in stored_in.of_layer.values() for name in names]
    prefixes = [f"{stored_in.theirs}.{i}" for i in range(shape.layers)]
    return whole | {f"{prefix}.{name}" for prefix in prefixes for name in of_layer}


def check_names(family: str, shape: Shape, names: Iterable[str]) -> None:
    """Check that a checkpoint holds a family's parameters and no other.

    Args:
        names: Of Megatron's parameters in the checkpoint.

    Raises:
        ConversionError: It does not, in spite of its arguments.
    """
    stored_in = FAMILIES[family]
    of_layers = (f"{stored_in.layers}.{name}" for name in stored_in.of_layer)
    expected = {*of_model(family, shape), *of_layers}
    missing, more = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or more:
        listed = [f"lacks {name}" for name in missing] + [f"has {name}" for name in more]
        raise ConversionError(
            f"this is not a {stored_in.title} as Megatron stores it: the checkpoint "
            + ", ".join(listed[:4] + ["..."] * (len(listed) > 4))
        )


def check_tensors(folder: Path, expected: set[str], names: Iterable[str], tied: bool) -> None:
    """Check that a Hugging Face folder holds a model's parameters and no other.

    Args:
        expected: The parameters' names.
        names: Those in the folder.
        tied: Whether a head may be there that is the embedding.

    Raises:
        ConversionError: It does not.
    """
    found = set(names) - (set(TIED) if tied else set())
    listed = [f"there is no tensor {name}" for name in sorted(expected - found)]
    listed += [f"Megatron has no place for {name}" for name in sorted(found - expected)]
    if listed:
        more = "; ..." if len(listed) > 4 else ""
        raise ConversionError(f"--input {folder}: " + "; ".join(listed[:4]) + more)
