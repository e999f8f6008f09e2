"""A learning rate that follows LayerTokens (arXiv 2211.11586) instead of samples.

Dropping tokens shrinks what the middle layers see of a batch, so that a schedule over samples warms
up and decays too early for them. This one advances by LayerTokens, in units of a sample of which
nothing is dropped: n samples of which dropped layers keep k of s tokens advance it by
n * (s * (L - n_d) + k * n_d) / (s * L). It is Megatron's own schedule otherwise, all styles of
warm-up, decay and weight decay included, and equals it bit for bit as long as nothing is dropped.

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

    Not a subclass: that class calls its own ``step`` to construct itself and to load its state.

    Attributes:
        random_ltd: Whose steps count.
        layer_tokens: By how many LayerTokens the schedule has advanced, an exact integer. Less than
            the run consumed if the optimizer skipped steps, as in Megatron.
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
            step: That they were trained in; default: the one that has begun and not ended, in
                which Megatron's loop calls this.
        """
        step = step or self.random_ltd.step
        if increment and step is None:
            raise RuntimeError("random-LTD: say which step the samples are of: step(n, end_step())")
        if step is not None:
            self.layer_tokens += increment * step.layer_tokens_per_sample
        # Divided anew from the exact sum each time, so that no rounding adds up.
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
            ConfigError: Its settings are not the scheduler's, and neither is to win.
        """
        try:
            self._scheduler.load_state_dict(state_dict)
        except AssertionError as error:
            raise ConfigError(
                [
                    f"{error}; add --override-opt-param-scheduler to go on with the command line's "
                    "learning rate, which by default ends with the run, or "
                    "--use-checkpoint-opt-param-scheduler to go on with the checkpoint's"
                ]
            ) from error
        steps, dense = self._scheduler.num_steps, self.random_ltd.resolved.layer_tokens.dense
        saved = state_dict.get(LAYER_TOKENS)
        if saved is None or _quotient(saved, dense) != steps:  # of another sequence length
            saved = round(Fraction(steps) * dense)
        self.layer_tokens = saved


def _quotient(dividend: int, divisor: int) -> int | float:
    """Return the quotient, as an integer like Megatron's where it is one."""
    whole, rest = divmod(dividend, divisor)
    return dividend / divisor if rest else whole
