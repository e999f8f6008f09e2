"""Estimate what a run saves on a certain GPU, and which changes would save more.

The estimate uses the model of `gpu_time`; nothing is measured.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron_rltd.commands.plan import gpu_time
from megatron_rltd.commands.plan.gpu_memory import peak_memory
from megatron_rltd.commands.plan.gpu_time import Gpu, Training
from megatron_rltd.commands.plan.megatron_arguments import PlanError
from megatron_rltd.commands.plan.planned_run import segments
from megatron_rltd.commands.plan.planning import Plan
from megatron_rltd.commands.text_table import aligned
from megatron_rltd.training import budget

MICRO_BATCHES, INCREMENT, JOINED = (4, 8, 16), 128, 8  # what is compared
LENGTHS = 9  # kept lengths shown
# The model works only with these values of Megatron's arguments.
_WITHOUT = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "num_experts": None,
    "multi_latent_attention": False,
    "hybrid_layer_pattern": None,
    "fp8": None,
    "fp4": None,
}


def training_of(plan: Plan) -> Training:
    """Return what the model needs to know of a plan's run.

    Raises:
        PlanError: The run drops nothing, or is of a kind that the model does not know.
    """
    args = plan.args
    if plan.resolved is None:
        raise PlanError(
            "--gpu estimates what random-LTD saves, but the run is dense: add --random-ltd"
        )
    if plan.is_bert:
        raise PlanError("--gpu estimates causal attention only, and BERT's is full: omit --gpu")
    unknown = [name for name, value in _WITHOUT.items() if getattr(args, name, value) != value]
    if unknown:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise PlanError(
            f"--gpu estimates only whole, dense layers in bfloat16: omit --gpu or {flags}"
        )
    is_grouped = args.group_query_attention
    return Training(
        seq_length=args.seq_length,
        num_layers=args.num_layers,
        dropped_layers=len(plan.resolved.dropped_layers),
        hidden_size=args.hidden_size,
        query_size=args.num_attention_heads * args.kv_channels,
        key_value_size=(args.num_query_groups if is_grouped else args.num_attention_heads)
        * args.kv_channels,
        mlp_size=args.ffn_hidden_size,
        vocab_size=args.padded_vocab_size,
        micro_batch_size=args.micro_batch_size,
        micro_batches=plan.micro_batches,
        is_gated=args.swiglu,
        optimizer_shards=args.data_parallel_size if args.use_distributed_optimizer else 1,
        cross_entropy=args.cross_entropy_fusion_impl
        if args.cross_entropy_loss_fusion
        else "unfused",
        has_fused_gradients=args.gradient_accumulation_fusion,
        recomputes=args.recompute_granularity == "full",
    )


def weights(plan: Plan, increment: int) -> list[tuple[int, float]]:
    """Return (kept length, its share of the samples) of the run, were its increment another."""
    assert plan.resolved
    schedule = dataclasses.replace(plan.resolved.schedule, increment=increment)
    counted = dataclasses.replace(plan.resolved.layer_tokens, schedule=schedule)
    steps = segments(counted, budget.batch_size(plan.args), plan.run.end.iteration)
    samples: dict[int, int] = {}
    for segment in steps:
        samples[segment.kept] = samples.get(segment.kept, 0) + segment.steps * segment.batch_size
    return [(kept, n / plan.run.end.samples) for kept, n in samples.items()]


def joined(plan: Plan, training: Training, most: int | None = None) -> Callable[[int], int]:
    """Return how many micro-batches one pass takes, of a kept length.

    Args:
        most: For ``--random-ltd-grow-micro-batch``; default: the run's own.
    """
    resolved = plan.resolved
    assert resolved
    if most is not None:
        config = dataclasses.replace(resolved.config, grow_micro_batch=most)
        resolved = dataclasses.replace(resolved, config=config)
    return lambda kept: resolved.micro_batches_per_pass(kept, training.micro_batches)


def estimate(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    """Return the estimate as what JSON can hold.

    Returns:
        "gpu"; "lengths", rows of kept lengths; "step", milliseconds by what they go into, of dense
        steps and some others; "choices", what other flags would make of the run.
    """
    training, resolved = training_of(plan), plan.resolved
    assert resolved
    kept = plan.run.kept_lengths
    kept = [kept[i * (len(kept) - 1) // (LENGTHS - 1)] for i in range(LENGTHS)]
    lengths = [
        {"kept_tokens": k, **gpu_time.saved(gpu, training, [(k, 1.0)])}
        for k in dict.fromkeys(kept)
        if k < training.seq_length
    ]
    own = resolved.schedule.increment
    compared = [training.seq_length, kept[0], kept[len(kept) // 2]]
    return {
        "gpu": dataclasses.asdict(gpu),
        "lengths": lengths,
        "step": {
            str(k): {
                name: 1e3 * seconds for name, seconds in gpu_time.step(gpu, training, k).items()
            }
            for k in dict.fromkeys(compared)
        },
        "run": gpu_time.saved(gpu, training, weights(plan, own), joined(plan, training)),
        "choices": choices(plan, gpu, training, own),
    }


def choices(plan: Plan, gpu: Gpu, training: Training, own: int) -> list[dict[str, Any]]:
    """Return the rows of what other micro-batches and increments would make of the run.

    Each has "relative": the run's time in units of that with its own flags; and "gib", the memory
    of a GPU, at least.

    Args:
        own: The run's increment.
    """
    assert plan.resolved
    samples = training.micro_batch_size * training.micro_batches  # of a step, on each GPU
    sizes = {*MICRO_BATCHES, training.micro_batch_size}
    increments = [own]
    if own < INCREMENT and INCREMENT % plan.resolved.strata == 0 == training.seq_length % INCREMENT:
        increments.append(INCREMENT)
    mean = gpu_time.saved(gpu, training, weights(plan, own), joined(plan, training))["seconds"]
    rows = []
    for size in sorted(size for size in sizes if samples % size == 0):
        other = dataclasses.replace(training, micro_batch_size=size, micro_batches=samples // size)
        for increment in increments:
            shares = weights(plan, increment)
            for most in sorted({1, JOINED, plan.resolved.config.grow_micro_batch}):
                per_pass = joined(plan, other, most)
                found = gpu_time.saved(gpu, other, shares, per_pass)
                needed = peak_memory(other, [kept for kept, _ in shares], per_pass)
                choice = {"micro_batch_size": size, "increment": increment, "grown": most}
                compared = {"relative": found["seconds"] / mean, "gib": needed / 2**30}
                rows.append(choice | found | compared)
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def as_text(found: dict[str, Any]) -> str:
    """Return an estimate as people read it."""
    gpu = found["gpu"]
    lengths = [["kept tokens", "saved in theory", "in time", "realised"]]
    for row in found["lengths"]:
        shares = [_percent(row[key]) for key in ("operations", "time", "realised")]
        lengths.append([f"{row['kept_tokens']:,}", *shares])
    shares = [_percent(found["run"][key]) for key in ("operations", "time", "realised")]
    lengths.append(["the run", *shares])
    steps = [["ms of a step", *(f"k = {int(kept):,}" for kept in found["step"])]]
    for name in next(iter(found["step"].values())):
        steps.append([name, *(f"{parts[name]:,.1f}" for parts in found["step"].values())])
    steps.append(["sum", *(f"{sum(parts.values()):,.1f}" for parts in found["step"].values())])
    table = [["micro-batch", "increment", "grown", "saved in time", "realised", "time", "GiB"]]
    for row in found["choices"]:
        table.append(
            [
                *(str(row[key]) for key in ("micro_batch_size", "increment", "grown")),
                *(_percent(row[key]) for key in ("time", "realised")),
                f"{row['relative']:.3f}",
                f"{row['gib']:.0f}",
            ]
        )
    return "\n".join(
        [
            "ESTIMATE by a model, not a measurement: good to two points, differences better than "
            "numbers.",
            f"GPU: {gpu['tflops']:,.0f} TFLOP/s in large matrix products, {gpu['bandwidth']:.2f} "
            f"TB/s, {gpu['multiprocessors']} multiprocessors. docs/planning.md has the terms.",
            "",
            aligned(lengths),
            "",
            aligned(steps),
            "",
            "The run with other flags. grown: --random-ltd-grow-micro-batch; time: of the run, in "
            "units of that with its own flags; GiB: memory of a GPU, at least.",
            "",
            aligned(table),
        ]
    )
