"""The arms of the study of Early-Bird tickets: what is trained, for how many steps, and its FLOPs.

FLOPs are those of the GEMMs, attention and the LM head, forward and backward. A search costs the
dense steps before the draw and nothing else.
"""

import dataclasses
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

from lib import text

from megatron_rltd.early_bird.masks import STRUCTURED, TWO_OF_FOUR, UNSTRUCTURED
from megatron_rltd.early_bird.target import Target
from megatron_rltd.early_bird.units import ModelShape

DRAWN_AT = Fraction(1, 5)  # of a dense run's steps
REWOUND_TO = WARM_UP = Fraction(1, 20)
INTERVALS = (Fraction(1, 50), Fraction(1, 25))  # between checks, of a dense run's steps
PRETRAINING, TUNING = "pretraining", "tuning"


@dataclass(frozen=True)
class Size:
    """Models and lengths of a seed's runs; samples of each validation set."""

    num_layers: int = 4
    hidden_size: int = 128
    heads: int = 8
    ffn_hidden_size: int = 512
    kept_heads: int = 4
    kept_ffn_hidden_size: int = 320
    seq_length: int = 128
    batch_size: int = 4
    steps: int = 300
    lr: float = 2e-3
    tuning_steps: int = 100
    tuning_lr: float = 5e-4
    validation_samples: int = 128

    def steps_of(self, phase: str) -> int:
        """Return the steps of the dense run."""
        return self.steps if phase == PRETRAINING else self.tuning_steps

    def dense(self) -> ModelShape:
        """Return the dense model's sizes."""
        head = self.hidden_size // self.heads
        return ModelShape(
            self.num_layers, self.heads, self.heads, head, self.ffn_hidden_size, gated=False
        )

    def target(self) -> Target:
        """Return what a ticket keeps."""
        return Target(STRUCTURED, self.kept_heads, self.kept_ffn_hidden_size)

    def ticket(self) -> ModelShape:
        """Return a ticket's sizes: those of the small model, too."""
        return self.target().kept(self.dense())


def flops_of_step(size: Size, shape: ModelShape) -> int:
    """Return the FLOPs of a training step of a model, its attention being causal."""
    heads = shape.num_attention_heads * shape.kv_channels
    groups = shape.num_query_groups * shape.kv_channels
    qkv_and_proj = size.hidden_size * (2 * heads + 2 * groups)
    neurons = size.hidden_size * shape.ffn_hidden_size * (3 if shape.gated else 2)
    core = heads * size.seq_length  # two products, of half of the scores each
    of_token = shape.num_layers * (qkv_and_proj + neurons + core)
    of_token += size.hidden_size * text.VOCABULARY
    # 2 for a multiplication and an addition, 3 for the forward pass and the backward's two.
    return 6 * of_token * size.batch_size * size.seq_length


# What a run may cost: as many steps as the dense run; the FLOPs of `ticket`; those of `dense`.
EQUAL_STEPS, TICKETS, DENSES = "steps of dense", "FLOPs of ticket", "FLOPs of dense"
ALL, SMALL = "all", "small"  # no draw: the dense model, or one of the ticket's size from scratch
NORM, RANDOM, LARGEST_REMOVED = "norm", "random", "largest removed"


@dataclass(frozen=True)
class Arm:
    """What sets a run apart from the others of its seed.

    Attributes:
        units: ALL, SMALL, or how a draw chooses.
        budget: What the run may cost.
        pattern: Of `masks.PATTERNS`: what is drawn. A mask of single weights is enforced.
        resets: Whether a ticket begins with fresh moments.
        rewinds: Whether it begins with the weights and moments of an earlier step.
        phase: PRETRAINING, or TUNING of the trained dense model on other text.
    """

    units: str = ALL
    budget: str = EQUAL_STEPS
    pattern: str = STRUCTURED
    resets: bool = False
    rewinds: bool = False
    phase: str = PRETRAINING

    def target(self, size: Size) -> Target:
        """Return what the draw keeps."""
        if self.pattern == STRUCTURED:
            return size.target()
        return Target(self.pattern, ratio=0.5 if self.pattern == UNSTRUCTURED else None)


