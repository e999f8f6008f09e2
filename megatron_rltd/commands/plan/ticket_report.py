"""What a plan says of an Early-Bird ticket (`ticket`), as text and as plain numbers."""

from typing import Any

from megatron_rltd.commands.plan.planning import Plan
from megatron_rltd.commands.text_table import aligned, count

_SIZES = ("num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")


def as_numbers(plan: Plan) -> dict[str, Any] | None:
    """Return what JSON can hold of the ticket; None if the run searches for none."""
    ticket, run = plan.ticket, plan.run
    if ticket is None:
        return None
    other = plan.same_samples
    return {
        "keeps": {name: getattr(ticket.kept, name) for name in _SIZES},
        "flops_of_iteration": {"dense": ticket.step, "ticket": ticket.ticket_step},
        "draws": {
            draw.when: {
                "iteration": draw.iteration,
                "flops_causal_attention": draw.flops,
                "flops_full_attention": draw.full_attention_flops,
                "in_units_of_run": draw.flops / run.flops,
                "in_units_of_same_samples": draw.flops / other.flops if other else None,
                "from_scratch": {
                    "iterations": draw.from_scratch.iteration,
                    "samples": draw.from_scratch.samples,
                    "layer_tokens_per_layer": run.per_layer(draw.from_scratch),
                },
            }
            for draw in ticket.draws
        },
    }


def as_lines(plan: Plan) -> list[str]:
    """Return the same as people read it; nothing if the run searches for none."""
    ticket, run, other = plan.ticket, plan.run, plan.same_samples
    if ticket is None:
        return []
    dense, kept = ticket.dense, ticket.kept
    table = [["ticket drawn at", "after iteration", "FLOPs in all", "of this run"]]
    table[0] += ["of dense, same samples"] * bool(other)
    table[0] += ["same FLOPs from scratch", "LayerTokens per layer"]
    for draw in ticket.draws:
        line = [draw.when, f"{draw.iteration:,}", f"{draw.flops:.4e}"]
        line.append(f"{draw.flops / run.flops:.3f}")
        line += [f"{draw.flops / other.flops:.3f}"] if other else []
        line += [f"{draw.from_scratch.iteration:,}", count(run.per_layer(draw.from_scratch))]
        table.append(line)
    return [
        f"--early-bird keeps {kept.num_attention_heads:,} of {dense.num_attention_heads:,} heads "
        f"and {kept.ffn_hidden_size:,} of {dense.ffn_hidden_size:,} FFN neurons in each layer",
        f"FLOPs of an iteration that drops nothing: {ticket.step:.4e} of the dense model, "
        f"{ticket.ticket_step:.4e} of the ticket, {ticket.ticket_step / ticket.step:.3f} of it",
        *aligned(table).splitlines(),
    ]
