"""What a ticket keeps, and the mask of one layer that follows from it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rltd.early_bird import masks
from megatron_rltd.early_bird.masks import PATTERNS, STRUCTURED, TWO_OF_FOUR, UNSTRUCTURED
from megatron_rltd.early_bird.units import (
    FFN,
    HEADS,
    MATRICES,
    WEIGHTS,
    ModelShape,
    importance,
    matrix_shapes,
    random_importance,
    random_weights,
)

# On args of a checkpoint that was drawn: the target, and how its units were chosen.
TICKET = "early_bird_ticket"
DRAW = "tools/checkpoint/draw_ticket.py"
NEURONS = 16  # FP8 needs multiples of it


@dataclass(frozen=True)
class Parallel:
    """What the ranks of tensor parallelism do together; by default there is one.

    Attributes:
        size: Ranks.
        join: (tensor, dimension) to the tensors of all ranks, joined in their order.
        add_up: int64 tensor to its sum over the ranks.
    """

    size: int = 1
    join: Callable[[Tensor, int], Tensor] = lambda tensor, dim: tensor
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Target:
    """What a ticket keeps.

    Attributes:
        pattern: One of `masks.PATTERNS`.
        num_attention_heads: Query heads to keep in each layer; None: all. Structured only.
        ffn_hidden_size: FFN neurons to keep in each layer; None: all. Structured only.
        ratio: Share of the weights to prune. Unstructured only.
    """

    pattern: str = STRUCTURED
    num_attention_heads: int | None = None
    ffn_hidden_size: int | None = None
    ratio: float | None = None

    @classmethod
    def searched_by(cls, args: Any) -> "Target":
        """Return what Megatron's arguments, or those that a checkpoint holds, search for."""
        names = ("pattern", "num_attention_heads", "ffn_hidden_size", "ratio")
        given = {name: getattr(args, f"early_bird_{name}", None) for name in names}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def problems(self, shape: ModelShape, tensor_parallel: int, prefix: str) -> list[str]:
        """Return what is wrong with this for a model, as sentences that name the flags.

        Args:
            shape: Of the dense model.
            tensor_parallel: Ranks that share a layer.
            prefix: Of the flags' names, such as "--early-bird-".
        """
        heads, ffn = f"{prefix}num-attention-heads", f"{prefix}ffn-hidden-size"
        ratio, pattern = f"{prefix}ratio", f"{prefix}pattern"
        if self.pattern not in PATTERNS:
            return [f"{pattern} {self.pattern} is none of {', '.join(PATTERNS)}"]
        counts = {heads: self.num_attention_heads, ffn: self.ffn_hidden_size}
        given = [flag for flag, count in counts.items() if count is not None]
        found = []
        if self.pattern != STRUCTURED and given:
            found.append(
                f"{' and '.join(given)} remove whole units, but {pattern} {self.pattern} prunes "
                f"single weights: omit {' and '.join(given)}, or use {pattern} {STRUCTURED}"
            )
        if self.pattern != UNSTRUCTURED and self.ratio is not None:
            found.append(
                f"{ratio} is for {pattern} {UNSTRUCTURED} only, not {self.pattern}: omit {ratio}"
                + (f" and give {heads} or {ffn}" if self.pattern == STRUCTURED else "")
            )
        elif self.pattern == STRUCTURED and not given:
            found.append(f"give {heads}, {ffn} or both: how much the ticket keeps of each layer")
        if self.pattern == UNSTRUCTURED and not 0 < (self.ratio or 0) < 1:
            found.append(f"give {ratio} between 0 and 1: the share of weights to prune")
        if self.pattern == STRUCTURED:
            found += self._count_problems(shape, tensor_parallel, heads, ffn)
        columns = shape.num_attention_heads * shape.kv_channels, shape.ffn_hidden_size
        if self.pattern == TWO_OF_FOUR and any(c // tensor_parallel % 4 for c in columns):
            found.append(
                f"{pattern} {TWO_OF_FOUR} needs the columns of linear_proj and linear_fc2 on each "
                f"rank in fours, but {columns[0]} and {columns[1]} are split over "
                f"{tensor_parallel} ranks: use a smaller --tensor-model-parallel-size"
            )
        return found

    def _count_problems(self, shape: ModelShape, ranks: int, heads: str, ffn: str) -> list[str]:
        found = []
        step = shape.heads_per_group * ranks
        limits = (
            (heads, self.num_attention_heads, shape.num_attention_heads, step),
            (ffn, self.ffn_hidden_size, shape.ffn_hidden_size, NEURONS * ranks),
        )
        for flag, kept, there, multiple in limits:
            if kept is None or kept == there:
                continue
            if not 0 < kept < there:
                found.append(f"{flag} {kept} must be from 1 to {there}, which the model has")
            elif kept % multiple:
                reason = f"{shape.heads_per_group} query heads of a group" if flag == heads else ""
                reason = reason or f"the {NEURONS} of a tile"
                if ranks > 1:
                    reason += f" times --tensor-model-parallel-size {ranks}"
                near = (kept // multiple * multiple, -(-kept // multiple) * multiple)
                ways = " or ".join(str(n) for n in near if 0 < n <= there)
                ways = f"use {ways}" if ways else "keep all, or use fewer ranks"
                found.append(f"{flag} {kept} must be a multiple of {multiple} ({reason}): {ways}")
        return found

    def kept(self, shape: ModelShape) -> ModelShape:
        """Return the sizes of the ticket."""
        heads = self.num_attention_heads or shape.num_attention_heads
        return dataclasses.replace(
            shape,
            num_attention_heads=heads,
            num_query_groups=heads // shape.heads_per_group,
            ffn_hidden_size=self.ffn_hidden_size or shape.ffn_hidden_size,
        )

    def units(self, shape: ModelShape, hidden_size: int) -> dict[str, int]:
        """Return {kind: units of a layer} of all kinds that this prunes."""
        if self.pattern == STRUCTURED:
            both = {HEADS: self.num_attention_heads, FFN: self.ffn_hidden_size}
            counts = {HEADS: shape.num_query_groups, FFN: shape.ffn_hidden_size}
            return {kind: counts[kind] for kind, kept in both.items() if kept is not None}
        return {WEIGHTS: sum(a * b for a, b in matrix_shapes(shape, hidden_size).values())}

    def num_pruned(self, shape: ModelShape) -> dict[str, int]:
        """Return {kind: units of a layer to prune} of a structured target."""
        kept = self.kept(shape)
        return {
            HEADS: shape.num_query_groups - kept.num_query_groups,
            FFN: shape.ffn_hidden_size - kept.ffn_hidden_size,
        }

    def matrix_masks(
        self, weights: Mapping[str, Tensor], parallel: Parallel | None = None
    ) -> dict[str, Tensor]:
        """Return the bool masks of a layer's matrices, of this rank, if single weights are pruned.

        Args:
            weights: The four `units.MATRICES` of the layer, as this rank holds them.
            parallel: The ranks that share the layer; None: none.
        """
        add_up = (parallel or Parallel()).add_up
        matrices = [weights[name] for name in MATRICES]
        if self.pattern == TWO_OF_FOUR:
            found = [masks.two_of_four(matrix) for matrix in matrices]
        else:
            found = masks.smallest_weights(matrices, self.ratio or 0.0, add_up)
        return dict(zip(MATRICES, found, strict=True))

    def mask_of_layer(
        self,
        weights: Mapping[str, Tensor],
        shape: ModelShape,
        parallel: Parallel | None = None,
    ) -> dict[str, Tensor]:
        """Return what a layer prunes, {kind: packed bits of the whole layer}; on all ranks alike.

        Args:
            weights: The four `units.MATRICES` of the layer, as this rank holds them.
            shape: Of the whole model.
            parallel: The ranks that share the layer; None: none.
        """
        parallel = parallel or Parallel()
        if self.pattern == STRUCTURED:
            parts = importance(weights, shape)
            return self.least({kind: parallel.join(part, 0) for kind, part in parts.items()}, shape)
        whole = {}
        for name, mask in self.matrix_masks(weights, parallel).items():
            whole[name] = parallel.join(*masks.whole_matrix(name, mask, shape))
        return {WEIGHTS: masks.pack(masks.flat_weights(whole))}

    def random_mask_of_layer(
        self, layer_number: int, shape: ModelShape, seed: int, hidden_size: int
    ) -> dict[str, Tensor]:
        """Return a random mask of as many units or weights, the control, as `mask_of_layer`."""
        if self.pattern == STRUCTURED:
            return self.least(random_importance(layer_number, shape, seed), shape)
        return self.mask_of_layer(random_weights(layer_number, shape, seed, hidden_size), shape)

    def least(self, of_units: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
        """Return the packed mask of a layer's least important units, {kind: bits}."""
        pruned = self.num_pruned(shape)
        return {
            kind: masks.pack(masks.least_important(of_units[kind], pruned[kind]))
            for kind in self.units(shape, 0)
        }

    def as_dict(self) -> dict[str, Any]:
        """Return what identifies this, as plain values."""
        return dataclasses.asdict(self)
