"""Train an arm: dense steps, a draw, and the steps of what is left.

Shapes: b samples, s sequence length.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lib import text
from lib.samples import blocks, order, read_tokens
from lib.small_models import EVALUATED, learning_rate  # before Megatron
from torch import Tensor

# isort: split
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from early_bird import tickets
from early_bird.arms import PRETRAINING, TUNING, Arm, Plan, Size, plan, warm_up
from early_bird.tickets import State
from megatron_rltd.early_bird.masks import STRUCTURED
from megatron_rltd.early_bird.units import ModelShape

Watch = Callable[[int, Any], None]


@dataclass(frozen=True)
class Texts:
    """Tokens to train on, and of the two validation sets."""

    train: Tensor
    validation: list[Tensor]


def read_texts(folder: Path) -> dict[str, Texts]:
    """Return the text of each phase, tokenised into a folder unless it is there."""
    train, validation, _ = text.prepare(folder)
    others = text.prepare_headers(folder)
    return {
        phase: Texts(read_tokens(first), [read_tokens(prefix) for prefix in rest])
        for phase, (first, rest) in ((PRETRAINING, (train, validation)), (TUNING, others))
    }


def build(size: Size, shape: ModelShape, seed: int = 0) -> Any:
    """Return a new model of any shape; its initial weights depend on shape and seed only."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn_hidden_size,
        gated_linear_unit=shape.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=text.VOCABULARY,
        max_sequence_length=size.seq_length,
        position_embedding_type="rope",
    ).cuda()


def initial(size: Size, shape: ModelShape, seed: int) -> State:
    """Return an untrained state."""
    return _state(build(size, shape, seed), shape, 0)


def _state(model: Any, shape: ModelShape, step: int, optimizer: Any = None) -> State:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {}
    if optimizer is not None:
        moments = {
            name: {key: value.clone() for key, value in optimizer.state[p].items()}
            for name, p in model.named_parameters()
        }
    return State(shape, step, weights, moments)


@torch.no_grad()
def model_of(state: State, size: Size) -> Any:
    """Return a model with a state's weights."""
    model = build(size, state.shape)
    for name, parameter in model.named_parameters():
        if parameter.shape != state.weights[name].shape:
            raise ValueError(f"{name}: {tuple(state.weights[name].shape)} in the state")
        parameter.copy_(state.weights[name])
    return model


def token_losses(model: Any, own: Tensor) -> Tensor:
    """Return the loss of every token of samples [b, s + 1] but the first, in one dimension."""
    ids, labels = own[:, :-1].cuda(), own[:, 1:].cuda()
    positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    return model(ids, positions, None, labels=labels).flatten()


