"""The parameters of Megatron's GPT and of Hugging Face's GPT-2 and Llama: names, layouts, shapes.

Megatron's names are those of its distributed checkpoints, where a norm belongs to the linear layer
behind it, as Transformer Engine has it; the local layers are stored under the same names.

Shapes: h hidden size, f width of the MLP, g query groups, q query heads of a group, d head size,
v vocabulary. A weight is [outputs, inputs] in Megatron and Llama, [inputs, outputs] in GPT-2.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
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
    all_heads: int = 0
    """Heads of a GPT-2 that was pruned: heads of zeros are added up to this number."""


# How Megatron's tensor becomes Hugging Face's: (of Megatron, the names there). Both ways.
SAME, TRANSPOSED, HEADS, NORM, ROWS, GATED, QKV, FUSED_QKV = (
    "same transposed heads norm rows gated qkv fused_qkv".split()
)
Names = dict[str, tuple[str, tuple[str, ...]]]

_GPT2_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("ln_1.weight",)),
    "self_attention.linear_qkv.layer_norm_bias": (SAME, ("ln_1.bias",)),
    "self_attention.linear_qkv.weight": (FUSED_QKV, ("attn.c_attn.weight",)),
    "self_attention.linear_qkv.bias": (FUSED_QKV, ("attn.c_attn.bias",)),
    "self_attention.linear_proj.weight": (HEADS, ("attn.c_proj.weight",)),
    "self_attention.linear_proj.bias": (SAME, ("attn.c_proj.bias",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("ln_2.weight",)),
    "mlp.linear_fc1.layer_norm_bias": (SAME, ("ln_2.bias",)),
    "mlp.linear_fc1.weight": (TRANSPOSED, ("mlp.c_fc.weight",)),
    "mlp.linear_fc1.bias": (SAME, ("mlp.c_fc.bias",)),
    "mlp.linear_fc2.weight": (TRANSPOSED, ("mlp.c_proj.weight",)),
    "mlp.linear_fc2.bias": (SAME, ("mlp.c_proj.bias",)),
}
_GPT2: Names = {
    "embedding.word_embeddings.weight": (ROWS, ("transformer.wte.weight",)),
    "embedding.position_embeddings.weight": (SAME, ("transformer.wpe.weight",)),
    "decoder.final_layernorm.weight": (NORM, ("transformer.ln_f.weight",)),
    "decoder.final_layernorm.bias": (SAME, ("transformer.ln_f.bias",)),
    "output_layer.weight": (ROWS, ("lm_head.weight",)),
}
_LLAMA_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        QKV,
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_proj.weight": (SAME, ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": (GATED, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (SAME, ("mlp.down_proj.weight",)),
}
_LLAMA: Names = {
    "embedding.word_embeddings.weight": (ROWS, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": (NORM, ("model.norm.weight",)),
    "output_layer.weight": (ROWS, ("lm_head.weight",)),
}
# {family: (whole model, a layer, where Hugging Face keeps layers)}
FAMILIES: dict[str, tuple[Names, Names, str]] = {
    "gpt2": (_GPT2, _GPT2_LAYER, "transformer.h"),
    "llama": (_LLAMA, _LLAMA_LAYER, "model.layers"),
}
TITLES = {"gpt2": "GPT-2", "llama": "Llama"}
LAYERS = "decoder.layers"
# What is no parameter, and is computed anew.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def of_model(family: str, shape: Shape) -> Names:
    """Return the parameters outside of the layers."""
    names = FAMILIES[family][0]
    return {k: v for k, v in names.items() if not (shape.tied and k == "output_layer.weight")}


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
    _, layer_names, prefix = FAMILIES[family]
    for name, (kind, theirs) in layer_names.items():
        for i, tensor in enumerate(read(f"{LAYERS}.{name}")):
            parts = _exported(kind, tensor, shape, dtype)
            yield from zip((f"{prefix}.{i}.{t}" for t in theirs), parts, strict=True)


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
        yield name, None, pad(tensor, padded_vocabulary) if kind == ROWS else tensor
    _, layer_names, prefix = FAMILIES[family]
    for i in range(shape.layers):
        for name, (kind, theirs) in layer_names.items():
            tensors = [read(f"{prefix}.{i}.{t}") for t in theirs]
            yield f"{LAYERS}.{name}", i, _imported(kind, tensors, shape)


def pad(rows: Tensor, size: int) -> Tensor:
    """Return a matrix [v, h] with rows added up to `size`, each the mean of the others.

    The logit of such a token is the mean of all logits, so that its probability is at most the
    mean one (Jensen) and the loss changes by at most padding / v. Rows of zeros would have logits
    of zero, where those of a published GPT-2 are far below: its loss would be lost in them.
    """
    mean = rows.mean(0, keepdim=True, dtype=torch.float64).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - len(rows), -1)])


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
    if kind == GATED:
        return torch.cat(tensors)
    if kind == FUSED_QKV:
        tensors = [*_turned(tensors[0]).chunk(3)]
    if kind in (QKV, FUSED_QKV):
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


def stored(folder: Path, family: str) -> dict[str, Callable[[], Tensor]]:
    """Return what reads each tensor of a folder with safetensors files.

    By the name that it has in the model with its head: a published GPT-2 was saved without, and its
    names lack their beginning. Left out are buffers that older releases saved.
    """
    from safetensors import safe_open

    tensors: dict[str, Callable[[], Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        opened = safe_open(file, "pt")
        tensors |= {name: partial(opened.get_tensor, name) for name in opened.keys()}
    prefix = FAMILIES[family][2].partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {prefix + name: read for name, read in tensors.items()}
    return {name: read for name, read in tensors.items() if not name.endswith(BUFFERS)}


def theirs(family: str, shape: Shape) -> set[str]:
    """Return the names of the Hugging Face model's parameters."""
    layer, prefix = FAMILIES[family][1:]
    whole = {name for _, names in of_model(family, shape).values() for name in names}
    of_layer = [name for _, names in layer.values() for name in names]
    return whole | {f"{prefix}.{i}.{name}" for i in range(shape.layers) for name in of_layer}


def check_names(family: str, shape: Shape, names: Iterable[str]) -> None:
    """Check that a checkpoint holds a family's parameters and no other.

    Args:
        names: Of Megatron's parameters in the checkpoint.

    Raises:
        ConversionError: It does not, in spite of its arguments.
    """
    layer = FAMILIES[family][1]
    expected = {*of_model(family, shape), *(f"{LAYERS}.{name}" for name in layer)}
    missing, more = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or more:
        listed = [f"lacks {name}" for name in missing] + [f"has {name}" for name in more]
        raise ConversionError(
            f"this is not a {TITLES[family]} as Megatron's GPT stores it: the checkpoint "
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
    found = set(names) - ({"lm_head.weight"} if tied else set())
    listed = [f"there is no tensor {name}" for name in sorted(expected - found)]
    listed += [f"Megatron's GPT has no place for {name}" for name in sorted(found - expected)]
    if listed:
        more = "; ..." if len(listed) > 4 else ""
        raise ConversionError(f"--input {folder}: " + "; ".join(listed[:4]) + more)
