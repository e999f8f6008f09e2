"""Who chooses the tokens that dropped layers keep: ``--random-ltd-policy``.

A policy turns a `Draw` into positions. Those of `random` and `balanced` are pure functions of
(seed, layer, sample, position): every rank, layout, recomputation and restart gets the same tokens.
`TokenBypass` also reads the tokens, and learns from their losses which of them matter.

Shapes: l layers, b samples, s sequence length, k kept tokens, S strata, v vocabulary.
"""

import base64
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.tokens import ops
from megatron_rltd.tokens.sampling import priorities


@dataclass(frozen=True)
class Draw:
    """What a policy chooses for: the dropped layers of a block in one forward pass.

    Attributes:
        seed: 0..2^64-1.
        layer_numbers: [l] int64, from 1.
        ordinals: Places of these layers among all dropped layers of the model, from 0.
        samples: [b] int64, global indices of the samples.
        seq_length: s, a multiple of `strata`.
        kept_tokens: k < s, a multiple of `strata`.
        strata: S.
    """

    seed: int
    layer_numbers: Tensor
    ordinals: tuple[int, ...]
    samples: Tensor
    seq_length: int
    kept_tokens: int
    strata: int = 1


class Policy:
    """Who chooses the tokens. This one is the paper's; see `megatron_rltd.tokens.sampling`.

    What it does not need does nothing: `observe` and the rest are for policies that learn.
    """

    learns = False

    def choose(self, library: Any, draw: Draw) -> Tensor:
        """Return the kept positions, [l, b, k] int32, ascending along the last dimension.

        [1, b, k] if all layers keep the same.

        Args:
            library: What implements the ops (`ops.find_library`).
        """
        return ops.sample_positions(
            library,
            draw.seed,
            draw.layer_numbers,
            draw.samples,
            draw.seq_length,
            draw.kept_tokens,
            draw.strata,
        )

    def begin(self, token_ids: Tensor) -> None:
        """Name the tokens of the forward pass that follows, [b, s]."""

    def observe(self, labels: Tensor, losses: Tensor, counted: Tensor) -> None:
        """Note the losses of a forward pass.

        Args:
            labels: [b, s] integers, the vocabulary entry that each position predicts.
            losses: [b, s].
            counted: [b, s] bool, where a label counts.
        """

    def learn(self, groups: Iterable[Any] = ()) -> None:
        """Use what all ranks have observed since the last call.

        Args:
            groups: Process groups to sum over, one after the other. All ranks that choose together
                must be in them: they must learn the same to the last bit.
        """

    def forget(self) -> None:
        """Forget what was observed since `learn`."""

    def state(self) -> str | None:
        """Return what was learned, as text; None if the policy does not learn."""
        return None

    def load(self, state: str) -> None:
        """Take over the `state` of an earlier run."""