ARMS = {
    "dense": Arm(),
    "dense-short": Arm(budget=TICKETS),
    "ticket": Arm(NORM),
    "ticket-reset": Arm(NORM, resets=True),
    "random": Arm(RANDOM),
    "ticket-long": Arm(NORM, DENSES),
    "random-long": Arm(RANDOM, DENSES),
    "rewind-long": Arm(NORM, DENSES, rewinds=True),
    "small-long": Arm(SMALL, DENSES),
    "small-short": Arm(SMALL, TICKETS),
    "tuning/dense": Arm(phase=TUNING),
    "tuning/ticket": Arm(NORM, phase=TUNING),
    "tuning/random": Arm(RANDOM, phase=TUNING),
    "tuning/largest-removed": Arm(LARGEST_REMOVED, phase=TUNING),
    "unstructured": Arm(NORM, pattern=UNSTRUCTURED),
    "unstructured-random": Arm(RANDOM, pattern=UNSTRUCTURED),
    "2:4": Arm(NORM, pattern=TWO_OF_FOUR),
}

QUESTIONS = [  # (arm, arm that it is compared with, what the difference says)
    ("ticket", "random", "does the choice matter, equal steps"),
    ("ticket-long", "random-long", "does the choice matter, FLOPs of dense"),
    ("ticket", "dense", "what a ticket costs at equal steps, for fewer FLOPs"),
    ("ticket", "dense-short", "at equal FLOPs, fewer than dense's"),
    ("ticket-long", "dense", "at equal FLOPs"),
    ("small-short", "ticket", "a small model from scratch at the ticket's FLOPs"),
    ("small-long", "ticket-long", "a small model from scratch at dense's FLOPs"),
    ("rewind-long", "ticket-long", "rewinding, at dense's FLOPs"),
    ("ticket-reset", "ticket", "fresh moments instead of carried ones"),
    ("unstructured", "unstructured-random", "does the choice of single weights matter"),
    ("unstructured", "dense", "half of the weights, equal steps"),
    ("2:4", "dense", "two of every four weights, equal steps"),
    ("tuning/ticket", "tuning/random", "tuning: does the choice matter"),
    ("tuning/ticket", "tuning/largest-removed", "tuning: against the opposite choice"),
    ("tuning/ticket", "tuning/dense", "tuning: what a ticket costs at equal steps"),
]


@dataclass(frozen=True)
class Plan:
    """A run in steps.

    Attributes:
        before: Dense steps before the draw; without a draw, 0.
        start: Step of the learning rate's schedule at which what is drawn begins.
        after: Steps of what is drawn; without a draw, of the whole run.
        shape: Of the model that ends the run.
        flops: Of all of it.
    """

    before: int
    start: int
    after: int
    shape: ModelShape
    flops: int

    @property
    def schedule(self) -> int:
        """Steps over which the learning rate decays: before the draw, too."""
        return self.start + self.after


def plan(arm: Arm, size: Size) -> Plan:
    """Return how long an arm trains what."""
    steps = size.steps_of(arm.phase)
    dense = flops_of_step(size, size.dense())
    if arm.units == ALL or arm.pattern != STRUCTURED:
        shape, each = size.dense(), dense
    else:
        shape, each = size.ticket(), flops_of_step(size, size.ticket())
    before = start = 0
    if arm.units not in (ALL, SMALL):
        before = start = int(steps * DRAWN_AT)
    if arm.rewinds:
        start = int(steps * REWOUND_TO)
    if arm.budget == EQUAL_STEPS:
        after = steps - before
    else:
        of_ticket = plan(dataclasses.replace(ARMS["ticket"], phase=arm.phase), size).flops
        budget = of_ticket if arm.budget == TICKETS else steps * dense
        after = (budget - before * dense) // each
    return Plan(before, start, after, shape, before * dense + after * each)


def warm_up(steps: int) -> int:
    """Return the steps of a run's warm-up."""
    return max(1, int(steps * WARM_UP))
