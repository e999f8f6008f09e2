"""What a run does: its options, checked against the model and the parallel layout.

All problems are found before anything is built, and reported together. What random-LTD refuses to
run with is in `refusals`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from megatron_rltd.config import ConfigError, RandomLTDConfig, flag, format_ranges, parse_layers
from megatron_rltd.groups import RECURRENT, SPARSE, number_layers, split_pattern
from megatron_rltd.schedule import LayerTokenCost, Schedule


@dataclass(frozen=True)
class ModelFacts:
    """What `resolve` needs to know about a model and its layout.

    Attributes:
        seq_length: s, the tokens of a sample.
        num_layers: Layers of the decoder (or BERT's encoder) over all pipeline stages; in a
            HybridModel, groups of layers (see `megatron_rltd.groups`).
        micro_batch_size: Samples of a micro-batch; 1 if it is not known.
        sequence_parallel_size: The tensor-parallel size under sequence parallelism, else 1.
        context_parallel_size: The context-parallel size.
        pipeline_parallel_size: Pipeline stages.
        passes_of_chunk: Passes that interleaved pipeline stages run in a row through one model
            chunk, or None.
        row_multiple: The rows of a dropped layer on one rank must be a multiple of this (FP8).
        seed: The seed if the config has none.
        groups: The symbols of each group of a HybridModel; empty if each layer is a group.
    """

    seq_length: int
    num_layers: int
    micro_batch_size: int = 1
    sequence_parallel_size: int = 1
    context_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    passes_of_chunk: int | None = None
    row_multiple: int = 1
    seed: int = 1234
    groups: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        seq_length: int,
        seed: int,
        micro_batch_size: int = 1,
        pattern: str | None = None,
    ) -> "ModelFacts":
        """Return what Megatron says about a model and its layout.

        Args:
            config: A ``TransformerConfig`` or Megatron's validated arguments, which use the same
                names.
            micro_batch_size: 1 if it is not known.
            pattern: The ``hybrid_layer_pattern`` of a HybridModel.
        """
        groups = split_pattern(pattern) if pattern else ()
        is_block_scaled = getattr(config, "fp8_recipe", None) == "mxfp8"
        fp4 = getattr(config, "fp4", None)
        has_fp8 = bool(getattr(config, "fp8", None) or fp4)
        tensor_parallel_size = config.tensor_model_parallel_size
        return cls(
            seq_length=seq_length,
            num_layers=len(groups) or config.num_layers,
            micro_batch_size=micro_batch_size,
            sequence_parallel_size=tensor_parallel_size if config.sequence_parallel else 1,
            context_parallel_size=config.context_parallel_size,
            pipeline_parallel_size=config.pipeline_model_parallel_size,
            passes_of_chunk=_interleaved_passes(config),
            row_multiple=(32 if is_block_scaled or fp4 else 16) if has_fp8 else 1,
            seed=seed,
            groups=groups,
        )

    def why_full(self, number: int, recurrent_layers: bool) -> str | None:
        """Return why a group cannot drop tokens, or None if it can.

        Args:
            number: Of the group, from 1.
            recurrent_layers: Whether recurrent layers may drop.
        """
        symbols = self.groups[number - 1] if self.groups else ""
        for symbol in symbols:
            if symbol in RECURRENT and not recurrent_layers:
                return (
                    f"group {number} ({symbols}) has a {RECURRENT[symbol]} layer, whose state "
                    f"passes over every position: add {flag('recurrent_layers')}, or omit "
                    f"group {number}"
                )
            if symbol in SPARSE:
                return (
                    f"group {number} ({symbols}) has {SPARSE[symbol]}, which shares positions "
                    f"between layers and never drops: omit it in {flag('layers')}, or train "
                    "without --random-ltd if no other group can drop"
                )
        return None


@dataclass(frozen=True)
class ResolvedConfig:
    """A config that fits its model: everything that a run needs, with no default left open.

    Attributes:
        schedule: The kept length; its position counts samples if `ramp_in_samples`.
        ramp_in_samples: Whether the schedule's position is samples consumed, not iterations.
        dropped_layers: Layer numbers from 1, ascending; in a HybridModel, group numbers.
        strata: S.
        seed: Seed of the sampling.
    """

    config: RandomLTDConfig
    model: ModelFacts
    schedule: Schedule
    ramp_in_samples: bool
    dropped_layers: tuple[int, ...]
    strata: int
    seed: int

    @functools.cached_property
    def group_of(self) -> dict[int, int]:
        """Megatron's layer number to the number by which `dropped_layers` knows the layer."""
        return number_layers(self.model.groups, self.model.num_layers)

    @property
    def crossed_layer(self) -> int | None:
        """The layer before the dropped ones that processes all tokens but changes only kept ones.

        Only token-bypass has one. In the original, this layer has kept queries and all keys; here
        it does the work of a full layer, and is counted as one.
        """
        return self.dropped_layers[0] - 1 if self.config.policy == "token-bypass" else None

    @property
    def layer_tokens(self) -> LayerTokenCost:
        """What a step consumes."""
        return LayerTokenCost(
            self.schedule, self.model.num_layers, len(self.dropped_layers), self.ramp_in_samples
        )

    def describe(self, num_micro_batches: int) -> list[str]:
        """Return lines for the log that say what the run will do.

        Args:
            num_micro_batches: Micro-batches of a step.
        """
        config, schedule, s = self.config, self.schedule, self.schedule.seq_length
        length = f"{schedule.min_tokens:,} of {s:,} tokens"
        if schedule.min_tokens == s:
            length = f"all {s:,}; nothing is dropped"
        elif schedule.ramp_length is not None:
            unit = "samples" if self.ramp_in_samples else "iterations"
            root = f" with root degree {schedule.root_degree}" * (schedule.root_degree != 1)
            length += f" at first, all after {schedule.first_position(s):,} {unit}{root}"
            length += f", in steps of {schedule.increment:,}"
        dropped, layers = set(self.dropped_layers), self.model.num_layers
        what = "groups of layers" if self.model.groups else "layers"
        full = [n for n in range(1, layers + 1) if n not in dropped]
        share = "one draw for each " + ("micro-batch" if config.shared_indices else "sample")
        draws = f"draws: seed {self.seed}, {self.strata} strata, {share}"
        if config.policy == "balanced":
            draws += ", balanced over layers"
        if self.crossed_layer is not None:
            draws = (
                "token-bypass: the kept tokens of a sample are those of the highest importance, "
                f"{config.bypass_random_share:.0%} of them drawn with seed {self.seed}; layer "
                f"{self.crossed_layer} processes all tokens and changes only these"
            )
        cost = self.layer_tokens.per_sample(schedule.kept_tokens(0)) / self.layer_tokens.dense
        lines = [
            f"kept tokens: {length}",
            f"{what} that drop: {format_ranges(self.dropped_layers)} of {layers}; {what} that see "
            f"all tokens: {format_ranges(full) or 'none'}",
            draws,
            f"LayerTokens of the first step: {cost:.1%} of a dense one's",
        ]
        if self.model.groups:
            lines.insert(2, f"groups of layers by their symbols: {_list_groups(self.model)}")
            if len(set(self.model.groups)) > 1:
                lines[-1] += ", with each group counted alike; the FLOPs are of what each costs"
        if config.grow_micro_batch > 1:
            lines.append(self.joined_in_words(num_micro_batches))
        return lines

    def micro_batches_per_pass(self, kept: int, num_micro_batches: int) -> int:
        """Return how many of a step's micro-batches one pass takes.

        Args:
            kept: k, in tokens.
            num_micro_batches: Of the step.
        """
        tokens, stages = self.layer_tokens, self.model.pipeline_parallel_size
        least = self.config.grow_min_micro_batches or stages

        def fits(count: int) -> bool:
            passes, rest = divmod(num_micro_batches, count)
            if rest or passes < least or count * tokens.per_sample(kept) > tokens.dense:
                return False
            # Megatron's interleaved schedule requires this.
            row = self.model.passes_of_chunk
            return row is None or (row <= passes and not 0 < passes % row < stages)

        count = 1
        for larger in (2**n for n in range(1, self.config.grow_micro_batch.bit_length())):
            count = larger if fits(larger) else count
        return count

    def joined_micro_batches(self, num_micro_batches: int) -> list[tuple[int, int]]:
        """Return (first kept length, micro-batches of a pass from there), in order of the ramp."""
        found: list[tuple[int, int]] = []
        for _, kept in self.schedule.levels():
            count = self.micro_batches_per_pass(kept, num_micro_batches)
            if not found or found[-1][1] != count:
                found.append((kept, count))
        return found

    def joined_in_words(self, num_micro_batches: int) -> str:
        """Return the same as a sentence."""
        levels = self.joined_micro_batches(num_micro_batches)
        listed = ", ".join(f"{count} from {kept:,} kept tokens" for kept, count in levels)
        return f"micro-batches in one pass ({num_micro_batches} in a step): {listed}"


def _interleaved_passes(config: Any) -> int | None:
    """Return the passes in a row through one model chunk of an interleaved pipeline, or None."""
    if not getattr(config, "virtual_pipeline_model_parallel_size", None):
        return None
    row = getattr(config, "microbatch_group_size_per_vp_stage", None)
    return row or config.pipeline_model_parallel_size


def _list_groups(model: ModelFacts) -> str:
    numbers: dict[str, list[int]] = {}
    for number, group in enumerate(model.groups, 1):
        numbers.setdefault(group, []).append(number)
    return "; ".join(f"{group}: {format_ranges(found)}" for group, found in numbers.items())


def _nothing_to_drop(model: ModelFacts, reasons: dict[int, str | None]) -> str:
    if not model.groups:
        return (
            f"a model of --num-layers {model.num_layers} has no middle layer to drop tokens in; "
            f"choose layers with {flag('layers')}"
        )
    found = "; ".join(reason for reason in reasons.values() if reason)
    return (
        f"no group of the --hybrid-layer-pattern drops tokens by default ({_list_groups(model)}): "
        + (found or f"the first and the last see all; choose groups with {flag('layers')}")
    )


def fewest_strata(sequence_parallel_size: int = 1, context_parallel_size: int = 1) -> int:
    """Return the smallest S with which every rank holds whole strata (`tokens.shards`)."""
    chunks = 2 * context_parallel_size if context_parallel_size > 1 else 1
    return chunks * sequence_parallel_size


def resolve(config: RandomLTDConfig, model: ModelFacts) -> ResolvedConfig:
    """Check a config against a model and fill in what it leaves open.

    Raises:
        ConfigError: It names every problem.
    """
    problems: list[str] = []

    def require(condition: bool, message: str) -> bool:
        if not condition:
            problems.append(message)
        return condition

    s, k0, q = model.seq_length, config.min_tokens, config.increment
    ramps = [n for n in ("ramp_iters", "ramp_samples") if getattr(config, n) is not None]
    require(
        len(ramps) + config.constant == 1,
        f"give exactly one of {flag('ramp_iters')}, {flag('ramp_samples')} and {flag('constant')}; "
        f"given: {', '.join(flag(n) for n in ramps + ['constant'] * config.constant) or 'none'}",
    )
    least = ["grow_min_micro_batches"] if config.grow_min_micro_batches is not None else []
    for name in (*ramps, "increment", "root_degree", "grow_micro_batch", *least):
        value = getattr(config, name)
        require(value > 0, f"{flag(name)} {value} must be positive")
    seed = model.seed if config.seed is None else config.seed
    require(0 <= seed < 2**64, f"{flag('seed')} {seed} must be between 0 and 2**64 - 1")
    require(
        0 < k0 <= s,
        f"{flag('min_tokens')} {k0}{' (the default)' * (k0 == RandomLTDConfig.min_tokens)} must be "
        f"between 1 and --seq-length {s}",
    )
    layers: tuple[int, ...] = ()
    try:
        layers = parse_layers(config.layers, model.num_layers, config.policy)
        reasons = {n: model.why_full(n, config.recurrent_layers) for n in layers}
        if config.layers is None:
            layers = tuple(n for n in layers if reasons[n] is None)
            require(bool(layers), _nothing_to_drop(model, reasons))
        else:
            problems += [f"{flag('layers')} {config.layers}: {r}" for r in reasons.values() if r]
    except ValueError as error:
        said = str(error)
        if model.groups:
            said = said.replace("layers go", "groups go")
            said += f" (groups of the hybrid pattern: {_list_groups(model)})"
        problems.append(f"{flag('layers')} {config.layers}: {said}")
    if config.policy == "token-bypass" and layers:
        require(
            layers[0] > 1 and layers == tuple(range(layers[0], layers[-1] + 1)),
            f"{flag('layers')} {config.layers}: {flag('policy')} token-bypass needs neighbouring "
            "layers, with at least one layer before them: give one range, such as "
            f"{model.num_layers // 2 + 1}-{model.num_layers - 1}, or omit {flag('layers')}",
        )
    share = config.bypass_random_share
    require(0 <= share <= 1, f"{flag('bypass_random_share')} {share} must be from 0 to 1")
    require(
        not share or config.policy == "token-bypass",
        f"{flag('bypass_random_share')} does nothing without {flag('policy')} token-bypass: omit "
        "it, or add that",
    )
    require(
        not config.recurrent_layers or bool(set(RECURRENT) & set("".join(model.groups))),
        f"{flag('recurrent_layers')} does nothing without a --hybrid-layer-pattern that has "
        f"recurrent layers ({', '.join(RECURRENT)}): omit it",
    )

    needed = fewest_strata(model.sequence_parallel_size, model.context_parallel_size)
    strata = config.strata or needed
    if require(strata > 0, f"{flag('strata')} {strata} must not be negative"):
        require(
            strata % needed == 0,
            f"{flag('strata')} {strata} must be a multiple of {needed}: every rank of sequence "
            f"parallelism {model.sequence_parallel_size} and context parallelism "
            f"{model.context_parallel_size} holds whole strata",
        )
        lengths = [(f"{flag('min_tokens')} {k0}", k0)]
        if not config.constant:
            lengths.append((f"{flag('increment')} {q}", q))
        for what, value in ((f"--seq-length {s}", s), *lengths):
            require(
                value % strata == 0,
                f"{what} must be a multiple of the number of strata, {strata}: change it or "
                f"{flag('strata')} (this layout needs a multiple of {needed})",
            )
        shards = model.sequence_parallel_size * model.context_parallel_size
        for what, value in lengths:
            rows_multiple = model.row_multiple * shards
            multiple = rows_multiple // math.gcd(rows_multiple, model.micro_batch_size)
            require(
                value % multiple == 0,
                f"{what} must be a multiple of {multiple}: FP8 needs a multiple of "
                f"{model.row_multiple} rows on every rank",
            )
    if problems:
        raise ConfigError(problems)
    ramp = config.ramp_iters if config.ramp_samples is None else config.ramp_samples
    return ResolvedConfig(
        config=config,
        model=model,
        schedule=Schedule(s, k0, None if config.constant else ramp, q, config.root_degree),
        ramp_in_samples=config.ramp_samples is not None,
        dropped_layers=layers,
        strata=strata,
        seed=seed,
    )
