"""The runtime of random-LTD: which tokens each layer of a model keeps at this step.

    random_ltd = RandomLTD(RandomLTDConfig(min_tokens=128, ramp_iters=10_000))
    random_ltd.attach(model)                              # a GPTModel, wrapped or not, or a list
    for iteration in range(iterations):
        random_ltd.begin_step(iteration, consumed_samples)
        ...                                               # Megatron's forward-backward function
        random_ltd.end_step()

`attach` replaces the forward of the model's transformer block and of its layers on these instances
only; nothing is patched globally, no module is added and no parameter renamed. Evaluation mode and
everything outside a step run at full length.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_rltd import layer as dropped_layer
from megatron_rltd.config import (
    ConfigError,
    Model,
    RandomLTDConfig,
    Resolved,
    flag,
    interleaved_passes,
    resolve,
)
from megatron_rltd.model import routers
from megatron_rltd.model.block import check_layers, plan_angles, plan_recomputation, plan_run_ends
from megatron_rltd.model.layer import KeptTokens, MicroBatch
from megatron_rltd.model.packed import flatten_samples
from megatron_rltd.patching import versions
from megatron_rltd.refusals import refused_in_model
from megatron_rltd.schedule import Progress
from megatron_rltd.tokens import kernels, ops
from megatron_rltd.tokens.shards import context_parallel_strata, sequence_parallel_strata


class RandomLTD:
    """random-LTD on one model.

    Attributes:
        config: What the user asked for.
    """

    def __init__(self, config: RandomLTDConfig, resolved: Resolved | None = None):
        self.config = config
        self._resolved = resolved
        self._kept_tokens: int | None = None
        self._in_step = False
        self._consumed_samples = 0
        self._micro_batch: int | None = None
        self._pass = (1, 0)  # micro-batches of the run in a pass, and samples of each
        self._blocks: list[Any] = []
        self._routers: list[Any] = []
        try:
            ops.use_backend(config.backend)
        except ValueError as error:
            way_out = f"or use {flag('backend')} auto"
            raise ConfigError(
                [f"{flag('backend')} {config.backend}: {error}; {way_out}"]
            ) from error

    @property
    def resolved(self) -> Resolved:
        """What the config means for the model that is attached."""
        if self._resolved is None:
            raise RuntimeError("random-LTD: attach a model first")
        return self._resolved

    @property
    def kept_tokens(self) -> int:
        """k of the current step, or of the last one between steps; s before the first."""
        return self.resolved.model.seq_length if self._kept_tokens is None else self._kept_tokens

    def attach(self, model: Any, seq_length: int | None = None, seed: int = 1234) -> "RandomLTD":
        """Make the decoder (BERT: encoder) layers of a model drop tokens.

        Args:
            model: A Megatron-core GPTModel or BertModel, wrapped or not, or the list of model
                chunks of this pipeline rank. All ranks must attach the same config.
            seq_length: Tokens per sample; default: the model's ``max_sequence_length``.
            seed: Seed of the sampling if the config has none.

        Raises:
            ConfigError: The config does not fit the model, or the model uses something that
                random-LTD refuses.
            RuntimeError: There is no such model, it is attached already, or Megatron's version
                is not one that random-LTD was tested with.
        """
        versions.require(versions.problems())
        models = list(_language_models(model if isinstance(model, (list, tuple)) else [model]))
        if not models:
            raise RuntimeError("random-LTD: there is no GPTModel or BertModel to drop tokens in")
        blocks = [m.decoder if hasattr(m, "decoder") else m.encoder for m in models]
        problems = [p for block in blocks for p in refused_in_model(block.config, self.config)]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        if self._resolved is None:
            facts = _model_facts(
                blocks[0].config, seq_length or models[0].max_sequence_length, seed
            )
            self._resolved = resolve(self.config, facts)
        dropped = set(self.resolved.dropped_layers)
        blocks = [b for b in blocks if any(n.layer_number in dropped for n in b.layers)]
        for block in blocks:
            check_layers(block)
        if self.config.backend != "torch":
            kernels.warn_if_missing(next(blocks[0].parameters()).device.type if blocks else "cpu")
        for block in blocks:
            _override(block, functools.partial(self._block_forward, block, block.forward))
            for layer in block.layers:
                _override(layer, functools.partial(dropped_layer.forward, layer, layer.forward))
        self._blocks += blocks
        if self.config.grow_micro_batch > 1:
            self._routers += [router for m in models for router in routers.routers_of(m)]
            for router in self._routers:
                routers.balance_each(router, lambda: self._pass)
        return self

    def detach(self) -> None:
        """Give the model its own forwards back."""
        for block in self._blocks:
            for module in (block, *block.layers):
                del module.forward
        for router in self._routers:
            routers.undo(router)
        self._blocks, self._routers = [], []

    def begin_step(self, iteration: int, consumed_samples: int) -> None:
        """Start a training step.

        Args:
            iteration: From 0.
            consumed_samples: Samples of all data-parallel ranks before this step.

        Parallelism: All ranks must call it with equal values.
        """
        position = self.resolved.layer_tokens.position(Progress(iteration, consumed_samples))
        self._kept_tokens = self.resolved.schedule.kept_tokens(position)
        self._consumed_samples = consumed_samples
        self._micro_batch = None
        for block in self._blocks:
            block.layers[0].current_microbatch = None  # of the last step, or of an evaluation
        self._in_step = True

    def begin_micro_batch(self, index: int) -> None:
        """Say which micro-batch of the step, from 0, the next forward pass is of.

        Needed only for a loop that does not go through Megatron's pipeline schedules, and for
        BERT: the schedules tell it to the layers of a GPTModel.
        """
        self._micro_batch = index

    def micro_batches_per_pass(self, num_micro_batches: int) -> int:
        """Return how many of a step's micro-batches one pass of this step takes.

        Args:
            num_micro_batches: Of the step.
        """
        if not self.is_dropping:
            return 1
        return self.resolved.micro_batches_per_pass(self.kept_tokens, num_micro_batches)

    @contextlib.contextmanager
    def joining(self, count: int, micro_batch_size: int) -> Iterator[None]:
        """Within it a forward pass is of `count` consecutive micro-batches of the step.

        `begin_micro_batch` then counts passes. See `megatron_rltd.model.micro_batches`.
        """
        self._pass = (count, micro_batch_size)
        try:
            yield
        finally:
            self._pass = (1, 0)

    def end_step(self) -> None:
        """End a training step: until the next one nothing is dropped."""
        self._in_step = False

    @property
    def is_dropping(self) -> bool:
        """Whether a forward pass in training mode would drop tokens now."""
        return self._in_step and self.kept_tokens < self.resolved.model.seq_length

    def _block_forward(self, block: Any, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a TransformerBlock with what its layers keep of this micro-batch."""
        if not (block.training and self.is_dropping):
            return original(*args, **kwargs)
        call = _signature(block.__class__).bind(block, *args, **kwargs).arguments
        hidden_states = call["hidden_states"] if block.pre_process else block.input_tensor
        micro_batch = self._micro_batch_of(block, hidden_states, call)
        kwargs = {**kwargs, "packed_seq_params": micro_batch}
        config = block.config
        if not micro_batch.recomputed:
            return original(*args, **kwargs)
        # Layers checkpoint themselves around the kept tokens, so the block must not do it around
        # them. The config is the only place where it looks.
        granularity, config.recompute_granularity = config.recompute_granularity, None
        try:
            return original(*args, **kwargs)
        finally:
            config.recompute_granularity = granularity

    def _micro_batch_of(self, block: Any, hidden_states: Tensor, call: dict) -> MicroBatch:
        dropped_layer.check_arguments(call, block.config)
        dropped = [n.layer_number for n in block.layers]
        dropped = [n for n in dropped if n in self.resolved.dropped_layers]
        packed = call.get("packed_seq_params")
        kept = self._kept(block, dropped, hidden_states, packed is not None)
        recomputed, grouped = plan_recomputation(block, kept, hidden_states.size(0))
        ends = plan_run_ends(block, set(dropped), call.get("extract_layer_indices") or (), grouped)
        micro_batch = MicroBatch(packed, kept, ends, recomputed)
        rotary = call.get("rotary_pos_emb")
        # Megatron recomputes groups with copies of the arguments, of which nothing is known here.
        if not grouped and plan_angles(rotary, kept, hidden_states, bool(recomputed)):
            micro_batch.rotary = rotary
            micro_batch.angles = dropped_layer.angles_of_layers(rotary, kept, packed)
        return micro_batch

    def _samples(self, block: Any, batch: int, device: torch.device) -> Tensor:
        """Return the global indices of the samples of a pass, [batch] int64.

        Megatron's order: micro-batch by micro-batch, in each the data-parallel ranks in turn
        (``megatron/training/datasets/data_samplers.py:MegatronPretrainingSampler``). Only the first
        of each micro-batch if all its samples keep the same tokens.
        """
        from megatron.core.utils import get_pg_rank, get_pg_size

        index = self._micro_batch
        if index is None:
            index = getattr(block.layers[0], "current_microbatch", None)
        if index is None:
            raise RuntimeError(
                "random-LTD: call begin_micro_batch(index) before each forward pass in a loop "
                "that does not use Megatron's pipeline schedules"
            )
        group = block.pg_collection.dp
        count, ranks = self._pass[0], get_pg_size(group)
        size, rest = divmod(batch, count)
        if rest:
            raise RuntimeError(f"random-LTD: a pass of {count} micro-batches has {batch} samples")
        start = self._consumed_samples + (index * count * ranks + get_pg_rank(group)) * size
        drawn = 1 if self.config.shared_indices else size
        offsets = tuple(i * ranks * size + j for i in range(count) for j in range(drawn))
        return _on_device(offsets, device) + start

    def _kept(
        self, block: Any, dropped: list[int], hidden_states: Tensor, is_packed: bool
    ) -> dict[int, KeptTokens]:
        """Return what the dropped layers of a block keep, drawn for all of them at once.

        Args:
            is_packed: Whether hidden_states holds its samples end to end, [b * s, 1, h].
        """
        from megatron.core.utils import get_pg_rank, get_pg_size

        if not dropped:
            return {}
        model, strata, length = (
            self.resolved.model,
            self.resolved.strata,
            self.resolved.model.seq_length,
        )
        rows, batch = hidden_states.shape[:2]
        expected = length // model.sequence_parallel_size // model.context_parallel_size
        samples = rows // expected if is_packed else batch
        if rows != (expected * samples if is_packed else expected) or samples < 1:
            raise RuntimeError(
                f"random-LTD: hidden states have {rows} rows on this rank where --seq-length "
                f"{length} makes {expected} of a sample; variable lengths do not work, another "
                "constant length is attach(seq_length=...)"
            )
        device = hidden_states.device
        positions = ops.sample(
            self.resolved.seed,
            _on_device(tuple(dropped), device),
            self._samples(block, samples, device),
            length,
            self.kept_tokens,
            strata,
        )
        if 1 < positions.size(1) < samples:  # shared within each micro-batch of a pass
            positions = positions.repeat_interleave(samples // positions.size(1), dim=1)
        if is_packed:
            positions = flatten_samples(positions, samples, length)
            strata, length = strata * samples, length * samples
        groups = block.pg_collection
        on_rank = context_parallel_strata(strata, get_pg_rank(groups.cp), get_pg_size(groups.cp))
        local = _rows_of(positions, on_rank, length, strata)
        rows_of_rank = local
        if model.sequence_parallel_size > 1:
            mine = sequence_parallel_strata(
                on_rank, get_pg_rank(groups.tp), model.sequence_parallel_size
            )
            rows_of_rank = _rows_of(positions, mine, length, strata)
        if rows_of_rank.size(1) != batch:
            rows_of_rank = rows_of_rank.expand(-1, batch, -1).contiguous()
        return {
            n: KeptTokens(rows_of_rank[i], local[i], positions[i], length)
            for i, n in enumerate(dropped)
        }


def _rows_of(positions: Tensor, on_rank: list[int], seq_length: int, strata: int) -> Tensor:
    """Return where the kept positions that lie in some strata are if only those are held, in order.

    Args:
        positions: [l, b, k] int32, the same number in each of `strata` strata.
        on_rank: The strata held, in the order in which they are held.

    Returns:
        [l, b, k * len(on_rank) / strata] int32.
    """
    if on_rank == list(range(strata)):
        return positions
    length = seq_length // strata
    shifts = tuple((row - stratum) * length for row, stratum in enumerate(on_rank))
    index = _on_device(tuple(on_rank), positions.device)
    shift = _on_device(shifts, positions.device, positions.dtype)
    chosen = positions.unflatten(-1, (strata, -1)).index_select(2, index)
    return chosen.add_(shift[:, None]).flatten(-2)


@functools.cache
def _on_device(
    numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    # Cached since the copy to a GPU waits for all it has to do.
    return torch.tensor(numbers, device=device, dtype=dtype)


@functools.cache
def _signature(block_class: Any) -> inspect.Signature:
    return inspect.signature(block_class.forward)


def _language_models(models: Iterable[Any]) -> Iterator[Any]:
    """Yield every GPTModel and BertModel in `models`, which may be wrapped."""
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel

    for model in models:
        yield from (m for m in model.modules() if isinstance(m, (GPTModel, BertModel)))


def _model_facts(config: Any, seq_length: int, seed: int) -> Model:
    """Return what a ``TransformerConfig`` says of a model and its layout."""
    return Model(
        seq_length=seq_length,
        num_layers=config.num_layers,
        sequence_parallel_size=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        context_parallel_size=config.context_parallel_size,
        pipeline_parallel_size=config.pipeline_model_parallel_size,
        passes_of_chunk=interleaved_passes(config),
        seed=seed,
    )


def _override(module: torch.nn.Module, forward: Callable) -> None:
    # An instance attribute: torch calls self.forward, and the class stays as Megatron made it.
    module.forward = forward
