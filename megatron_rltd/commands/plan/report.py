"""A plan (`planning`) as text, as plain numbers and as a figure."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_rltd.commands.plan import ticket_report
from megatron_rltd.commands.plan.planned_run import PlannedRun
from megatron_rltd.commands.plan.planning import Plan
from megatron_rltd.commands.text_table import aligned, count
from megatron_rltd.groups import count_groups
from megatron_rltd.patching import versions
from megatron_rltd.schedule import Progress

COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito
HOUR = 3600
ARGUMENTS = (
    *("num_layers", "hidden_size", "seq_length", "padded_vocab_size"),
    *("micro_batch_size", "data_parallel_size"),
)
NEAR = 1e-3  # of the learning rate's span: where a run without its last, incomplete batch ends
POINTS = 600  # of a learning rate's curve


def runs(plan: Plan) -> dict[str, PlannedRun]:
    """Return the run, as "run", and by name what it is compared with."""
    names = ("run", "same_samples", "same_layer_tokens", "dense")
    return {name: run for name in names if (run := getattr(plan, name))}


def quantities(plan: Plan, run: PlannedRun, tflops: float | None) -> dict[str, Any]:
    """Return the numbers of one run; hours at `tflops` TFLOP/s per GPU."""
    seconds = run.flops / (tflops * 1e12) if tflops else None
    return {
        "iterations": run.end.iteration,
        "samples": run.end.samples,
        "raw_tokens": run.raw_tokens,
        "layer_tokens": run.end.layer_tokens,
        "layer_tokens_per_layer": run.per_layer(run.end),
        "flops_causal_attention": run.flops,
        "flops_full_attention": run.full_attention_flops,
        "hours": seconds and seconds / HOUR / plan.args.world_size,
        "gpu_hours": seconds and seconds / HOUR,
    }


# {heading: (quantity, format)}
ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "iterations": ("iterations", "{:,}".format),
    "samples": ("samples", "{:,}".format),
    "raw tokens": ("raw_tokens", lambda number: count(number)),
    "LayerTokens": ("layer_tokens", lambda number: count(number)),
    "LayerTokens per layer": ("layer_tokens_per_layer", lambda number: count(number)),
    "FLOPs, causal attention": ("flops_causal_attention", "{:.4e}".format),
    "FLOPs, full attention": ("flops_full_attention", "{:.4e}".format),
    "hours": ("hours", "{:,.1f}".format),
    "GPU-hours": ("gpu_hours", "{:,.1f}".format),
}
RATIOS = ("raw_tokens", "layer_tokens", "flops_causal_attention", "flops_full_attention")


def ratios(run: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """Return the quantities of a run in units of another's."""
    return {name: None if run[name] is None else run[name] / other[name] for name in RATIOS}


