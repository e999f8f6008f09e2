"""Convert the length and the learning rate of a Megatron-DeepSpeed run to our flags.

Part of `python -m megatron_rltd convert-deepspeed`. In Megatron-DeepSpeed a run of --random-ltd
ends after --train-tokens and its learning rate follows --lr-warmup-tokens and --lr-decay-tokens,
all of them LayerTokens per layer. Here the first is --train-layer-tokens; with --layer-token-lr the
others are Megatron's --lr-warmup-samples and --lr-decay-samples, a sample being seq_length of those
tokens.
"""

from dataclasses import dataclass, field
from fractions import Fraction

from megatron_rltd.commands.convert_deepspeed.launch import ConversionError, Launch
from megatron_rltd.schedule import LayerTokenCost, Schedule


@dataclass
class Conversion:
    """The flags, and what a person should read.

    Attributes:
        flags: Words of a command line.
        removed: For each flag or key that goes, why, or what takes its place.
        warnings: A line for each thing that is, or may be, unlike the DeepSpeed run.
    """

    flags: list[str] = field(default_factory=list)
    removed: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, value: object = None) -> None:
        """Add a flag."""
        self.flags += [name] if value is None else [name, str(value)]

    def remove(self, launch: Launch, name: str, why: str) -> None:
        """Say that a flag of the launch line goes, if it is there."""
        if name in launch:
            self.removed[launch.text(name)] = why


