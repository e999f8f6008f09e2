"""The runtime of random-LTD: it decides which tokens each layer of a model keeps at each step.

    random_ltd = RandomLTD(RandomLTDConfig(min_tokens=128, ramp_iters=10_000))
    random_ltd.attach(model)                              # a GPTModel, wrapped or not, or a list
    for iteration in range(iterations):
        random_ltd.begin_step(iteration, consumed_samples)
        ...                                               # Megatron's forward-backward function
        random_ltd.end_step()

`attach` replaces the forward of the model's block of layers and of each layer, on these instances
only. Nothing is patched globally, no module is added and no parameter is renamed. Evaluation mode
and everything outside a step run at full length.
"""

import collections
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.config import ConfigError, ModelError, RandomLTDConfig, RankConfigError, flag
from megatron_rltd.model import routers
from megatron_rltd.model.block import (
    LayerPlan,
    check_layers,
    plan_angles,
    plan_ends,
    plan_recomputation,
)
from megatron_rltd.model.kept import Pass, draw_kept
from megatron_rltd.model.layer import check_arguments, gather_angles, run_layer
from megatron_rltd.patching import versions
from megatron_rltd.refusals import BERT_WITH_CONTEXT_PARALLELISM, find_refused_in_model
from megatron_rltd.resolved_config import ModelFacts, ResolvedConfig, resolve
from megatron_rltd.schedule import Step
from megatron_rltd.tokens import kernels, ops
from megatron_rltd.tokens.shards import cached_on_device


