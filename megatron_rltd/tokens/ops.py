"""Choosing and moving tokens: torch.library ops with fake implementations and autograd.

Public: `gather_tokens` and `scatter_tokens`, out of place and each correct on its own.
Private to the rows that neighbouring dropped layers borrow (`model.block`): `split_tokens`,
`exchange_tokens` and `merge_tokens`, which move rows through one private buffer in place. They rely
on the buffer having no other reader, in forward and in backward; do not use them elsewhere.

`reference` implements the ops for every device. The compiled `kernels`, if they are built,
implement them for their devices under the same op names. The caller chooses with the argument
`library`, which `find_library` returns for a backend.

Shapes: s sequence length on this rank, b micro batch, h hidden size, k kept tokens on this rank.
Hidden states [s, b, h], any dtype; indices [b, k] int32, distinct and ascending in each row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rltd.tokens import kernels, reference

BACKENDS = ("auto", "cuda", "torch")
_LIBRARY = torch.library.Library("megatron_rltd", "DEF")
_SCHEMAS = {
    "gather": "(Tensor hidden_states, Tensor indices) -> Tensor",
    "scatter": "(Tensor hidden_states, Tensor tokens, Tensor indices) -> Tensor",
    "split": "(Tensor hidden_states, Tensor indices) -> (Tensor, Tensor)",
    "exchange_": "(Tensor(a!) buffer, Tensor tokens, Tensor indices, Tensor next_indices)"
    " -> Tensor",
    "merge_": "(Tensor(a!) buffer, Tensor tokens, Tensor indices) -> ()",
    "sample": "(int seed, Tensor layer_numbers, Tensor samples, int seq_length, int kept_tokens,"
    " int strata) -> Tensor",
    "select_mask": "(Tensor mask, Tensor rows, Tensor columns) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

kernels.load()


def find_library(backend: str) -> Any:
    """Return what implements the ops: the fastest one for "auto", `reference` for "torch".

    "cuda" is like "auto", but it is an error if there are no kernels for a GPU.

    Raises:
        ValueError: Not one of `BACKENDS`, or not there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    missing = kernels.missing_for("cuda") if backend == "cuda" else None
    if missing:
        raise ValueError(f"the kernels are {missing}")
    return reference if backend == "torch" else torch.ops.megatron_rltd


def _like_kept(hidden_states: Tensor, indices: Tensor) -> Tensor:
    _, batch, width = hidden_states.shape
    return hidden_states.new_empty(indices.size(1), batch, width)


@torch.library.register_fake("megatron_rltd::gather", lib=_LIBRARY)
def _(hidden_states, indices):
    return _like_kept(hidden_states, indices)


@torch.library.register_fake("megatron_rltd::scatter", lib=_LIBRARY)
def _(hidden_states, tokens, indices):
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.register_fake("megatron_rltd::split", lib=_LIBRARY)
def _(hidden_states, indices):
    return _like_kept(hidden_states, indices), hidden_states.new_empty(hidden_states.shape)


@torch.library.register_fake("megatron_rltd::exchange_", lib=_LIBRARY)
def _(buffer, tokens, indices, next_indices):
    return _like_kept(buffer, next_indices)


@torch.library.register_fake("megatron_rltd::merge_", lib=_LIBRARY)
def _(buffer, tokens, indices):
    return None


@torch.library.register_fake("megatron_rltd::sample", lib=_LIBRARY)
def _(seed, layer_numbers, samples, seq_length, kept_tokens, strata):
    shape = (layer_numbers.size(0), samples.size(0), kept_tokens)
    return samples.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("megatron_rltd::select_mask", lib=_LIBRARY)
def _(mask, rows, columns):
    batch, heads, length, _ = mask.shape
    return mask.new_empty(batch, heads, 1 if length == 1 else rows.size(1), columns.size(1))


def _save_indices(ctx, inputs, output):
    ctx.save_for_backward(inputs[-1])
    ctx.rows = inputs[0].size(0)


def _gather_backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    zeros = grad.new_zeros(ctx.rows, *grad.shape[1:])
    return scatter_tokens(zeros, grad, indices), None


def _scatter_backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    grad_tokens = gather_tokens(grad, indices)
    return scatter_tokens(grad, torch.zeros_like(grad_tokens), indices), grad_tokens, None


torch.library.register_autograd(
    "megatron_rltd::gather", _gather_backward, setup_context=_save_indices, lib=_LIBRARY
)
torch.library.register_autograd(
    "megatron_rltd::scatter", _scatter_backward, setup_context=_save_indices, lib=_LIBRARY
)


def _check(hidden_states: Tensor, indices: Tensor, tokens: Tensor | None = None) -> None:
    """Raise ValueError, naming dimensions, unless the arguments fit together."""
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states must be [s, b, h], got {list(hidden_states.shape)}")
    rows, batch, width = hidden_states.shape
    if indices.dim() != 2 or indices.size(0) != batch or indices.size(1) > rows:
        raise ValueError(
            f"indices must be [b, k] with b = {batch} and k <= {rows}, got {list(indices.shape)}"
        )
    if indices.dtype != torch.int32:
        raise ValueError(f"indices must be int32, got {indices.dtype}")
    if indices.device != hidden_states.device:
        raise ValueError(f"indices on {indices.device}, hidden_states on {hidden_states.device}")
    if tokens is not None:
        expected = [indices.size(1), batch, width]
        if list(tokens.shape) != expected:
            raise ValueError(f"tokens must be [k, b, h] = {expected}, got {list(tokens.shape)}")
        if tokens.dtype != hidden_states.dtype:
            raise ValueError(f"tokens are {tokens.dtype}, hidden_states {hidden_states.dtype}")