@dataclass(frozen=True)
class DeepSpeedRun:
    """What tokens and iterations are computed from.

    Attributes:
        batch_size: Samples of an iteration; None if that is unknown or grows.
    """

    schedule: Schedule
    num_layers: int
    num_dropped: int
    batch_size: int | None

    @property
    def layer_tokens(self) -> LayerTokenCost:
        """What an iteration consumes."""
        return LayerTokenCost(self.schedule, self.num_layers, self.num_dropped)

    def samples(self, iterations: int, flag: str) -> int:
        """Return the samples of a flag's iterations."""
        if self.batch_size is None:
            raise ConversionError(
                f"converting {flag} needs a --global-batch-size that does not change"
            )
        return iterations * self.batch_size

    def steps(self, budget: int) -> int:
        """Return the iterations that --train-layer-tokens takes."""
        total, batch = budget * self.num_layers, self.samples(1, "--train-tokens")
        end = self.layer_tokens.until(
            lambda progress: progress.layer_tokens >= total, lambda samples: batch
        )
        return end.iteration

    def deepspeed_steps(self, budget: int) -> int:
        """Return the iterations that Megatron-DeepSpeed's --train-tokens takes.

        It counts the layers' average length, rounded down. Until 2026, DeepSpeed's lengths were
        multiples of the increment even where that is below the minimum.
        """
        s, batch, consumed = self.schedule.seq_length, self.samples(1, "--train-tokens"), 0
        levels = list(self.schedule.levels())
        ends = [start for start, _ in levels[1:]] + [budget]  # an iteration has a token at least
        for (start, kept), end in zip(levels, ends, strict=True):
            if kept < s and self.schedule.ramp_length:
                kept -= kept % self.schedule.increment
            average = self.layer_tokens.per_sample(kept) // self.num_layers
            tokens = batch * max(average, 1)  # lengths below the minimum may be 0
            needed = -(-(budget - consumed) // tokens)
            if needed <= end - start:
                return start + needed
            consumed += tokens * (end - start)
        raise AssertionError("the last level does not end before the budget")


def convert_budget(launch: Launch, run: DeepSpeedRun, result: Conversion) -> None:
    """Convert --train-tokens; --train-samples and --train-iters limit it in Megatron-DeepSpeed."""
    budget = launch.integer("--train-tokens")
    if budget is None:
        if "--train-iters" in launch and follows_tokens(launch):
            iterations = launch.integer("--train-iters") or 0
            result.add("--train-samples", run.samples(iterations, "--train-iters"))
            why = "now --train-samples, because Megatron refuses --lr-decay-samples next to it"
            result.remove(launch, "--train-iters", why)
        return
    result.add("--train-layer-tokens", budget)
    result.remove(launch, "--train-tokens", "now --train-layer-tokens")
    for name in ("--train-samples", "--train-iters"):
        why = "only a limit beside --train-tokens; an error beside --train-layer-tokens"
        result.remove(launch, name, why)
    if not follows_tokens(launch) and not {"--lr-decay-iters", "--lr-decay-samples"} & set(
        launch.options
    ):
        result.warnings.append(
            "the learning rate followed iterations or samples up to the limit, not tokens; use "
            "--lr-decay-samples to say how long it decays"
        )
    if run.batch_size is None:
        return
    ours, theirs = run.steps(budget), run.deepspeed_steps(budget)
    if ours != theirs:
        result.warnings.append(
            f"Megatron-DeepSpeed rounds the tokens of an iteration down, so that --train-tokens "
            f"{budget} is {theirs:,} iterations there; LayerTokens are exact here, {ours:,} "
            f"iterations, {theirs - ours:,} fewer"
        )
    limit = launch.integer("--train-iters")
    if (samples := launch.integer("--train-samples")) is not None and limit is None:
        limit = samples // run.batch_size
    if limit is not None and limit < theirs:
        result.warnings.append(
            f"Megatron-DeepSpeed stopped at its limit, after {limit:,} iterations; to do the same, "
            f"use --train-samples {limit * run.batch_size} instead of --train-layer-tokens"
        )


def follows_tokens(launch: Launch) -> bool:
    """Return whether the learning rate follows tokens."""
    return "--lr-decay-tokens" in launch or "--lr-warmup-tokens" in launch


def convert_learning_rate(launch: Launch, run: DeepSpeedRun, result: Conversion) -> None:
    """Convert a learning rate that follows tokens; any other stays as it is.

    Raises:
        ConversionError: Only one of warm-up and decay follows tokens, in a way that cannot be said.
    """
    if not follows_tokens(launch):
        return
    seq_length = run.schedule.seq_length
    decay = launch.integer("--lr-decay-tokens")
    warmup: Fraction | int | None = launch.integer("--lr-warmup-tokens", least=0)
    if decay is None and launch.options.get("--lr-decay-style") != ["constant"]:
        raise ConversionError(
            f"{launch.text('--lr-warmup-tokens')}: without --lr-decay-tokens the decay follows "
            "iterations, but Megatron's learning rate can follow only one unit: add it"
        )
    if "--lr-warmup-fraction" in launch:
        raise ConversionError(
            f"{launch.text('--lr-warmup-fraction')}: it is a share of --train-samples or "
            "--train-iters, not of the tokens; give --lr-warmup-tokens instead"
        )
    if warmup is None:
        iterations = launch.integer("--lr-warmup-iters", least=0)
        if samples := launch.integer("--lr-warmup-samples", least=0):
            iterations = -(-samples // run.samples(1, "--lr-warmup-samples"))
        if iterations:
            # The warm-up ends at the same iteration: what the layers have processed until then.
            batch = run.samples(1, "--lr-warmup-iters")
            end = run.layer_tokens.after(iterations, batch)
            warmup = Fraction(end.layer_tokens, run.num_layers)
    result.add("--layer-token-lr")
    for name, value in (("warmup", warmup), ("decay", decay)):
        if value is None:
            continue
        exact = Fraction(value) / seq_length
        rounded = int(exact + Fraction(1, 2))
        result.add(f"--lr-{name}-samples", rounded)
        if exact != rounded:
            result.warnings.append(
                f"--lr-{name}-samples is {float(exact):,.2f} samples of {seq_length:,} tokens, "
                f"rounded to {rounded:,}"
            )
        for old in ("tokens", "iters", "samples"):
            used = old == "tokens" or f"--lr-{name}-tokens" not in launch
            why = f"now --lr-{name}-samples" if used else f"--lr-{name}-tokens overrides it"
            result.remove(launch, f"--lr-{name}-{old}", why)
