"""One training in Megatron's loop, with random-LTD: what happens at each seam that `patches` lists.

`Training` holds all that a process knows about it. What must outlive the process is stored on
Megatron's ``args``, and every checkpoint holds these: the options and the LayerTokens consumed, as
plain values.
"""

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_rltd.config import FIELDS, FLAG_PREFIX, ConfigError
from megatron_rltd.model.micro_batches import join_micro_batches
from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.refusals import packs_sequences
from megatron_rltd.resolved_config import ResolvedConfig, resolve
from megatron_rltd.schedule import Progress, Step
from megatron_rltd.training import bert_data, budget, checkpoint, metrics, tags
from megatron_rltd.training.arguments import (
    config_from_args,
    facts_from_args,
    refuse_without_random_ltd,
    resolve_args,
)
from megatron_rltd.training.learning_rate import LayerTokenScheduler
from megatron_rltd.training.preflight import Preflight


@dataclass(frozen=True)
class EndedStep:
    """A training step that Megatron has finished.

    Attributes:
        step: What it kept and cost.
        samples: Samples of all data-parallel ranks.
        micro_batches_per_pass: Micro-batches that each of its passes took.
    """

    step: Step
    samples: int
    micro_batches_per_pass: int

    @property
    def layer_tokens(self) -> int:
        """The LayerTokens that it consumed."""
        return self.samples * self.step.layer_tokens_per_sample