class Balanced(Policy):
    """Let as equal a number of layers as possible keep each token: the numbers differ by at most 1.

    In each stratum, all tokens stand in an endless row: first all in one random order, then all in
    the next, and so on. Each dropped layer takes the next k/S of the row. If a layer takes the last
    tokens of one order, the next order has these at its end, so that the layer does not take them
    twice. The order with number c, from 0, goes by the priority that layer c has in `sampling`.
    """

    def choose(self, library: Any, draw: Draw) -> Tensor:
        """See the class and `Policy.choose`."""
        length, kept = draw.seq_length // draw.strata, draw.kept_tokens // draw.strata
        orders = -(-(max(draw.ordinals) + 1) * kept // length)
        numbers = torch.arange(orders, device=draw.samples.device)
        ranked = priorities(draw.seed, numbers, draw.samples, draw.seq_length)
        by_priority = ranked.unflatten(-1, (draw.strata, length)).argsort(dim=-1, stable=True)
        row: list[Tensor] = []
        for number, order in enumerate(by_priority):  # [b, S, s/S]
            taken = number * length % kept  # by the layer that goes on into this order
            if taken:
                is_taken = torch.zeros_like(order).scatter_(-1, row[-1][..., -taken:], 1)
                order = order.gather(-1, is_taken.gather(-1, order).argsort(dim=-1, stable=True))
            row.append(order)
        whole = torch.cat(row, dim=-1)
        chosen = torch.stack([whole[..., j * kept : (j + 1) * kept] for j in draw.ordinals])
        starts = torch.arange(0, draw.seq_length, length, device=whole.device)[:, None]
        return (chosen.sort(dim=-1).values + starts).flatten(-2).to(torch.int32)


class TokenBypass(Policy):
    """TokenBypass (Hou et al., arXiv 2203.13240): all dropped layers keep the important tokens.

    The importance of a vocabulary entry is a running mean of the loss with which the model predicts
    it. A token is as important as its entry. Among equals, the first in the sample is kept.

    In each step: `begin` and `observe` for every forward pass, then `learn` once.

    Source: ``official/projects/token_dropping`` of tensorflow/models. Unlike there, an entry that
    occurs several times in a step counts once, with the mean of its losses over all ranks.
    """

    learns = True
    INITIAL = 10.0
    ALWAYS, LAST = 1e4, -1e4
    MEMORY = 0.995  # of the old importance, in each step in which the entry occurs
    _UNIT = 2.0**20  # losses are summed as integers, so that no order of the sum changes a bit

    def __init__(
        self,
        vocab_size: int,
        always_kept: Collection[int] = (),
        padding: Collection[int] = (),
        random_share: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Begin with all entries equally important.

        Args:
            vocab_size: v.
            always_kept: Ids of the special tokens, which are kept before all others.
            padding: Ids that are kept after all others.
            random_share: Share of the k tokens that is chosen at random, of those that are not
                important enough, and in which no padding is kept before other tokens.
        """
        self._always, self._padding = sorted(always_kept), sorted(padding)
        self._random_share = random_share
        self.importance = torch.full((vocab_size,), self.INITIAL, device=device)  # [v] float32
        self._fix_special()
        self._token_ids: Tensor | None = None
        self.forget()

    def begin(self, token_ids: Tensor) -> None:
        """See `Policy.begin`."""
        self._token_ids = token_ids

    def choose(self, library: Any, draw: Draw) -> Tensor:
        """Return the positions that all layers keep, [1, b, k] int32, ascending.

        Raises:
            RuntimeError: The tokens are not known.
        """
        if self._token_ids is None:
            raise RuntimeError("random-LTD: token-bypass needs the token ids of the model's call")
        importance = self.importance[self._token_ids]  # [b, s]
        order = importance.argsort(dim=-1, descending=True, stable=True)
        at_random = int(draw.kept_tokens * self._random_share)
        important = draw.kept_tokens - at_random
        if at_random:
            rest = order[:, important:]
            layer = torch.zeros_like(draw.layer_numbers[:1])  # one that no model has
            drawn = priorities(draw.seed, layer, draw.samples, draw.seq_length)[0]
            drawn = drawn.expand(order.size(0), -1).gather(-1, rest)
            by_chance = drawn.argsort(dim=-1, stable=True)
            # Special tokens still come first, padding last.
            kind = importance.gather(-1, rest).gather(-1, by_chance)
            kind = (kind <= self.LAST).long() - (kind >= self.ALWAYS).long()
            by_chance = by_chance.gather(-1, kind.argsort(dim=-1, stable=True))
            order = torch.cat([order[:, :important], rest.gather(-1, by_chance)], dim=-1)
        return order[:, : draw.kept_tokens].sort(dim=-1).values.to(torch.int32)[None]

    def observe(self, labels: Tensor, losses: Tensor, counted: Tensor) -> None:
        """See `Policy.observe`. Never waits for the device."""
        losses = losses.detach().float()
        counts = (counted & losses.isfinite()).flatten()
        amounts = torch.where(counts, (losses.flatten() * self._UNIT).round(), 0.0)
        ids = torch.where(counts, labels.flatten(), 0).long()
        self._sums.index_add_(1, ids, torch.stack([amounts.long(), counts.long()]))

    def learn(self, groups: Iterable[Any] = ()) -> None:
        """Update the importance; see `Policy.learn`."""
        for group in groups:
            torch.distributed.all_reduce(self._sums, group=group)
        total, counts = self._sums
        mean = (total.double() / counts.clamp(min=1) / self._UNIT).float()
        new = self.MEMORY * self.importance + (1 - self.MEMORY) * mean
        self.importance = torch.where(counts > 0, new, self.importance)
        self._fix_special()
        self.forget()

    def forget(self) -> None:
        """See `Policy.forget`."""
        size, device = self.importance.numel(), self.importance.device
        self._sums = torch.zeros(2, size, dtype=torch.int64, device=device)

    def _fix_special(self) -> None:
        for ids, value in ((self._always, self.ALWAYS), (self._padding, self.LAST)):
            index = torch.tensor(ids, dtype=torch.int64, device=self.importance.device)
            self.importance.index_fill_(0, index, value)

    def state(self) -> str:
        """Return the importance as text: base64 of v little-endian float32."""
        return base64.b64encode(self.importance.cpu().numpy().astype("<f4").tobytes()).decode()

    def load(self, state: str) -> None:
        """Take over the `state` of an earlier run, whose vocabulary may be padded differently."""
        saved = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.float32)
        size = min(saved.numel(), self.importance.numel())
        self.importance[:size] = saved[:size].to(self.importance.device)
        self._fix_special()


PURE: dict[str, type[Policy]] = {"random": Policy, "balanced": Balanced}
