"""Masks: which units or weights a ticket prunes, and how far two masks are apart.

True means pruned. Every layer prunes the same number. A mask is layout-independent: units are in
the order of the whole layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rltd.early_bird.units import MATRICES, ModelShape, neurons_of_fc1

STRUCTURED, UNSTRUCTURED, TWO_OF_FOUR = "structured", "unstructured", "2:4"
PATTERNS = (STRUCTURED, UNSTRUCTURED, TWO_OF_FOUR)
_BITS = torch.arange(8, dtype=torch.uint8)
_COUNTS = torch.tensor([n.bit_count() for n in range(256)], dtype=torch.uint8)


def least_important(importance: Tensor, pruned: int) -> Tensor:
    """Return the mask of the `pruned` least important units of a layer; of equals the lower ones.

    Args:
        importance: [units of the whole layer].
        pruned: How many.

    Returns:
        bool [units].
    """
    order = importance.argsort(stable=True)
    mask = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    mask[order[:pruned]] = True
    return mask


def smallest_weights(
    weights: Sequence[Tensor],
    ratio: float,
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> list[Tensor]:
    """Return the masks of the weights of smallest magnitude, of each matrix by itself.

    Pruned is every |w| <= t, with the largest t for which this is at most `ratio` of the matrix.
    Weights of equal magnitude are pruned all or not at all, so the share may be a little smaller.

    Args:
        weights: Of one dtype; float32, bfloat16, float16 or float64; a rank's shards, if `add_up`
            adds counts over its tensor-parallel group.
        ratio: Share of each matrix to prune, from 0 to 1.
        add_up: Takes and returns int64 [matrices].

    Returns:
        bool masks in the shapes of `weights`.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights[0].element_size()]
    # Magnitudes sort as the integers that their bits stand for.
    magnitudes = [weight.detach().abs().view(integer) for weight in weights]
    device = weights[0].device
    sizes = add_up(torch.tensor([w.numel() for w in weights], device=device))
    allowed = (sizes.double() * ratio).floor().long()
    low = torch.full_like(sizes, -1)  # prunes nothing
    high = torch.full_like(sizes, torch.iinfo(integer).max - 1)  # NaN, beyond every number
    for _ in range(torch.iinfo(integer).bits):  # bisection
        middle = low + (high - low) // 2 + (high - low) % 2  # does not overflow
        counts = torch.stack(
            [(m <= t).sum() for m, t in zip(magnitudes, middle, strict=True)]
        ).long()
        fits = add_up(counts) <= allowed
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return [m <= t for m, t in zip(magnitudes, low, strict=True)]


def two_of_four(weight: Tensor) -> Tensor:
    """Return the mask of the two smaller magnitudes of each four along the last dimension.

    Args:
        weight: [..., a multiple of 4].
    """
    fours = weight.detach().abs().unflatten(-1, (-1, 4))
    order = fours.argsort(dim=-1, stable=True)
    mask = torch.zeros(fours.shape, dtype=torch.bool, device=weight.device)
    return mask.scatter_(-1, order[..., :2], True).flatten(-2)


def whole_matrix(name: str, part: Tensor, shape: ModelShape) -> tuple[Tensor, int]:
    """Return a matrix so that ranks of tensor parallelism are joined along a dimension, and which.

    Args:
        name: One of `units.MATRICES`.
        part: What this rank holds, or a mask of the same shape.
        shape: Of the model.
    """
    if name == "linear_fc1":
        return neurons_of_fc1(part, shape), 1
    return part, 0 if name == "linear_qkv" else 1


def flat_weights(matrices: Mapping[str, Tensor]) -> Tensor:
    """Return the masks of a layer's four whole matrices as one, [weights of the layer]."""
    return torch.cat([matrices[name].flatten() for name in MATRICES])


def pack(mask: Tensor) -> Tensor:
    """Return a bool mask [n] as uint8 [ceil(n / 8)] on the CPU, the lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (padded << _BITS.to(mask.device)).sum(1, dtype=torch.uint8).cpu()


def unpack(packed: Tensor, units: int) -> Tensor:
    """Return the bool mask [units] that `pack` packed."""
    return ((packed[:, None] >> _BITS) & 1).bool().flatten()[:units]


def count_bits(packed: Tensor) -> int:
    """Return how many bits of a packed mask are set."""
    total = 0
    for part in packed.split(1 << 24):  # an index takes 8 bytes a byte
        total += int(_COUNTS[part.long()].sum(dtype=torch.int64))
    return total


@dataclass(frozen=True)
class Mask:
    """What a check would prune.

    Attributes:
        iteration: Iterations that the weights were trained for: that of a checkpoint of them.
        units: {kind: units of a layer}.
        pruned: {kind: {layer_number: packed bits, see `pack`}}; all layers, or those of a stage.
    """

    iteration: int
    units: dict[str, int]
    pruned: dict[str, dict[int, Tensor]]

    def of_layer(self, kind: str, layer_number: int) -> Tensor:
        """Return a layer's mask of a kind, bool [units]."""
        return unpack(self.pruned[kind][layer_number], self.units[kind])

    def size(self, kind: str) -> int:
        """Return how many bits of a kind this mask holds."""
        return self.units[kind] * len(self.pruned[kind])

    def count(self, kind: str) -> int:
        """Return how many units of a kind are pruned."""
        return sum(map(count_bits, self.pruned[kind].values()))

    def differing(self, other: "Mask", kind: str) -> int:
        """Return how many bits of a kind differ in the layers that this mask holds."""
        theirs = other.pruned[kind]
        return sum(count_bits(ours ^ theirs[n]) for n, ours in self.pruned[kind].items())


def distance(one: Mask, other: Mask, kind: str) -> float:
    """Return the share of bits of a kind that differ, from 0 to 1."""
    return one.differing(other, kind) / one.size(kind)


def chance(share: float) -> float:
    """Return the distance to expect of two independent masks that prune a share: 2p(1 - p)."""
    return 2 * share * (1 - share)
