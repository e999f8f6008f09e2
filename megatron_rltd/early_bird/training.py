"""The search in Megatron's training loop: where it reads weights, what it logs, when it ends.

Weights are read after the passes of a step and before the optimizer's. There, every rank has the
parameters that this step's forward gathered. After the optimizer's step, a rank of the distributed
optimizer may hold old ones until the next forward (--overlap-param-gather). So the step after
iteration n reads the weights that were trained for n iterations, those of checkpoint n.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rltd.config import ConfigError
from megatron_rltd.early_bird import history, zeros
from megatron_rltd.early_bird.arguments import (
    EMERGED,
    FLAG,
    Options,
    find_beyond_end,
    options_of,
    refuse_without_flag,
)
from megatron_rltd.early_bird.checkpoint import args_to_load
from megatron_rltd.early_bird.history import HistoryError
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.model import Ranks, layers_of, take_mask
from megatron_rltd.early_bird.refusals import refuse_other_sizes
from megatron_rltd.early_bird.search import Check, check, describe
from megatron_rltd.early_bird.target import DRAW, TICKET, Target
from megatron_rltd.early_bird.units import ModelShape

DISTANCE = "early-bird distance"


class Search:
    """A search in one training; without ``--early-bird``, every method just calls the original."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.options: Options | None = None
        self._args: Any = None  # Megatron's
        self.last: Check | None = None
        self._masks: list[Mask] = []  # of this stage's layers, the last W - 1
        self._checked: int | None = None
        self._is_logged = True  # whether TensorBoard has the last check
        self._must_save = False

    # Seams. The first argument of each is Megatron's own function.

    def validate_args(self, original: Callable, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """Check the flags.

        Raises:
            ConfigError: A flag is wrong, or combined with a feature that the search refuses.
        """
        self._forget()
        self._args = args
        if args.early_bird and args.use_distributed_optimizer:
            args.dist_ckpt_optim_fully_reshardable = True  # no ticket is drawn from flat buffers
        result = original(args, *rest, **kwargs)
        if getattr(args, zeros.NAME):
            zeros.check_arguments(args)
        if not args.early_bird:
            refuse_without_flag(args)
            return result
        self.options = options_of(args)
        # The checkpoint must hold what the run does, not a default that was left open.
        args.early_bird_window = self.options.rule.window
        args.early_bird_threshold = self.options.rule.threshold
        setattr(args, EMERGED, 0)
        return result

    def setup_model_and_optimizer(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Continue the search of a checkpoint, or end at once if it has its ticket.

        Raises:
            ConfigError: The checkpoint's model has other sizes, zeros that would be lost, or none
                to keep; the masks beside it are for another ticket, or damaged; or the run ends
                before a check.
            ModelError: The model is not a GPTModel.
            SystemExit: The search ended before.
        """
        megatrons = self._args
        if megatrons is None:  # a loop that checks its arguments by itself
            return original(*args, **kwargs)
        from megatron.training import print_rank_0

        stored = args_to_load(megatrons)
        if stored is not None:
            if not getattr(megatrons, "moe_use_upcycling", False):  # loads a model of other sizes
                refuse_other_sizes(stored, megatrons)
            zeros.require_choice(stored, megatrons)
        result = original(*args, **kwargs)
        if getattr(megatrons, zeros.NAME, None) and not megatrons.skip_train:
            share = zeros.keep(result[0], result[1])
            print_rank_0(f"early-bird: {share:.2%} of the layers' weights are zero and stay zero")
        if self.options is None:
            return result
        if megatrons.train_iters and (problems := find_beyond_end(megatrons)):
            raise ConfigError(problems)
        layers = layers_of(result[0])
        emerged = getattr(megatrons, EMERGED)
        if emerged and self.options.exit and not megatrons.skip_train:
            print_rank_0(
                f"early-bird: the search ended with the masks of iteration {emerged}, and the "
                f"checkpoint of iteration {megatrons.iteration} is there: draw its ticket with "
                f"{DRAW}, or go on with the dense model by --no-early-bird-exit"
            )
            raise SystemExit(0)
        self._resume(self.options, megatrons, layers)
        print_rank_0(f"early-bird: {_described(self.options)}")
        return result

    def check_checkpoint_args(
        self, original: Callable, checkpoint_args: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        """Take over what the checkpoint is a ticket of, and whether the one looked for is there."""
        result = original(checkpoint_args, *rest, **kwargs)
        ticket = getattr(checkpoint_args, TICKET, None)
        if ticket is not None:
            setattr(self._args, TICKET, ticket)  # so that later checkpoints say it, too
        if self.options is not None and Target.searched_by(checkpoint_args) == self.options.target:
            setattr(self._args, EMERGED, getattr(checkpoint_args, EMERGED, 0))
        return result

    def train_step(self, original: Callable, *call: Any, **kwargs: Any) -> Any:
        """Run a training step; after its passes, look at the weights if a check is due."""
        from megatron.training import get_args

        if self.options is None or not self.options.is_due(get_args().curr_iteration):
            return original(*call, **kwargs)
        bound = _signature(original).bind(*call, **kwargs)
        passes = bound.arguments["forward_backward_func"]
        model = bound.arguments["model"]
        scheduler = bound.arguments["opt_param_scheduler"]
        is_past_warm_up = scheduler.num_steps >= scheduler.lr_warmup_steps

        def with_check(**arguments: Any) -> Any:
            losses = passes(**arguments)
            if is_past_warm_up:
                self._check(model)
            return losses

        bound.arguments["forward_backward_func"] = with_check
        return original(*bound.args, **bound.kwargs)

    def training_log(self, original: Callable, *call: Any, **kwargs: Any) -> Any:
        """Add the distances of the last check to what Megatron logs."""
        from megatron_rltd.training import metrics

        if self.last is None:
            return original(*call, **kwargs)
        bound = _signature(original).bind(*call, **kwargs).arguments
        before = {f"{DISTANCE} {k}": self.last.previous(k) for k in self.last.distances}
        known = {name: value for name, value in before.items() if value is not None}
        metrics.add_exactly(bound["total_loss_dict"], bound["skipped_iter"], known)
        if not self._is_logged:
            self._write_scalars(self.last)
            self._is_logged = True
        return original(*call, **kwargs)

    def checkpoint_and_decide_exit(self, original: Callable, *call: Any, **kwargs: Any) -> Any:
        """Save when the ticket has emerged, and then say that the run ends, if it is to."""
        from megatron.training import get_args, print_rank_0, training

        should_exit = original(*call, **kwargs)
        if not self._must_save or self.options is None:
            return should_exit
        self._must_save = False
        bound = _signature(original).bind(*call, **kwargs).arguments
        args, iteration = get_args(), bound["iteration"]
        is_saved = args.save_interval and iteration % args.save_interval == 0
        # Megatron saves when it ends a run, unless it has just saved what is not to stay.
        passing = getattr(args, "non_persistent_save_interval", None)
        is_saved = is_saved or (should_exit and not (passing and iteration % passing == 0))
        if not is_saved:
            training.save_checkpoint_and_time(
                iteration,
                bound["model"],
                bound["optimizer"],
                bound["opt_param_scheduler"],
                bound["num_floating_point_operations_so_far"],
                bound["checkpointing_context"],
                train_data_iterator=bound["train_data_iterator"],
            )
        ends = "the run ends" if self.options.exit else "the run goes on"
        print_rank_0(f"early-bird: saved iteration {iteration} and {ends}; draw it with {DRAW}")
        return should_exit or self.options.exit

    # What the seams share.

    def _check(self, model: Any) -> None:
        from megatron.training import get_args, print_rank_0

        args, options = get_args(), self.options
        iteration = args.curr_iteration
        if options is None or self._checked == iteration:  # Megatron may rerun a step's passes
            return
        self._checked = iteration
        ranks = Ranks(next(model[0].parameters()).device)
        newest = take_mask(
            iteration,
            layers_of(model),
            options.target,
            ModelShape.of(args),
            args.hidden_size,
            ranks.tensor,
        )
        ranks.require_equal(newest)
        found = check(newest, self._masks, options.rule, ranks.add_over_stages)
        whole = ranks.whole(newest)
        if whole is not None:
            self._write(whole, options, args)
        self._masks = [*self._masks, newest][-(options.rule.window - 1) :]
        self.last, self._is_logged = found, False
        print_rank_0(f"early-bird: {describe(found, options.rule)}")
        is_late = options.until is not None and iteration >= options.until
        # All ranks find the same; but none may ever leave alone.
        has_ticket = not ranks.any(not (found.emerged or is_late))
        if has_ticket and not getattr(args, EMERGED):
            setattr(args, EMERGED, iteration)
            self._must_save = True
            reason = "has emerged" if found.emerged else "is taken, though it has not emerged,"
            print_rank_0(f"early-bird: the ticket {reason} at iteration {iteration}")

    @staticmethod
    def _write(mask: Mask, options: Options, args: Any) -> None:
        try:
            history.write(Path(args.save), mask, options.target, options.interval)
        except OSError as error:
            # Other ranks wait for this one, and the window is in memory.
            print(
                f"early-bird: WARNING: the masks of iteration {mask.iteration} cannot be written "
                f"({error}); a run that is resumed will lack them",
                flush=True,
            )

    def _resume(self, options: Options, args: Any, layers: dict) -> None:
        """Take over the last masks before the iteration to continue from.

        Raises:
            ConfigError: They are for another ticket, or damaged.
        """
        from megatron.training import print_rank_0

        if not args.iteration:
            return
        masks: list[Mask] = []
        problem = ""
        if torch.distributed.get_rank() == 0:
            try:
                masks = _last_masks(options, args)
            except (HistoryError, OSError) as error:
                problem = str(error)
        problem, count = Ranks.from_first((problem, len(masks)))
        if problem:
            raise ConfigError([problem])
        self._masks = []
        for i in range(count):  # one by one: those of single weights are large
            mask = Ranks.from_first(masks[i] if masks else None)
            own = _of_layers(mask.pruned, layers)
            self._masks.append(Mask(mask.iteration, mask.units, own))
        taken = ", ".join(str(mask.iteration) for mask in self._masks)
        print_rank_0(f"early-bird: continues with the masks of iterations {taken or '(none)'}")

    def _write_scalars(self, found: Check) -> None:
        """Write a check to TensorBoard and W&B if Megatron has writers open."""
        from megatron.training import get_tensorboard_writer
        from megatron.training.global_vars import get_wandb_writer

        values = {}
        for kind in found.distances:
            before, largest = found.previous(kind), found.largest(kind)
            if before is None or largest is None:
                continue
            values[f"{DISTANCE} {kind}"] = before
            values[f"{DISTANCE} {kind} largest of window"] = largest
            if found.chance[kind]:
                values[f"{DISTANCE} {kind} share of chance"] = before / found.chance[kind]
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, value in values.items():
            if writer:
                writer.add_scalar(name, value, found.iteration)
            if wandb:
                wandb.log({name: value}, found.iteration)


def _of_layers(pruned: dict[str, dict], layers: dict) -> dict[str, dict]:
    return {kind: {n: bits[n] for n in layers} for kind, bits in pruned.items()}


def _last_masks(options: Options, args: Any) -> list[Mask]:
    """Return the last W - 1 masks before ``args.iteration``; put those of --load into --save."""
    units = options.target.units(ModelShape.of(args), args.hidden_size)
    save = Path(args.save)
    folders = [Path(args.load)] if args.load else []
    folders += [save] if save not in folders else []
    for folder in folders:
        before = [n for n in history.iterations(folder) if n < args.iteration]
        masks = [
            history.read(folder, n, options.target, units, options.interval)
            for n in before[-(options.rule.window - 1) :]
        ]
        if masks:
            if folder != save:
                for mask in masks:
                    history.write(save, mask, options.target, options.interval)
            return masks
    return []


def _described(options: Options) -> str:
    target = {k: v for k, v in options.target.as_dict().items() if v is not None}
    wanted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in target.items())
    until = f", at the latest from iteration {options.until} on" if options.until else ""
    return (
        f"{FLAG} looks for a ticket ({wanted}) every {options.interval} iterations once the "
        f"learning rate has warmed up; it has emerged when {options.rule.window} masks differ by "
        f"at most {options.rule.threshold:g}{until}"
    )


_signature = functools.cache(inspect.signature)
