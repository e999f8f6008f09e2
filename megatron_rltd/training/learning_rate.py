"""A learning rate that follows LayerTokens (arXiv 2211.11586) instead of samples.

If tokens are dropped, the middle layers see less of each batch, and a schedule over samples warms
up and decays too early for them. This schedule advances by LayerTokens, in units of a sample that
drops nothing: n samples, if dropped layers keep k of their s tokens, advance it by
n * (s * (L - n_d) + k * n_d) / (s * L). Otherwise it is Megatron's own schedule, with all styles of
warm-up, decay and weight decay. It equals Megatron's bit for bit as long as nothing is dropped.

In a loop of your own:

    scheduler = LayerTokenScheduler(OptimizerParamScheduler(optimizer, ...), random_ltd)
    ...
    step = random_ltd.end_step()
    scheduler.step(increment=global_batch_size, step=step)   # after the optimizer's step
"""

from fractions import Fraction
from typing import Any

from megatron_rltd.config import ConfigError
from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.schedule import Step

LAYER_TOKENS = "layer_tokens"


class LayerTokenScheduler:
    """Megatron's ``OptimizerParamScheduler``, advanced by LayerTokens.

    It is not a subclass, because that class calls its own ``step`` to construct itself and to load
    its state.

    Attributes:
        random_ltd: The runtime whose steps count.
        layer_tokens: LayerTokens that the schedule has advanced by, an exact integer. As in
            Megatron, it is less than the run consumed if the optimizer skipped steps.
    """

    def __init__(self, scheduler: Any, random_ltd: RandomLTD):
        """Wrap a scheduler that has not advanced yet.

        Args:
            scheduler: A ``megatron.core.optimizer_param_scheduler.OptimizerParamScheduler``.
            random_ltd: Attached to the model.
        """
        self._scheduler = scheduler
        self.random_ltd = random_ltd
        self.layer_tokens = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an instance that has not been constructed, by copy
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    def step(self, increment: int, step: Step | None = None) -> None:
        """Advance by `increment` samples of a step and set the learning rates.

        Args:
            step: The step that trained on them. Default: the step that has begun and not ended;
                Megatron's loop calls this within it.
        """
        step = step or self.random_ltd.step
        if increment and step is None:
            raise RuntimeError(
                "random-LTD: pass the step that the samples belong to: step(n, end_step())"
            )
        if step is not None:
            self.layer_tokens += increment * step.layer_tokens_per_sample
        # Divide the exact sum each time, so that rounding errors do not add up.
        dense = self.random_ltd.resolved.layer_tokens.dense
        self._scheduler.num_steps = _quotient(self.layer_tokens, dense)
        self._scheduler.step(0)

    def state_dict(self) -> dict[str, Any]:
        """Return Megatron's state and the exact LayerTokens.

        Plain Megatron loads it too, though its ``num_steps`` may be a fraction of a sample here.
        """
        return {**self._scheduler.state_dict(), LAYER_TOKENS: self.layer_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or, counted at full length, of plain Megatron.

        Raises:
            ConfigError: Its settings differ from the scheduler's, and no flag says which ones win.
        """
        try:
            self._scheduler.load_state_dict(state_dict)
        except AssertionError as error:
            raise ConfigError(
                [
                    f"{error}; add --override-opt-param-scheduler to continue with the learning "
                    "rate of the command line, which by default ends with the run, or "
                    "--use-checkpoint-opt-param-scheduler to continue with the checkpoint's"
                ]
            ) from error
        steps, dense = self._scheduler.num_steps, self.random_ltd.resolved.layer_tokens.dense
        saved = state_dict.get(LAYER_TOKENS)
        if saved is None or _quotient(saved, dense) != steps:  # of another sequence length
            saved = round(Fraction(steps) * dense)
        self.layer_tokens = saved


def _quotient(dividend: int, divisor: int) -> int | float:
    """Return the quotient, as an integer like Megatron's if it is a whole number."""
    whole, rest = divmod(dividend, divisor)
    return dividend / divisor if rest else whole
