"""The distances of a mask to those before it, and what they say: a check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rltd.early_bird import masks
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.rule import Rule


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        iteration: Of the mask.
        distances: {kind: distances to the masks before it, newest first}.
        chance: {kind: distance of two independent masks of as many units}.
        emerged: Whether the rule says so.
    """

    iteration: int
    distances: dict[str, list[float]]
    chance: dict[str, float]
    emerged: bool

    def previous(self, kind: str) -> float | None:
        """Return the distance to the mask before it; None at the first check."""
        return self.distances[kind][0] if self.distances[kind] else None

    def largest(self, kind: str) -> float | None:
        """Return the largest distance of the window, which the rule compares."""
        return max(self.distances[kind], default=None)


def check(
    newest: Mask,
    earlier: Sequence[Mask],
    rule: Rule,
    add_up: Callable[[list[int]], list[int]] = lambda counts: counts,
) -> Check:
    """Compare a mask with those before it.

    Args:
        newest: All layers, or those of a pipeline stage.
        earlier: In any order; only the last W - 1 before `newest` count. They hold the layers of
            `newest`, and perhaps others.
        rule: The window and the threshold.
        add_up: Takes and returns counts, added over the pipeline stages.
    """
    before = sorted((m for m in earlier if m.iteration < newest.iteration), key=_iteration)
    before = before[::-1][: rule.window - 1]
    distances, chance = {}, {}
    for kind in newest.units:
        own = [newest.size(kind), newest.count(kind)]
        own += [newest.differing(mask, kind) for mask in before]
        size, pruned, *differing = add_up(own)
        distances[kind] = [bits / size for bits in differing]
        chance[kind] = masks.chance(pruned / size)
    return Check(newest.iteration, distances, chance, rule.has_emerged(distances))


def _iteration(mask: Mask) -> int:
    return mask.iteration


def describe(found: Check, rule: Rule) -> str:
    """Return a check as one line, such as the log shows."""
    parts = []
    for kind, of_kind in found.distances.items():
        if not of_kind:
            parts.append(f"{kind} -")
            continue
        share = f", {of_kind[0] / found.chance[kind]:.2f} of chance" if found.chance[kind] else ""
        text = f"{kind} {of_kind[0]:.4f} to the check before{share}"
        if rule.window > 2:
            text += f", at most {max(of_kind):.4f} to the last {len(of_kind)}"
        parts.append(text)
    return f"iteration {found.iteration}: mask distance " + "; ".join(parts)
