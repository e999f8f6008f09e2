"""Random inputs of the ops, each op applied to them, and by plain indexing what must come out.

Shapes: s sequence length, b micro batch, h hidden size, k kept tokens, m those of the next layer.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rltd.tokens import reference
from megatron_rltd.tokens.sampling import kept_indices


@dataclass(frozen=True)
class Case:
    """Inputs of all ops. mask [b, 2, s, s] bool; layers [l] and samples [b] int64."""

    hidden: Tensor
    tokens: Tensor
    indices: Tensor
    next_indices: Tensor
    mask: Tensor
    layers: Tensor
    samples: Tensor

    def to(self, device: torch.device) -> "Case":
        return Case(*(x.to(device) for x in vars(self).values()))

    def buffer(self) -> Tensor:
        """Return hidden states that may be written to, without the rows that a layer holds."""
        return poisoned(self.hidden.contiguous().clone(), self.indices)


def random_case(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Case:
    """Return a case on the CPU.

    Args:
        shape: s, b, h, k, m.
    """
    length, batch, width, kept, next_kept = shape
    generator = torch.Generator().manual_seed(seed)

    def values(*sizes: int) -> Tensor:
        # Any bits, NaNs too: bytes are compared.
        in_bytes = (*sizes[:-1], sizes[-1] * dtype.itemsize)
        drawn = torch.randint(0, 255, in_bytes, dtype=torch.uint8, generator=generator)
        return drawn.view(dtype)

    def sets(size: int) -> Tensor:
        order = torch.rand(batch, length, generator=generator).argsort(1)
        return order[:, :size].sort(1).values.to(torch.int32)

    mask = torch.rand(batch, 2, length, length, generator=generator) > 0.5
    numbers = torch.randint(1, 2**40, (3 + batch,), generator=generator)
    return Case(
        values(length, batch, width),
        values(kept, batch, width),
        sets(kept),
        sets(next_kept),
        mask,
        numbers[:3] % 1000,
        numbers[3:],
    )


# The definition of the ops, by plain indexing.


def places(indices: Tensor) -> tuple[Tensor, Tensor]:
    return indices.t().long(), torch.arange(indices.size(0), device=indices.device)


def _gather(hidden: Tensor, indices: Tensor) -> Tensor:
    return as_bytes(hidden)[places(indices)]


def _scatter(hidden: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    result = as_bytes(hidden).clone()
    result[places(indices)] = as_bytes(tokens)
    return result


def _exchange(buffer: Tensor, tokens: Tensor, indices: Tensor, next_indices: Tensor) -> Tensor:
    buffer.copy_(_scatter(buffer, tokens, indices).view(buffer.dtype))
    return _gather(buffer, next_indices)


def _select_mask(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    samples = [m[:, r.long()][:, :, c.long()] for m, r, c in zip(mask, rows, columns, strict=True)]
    return torch.stack(samples)


BY_HAND = types.SimpleNamespace(
    gather=_gather,
    scatter=_scatter,
    split=lambda hidden, indices: (_gather(hidden, indices), hidden.contiguous().clone()),
    exchange_=_exchange,
    merge_=lambda buffer, *rest: buffer.copy_(_scatter(buffer, *rest).view(buffer.dtype)),
    select_mask=_select_mask,
    sample=lambda seed, *rest: kept_indices(seed % 2**64, *rest),
)


def as_bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.dtype in (torch.bool, torch.int32) else tensor.view(torch.uint8)


def poisoned(buffer: Tensor, indices: Tensor) -> Tensor:
    """Overwrite the rows that nobody may read, and return the buffer."""
    as_bytes(buffer).view(-1, buffer.size(-1) * buffer.itemsize).index_fill_(
        0, reference.flat_rows(indices).long(), 77
    )
    return buffer


def _split_poisoned(library, case: Case) -> tuple[Tensor, ...]:
    tokens, buffer = library.split(case.hidden, case.indices)
    return tokens, poisoned(buffer, case.indices)


def _exchanged(library, case: Case) -> tuple[Tensor, ...]:
    buffer = case.buffer()
    following = library.exchange_(buffer, case.tokens, case.indices, case.next_indices)
    return following, poisoned(buffer, case.next_indices)


def _merged(library, case: Case) -> tuple[Tensor, ...]:
    buffer = case.buffer()
    library.merge_(buffer, case.tokens, case.indices)
    return (buffer,)


def _sampled(library, case: Case) -> tuple[Tensor, ...]:
    length, kept = case.hidden.size(0), case.indices.size(1)
    strata = 2 if length % 2 == kept % 2 == 0 else 1
    return (library.sample(-7, case.layers, case.samples, length, kept, strata),)


def _angles(library, case: Case) -> tuple[Tensor, ...]:
    # One table for all samples.
    table = case.hidden[:, :1].expand(-1, case.indices.size(0), -1)
    return (library.gather(table, case.indices),)


OPERATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gather": lambda library, case: (library.gather(case.hidden, case.indices),),
    "scatter": lambda library, case: (library.scatter(case.hidden, case.tokens, case.indices),),
    "split": _split_poisoned,
    "exchange": _exchanged,
    "merge": _merged,
    "sample": _sampled,
    "select_mask": lambda library, case: (
        library.select_mask(case.mask, case.indices, case.next_indices),
    ),
    "rotary angles": _angles,
}


def check(name: str, library, case: Case) -> None:
    """Compare an op on a case, on its device, with what plain indexing on the CPU makes of it."""
    before = [as_bytes(x).clone() for x in vars(case).values()]
    results = OPERATIONS[name](library, case)
    compare(name, results, case)
    for x, copy in zip(vars(case).values(), before, strict=True):
        assert torch.equal(as_bytes(x), copy), "an input was written to"


def compare(name: str, results: tuple[Tensor, ...], case: Case) -> None:
    """Compare the bytes of what an op made of a case with what it should have."""
    expected = OPERATIONS[name](BY_HAND, case.to(torch.device("cpu")))
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(as_bytes(ours).cpu(), as_bytes(theirs))
