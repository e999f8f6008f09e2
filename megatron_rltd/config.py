"""The options of random-LTD.

`RandomLTDConfig` is what a user asks for; its fields are the ``--random-ltd-...`` flags and their
docstrings the ``--help``. `resolved_config.resolve` checks it against a model and a layout.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


class ConfigError(ValueError):
    """The user asked for something that cannot work. Every rank finds the same problem.

    The message names flags, values and ways out.
    """

    def __init__(self, problems: list[str]):
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"cannot run with these arguments:{lines}")
        self.problems = problems


class RankConfigError(ConfigError):
    """A `ConfigError` that only some ranks may find, such as a file that is missing on one node.

    A single problem stands on one line, so that the lines of many ranks do not mix.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace("\n  -", "") if len(self.problems) == 1 else text


class ModelError(RuntimeError):
    """A model is not one in whose layers tokens can be dropped. Only some ranks may find this."""


@dataclass(frozen=True)
class RandomLTDConfig:
    """random-LTD: every middle layer processes only a random, sorted subset of the tokens
    (arXiv 2211.11586)."""

    min_tokens: int = 128
    """Tokens per sample that a dropped layer keeps at the start of training. The default is the
    paper's."""

    ramp_iters: int | None = None
    """Length of the ramp in iterations. After the ramp nothing is dropped, or soon after it if the
    increment does not divide the sequence length. The paper uses 0.7 of the iterations of a dense
    run on the same token budget."""

    ramp_samples: int | None = None
    """Length of the ramp in samples, instead of iterations."""

    increment: int = 16
    """Between the minimum and the sequence length, the kept length is a multiple of this number of
    tokens. It then takes few distinct values, and these suit tensor cores. The default is the
    paper's."""

    root_degree: int = 1
    """The kept length grows with this root of the training progress: 1 for linear growth, 2 for the
    square root."""

    constant: bool = False
    """Keep the minimum number of tokens for the whole run, without a ramp. This is the paper's
    ablation."""

    layers: str | None = None
    """Layers that drop tokens: comma-separated numbers and ranges such as 2-11,14-23, counted from
    1 like Megatron's layer_number. Default: all but the first and the last; with token-bypass, all
    after the middle of the model but the last. In a HybridModel, the numbers count groups: an
    attention or recurrent layer and the MLP or MoE layers after it."""

    policy: Literal["random", "balanced", "token-bypass"] = "random"
    """Who chooses the kept tokens. random: a draw for each layer and sample, as in the paper.
    balanced: a draw in which as equal a number of layers as possible keeps each token. token-bypass
    (arXiv 2203.13240): one set for all layers, of the tokens that are hardest to predict. It is the
    paper's baseline, and by default only the layers after the middle of the model drop."""

    bypass_random_share: float = 0.0
    """Share of the kept tokens, from 0 to 1, that token-bypass chooses at random instead of by
    importance."""

    recurrent_layers: bool = False
    """In a HybridModel, let groups with a Mamba or gated-delta-net layer drop tokens too. The kept
    tokens are a shorter sequence to such a layer. By default these groups see all tokens, because
    their state passes over every position."""

    strata: int = 0
    """Number of equal slices of the sequence; each slice keeps the same number of tokens. 0: the
    fewest slices that the parallel layout needs. 1: plain uniform sampling as in the paper. You can
    continue a run on another layout if the fewest slices of that layout divide this number."""

    shared_indices: bool = False
    """Draw one set of kept tokens for all samples of a micro-batch, not one for each sample. The
    micro-batch size then decides which tokens are kept."""

    seed: int | None = None
    """Seed of the sampling of kept tokens. Default: --seed."""

    backend: Literal["auto", "cuda", "torch"] = "auto"
    """Implementation that chooses and moves the tokens. auto: the compiled kernels if they are
    built, otherwise plain torch. cuda: the kernels, or an error if they are not built. torch: plain
    torch."""

    grow_micro_batch: int = 1
    """While few tokens are kept, let one pass take several micro-batches of the step, up to this
    number. The pass takes the largest power of two that divides the step's micro-batches, if the
    layers then process no more tokens than in a pass that drops nothing. Data, kept tokens and
    losses do not change."""

    grow_min_micro_batches: int | None = None
    """Smallest number of passes in a step if micro-batches are joined. Default: the number of
    pipeline stages."""

    preflight: bool = False
    """Before the second iteration, run forward and backward passes at the largest kept lengths,
    without an update. You then see the run's peak memory at once, not when the ramp ends."""


FIELDS = tuple(f.name for f in dataclasses.fields(RandomLTDConfig))
# These say how a run computes, not what: you may change them when you continue a run.
FREE = ("backend", "grow_micro_batch", "grow_min_micro_batches", "preflight")
FLAG_PREFIX = "random_ltd_"


def to_flag(name: str) -> str:
    """Return the command-line flag of a name in Megatron's arguments."""
    return "--" + name.replace("_", "-")


def flag(field: str) -> str:
    """Return the command-line flag of a field of `RandomLTDConfig`."""
    return to_flag(FLAG_PREFIX + field)


def options_in_force(config: RandomLTDConfig, num_layers: int) -> dict[str, Any]:
    """Return the options that decide what a run computes; equal for configs that mean the same.

    Args:
        num_layers: In a HybridModel, the number of groups.

    Raises:
        ValueError: See `parse_layers`.
    """
    without_effect = set(FREE)
    if config.constant:
        without_effect |= {"increment", "root_degree"}
    options = {name: getattr(config, name) for name in FIELDS if name not in without_effect}
    return {**options, "layers": parse_layers(config.layers, num_layers, config.policy)}


def parse_layers(text: str | None, num_layers: int, policy: str = "random") -> tuple[int, ...]:
    """Return the layer numbers of ``--random-ltd-layers``, ascending.

    Args:
        num_layers: In a HybridModel, the number of groups.
        policy: It decides the default.

    Raises:
        ValueError: Not numbers and ranges, out of 1..num_layers, or the same layer twice.
    """
    if text is None:
        return tuple(range(num_layers // 2 + 1 if policy == "token-bypass" else 2, num_layers))
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = first.isdecimal() and (not dash or last.isdecimal())
        if not numbers or int(last or first) < int(first):
            raise ValueError(f"{part.strip()!r} is neither a number nor a range such as 2-11")
        layers += range(int(first), int(last or first) + 1)
    wrong = sorted({n for n in layers if not 1 <= n <= num_layers or layers.count(n) > 1})
    if wrong:
        raise ValueError(f"layers go from 1 to {num_layers}, each at most once; wrong: {wrong}")
    return tuple(sorted(layers))


def format_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `parse_layers` takes them, such as 2-11,14."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
