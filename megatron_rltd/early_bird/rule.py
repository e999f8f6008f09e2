"""When a ticket has emerged: one rule that covers the papers.

At a check, the newest mask is compared with each of the W - 1 masks before it. The ticket has
emerged if all these distances are at most ε, for every kind of units.

"Early" depends on how far checks are apart and on the learning rate's decay: masks taken closer to
each other differ less. So a rule says little without its interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A window W of masks, the newest included, and a threshold ε of their distances."""

    window: int
    threshold: float

    def has_emerged(self, distances: Mapping[str, Sequence[float]]) -> bool:
        """Return whether a ticket has emerged at a check.

        Args:
            distances: {kind: distances of the newest mask to those before it, newest first}. Only
                the first W - 1 count; if there are fewer, the window is not full.
        """
        return bool(distances) and all(
            len(of_kind) >= self.window - 1 and max(of_kind[: self.window - 1]) <= self.threshold
            for of_kind in distances.values()
        )


PRESETS = {
    # 1909.11957 section 3.2 and its released code: a queue of 5 masks, all distances at most 0.1.
    "early-bird": Rule(5, 0.1),
    # 2101.00063 names the same rule. Its released code draws at a fixed time: --early-bird-until.
    "early-bert": Rule(5, 0.1),
    # 2405.02353: consecutive masks; 0.01 for language models, 0.1 for vision transformers.
    "early-transformers": Rule(2, 0.01),
    "early-transformers-vision": Rule(2, 0.1),
}
