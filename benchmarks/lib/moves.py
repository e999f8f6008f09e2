"""Ways to move the tokens of a run of dropped layers, and the rows that each of them moves.

Shapes: s sequence length, b micro batch, h hidden size, l layers of the run, k kept tokens.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.model.block import BorrowedRows
from megatron_rltd.tokens import ops, reference

Layer = Callable[[Tensor], Tensor]
Move = Callable[[Tensor, Sequence[Tensor], Layer], Tensor]
"""Takes hidden states [s, b, h], the kept tokens of each layer, [b, k] int32, and what a layer does
to [k, b, h]; returns the hidden states after the last layer."""

KERNELS, IN_PLACE, TORCH = "kernels", "kernels, in place per layer", "torch"
DEEPSPEED_LINES, DEEPSPEED = "DeepSpeed formulation", "DeepSpeed"
DEEPSPEED_LONGEST = 2048
SEED = 1234


@dataclass(frozen=True)
class Inputs:
    """Random hidden states and the tokens that the layers of a run keep of them.

    Attributes:
        hidden: [s, b, h].
        layer_numbers: [l] int64.
        samples: [b] int64.
        index_sets: Of each layer, [b, k] int32.
    """

    hidden: Tensor
    layer_numbers: Tensor
    samples: Tensor
    index_sets: list[Tensor]

    @property
    def seq_length(self) -> int:
        """s."""
        return self.hidden.size(0)

    @property
    def share(self) -> float:
        """k / s."""
        return self.index_sets[0].size(1) / self.seq_length

    @property
    def rows(self) -> int:
        """s * b."""
        return self.hidden.size(0) * self.hidden.size(1)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of hidden states."""
        return self.hidden.size(2) * self.hidden.itemsize


def random_inputs(hidden: Tensor, layers: int, kept: int) -> Inputs:
    """Return inputs with the kept tokens that a model would draw.

    Args:
        hidden: [s, b, h].
        kept: k.
    """
    numbers = torch.arange(2, layers + 2, device=hidden.device)
    samples = torch.arange(hidden.size(1), device=hidden.device)
    library = ops.find_library("auto")
    drawn = ops.sample_positions(library, SEED, numbers, samples, hidden.size(0), kept)
    return Inputs(hidden, numbers, samples, list(drawn))


def _run(backend: str, hidden: Tensor, index_sets: Sequence[Tensor], layer: Layer) -> Tensor:
    borrowed = BorrowedRows(ops.find_library(backend))
    for number, indices in enumerate(index_sets, start=1):
        tokens = borrowed.borrow(hidden, indices)
        hidden = borrowed.give_back(layer(tokens), last=number == len(index_sets))
    return hidden


class _PutAndTake(torch.autograd.Function):
    """What exchange does, in two passes over the kept rows: put a layer's back, take the next's."""

    @staticmethod
    def forward(ctx, buffer, tokens, indices, next_indices):
        ctx.save_for_backward(indices, next_indices)
        ctx.mark_dirty(buffer)
        torch.ops.megatron_rltd.merge_(buffer, tokens, indices)
        return torch.ops.megatron_rltd.gather(buffer, next_indices), buffer

    @staticmethod
    def backward(ctx, grad_next, grad_buffer):
        indices, next_indices = ctx.saved_tensors
        torch.ops.megatron_rltd.merge_(grad_buffer, grad_next.contiguous(), next_indices)
        return grad_buffer, torch.ops.megatron_rltd.gather(grad_buffer, indices), None, None


def _in_place(hidden: Tensor, index_sets: Sequence[Tensor], layer: Layer) -> Tensor:
    library = ops.find_library("auto")
    tokens, buffer = ops.split_tokens(library, hidden, index_sets[0])
    for indices, next_indices in zip(index_sets, index_sets[1:], strict=False):
        tokens, buffer = _PutAndTake.apply(buffer, layer(tokens), indices, next_indices)
    return ops.merge_tokens(library, buffer, layer(tokens), index_sets[-1])


class _GatherTokens(torch.autograd.Function):
    """DeepSpeed's, whose backward writes into the gradient that it is given."""

    @staticmethod
    def forward(ctx, hidden, indices):
        ctx.save_for_backward(hidden, indices)
        return hidden, reference.gather(hidden, indices)

    @staticmethod
    def backward(ctx, grad, grad_tokens):
        _, indices = ctx.saved_tensors
        reference.scatter_(grad, grad_tokens.contiguous(), indices)
        return grad, None


class _ScatterTokens(torch.autograd.Function):
    """DeepSpeed's: a copy of the hidden states for each layer."""

    @staticmethod
    def forward(ctx, hidden, tokens, indices):
        ctx.save_for_backward(indices)
        result = hidden.clone()
        reference.scatter_(result, tokens, indices)
        return result

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        grad = grad.contiguous()
        return grad, reference.gather(grad, indices), None