class RandomLTD:
    """random-LTD on one model.

    Attributes:
        config: What the user asked for.
        step: The step that has begun and not ended; None between steps.
    """

    def __init__(self, config: RandomLTDConfig, resolved: ResolvedConfig | None = None):
        """Choose what implements the ops.

        Args:
            resolved: What the config means for the model, if you know it before the model exists.

        Raises:
            RankConfigError: The backend that ``config.backend`` asks for is not there.
        """
        self.config = config
        self.step: Step | None = None
        self._given = self._resolved = resolved
        self._micro_batch: int | None = None
        self._passes: collections.Counter[int] = collections.Counter()  # of this step, by block
        self._joined = (1, 0)  # micro-batches of the run in a pass, and samples of each
        self._is_attached = False  # a stage may have no block in which tokens drop
        self._blocks: list[Any] = []
        self._routers: list[Any] = []
        self._on_device = cached_on_device()
        try:
            self._library = ops.find_library(config.backend)
        except ValueError as error:
            way_out = f"or use {flag('backend')} auto"
            raise RankConfigError(
                [f"{flag('backend')} {config.backend}: {error}; {way_out}"]
            ) from error

    @property
    def resolved(self) -> ResolvedConfig:
        """What the config means for the model that is attached."""
        if self._resolved is None:
            raise RuntimeError("random-LTD: attach a model first")
        return self._resolved

    def attach(
        self,
        model: Any,
        seq_length: int | None = None,
        seed: int = 1234,
        micro_batch_size: int = 1,
    ) -> "RandomLTD":
        """Make the decoder (BERT: encoder) layers of a model drop tokens.

        Args:
            model: A Megatron-core GPTModel, HybridModel or BertModel, wrapped or not, or the list
                of model chunks of this pipeline rank. All ranks must attach the same config.
            seq_length: Tokens per sample; default: the model's ``max_sequence_length``.
            seed: Seed of the sampling if the config has none.
            micro_batch_size: Samples of a micro-batch. FP8 needs a multiple of 16 or 32 rows, and a
                larger micro-batch needs fewer tokens for that.

        Raises:
            ConfigError: The config does not fit the model, or the model uses something that
                random-LTD refuses.
            ModelError: There is no such model, or it is already attached.
            VersionError: random-LTD was not tested with this version of Megatron.
        """
        versions.check_versions(versions.find_problems())
        if self._given is None:  # else the table of patches has said it
            versions.print_untested()
        if self._is_attached:
            raise ModelError("random-LTD: already attached; call detach() first")
        models = list(_language_models(model if isinstance(model, (list, tuple)) else [model]))
        if not models:
            raise ModelError(
                "random-LTD: there is no GPTModel, HybridModel (of megatron-core 0.18 or newer) or "
                "BertModel to drop tokens in"
            )
        is_hybrid = hasattr(models[0], "hybrid_layer_pattern")
        if self._given is not None and is_hybrid != bool(self._given.model.groups):
            built = f"this script builds a {type(models[0]).__name__}"
            way_out = "use pretrain_hybrid.py with --hybrid-layer-pattern, or omit that flag"
            raise ConfigError([f"{built}: {way_out}"])
        blocks = [m.decoder if hasattr(m, "decoder") else m.encoder for m in models]
        problems = [
            problem for b in blocks for problem in find_refused_in_model(b.config, self.config)
        ]
        # A GPT's block is its decoder, BERT's its encoder.
        if not hasattr(models[0], "decoder") and blocks[0].config.context_parallel_size > 1:
            problems.append(BERT_WITH_CONTEXT_PARALLELISM)
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        if self._given is None:
            facts = ModelFacts.of(
                blocks[0].config,
                seq_length=seq_length or models[0].max_sequence_length,
                seed=seed,
                micro_batch_size=micro_batch_size,
                pattern=getattr(models[0], "hybrid_layer_pattern", None),
            )
            self._resolved = resolve(self.config, facts)
        blocks = [b for b in blocks if self._groups_dropping(b)]
        for block in blocks:
            check_layers(block, is_hybrid)
        if self.config.backend != "torch":
            kernels.warn_if_missing(next(blocks[0].parameters()).device.type if blocks else "cpu")
        for block in blocks:
            _override(block, functools.partial(self._run_block, block, block.forward))
            for layer in block.layers:
                _override(layer, functools.partial(run_layer, layer, layer.forward))
        self._blocks, self._is_attached = blocks, True
        if self.config.grow_micro_batch > 1:
            self._routers = [router for m in models for router in routers.routers_of(m)]
            for router in self._routers:
                routers.balance_each(router, lambda: self._joined)
        return self

    def detach(self) -> None:
        """Give the model its own forwards back."""
        for block in self._blocks:
            for module in (block, *block.layers):
                del module.forward
        for router in self._routers:
            routers.undo(router)
        self._blocks, self._routers, self._resolved = [], [], self._given
        self._is_attached = False

    def begin_step(self, iteration: int, consumed_samples: int) -> Step:
        """Begin a training step, and return what it keeps and costs.

        Args:
            iteration: From 0.
            consumed_samples: Samples of all data-parallel ranks before this step.

        Parallelism: All ranks must call it with equal values.
        """
        self.step = self.resolved.layer_tokens.step(iteration, consumed_samples)
        self._micro_batch = None
        self._passes.clear()
        return self.step

    def begin_micro_batch(self, index: int) -> None:
        """Say which micro-batch of the step, from 0, the next forward pass processes.

        You need this only for BERT, and for a loop that does not use Megatron's pipeline schedules.
        The schedules tell it to the layers of a GPTModel and a HybridModel.
        """
        self._micro_batch = index

    def end_step(self) -> Step:
        """End the training step and return it; until the next one nothing is dropped."""
        if self.step is None:
            raise RuntimeError("random-LTD: no step has begun")
        step, self.step = self.step, None
        return step

    @property
    def is_dropping(self) -> bool:
        """Whether a forward pass in training mode would drop tokens now."""
        return self.step is not None and self.step.kept_tokens < self.resolved.model.seq_length

    def micro_batches_per_pass(self, num_micro_batches: int) -> int:
        """Return how many of a step's micro-batches one pass of the current step takes.

        Args:
            num_micro_batches: Of the step.
        """
        if self.step is None or not self.is_dropping:
            return 1
        return self.resolved.micro_batches_per_pass(self.step.kept_tokens, num_micro_batches)

    @contextlib.contextmanager
    def joining(self, count: int, micro_batch_size: int) -> Iterator[None]:
        """Within it, a forward pass takes `count` consecutive micro-batches of the step.

        `begin_micro_batch` then counts passes. See `megatron_rltd.model.micro_batches`.
        """
        self._joined = (count, micro_batch_size)
        try:
            yield
        finally:
            self._joined = (1, 0)

    def _run_block(self, block: Any, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a block with a plan of what its layers keep in this pass."""
        if self.step is None or not (block.training and self.is_dropping):
            return original(*args, **kwargs)
        call = _signature(block.__class__).bind(block, *args, **kwargs)
        arguments = call.arguments
        hidden_states = arguments["hidden_states"] if block.pre_process else block.input_tensor
        plan = arguments["packed_seq_params"] = self._plan(
            block, self.step, hidden_states, arguments
        )
        config = block.config
        if not plan.recomputed:
            return original(*call.args[1:], **call.kwargs)
        # Layers checkpoint themselves around the kept tokens, so the block must not checkpoint
        # them. It reads only the config to decide that.
        granularity, config.recompute_granularity = config.recompute_granularity, None
        try:
            return original(*call.args[1:], **call.kwargs)
        finally:
            config.recompute_granularity = granularity

    def _plan(
        self, block: Any, step: Step, hidden_states: Tensor, arguments: dict[str, Any]
    ) -> LayerPlan:
        check_arguments(arguments, block.config)
        packed, rotary = arguments.get("packed_seq_params"), arguments.get("rotary_pos_emb")
        if packed is not None and self.config.recurrent_layers:
            # Such a layer would take all documents for one.
            raise RuntimeError(
                "random-LTD: recurrent layers cannot drop tokens of packed sequences: omit "
                f"{flag('recurrent_layers')}"
            )
        drawn = draw_kept(
            self.resolved,
            self._library,
            step,
            Pass(self._pass_index(block), self._joined[0]),
            self._groups_dropping(block),
            hidden_states,
            packed is not None,
            block.pg_collection,
            self._on_device,
        )
        kept = self._of_layers(block, drawn)
        recomputed, grouped = plan_recomputation(block, kept, hidden_states.size(0))
        extracted = arguments.get("extract_layer_indices") or ()
        ends = plan_ends(block, set(kept), extracted, grouped)
        plan = LayerPlan(packed, kept, ends, recomputed, self._library)
        # Megatron recomputes groups with copies of the arguments, which cannot be recognised.
        if not grouped and plan_angles(rotary, drawn, hidden_states, bool(recomputed)):
            plan.rotary = rotary
            angles = gather_angles(rotary, drawn, packed, self._library)
            plan.angles = self._of_layers(block, angles)
        return plan

    def _groups_dropping(self, block: Any) -> tuple[int, ...]:
        """Return the numbers of a block's groups that drop, in order; in a GPTModel, its layers."""
        group_of, dropped = self.resolved.group_of, set(self.resolved.dropped_layers)
        numbers = dict.fromkeys(group_of[layer.layer_number] for layer in block.layers)
        return tuple(n for n in numbers if n in dropped)

    def _of_layers(self, block: Any, of_groups: dict[int, Any]) -> dict[int, Any]:
        """Return Megatron's layer numbers to the values of their groups."""
        numbers = (layer.layer_number for layer in block.layers)
        group_of = self.resolved.group_of
        return {n: of_groups[group_of[n]] for n in numbers if group_of[n] in of_groups}

    def _pass_index(self, block: Any) -> int:
        """Return the index, within the step, of the pass that a block's forward belongs to."""
        if self._micro_batch is not None:
            return self._micro_batch
        # Megatron's schedules leave the index on the layers and take the micro-batches in order.
        # A value that does not fit comes from an earlier step or an evaluation.
        index = self._passes[id(block)]
        if len(block.layers) and getattr(block.layers[0], "current_microbatch", None) != index:
            raise RuntimeError(
                "random-LTD: call begin_micro_batch(index) before each forward pass in a loop "
                "that does not use Megatron's pipeline schedules, or that repeats passes to find "
                "faults (its rerun_mode is not disabled)"
            )
        self._passes[id(block)] += 1
        return index


@functools.cache
def _signature(block_class: Any) -> inspect.Signature:
    return inspect.signature(block_class.forward)


def _language_models(models: Iterable[Any]) -> Iterator[Any]:
    """Yield every GPTModel, HybridModel and BertModel in `models`, which may be wrapped."""
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel

    kinds = [GPTModel, BertModel]
    if versions.release() >= (0, 18):
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        kinds.append(HybridModel)
    for model in models:
        yield from (m for m in model.modules() if isinstance(m, tuple(kinds)))


def _override(module: torch.nn.Module, forward: Callable) -> None:
    # An instance attribute: torch calls self.forward, and the class stays as Megatron made it.
    module.forward = forward
