"""Plan a training run from its flags: length, LayerTokens, FLOPs and learning rate.

    plan = make_plan(["--num-layers", "24", ..., "--random-ltd", ...], gpus=64)
    plan.run.end.iteration, plan.run.flops, plan.run.learning_rate(plan.run.at(1000))

The flags take the same way as in training: Megatron's parser and validation with this package's
patches, then Megatron's own scheduler and its own count of floating-point operations. No process
group is started, and no model, data set or tokenizer is built. Megatron keeps global state, so a
process can make only one plan.
"""

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_rltd.commands.plan import flops, megatron_arguments
from megatron_rltd.commands.plan.megatron_arguments import PlanError, refusals
from megatron_rltd.commands.plan.planned_run import PlannedRun, Segment, segments
from megatron_rltd.commands.plan.ticket import Ticket, find_ticket
from megatron_rltd.groups import count_groups
from megatron_rltd.resolved_config import ResolvedConfig
from megatron_rltd.schedule import LayerTokenCost, Schedule
from megatron_rltd.training import budget

FULL_ATTENTION = (
    "BERT attends to all tokens: read the row 'FLOPs, full attention' (from Megatron 0.18 on); "
    "Megatron's log counts causal attention, which is too little for BERT"
)


@dataclass(frozen=True)
class Plan:
    """A run and the dense runs to compare it with.

    Attributes:
        args: Megatron's validated arguments.
        resolved: How the run drops tokens; None for a dense one.
        run: The run that the flags are of.
        same_samples: A dense run on as many samples (iso-data); None if the run is dense.
        same_layer_tokens: A dense run on as many LayerTokens (iso-compute); None if the run is.
        dense: A dense run of the raw tokens asked for; None if none were.
        notes: What was taken for granted, a sentence each.
        ticket: The Early-Bird ticket that the run searches for, and what it saves; None if none.
        is_bert: Whether the model attends to all tokens, not only to those before.
    """

    args: Any
    resolved: ResolvedConfig | None
    run: PlannedRun
    same_samples: PlannedRun | None
    same_layer_tokens: PlannedRun | None
    dense: PlannedRun | None
    notes: list[str]
    ticket: Ticket | None = None
    is_bert: bool = False

    @property
    def micro_batches(self) -> int:
        """The micro-batches of the run's last step."""
        per_pass = self.args.micro_batch_size * self.args.data_parallel_size
        return self.run.segments[-1].batch_size // per_pass


