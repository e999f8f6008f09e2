"""The arms of the study of policies: who chooses the tokens, in which layers, and how many.

Arms of a level read the same samples and process the same LayerTokens, to the last token. The kept
length is constant, as in the original TokenBypass.
"""

import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

from megatron_rltd import RandomLTDConfig
from megatron_rltd.config import parse_layers
from megatron_rltd.schedule import LayerTokenCost, Schedule

STRATA = 8


@dataclass(frozen=True)
class Size:
    """Model and length of all runs of a task.

    The levels need an even number of layers and a sequence of a multiple of 64 tokens.
    """

    num_layers: int = 8
    hidden_size: int = 64
    heads: int = 4
    seq_length: int = 128
    batch_size: int = 4
    steps: int = 300
    lr: float = 4e-3
    init_std: float = 0.1


# Learning rates were chosen for the dense run.
SIZES = {"causal": Size(), "masked": Size(lr=2e-3)}

LATE = "after the middle"  # TokenBypass's layers: L/2+1..L-1
MIDDLE = "all but first and last"  # random-LTD's layers: 2..L-1
NONE = "none"


@dataclass(frozen=True)
class Arm:
    """What sets a run apart from the others of its task and seed.

    Attributes:
        policy: Of ``--random-ltd-policy``; "none" drops nothing.
        layers: LATE or MIDDLE.
        kept: Share of the tokens that these layers keep.
        strata: See ``--random-ltd-strata``.
        random_share: See ``--random-ltd-bypass-random-share``.
    """

    policy: str = NONE
    layers: str = MIDDLE
    kept: Fraction = Fraction(1)
    strata: int = 1
    random_share: float = 0.0

    def config(self, size: Size) -> RandomLTDConfig | None:
        """Return what to ask random-LTD for; None if nothing is dropped."""
        if self.policy == NONE:
            return None
        kept = self.kept * size.seq_length
        layers = f"2-{size.num_layers - 1}"
        if self.layers == LATE:
            layers = f"{size.num_layers // 2 + 1}-{size.num_layers - 1}"
        return RandomLTDConfig(
            min_tokens=int(kept),
            constant=True,
            layers=layers,
            policy=self.policy,
            strata=self.strata,
            bypass_random_share=self.random_share,
        )

    def layer_tokens(self, size: Size) -> int:
        """Return the LayerTokens of a whole run."""
        config = self.config(size)
        dropped = len(parse_layers(config.layers, size.num_layers)) if config else 0
        kept = config.min_tokens if config else size.seq_length
        schedule = Schedule(size.seq_length, kept, None)
        counted = LayerTokenCost(schedule, size.num_layers, dropped)
        return counted.after(size.steps, size.batch_size).layer_tokens


def _chosen_by(layers: str, kept: Fraction) -> dict[str, Arm]:
    """Return arms that choose in the same layers and keep the same number of tokens."""

    def bypass(share: float) -> Arm:
        return Arm("token-bypass", layers, kept, random_share=share)

    return {
        "random": Arm("random", layers, kept),
        "strata": Arm("random", layers, kept, STRATA),
        "balanced": Arm("balanced", layers, kept),
        "bypass": bypass(0.0),
        "bypass-half": bypass(0.5),
        "bypass-random": bypass(1.0),
    }


def _level(kept: Fraction) -> dict[str, Arm]:
    """Return TokenBypass's layers, and random-LTD's with as many LayerTokens.

    These are twice as many, L-2 against L/2-1, so that each drops half of what one of those drops.
    """
    late = _chosen_by(LATE, kept)
    middle = _chosen_by(MIDDLE, 1 - (1 - kept) / 2)
    return {
        "random-late": late["random"],
        **{name: arm for name, arm in late.items() if name.startswith("bypass")},
        **{name: middle[name] for name in ("random", "strata", "balanced")},
    }


DENSE = Arm()
# {level: {name: arm}}, from mild to severe. All of a level cost the same.
LEVELS = {
    "mild": _level(Fraction(1, 2)),
    "medium": _level(Fraction(1, 8)),
    "severe": _chosen_by(MIDDLE, Fraction(1, 8)),
}

ARMS = {"dense": DENSE} | {
    f"{level}/{name}": arm for level, arms in LEVELS.items() for name, arm in arms.items()
}

# (arm, arm that it is compared with, what the difference says), for the arms of a level
_EVERYWHERE = [
    ("bypass", "bypass-random", "important tokens against drawn ones, all else being equal"),
    ("bypass-half", "bypass", "drawing half of the set"),
    ("bypass", "random", "TokenBypass against random-LTD"),
    ("bypass-half", "random", "with half of the set drawn, against random-LTD"),
    ("balanced", "random", "balancing"),
    ("strata", "random", f"{STRATA} strata against plain uniform sampling"),
]
# In the severe level all arms drop in the same layers.
_SAME_LAYERS = [
    ("bypass-random", "random", "one drawn set for all layers against one for each"),
]
_OTHER_LAYERS = [
    ("bypass", "random-late", "TokenBypass against random-LTD in the same layers"),
    ("bypass-half", "random-late", "with half of the set drawn, against that"),
    ("bypass-random", "random-late", "one drawn set for all layers against one for each"),
    ("random-late", "random", "fewer layers that drop more tokens"),
]


def questions() -> list[tuple[str, str, str]]:
    """Return (arm, arm that it is compared with, what the difference says)."""
    asked = []
    for level, arms in LEVELS.items():
        of_level = _EVERYWHERE + (_OTHER_LAYERS if "random-late" in arms else _SAME_LAYERS)
        asked += [(f"{level}/{a}", f"{level}/{b}", what) for a, b, what in of_level]
        asked.append((f"{level}/random", "dense", "random-LTD against dense, for less compute"))
    return asked