class _Gather(torch.autograd.Function):
    """`reference.gather`, for devices on which the library's op would run the kernels."""

    @staticmethod
    def forward(ctx, hidden_states, indices):
        _save_indices(ctx, (hidden_states, indices), None)
        return reference.gather(hidden_states, indices)

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        zeros = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return scatter_tokens(zeros, grad, indices, "torch"), None


class _Scatter(torch.autograd.Function):
    """`reference.scatter`, likewise."""

    @staticmethod
    def forward(ctx, hidden_states, tokens, indices):
        _save_indices(ctx, (hidden_states, indices), None)
        return reference.scatter(hidden_states, tokens, indices)

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        grad_tokens = gather_tokens(grad, indices, "torch")
        zeros = torch.zeros_like(grad_tokens)
        return scatter_tokens(grad, zeros, indices, "torch"), grad_tokens, None


def gather_tokens(hidden_states: Tensor, indices: Tensor, backend: str = "auto") -> Tensor:
    """Return the kept rows [k, b, h], a new tensor.

    Equivalent to ``hidden_states.gather(0, indices.t()[..., None].expand(-1, -1, h).long())``.

    Args:
        backend: One of `BACKENDS`, as ``--random-ltd-backend``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or there is no such backend.
    """
    _check(hidden_states, indices)
    if find_library(backend) is reference:
        return _Gather.apply(hidden_states, indices)
    return torch.ops.megatron_rltd.gather(hidden_states, indices)


def scatter_tokens(
    hidden_states: Tensor, tokens: Tensor, indices: Tensor, backend: str = "auto"
) -> Tensor:
    """Return hidden_states [s, b, h] with the kept rows replaced by tokens, a new tensor.

    Args:
        backend: One of `BACKENDS`, as ``--random-ltd-backend``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or there is no such backend.
    """
    _check(hidden_states, indices, tokens)
    if find_library(backend) is reference:
        return _Scatter.apply(hidden_states, tokens, indices)
    return torch.ops.megatron_rltd.scatter(hidden_states, tokens, indices)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, hidden_states, indices):
        ctx.library = library
        ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)
        ctx.shape = hidden_states.shape
        return library.split(hidden_states, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens, grad_buffer):
        # grad_buffer comes from Exchange or Merge and has no other reader: it is ours to write.
        (indices,) = ctx.saved_tensors
        if grad_tokens is None and grad_buffer is None:
            return None, None, None
        if grad_buffer is None:
            grad_buffer = grad_tokens.new_zeros(ctx.shape)
        if grad_tokens is None:
            grad_tokens = torch.zeros_like(_like_kept(grad_buffer, indices))
        ctx.library.merge_(grad_buffer, grad_tokens.contiguous(), indices)
        return None, grad_buffer, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, buffer, tokens, indices, next_indices):
        ctx.library = library
        ctx.save_for_backward(indices, next_indices)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(buffer)
        ctx.shape = buffer.shape
        return library.exchange_(buffer, tokens.contiguous(), indices, next_indices), buffer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_next, grad_buffer):
        # The same kernel with the index sets swapped.
        indices, next_indices = ctx.saved_tensors
        if grad_next is None and grad_buffer is None:
            return None, None, None, None, None
        if grad_buffer is None:
            grad_buffer = grad_next.new_zeros(ctx.shape)
        if grad_next is None:
            grad_next = torch.zeros_like(_like_kept(grad_buffer, next_indices))
        grad_next = grad_next.contiguous()
        grad_tokens = ctx.library.exchange_(grad_buffer, grad_next, next_indices, indices)
        return None, grad_buffer, grad_tokens, None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, buffer, tokens, indices):
        ctx.library = library
        ctx.save_for_backward(indices)
        ctx.mark_dirty(buffer)
        library.merge_(buffer, tokens.contiguous(), indices)
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Others may hold grad: split copies it and writes nothing to it.
        (indices,) = ctx.saved_tensors
        grad_tokens, grad_buffer = ctx.library.split(grad, indices)
        return None, grad_buffer, grad_tokens, None


def split_tokens(library: Any, hidden_states: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Begin borrowing: return the kept rows [k, b, h] and a private buffer with the others.

    hidden_states is only read. Rows of `indices` in the buffer are arbitrary until they are put
    back. Not twice differentiable.
    """
    _check(hidden_states, indices)
    return _Split.apply(library, hidden_states, indices)


def exchange_tokens(
    library: Any, buffer: Tensor, tokens: Tensor, indices: Tensor, next_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Put back a layer's rows; return the next layer's, [m, b, h], and the buffer."""
    _check(buffer, indices, tokens)
    _check(buffer, next_indices)
    return _Exchange.apply(library, buffer, tokens, indices, next_indices)


def merge_tokens(library: Any, buffer: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """Put back the last layer's rows and return the buffer, now the hidden states."""
    _check(buffer, indices, tokens)
    return _Merge.apply(library, buffer, tokens, indices)


def sample_positions(
    library: Any,
    seed: int,
    layer_numbers: Tensor,
    samples: Tensor,
    seq_length: int,
    kept_tokens: int,
    strata: int = 1,
) -> Tensor:
    """Return the positions that each layer keeps of each sample, [l, b, k] int32, ascending.

    Args: See `megatron_rltd.tokens.sampling.kept_indices`, which defines them.
    """
    signed = seed - 2**64 if seed >= 2**63 else seed  # an op takes no larger integer
    return library.sample(signed, layer_numbers, samples, seq_length, kept_tokens, strata)


def select_mask(library: Any, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the rows and columns of an attention mask that belong to kept tokens.

    Args:
        mask: [b, a, s or 1, s], elements of one byte; its columns contiguous.
        rows: [b, i] int32.
        columns: [b, j] int32.

    Returns:
        [b, a, i or 1, j].
    """
    return library.select_mask(mask, rows, columns)