class Training:
    """A training in Megatron's loop.

    Attributes:
        random_ltd: The runtime; None until the arguments are valid, and in a run without
            random-LTD.
        ended: The step that ended last.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.random_ltd: RandomLTD | None = None
        self.ended: EndedStep | None = None
        self._scheduler: Any = None  # a LayerTokenScheduler under --layer-token-lr, else Megatron's
        self._megatrons_scheduler: Any = None
        self._is_decay_given = False
        self._preflight: Preflight | None = None
        # For the throughput that Megatron logs: the operations of the last steps, and how many
        # steps the current log line covers.
        self._operations: deque[float] = deque()
        self._steps_in_log: int | None = None

    # Seams. The first argument of each is Megatron's own function. `patches` gives the reasons.

    def validate_args(self, original: Callable, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """Check and resolve the flags; first those that Megatron would refuse less clearly.

        Raises:
            ConfigError: A flag is wrong, or combined with a feature that random-LTD refuses.
        """
        if getattr(args, "random_ltd", False):
            budget.check_units(args)
            problems = bert_data.vocabulary_problems(args)
            if problems:
                raise ConfigError(problems)
        result = original(args, *rest, **kwargs)
        self._forget()  # arguments may have been validated before these
        if not args.random_ltd:
            refuse_without_random_ltd(args)
            return result
        resolved = resolve_args(args)
        lengths = (args.train_iters, args.train_samples, args.train_layer_tokens)
        if not any(lengths) and not args.skip_train:
            raise ConfigError(["give --train-iters, --train-samples or --train-layer-tokens"])
        self._is_decay_given = args.lr_decay_iters is not None or args.lr_decay_samples is not None
        budget.set_length(args, resolved)
        self._use(RandomLTD(config_from_args(args), resolved), args)
        checkpoint.set_consumed(args, 0, 0)
        if args.random_ltd_preflight:
            self._preflight = Preflight()
        return result

    def setup_model_and_optimizer(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Attach to the model chunks that Megatron builds, and set what is left of the run.

        Raises:
            ConfigError: random-LTD does not work on this model.
            ModelError: random-LTD does not work on the layers of this pipeline stage.
        """
        result = original(*args, **kwargs)
        if self.random_ltd is not None:
            self.random_ltd.detach()  # from the model of an earlier start in this process
            self.random_ltd.attach(result[0])
            self._describe()
            self.continue_run()
        return result

    def get_optimizer_param_scheduler(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the scheduler of the learning rate that replaces Megatron's."""
        from megatron.training import get_args

        scheduler = original(*args, **kwargs)
        if self.random_ltd is None or not budget.follows_layer_tokens(get_args()):
            return scheduler
        megatrons = get_args()
        self._scheduler = self._megatrons_scheduler = scheduler
        if megatrons.layer_token_lr:
            self._scheduler = LayerTokenScheduler(scheduler, self.random_ltd)
        resolved = self.random_ltd.resolved
        self._set_scheduler(budget.scheduler_settings(megatrons, resolved, self._is_decay_given))
        return self._scheduler

    def check_checkpoint_args(
        self, original: Callable, checkpoint_args: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        """Take over state from a checkpoint and check that it continues the same run.

        Raises:
            ConfigError: The checkpoint was trained with other options, or its strata do not fit the
                layout.
        """
        result = original(checkpoint_args, *rest, **kwargs)
        if self.random_ltd is not None:
            self._resume(checkpoint_args, self.random_ltd)
        return result

    def train_step(self, original: Callable, *call: Any, **kwargs: Any) -> Any:
        """Run one training step with its kept length, then count and log it."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_args

        random_ltd = self.random_ltd
        if random_ltd is None:
            return original(*call, **kwargs)
        args = get_args()
        bound = _signature(original).bind(*call, **kwargs)
        if random_ltd.config.grow_micro_batch > 1:
            bound.arguments["forward_backward_func"] = join_micro_batches(
                bound.arguments["forward_backward_func"], random_ltd, packs_sequences(args)
            )
        # Not in the first step: the optimizer's state takes memory, and does not exist yet.
        if self._preflight and args.curr_iteration > args.iteration:
            self._preflight.add(bound.arguments, random_ltd)
            self._preflight = None
        step = random_ltd.begin_step(args.curr_iteration, args.consumed_train_samples)
        micro_batches = get_num_microbatches()
        joined = random_ltd.micro_batches_per_pass(micro_batches)
        try:
            result = original(*bound.args, **bound.kwargs)
        finally:
            random_ltd.end_step()
        losses, should_exit = result[0], result[3]
        if not should_exit:  # else Megatron does not count the step either
            samples = micro_batches * args.micro_batch_size * args.data_parallel_size
            self.ended = EndedStep(step, samples, joined)
            self._consume(self.ended)
            metrics.add_value(losses, tags.KEPT_TOKENS, step.kept_tokens)
            if random_ltd.config.grow_micro_batch > 1:
                metrics.add_value(losses, tags.MICRO_BATCHES, joined)
        return result

    def training_log(self, original: Callable, *call: Any, **kwargs: Any) -> Any:
        """Add to what Megatron logs after each step."""
        from megatron.training import get_args

        if self.random_ltd is None:
            return original(*call, **kwargs)
        bound = _signature(original).bind(*call, **kwargs).arguments
        tokens, dense = checkpoint.consumed(get_args())
        sums, skipped = bound["total_loss_dict"], bound["skipped_iter"]
        metrics.add_to_log_line(sums, skipped, tokens, tokens / dense)
        metrics.write_scalars(
            bound["loss_dict"], bound["learning_rate"], bound["iteration"], tokens, tokens / dense
        )
        self._steps_in_log = metrics.steps_since_log(sums)
        try:
            return original(*call, **kwargs)
        finally:
            self._steps_in_log = None

    def set_current_microbatch(self, original: Callable, model: Any, microbatch_id: int) -> Any:
        """Tell the runtime which micro-batch Megatron's schedule runs next."""
        if self.random_ltd is not None:
            self.random_ltd.begin_micro_batch(microbatch_id)
        return original(model, microbatch_id)

    def num_floating_point_operations(
        self, original: Callable, args: Any, batch_size: int, *rest: Any, **kwargs: Any
    ) -> float:
        """Count a global batch of the step that ended; in a log line, the mean of its steps."""
        if self.random_ltd is None:
            return original(args, batch_size, *rest, **kwargs)
        if self._steps_in_log is not None:
            # Megatron divides by the mean time of the steps since its last line. The kept length
            # grows, so the mean of their operations belongs to that time.
            while len(self._operations) > self._steps_in_log:
                self._operations.popleft()
            return math.fsum(self._operations) / len(self._operations)
        resolved = self.random_ltd.resolved
        kept = self.ended.step.kept_tokens if self.ended else resolved.model.seq_length
        counted = metrics.floating_point_operations(
            original, resolved, kept, args, batch_size, *rest, **kwargs
        )
        self._operations.append(counted)
        return counted

    # What the seams share.

    def continue_run(self) -> None:
        """Set what is left of the run after a checkpoint may have been loaded.

        The run may have had another batch size or schedule before it.
        """
        from megatron.training import get_args, print_rank_0

        if self.random_ltd is None or not budget.follows_layer_tokens(get_args()):
            return
        args, resolved = get_args(), self.random_ltd.resolved
        # Megatron later does the same for a checkpoint without a count of samples.
        samples = args.consumed_train_samples or args.iteration * args.global_batch_size
        here = Progress(args.iteration, samples, checkpoint.consumed(args)[0])
        if args.train_layer_tokens is not None:
            end = budget.end_of_budget(args, resolved, here)
            args.train_iters = end.iteration
            # This is the size of the data set. Otherwise Megatron computes it from the iterations
            # and the current batch size.
            if args.train_samples or end.samples > end.iteration * args.global_batch_size:
                args.train_samples = end.samples
            print_rank_0(
                f"random-LTD: --train-layer-tokens {args.train_layer_tokens} ends the run after "
                f"{end.iteration} iterations and {end.samples} samples; done so far: "
                f"{here.iteration} iterations and {here.samples} samples"
            )
        if here.iteration and args.override_opt_param_scheduler and self._scheduler is not None:
            advanced = Fraction(self._scheduler.num_steps)
            if args.layer_token_lr:
                advanced = Fraction(self._scheduler.layer_tokens, resolved.layer_tokens.dense)
            self._set_scheduler(
                budget.scheduler_settings(args, resolved, self._is_decay_given, here, advanced)
            )
            self._scheduler.step(0)

    def _describe(self) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import print_rank_0

        assert self.random_ltd is not None
        for line in self.random_ltd.resolved.describe(get_num_microbatches()):
            print_rank_0(f"random-LTD: {line}")

    def _use(self, random_ltd: RandomLTD, args: Any) -> None:
        if self.random_ltd is not None:
            self.random_ltd.detach()  # from a model that was built before
        self.random_ltd = random_ltd
        if isinstance(self._scheduler, LayerTokenScheduler):
            self._scheduler.random_ltd = random_ltd
        # The checkpoint must hold what the run does, not a default that was left open.
        args.random_ltd_strata = random_ltd.resolved.strata
        args.random_ltd_seed = random_ltd.resolved.seed

    def _set_scheduler(self, settings: dict[str, int | float]) -> None:
        from megatron.training import get_args

        checkpoint.set_scheduler_settings(get_args(), settings)
        for name, value in settings.items():
            setattr(self._megatrons_scheduler, name, value)

    def _resume(self, checkpoint_args: Any, random_ltd: RandomLTD) -> None:
        from megatron.training import get_args, print_rank_0

        args = get_args()
        samples = getattr(checkpoint_args, "consumed_train_samples", 0)
        dense = samples * random_ltd.resolved.layer_tokens.dense
        checkpoint.set_consumed(args, *checkpoint.consumed(checkpoint_args, dense))
        checkpoint.check_learning_rate(checkpoint_args, args)
        settings = checkpoint.scheduler_settings(checkpoint_args, args)
        if self._scheduler is not None and settings is not None:
            self._set_scheduler(settings)
        if not getattr(checkpoint_args, "random_ltd", False):
            print_rank_0(
                f"random-LTD: the checkpoint was trained without it; its {samples} samples count "
                f"as {dense} LayerTokens, and the schedule continues from its iteration and samples"
            )
            return
        config = checkpoint.continued_config(random_ltd.config, checkpoint_args, args)
        for name in FIELDS:
            setattr(args, FLAG_PREFIX + name, getattr(config, name))
        resolved: ResolvedConfig = resolve(config, facts_from_args(args))
        self._use(RandomLTD(config, resolved), args)
        rewound = getattr(args, "override_ckpt_iteration", None)
        if rewound is not None:
            end = budget.after_iterations(args, resolved, rewound)
            dense = end.samples * resolved.layer_tokens.dense
            checkpoint.set_consumed(args, end.layer_tokens, dense)

    def _consume(self, ended: EndedStep) -> None:
        from megatron.training import get_args

        assert self.random_ltd is not None
        tokens, dense = checkpoint.consumed(get_args())
        dense += ended.samples * self.random_ltd.resolved.layer_tokens.dense
        checkpoint.set_consumed(get_args(), tokens + ended.layer_tokens, dense)


_signature = functools.cache(inspect.signature)