@dataclass(frozen=True)
class Run:
    """What all steps of a run have in common.

    Attributes:
        size: Of models and batches.
        peak: Learning rate.
        schedule: Steps over which it decays.
        seed: Of the order of the samples.
        tokens: The training text.
    """

    size: Size
    peak: float
    schedule: int
    seed: int
    tokens: Tensor

    def train(
        self,
        state: State,
        until: int,
        arm: Arm | None = None,
        watch: Watch = lambda step, model: None,
    ) -> State:
        """Return the state after the steps from the state's to `until`.

        Args:
            arm: Whose mask of single weights is drawn now and enforced; None: none.
            watch: Called after every step with the number of steps done and the model.
        """
        size = self.size
        model = model_of(state, size)
        settings = {"lr": self.peak, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
        for name, parameter in model.named_parameters():
            if name in state.moments:
                own = {key: value.clone() for key, value in state.moments[name].items()}
                optimizer.state[parameter] = own
        enforced = tickets.weight_masks(arm, model, size, self.seed) if arm else []
        _enforce(enforced)
        samples = blocks(self.tokens, size.seq_length)
        numbers = order(len(samples), self.seed)
        for step in range(state.step, until):
            first = step * size.batch_size
            own = samples[numbers[first : first + size.batch_size]]
            token_losses(model, own).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = learning_rate(step, self.schedule, self.peak, warm_up(self.schedule))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            _enforce(enforced)
            watch(step + 1, model)
        if until <= state.step:
            return _enforced_state(model, state)
        return _state(model, state.shape, until, optimizer)


@torch.no_grad()
def _enforce(masks: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, mask in masks:
        parameter.masked_fill_(mask, 0.0)


def _enforced_state(model: Any, state: State) -> State:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return replace(state, weights=weights)


@torch.no_grad()
def evaluate(model: Any, size: Size, tokens: Tensor) -> float:
    """Return the mean loss, nats per token, on samples spread over a text."""
    model.eval()
    samples = blocks(tokens, size.seq_length)
    samples = samples[:: max(1, len(samples) // size.validation_samples)]
    samples = samples[: size.validation_samples]
    losses = [
        token_losses(model, samples[first : first + EVALUATED])
        for first in range(0, len(samples), EVALUATED)
    ]
    model.train()
    return float(torch.cat(losses).double().mean())


def losses(state: State, size: Size, texts: Texts) -> list[float]:
    """Return the loss on each validation set."""
    model = model_of(state, size)
    return [evaluate(model, size, tokens) for tokens in texts.validation]


class Seed:
    """The runs of one seed, which share what they begin with.

    Nothing that is shared differs from training it again.
    """

    def __init__(self, size: Size, number: int, texts: dict[str, Texts], kept: Path):
        """Take the size of all runs.

        Args:
            size: Of all runs.
            number: The seed.
            texts: Of `read_texts`.
            kept: File of the trained dense model's weights, which tuning begins with.
        """
        self.size, self.number, self.texts, self._kept = size, number, texts, kept
        self._dense_steps = lru_cache(maxsize=4)(self._train_dense)

    def run(self, arm: Arm) -> Run:
        """Return an arm's run."""
        peak = self.size.lr if arm.phase == PRETRAINING else self.size.tuning_lr
        tokens = self.texts[arm.phase].train
        return Run(self.size, peak, plan(arm, self.size).schedule, self.number, tokens)

    def begin(self, arm: Arm) -> State:
        """Return the state that an arm begins with."""
        if arm.phase == PRETRAINING:
            return initial(self.size, plan(arm, self.size).shape, self.number)
        if not self._kept.exists():
            self.keep(self.train(Arm()))
        return State(self.size.dense(), 0, torch.load(self._kept, weights_only=True))

    def keep(self, trained: State) -> None:
        """Note the weights of the trained dense model."""
        torch.save(dict(trained.weights), self._kept.with_suffix(".new"))
        self._kept.with_suffix(".new").rename(self._kept)

    def _train_dense(self, phase: str, schedule: int, until: int) -> State:
        arm = Arm(phase=phase)
        return replace(self.run(arm), schedule=schedule).train(self.begin(arm), until)

    def at_draw(self, arm: Arm) -> State:
        """Return the dense state at an arm's draw."""
        own = plan(arm, self.size)
        return self._dense_steps(arm.phase, own.schedule, own.before)

    def drawn(self, arm: Arm) -> State:
        """Return what an arm goes on with after its draw; single weights are not yet pruned."""
        own, dense = plan(arm, self.size), self.at_draw(arm)
        if arm.pattern != STRUCTURED:
            return dense
        mask = tickets.choose(
            arm.units, model_of(dense, self.size), dense.step, self.size, self.number
        )
        if arm.rewinds:
            dense = self._dense_steps(arm.phase, own.schedule, own.start)
        ticket = tickets.cut(dense, mask, self.size)
        return replace(ticket, moments={}) if arm.resets else ticket

    def after_draw(self, arm: Arm, drawn: State) -> list[float]:
        """Return the losses of what a draw left, before its first step."""
        masked = self.run(arm).train(drawn, drawn.step, _masked(arm))
        return losses(masked, self.size, self.texts[arm.phase])

    def train(self, arm: Arm, start: State | None = None, watch: Watch | None = None) -> State:
        """Return the state at an arm's end.

        Args:
            start: Of `drawn`, if it was made already.
            watch: See `Run.train`; not called before a draw.
        """
        own: Plan = plan(arm, self.size)
        if start is None:
            start = self.drawn(arm) if own.before else self.begin(arm)
        watch = watch or (lambda step, model: None)
        return self.run(arm).train(start, own.schedule, _masked(arm), watch)


def _masked(arm: Arm) -> Arm | None:
    return None if arm.pattern == STRUCTURED else arm