def make_plan(
    flags: list[str],
    gpus: int | None = None,
    dense_tokens: int | None = None,
    script: str | None = None,
) -> Plan:
    """Return the plan of a run with these flags.

    Args:
        flags: All that come after the script on the command line of training.
        gpus: The world size. Default: what one replica of the model takes.
        dense_tokens: Raw tokens of a dense run to compare with.
        script: Of the training. A pretrain_bert trains a BERT, and so do flags
            that only BERT has; `finetune_vit` a ViT.

    Raises:
        PlanError: This package or Megatron refuses the flags, or they do not say enough.
    """
    flags = [flag for flag in flags if flag != "--cpu"]  # where to run it, not what
    with refusals():
        from megatron_rltd.training.state import Training

        ours = Training()
        megatron_arguments.prepare(flags, ours)
        from megatron.training import training

        training.update_train_iters = functools.partial(
            _update_train_iters, training.update_train_iters
        )
        args = megatron_arguments.parse(flags, gpus, script)
        decay = {name: getattr(args, name) for name in ("lr_decay_iters", "lr_decay_samples")}
        is_bert = megatron_arguments.is_bert(flags, script)
        megatron_arguments.validate(args, megatron_arguments.defaults(args, flags, script))
        notes = megatron_arguments.set_vocabulary(args)
        resolved = ours.random_ltd.resolved if ours.random_ltd else None
        scheduler = _make_scheduler(args)
        args.iteration = 0  # as where Megatron finds no checkpoint
        ours.continue_run()
    run = _run(args, resolved, lambda: scheduler)
    with refusals():
        _check_batch_sizes(run)
        ticket, said = find_ticket(args, resolved, run, lambda n: _segments(args, resolved, n))
    notes += said
    if getattr(args, "sft", None) or getattr(args, "dataloader_inter_document_masking", None):
        notes.append("packed documents are counted as whole sequences: FLOPs are an upper bound")

    if is_bert:
        notes.append(FULL_ATTENTION)

    def dense(samples: int) -> PlannedRun:
        return _dense_run(args, decay, _iterations(args, samples))

    tokens = run.end.layer_tokens
    return Plan(
        args=args,
        resolved=resolved,
        run=run,
        same_samples=_dense_run(args, decay, args.train_iters) if resolved else None,
        same_layer_tokens=dense(-(-tokens // resolved.layer_tokens.dense)) if resolved else None,
        dense=None if dense_tokens is None else dense(-(-dense_tokens // args.seq_length)),
        notes=notes,
        ticket=ticket,
        is_bert=is_bert,
    )


def _update_train_iters(original: Callable, args: Any) -> None:
    """Set the iterations that ``--train-samples`` take.

    Args:
        original: Megatron's, which goes through a schedule of batch sizes step by step.
    """
    if args.train_iters or not getattr(args, "step_batch_size_schedule", None):
        original(args)
        return
    end = _dense_layer_tokens(args).until(
        lambda progress: progress.samples >= args.train_samples, budget.batch_size(args)
    )
    args.train_iters = end.iteration


def _dense_layer_tokens(args: Any) -> LayerTokenCost:
    return LayerTokenCost(Schedule(args.seq_length, args.seq_length, None), count_groups(args), 0)


def _make_scheduler(args: Any) -> Any:
    """Return Megatron's scheduler for a run, on an optimizer of one group of parameters.

    Sets the iterations of a run that is given in samples.
    """
    from megatron.training import global_vars, training

    global_vars.set_args(args)
    if args.train_samples:
        args.train_iters = None
    return training.get_optimizer_param_scheduler(types.SimpleNamespace(param_groups=[{}]))


def _iterations(args: Any, samples: int) -> int:
    """Return the iterations that Megatron makes of ``--train-samples``, at least 1."""
    from megatron.training import training

    other = copy.copy(args)
    other.train_iters, other.train_samples = None, samples
    with refusals():
        training.update_train_iters(other)
    return max(1, other.train_iters)


def _run(
    args: Any, resolved: ResolvedConfig | None, make_scheduler: Callable[[], Any]
) -> PlannedRun:
    """Return a run of ``args.train_iters`` iterations."""
    if not args.train_iters:
        raise PlanError("the run is shorter than one global batch: train longer")
    found = _segments(args, resolved, args.train_iters)
    causal, full = flops.of_segments(args, resolved, found)
    return PlannedRun(args.seq_length, count_groups(args), found, causal, full, make_scheduler)


def _segments(args: Any, resolved: ResolvedConfig | None, iterations: int) -> list[Segment]:
    """Return the steps of a run of so many iterations."""
    counted = resolved.layer_tokens if resolved else _dense_layer_tokens(args)
    return segments(counted, budget.batch_size(args), iterations)


def _dense_run(args: Any, decay: dict[str, int | None], iterations: int) -> PlannedRun:
    """Return a dense run of that many iterations, its learning rate by the same flags.

    Args:
        args: Of a run with random-LTD.
        decay: What was given of the length of the learning rate's decay.
    """

    def make_scheduler() -> Any:
        with refusals():
            return _make_scheduler(other)

    other = copy.copy(args)
    vars(other).update(decay, layer_token_lr=False, train_layer_tokens=None, train_iters=iterations)
    run = _run(other, None, make_scheduler)
    if args.train_samples and iterations != args.train_iters:
        other.train_samples = run.end.samples
    return run


def _check_batch_sizes(run: PlannedRun) -> None:
    from megatron.core.num_microbatches_calculator import update_num_microbatches

    for start, _ in run.batch_sizes:
        update_num_microbatches(start.samples, consistency_check=True)
