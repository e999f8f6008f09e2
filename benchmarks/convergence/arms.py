"""The arms of the convergence study: which flags each is trained with, and how long it is.

Every length follows from one number, the steps D of the dense run. As in the paper's GPT-3 1.3B
(arXiv 2211.11586), dropped layers keep s/16 tokens at first, all but the first and the last layer
drop, and the ramp takes 0.7 of the steps of a dense run of the same budget. Peak learning rate,
minimum and warm-up (in samples) are the same in all arms; every decay ends with its own run.
"""

import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

from megatron_rltd.schedule import LayerTokenCost, Progress, Schedule

SEQ_LENGTH = 256
NUM_LAYERS = 8
NUM_DROPPED = NUM_LAYERS - 2
BATCH_SIZE = 2
MIN_TOKENS = SEQ_LENGTH // 16
INCREMENT = 16
RAMP = Fraction(7, 10)
WARM_UP = Fraction(1, 20)
FEWEST_STEPS = 10  # with fewer there is no ramp and no warm-up to speak of

SAMPLES, LAYER_TOKENS = "samples", "LayerTokens"
NONE, RAMPED, CONSTANT = "none", "ramp", "constant"


@dataclass(frozen=True)
class Arm:
    """What sets a run apart from the others.

    Attributes:
        dropping: NONE, RAMPED (MSLG) or CONSTANT, which keeps so many tokens throughout that the
            LayerTokens are those of RAMPED on the same samples.
        budget: Whether the run ends when it has read as many SAMPLES as the dense run or when it
            has processed as many LAYER_TOKENS.
        share: Of the dense run's samples or LayerTokens.
        layer_token_lr: Whether the learning rate advances by LayerTokens, not by samples.
        long_warm_up: Whether the warm-up has as many steps as LayerToken LR makes of it in RAMPED,
            where few tokens are kept at first. Without it, the steps of a dense run.
        strata: 1 draws kept tokens uniformly from the sequence, as the paper does; more from each
            of so many slices alike. The default of the study is the paper's.
    """

    dropping: str = NONE
    budget: str = SAMPLES
    share: Fraction = Fraction(1)
    layer_token_lr: bool = False
    long_warm_up: bool = False
    strata: int = 1


SHORT = Fraction(2, 3)  # the paper's 200B of 300B

# {name: arm}
ARMS = {
    "dense": Arm(),
    "dense-short": Arm(share=SHORT),
    "ltd-same-data": Arm(RAMPED, layer_token_lr=True),
    "ltd-same-data-plain-lr": Arm(RAMPED),
    "ltd-same-compute": Arm(RAMPED, LAYER_TOKENS, layer_token_lr=True),
    "ltd-same-compute-plain-lr": Arm(RAMPED, LAYER_TOKENS),
    "ltd-same-compute-strata": Arm(RAMPED, LAYER_TOKENS, layer_token_lr=True, strata=16),
    "ltd-short": Arm(RAMPED, LAYER_TOKENS, SHORT, layer_token_lr=True),
    "constant-same-data": Arm(CONSTANT, layer_token_lr=True),
    "dense-long-warm-up": Arm(long_warm_up=True),
}

# (arm, arm that it is compared with, what the difference says)
QUESTIONS = [
    ("ltd-same-data", "dense", "random-LTD on the same samples, for less compute"),
    ("ltd-same-data-plain-lr", "dense", "the same with the dense run's learning rate"),
    ("ltd-same-compute", "dense", "random-LTD at the same LayerTokens, on more samples"),
    ("ltd-short", "dense-short", "the same at 2/3 of the budget"),
    ("ltd-short", "dense", "random-LTD at 2/3 of the LayerTokens: the paper's saving of a third"),
    ("dense-short", "dense", "what that third is worth to a dense run"),
    ("ltd-same-data", "ltd-same-data-plain-lr", "LayerToken LR, same samples"),
    ("ltd-same-compute", "ltd-same-compute-plain-lr", "LayerToken LR, same LayerTokens"),
    ("dense-long-warm-up", "dense", "what of it is the longer warm-up, in a dense run"),
    ("ltd-same-data", "dense-long-warm-up", "same samples, as many steps of warm-up"),
    ("ltd-same-compute", "dense-long-warm-up", "same LayerTokens, as many steps of warm-up"),
    ("ltd-same-data", "constant-same-data", "MSLG against constant drop, same samples and compute"),
    ("ltd-same-compute-strata", "ltd-same-compute", "16 strata against plain uniform sampling"),
]


def schedule(arm: Arm, steps: int) -> Schedule:
    """Return the kept length of an arm.

    Args:
        steps: D, of the dense run.
    """
    if arm.dropping == NONE:
        return Schedule(SEQ_LENGTH, SEQ_LENGTH, None)
    if arm.dropping == CONSTANT:
        ramped = schedule(Arm(RAMPED, share=arm.share), steps)
        length = int(steps * arm.share)
        return Schedule(SEQ_LENGTH, round(ramped.kept_token_sum(length) / length), None)
    return Schedule(SEQ_LENGTH, MIN_TOKENS, int(steps * arm.share * RAMP), INCREMENT)


def planned(arm: Arm, steps: int) -> Progress:
    """Return where a run of an arm ends."""
    counted = LayerTokenCost(schedule(arm, steps), NUM_LAYERS, NUM_DROPPED)
    if arm.budget == LAYER_TOKENS:
        tokens = _layer_tokens_per_layer(arm, steps) * NUM_LAYERS
        return counted.until(lambda run: run.layer_tokens >= tokens, lambda _: BATCH_SIZE)
    return counted.after(int(steps * arm.share), BATCH_SIZE)


def flags(arm: Arm, steps: int) -> list[str]:
    """Return the flags that make a training run this arm, all else being equal."""
    kept = schedule(arm, steps)
    words = ["--lr-warmup-samples", str(_warm_up_steps(arm, steps) * BATCH_SIZE)]
    if arm.budget == LAYER_TOKENS:
        words += ["--train-layer-tokens", str(_layer_tokens_per_layer(arm, steps))]
    else:
        words += ["--train-samples", str(int(steps * arm.share) * BATCH_SIZE)]
    if arm.dropping != NONE:
        words += ["--random-ltd", "--random-ltd-min-tokens", str(kept.min_tokens)]
        words += ["--random-ltd-strata", str(arm.strata)]
    if arm.dropping == RAMPED:
        words += ["--random-ltd-increment", str(kept.increment)]
        words += ["--random-ltd-ramp-iters", str(kept.ramp_length)]
    if arm.dropping == CONSTANT:
        words += ["--random-ltd-constant"]
    if arm.layer_token_lr:
        words += ["--layer-token-lr"]
    return words


def _warm_up_steps(arm: Arm, steps: int) -> int:
    """Return the steps of warm-up that are asked for: LayerToken LR takes longer over them."""
    usual = max(1, int(steps * WARM_UP))
    if not arm.long_warm_up:
        return usual
    counted = LayerTokenCost(schedule(Arm(RAMPED), steps), NUM_LAYERS, NUM_DROPPED)
    tokens = usual * BATCH_SIZE * counted.dense
    return counted.until(lambda run: run.layer_tokens >= tokens, lambda _: BATCH_SIZE).iteration


def _layer_tokens_per_layer(arm: Arm, steps: int) -> int:
    """Return the budget in LayerTokens per layer, those of a dense run of as many whole steps."""
    return int(steps * arm.share) * BATCH_SIZE * SEQ_LENGTH