def _per_layer(
    gather: Callable, scatter: Callable, hidden: Tensor, index_sets: Sequence[Tensor], layer: Layer
) -> Tensor:
    for indices in index_sets:
        hidden, tokens = gather(hidden, indices)
        hidden = scatter(hidden, layer(tokens), indices)
    return hidden


def deepspeed(
    device: torch.device, dtype: torch.dtype, seq_length: int, hidden_size: int
) -> tuple[Any, str]:
    """Return DeepSpeed's module of random-LTD, its kernels built, or None; and why there is none.

    Its kernels are for GPUs only. They are built at their first use, by nvcc and ninja.
    """
    if device.type != "cuda":
        return None, "its kernels need a GPU"
    # Beyond these its kernels read and write elsewhere, without an error
    # (csrc/random_ltd/token_sort.cu, gather_scatter.cu of DeepSpeed 0.19).
    if seq_length > DEEPSPEED_LONGEST or hidden_size * dtype.itemsize % 16:
        return None, f"its kernels are for {DEEPSPEED_LONGEST} tokens and rows of 16-byte units"
    try:
        dropping_utils = importlib.import_module("deepspeed.ops.random_ltd.dropping_utils")
        hidden = torch.zeros(16, 1, 16, device=device, dtype=dtype)
        indices, _ = dropping_utils.gpt_sample_tokens(8, 16, 1, device=device)
        dropping_utils.GatherTokens.apply(hidden, indices[0], False)
    except Exception as error:  # whatever its build at first use raises
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return dropping_utils, ""


def moves(has_kernels: bool, module: Any = None) -> dict[str, Move]:
    """Return the ways to move tokens, by name.

    Args:
        has_kernels: Whether there are compiled kernels for the device.
        module: DeepSpeed's, or None.
    """
    ways: dict[str, Move] = {}
    if has_kernels:
        ways = {KERNELS: functools.partial(_run, "auto"), IN_PLACE: _in_place}
    ways[TORCH] = functools.partial(_run, "torch")
    ways[DEEPSPEED_LINES] = functools.partial(_per_layer, _GatherTokens.apply, _ScatterTokens.apply)
    if module is not None:
        ways[DEEPSPEED] = functools.partial(
            _per_layer,
            lambda hidden, indices: module.GatherTokens.apply(hidden, indices, False),
            lambda *arguments: module.ScatterTokens.apply(*arguments, False),
        )
    return ways


def check(ways: dict[str, Move], inputs: Inputs) -> None:
    """Raise AssertionError unless all ways lead to the same bits, forward and backward."""
    upstream = torch.randn_like(inputs.hidden)
    expected: tuple[Tensor, ...] = ()
    for name, move in ways.items():
        start = inputs.hidden.detach().requires_grad_()
        output = move(start, inputs.index_sets, lambda tokens: tokens * -0.5)
        (grad,) = torch.autograd.grad(output, start, upstream.clone())
        results = (output.detach(), grad)
        expected = expected or results
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours, theirs), f"{name} moves other rows than {next(iter(ways))}"


def union_size(indices: Tensor, others: Tensor, length: int) -> int:
    """Return how many rows one or both of two layers keep, over all samples.

    Args:
        indices, others: [b, k].
        length: s.
    """
    kept = torch.zeros(indices.size(0), length, dtype=torch.bool)
    kept.scatter_(1, indices.cpu().long(), True).scatter_(1, others.cpu().long(), True)
    return int(kept.sum())


def rows_copied(way: str, inputs: Inputs) -> tuple[int, int]:
    """Return how many rows are copied, each read once and written once: forward, backward."""
    sets, rows = inputs.index_sets, inputs.rows
    kept = [indices.numel() for indices in sets]
    if way in (DEEPSPEED_LINES, DEEPSPEED):
        # Gather, clone and scatter; backward a gather and a scatter.
        return 2 * sum(kept) + rows * len(kept), 2 * sum(kept)
    between = sum(kept[:-1]) + sum(kept[1:])
    if way == KERNELS:
        pairs = zip(sets, sets[1:], strict=False)
        between = sum(union_size(a, b, inputs.seq_length) for a, b in pairs)
    # The kernels send each row where it belongs when a run begins; torch copies all, then some.
    twice = kept if way == TORCH else [0]
    return rows + twice[0] + between + kept[-1], rows + twice[-1] + between + kept[0]


def expected_rows(way: str, share: float, layers: int) -> float:
    """Return the rows read and written for each layer, forward and backward, in units of s * b.

    Of random index sets. Between two layers p = `share` of the rows are put back and p taken, of
    which a share p is the same; 2 + 2p rows (torch: 2 + 4p) begin and end a run, in each direction.
    """
    if way in (DEEPSPEED_LINES, DEEPSPEED):
        return 8 * share + 2
    between = 8 * share - (4 * share**2 if way == KERNELS else 0)
    ends = 4 + 4 * share + (4 * share if way == TORCH else 0)
    return (ends + (layers - 1) * between) / layers