def learning_rate_points(run: PlannedRun) -> dict[str, Progress]:
    """Return where in a run the learning rate is worth a look, by name, in order."""
    last = run.end.iteration
    points = {
        "first step": run.at(1),
        "warm-up over": run.warmup_end if run.scheduler.lr_warmup_steps else None,
        "nothing dropped from here on": run.full_length_from,
        "minimum reached": run.minimum_from,
        "last step": run.end,
    }
    points |= {f"{part}/4 of the iterations": run.at(last * part // 4) for part in (1, 2, 3)}
    found = {name: at for name, at in points.items() if at and at.iteration}
    return dict(sorted(found.items(), key=lambda item: item[1].iteration))


def as_numbers(plan: Plan, tflops: float | None) -> dict[str, Any]:
    """Return all of a plan as what JSON can hold. Where something is not reached it is None."""
    run, scheduler = plan.run, plan.run.scheduler

    def at(progress: Progress | None) -> dict[str, Any] | None:
        if progress is None:
            return None
        return {
            "iteration": progress.iteration,
            "samples": progress.samples,
            "layer_tokens": progress.layer_tokens,
            "layer_tokens_per_layer": run.per_layer(progress),
            "learning_rate": run.learning_rate(progress),
        }

    numbers = {name: quantities(plan, r, tflops) for name, r in runs(plan).items()}
    return {
        "megatron_core": versions.megatron_version(),
        "gpus": plan.args.world_size,
        "tflops_per_gpu": tflops,
        **{name: getattr(plan.args, name) for name in ARGUMENTS},
        "dropped_layers": list(plan.resolved.dropped_layers) if plan.resolved else [],
        "runs": numbers,
        "run_in_units_of": {
            name: ratios(numbers["run"], other) for name, other in numbers.items() if name != "run"
        },
        "kept_tokens": {
            "first": run.segments[0].kept,
            "last": run.segments[-1].kept,
            "distinct": len(run.kept_lengths),
            "nothing_dropped_from": at(run.full_length_from),
            "from_iteration": [[s.start.iteration, s.kept] for s in run.segments],
        },
        "micro_batches_per_pass_from_kept_tokens": plan.resolved.joined_micro_batches(
            plan.micro_batches
        )
        if plan.resolved
        else [],
        "batch_size_from_iteration": [[p.iteration, size] for p, size in run.batch_sizes],
        "learning_rate": {
            "maximum": scheduler.max_lr,
            "minimum": scheduler.min_lr,
            "decay_style": scheduler.lr_decay_style,
            "by_layer_tokens": plan.args.layer_token_lr,
            "warmup_over": at(run.warmup_end),
            "minimum_reached": at(run.minimum_from),
            "points": {name: at(p) for name, p in learning_rate_points(run).items()},
        },
        "ticket": ticket_report.as_numbers(plan),
        "notes": [*warnings(plan), *plan.notes],
    }


def warnings(plan: Plan) -> list[str]:
    """Return sentences about parts of a plan that are probably not intended."""
    run, said = plan.run, []
    uncounted = sorted({"+", "D"} & set(getattr(plan.args, "hybrid_layer_pattern", None) or ""))
    if uncounted:
        said.append(
            f"Megatron counts no FLOPs for the attention of {' and '.join(uncounted)} in the "
            "--hybrid-layer-pattern: all FLOPs here are too few, and so are what is saved and hours"
        )
    if run.full_length_from is None:
        last = run.segments[-1].kept
        said.append(
            f"the run ends while {last:,} of {run.seq_length:,} tokens are kept: the model is "
            "never trained at full length"
        )
    if run.warmup_end is None:
        said.append("the run ends before the learning rate's warm-up")
    elif run.scheduler.lr_decay_style != "constant":
        lowest, final = run.scheduler.min_lr, run.learning_rate(run.end)
        if final - lowest > NEAR * (run.scheduler.max_lr - lowest):
            said.append(
                f"the run ends at a learning rate of {final:.4e}, above its minimum of {lowest:.4e}"
            )
    return said


def as_text(plan: Plan, tflops: float | None) -> str:
    """Return a plan as people read it."""
    args, run, scheduler = plan.args, plan.run, plan.run.scheduler
    dropped = plan.resolved.dropped_layers if plan.resolved else ()
    unit = "LayerTokens" if args.layer_token_lr else "samples"
    lines = [
        f"{'random-LTD' if plan.resolved else 'dense'} run on Megatron "
        f"{versions.megatron_version()} and {args.world_size:,} GPU{'s' * (args.world_size > 1)} "
        f"({args.data_parallel_size:,} data-parallel)",
        f"{_layers(args)}, of which {len(dropped)} drop tokens; hidden size "
        f"{args.hidden_size:,}, sequence {args.seq_length:,}, vocabulary "
        f"{args.padded_vocab_size:,}",
        f"micro-batch {args.micro_batch_size:,}, global batch {_batch_sizes(run)}",
        "",
        *_comparison(plan, tflops),
        "",
        *([_kept(run), *_joined(plan), ""] if plan.resolved else []),
        f"learning rate: {scheduler.lr_decay_style}, {scheduler.max_lr:.4e} at most, "
        f"{scheduler.min_lr:.4e} at least{' (not reached)' * (run.minimum_from is None)}, "
        f"advances by {unit}",
        *_learning_rates(run),
        *(["", *ticket_report.as_lines(plan)] if plan.ticket else []),
    ]
    remarks = [f"WARNING: {text}" for text in warnings(plan)] + plan.notes
    if tflops:
        remarks.append(
            f"hours are at {tflops:g} TFLOP/s per GPU, counted for causal attention as in "
            "Megatron's log, whatever the kept length"
        )
    return "\n".join([*lines, *([""] if remarks else []), *(f"- {text}" for text in remarks)])


def _layers(args: Any) -> str:
    if not getattr(args, "hybrid_layer_pattern", None):
        return f"{args.num_layers} layers"
    return (
        f"{count_groups(args)} groups of the {args.num_layers} layers {args.hybrid_layer_pattern}"
    )


def _batch_sizes(run: PlannedRun) -> str:
    first, *later = run.batch_sizes
    if len(later) > 3:  # a ramp-up in small steps
        later = later[-1:]
        return f"{first[1]:,}, growing to {later[0][1]:,} at iteration {later[0][0].iteration:,}"
    texts = [f"{size:,} after iteration {start.iteration:,}" for start, size in later]
    return ", ".join([f"{first[1]:,}", *texts])


def _comparison(plan: Plan, tflops: float | None) -> list[str]:
    headings = {
        "run": "this run",
        "same_samples": "dense, same samples",
        "same_layer_tokens": "dense, same LayerTokens",
        "dense": f"dense, {count(plan.dense.raw_tokens)} tokens" if plan.dense else "",
    }
    compared = runs(plan)
    numbers = {name: quantities(plan, run, tflops) for name, run in compared.items()}
    table = [["", *(headings[name] for name in compared)]]
    for heading, (key, form) in ROWS.items():
        values = [n[key] for n in numbers.values()]
        if None not in values:
            table.append([heading, *map(form, values)])
    this = numbers.pop("run")
    if numbers:
        table.append(["this run in units of it:", *[""] * len(compared)])
        for heading, (key, _) in ROWS.items():
            if key in RATIOS and this[key] is not None:
                shares = [ratios(this, other)[key] for other in numbers.values()]
                table.append([f"  {heading}", "", *(f"{share:.3f}" for share in shares)])
    return aligned(table).splitlines()


def _learning_rates(run: PlannedRun) -> list[str]:
    table = [["after", "iteration", "samples", "LayerTokens per layer", "learning rate"]]
    points = learning_rate_points(run).items()
    for _, alike in groupby(points, key=lambda item: item[1].iteration):
        names, (at, *_) = zip(*alike, strict=True)
        tokens = count(run.per_layer(at))
        rate = f"{run.learning_rate(at):.4e}"
        table.append([", ".join(names), f"{at.iteration:,}", f"{at.samples:,}", tokens, rate])
    return aligned(table).splitlines()


def _kept(run: PlannedRun) -> str:
    text = f"kept tokens: {run.segments[0].kept:,} of {run.seq_length:,} at the start"
    if len(run.kept_lengths) > 1:
        text += f", {len(run.kept_lengths):,} different lengths"
    full = run.full_length_from
    if full is None:
        return f"{text}, {run.segments[-1].kept:,} at the end"
    share = full.iteration / run.end.iteration
    return f"{text}; nothing is dropped after iteration {full.iteration:,}, {share:.1%} of the run"


def _joined(plan: Plan) -> list[str]:
    if plan.resolved is None or plan.resolved.config.grow_micro_batch == 1:
        return []
    return [plan.resolved.joined_in_words(plan.micro_batches)]


def draw(plan: Plan, path: Path) -> None:
    """Draw kept tokens and learning rate by iterations, samples and LayerTokens, as PNG.

    Beside the run a dense one: on the same LayerTokens if the length is given in them, otherwise on
    the same samples.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    named = {"random-LTD" if plan.resolved else "dense": plan.run}
    if plan.args.train_layer_tokens is not None and plan.same_layer_tokens:
        named["dense, same LayerTokens"] = plan.same_layer_tokens
    elif plan.same_samples:
        named["dense, same samples"] = plan.same_samples
    coordinates: dict[str, Callable[[Progress], float]] = {
        "iterations": lambda progress: progress.iteration,
        "samples": lambda progress: progress.samples,
        "LayerTokens per layer": plan.run.per_layer,
    }
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex="col", sharey="row")
    for (name, run), colour, dashes in zip(named.items(), COLOURS, ("-", "--"), strict=False):
        style = {"color": colour, "linestyle": dashes}
        starts = [*(segment.start for segment in run.segments), run.end]
        kept = [*(segment.kept for segment in run.segments), run.segments[-1].kept]
        last = run.end.iteration
        iterations = {-(-last * i // POINTS) for i in range(1, POINTS + 1)}
        iterations |= {at.iteration for at in learning_rate_points(run).values()}
        curve = [run.at(iteration) for iteration in sorted(iterations)]
        rates = [run.learning_rate(at) for at in curve]
        for coordinate, (above, below) in zip(coordinates.values(), panels.T, strict=True):
            above.step([coordinate(at) for at in starts], kept, where="post", **style, label=name)
            below.plot([coordinate(at) for at in curve], rates, **style)
    for heading, axes in zip(coordinates, panels[1], strict=True):
        axes.set(xlabel=heading, xlim=(0, None), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0][0].set(ylim=(0, None), ylabel="kept tokens per sequence")
    panels[1][0].set(ylabel="learning rate")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, format="png", dpi=120)
