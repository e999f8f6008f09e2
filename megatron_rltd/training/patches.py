"""The table of every Megatron symbol that random-LTD replaces in a process, and why that one.

Rows hold no logic: each replacement calls one method of `state.Training`, or of the search for a
ticket, or of both, or one function, which is given the original and always calls it. The forwards
of a model's block and layers are not here: `RandomLTD.attach` overrides them on those instances
only, and `versions.RELIED_ON` lists them.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_rltd.early_bird import arguments as early_bird_arguments
from megatron_rltd.early_bird.training import Search
from megatron_rltd.model import layer
from megatron_rltd.patching import mechanism, versions
from megatron_rltd.patching.mechanism import AppliedPatches, Patch
from megatron_rltd.training import bert_data
from megatron_rltd.training.arguments import add_arguments
from megatron_rltd.training.state import Training


def _through(*methods: Callable) -> Callable[[Any], Any]:
    """Return a wrapper whose replacement calls ``method(original, ...)``.

    Of several methods, each gets the one before it as its original.
    """

    def wrap(original: Any) -> Any:
        # A function of a package that is not installed is None, and stays None.
        for method in methods if original else ():
            original = functools.wraps(original)(functools.partial(method, original))
        return original

    return wrap


def _before(check: Callable) -> Callable[[Any], Any]:
    """The same for a method, which must be a function to get its object."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return check(original, *args, **kwargs)

        return method

    return wrap


def _add_arguments(original: Callable, parser: Any) -> Any:
    return early_bird_arguments.add_arguments(add_arguments(original(parser)))


_TRAINING = "megatron.training.training"


def patches_of(training: Training) -> tuple[Patch, ...]:
    """Return the table, its rows bound to a training and to a new search for a ticket."""
    search = Search()
    return (
        Patch(
            "megatron.training.arguments:add_megatron_arguments",
            _through(_add_arguments),
            "adds the flags; every script's parser is built by it",
            parameters=("parser",),
        ),
        Patch(
            "megatron.training.arguments:validate_args",
            _through(search.validate_args, training.validate_args),
            "checks the flags once Megatron has derived the layout",
            parameters=("args",),
            copies=("megatron.training.initialize",),
        ),
        Patch(
            "megatron.training.initialize:validate_args",
            _through(search.validate_args, training.validate_args),
            "the same in Megatron 0.17, where this module holds and calls a copy",
            parameters=("args",),
            copies=("megatron.training.arguments",),
            before=(0, 18),
        ),
        Patch(
            f"{_TRAINING}:setup_model_and_optimizer",
            _through(search.setup_model_and_optimizer, training.setup_model_and_optimizer),
            "attaches to the model and, once a checkpoint is loaded, sets how long the run goes on",
        ),
        Patch(
            f"{_TRAINING}:get_optimizer_param_scheduler",
            _through(training.get_optimizer_param_scheduler),
            "lets the learning rate follow LayerTokens or end with their budget, if asked to",
        ),
        Patch(
            "megatron.training.checkpointing:check_checkpoint_args",
            _through(search.check_checkpoint_args, training.check_checkpoint_args),
            "the only place that sees the arguments a checkpoint was trained with",
            parameters=("checkpoint_args",),
        ),
        Patch(
            "megatron.training.checkpointing:generate_state_dict",
            _through(training.generate_state_dict),
            "saves what a policy has learned since the last checkpoint",
            parameters=("args",),
        ),
        Patch(
            f"{_TRAINING}:train_step",
            _through(search.train_step, training.train_step),
            "sets the kept length of a step, then counts its LayerTokens; looks for a ticket",
            parameters=(
                "forward_step_func",
                "data_iterator",
                "model",
                "optimizer",
                "opt_param_scheduler",
                "forward_backward_func",
            ),
        ),
        Patch(
            f"{_TRAINING}:training_log",
            _through(search.training_log, training.training_log),
            "logs LayerTokens, and losses and learning rate against them",
            parameters=(
                "loss_dict",
                "total_loss_dict",
                "learning_rate",
                "iteration",
                "loss_scale",
                "report_memory_flag",
                "skipped_iter",
            ),
        ),
        Patch(
            f"{_TRAINING}:checkpoint_and_decide_exit",
            _through(search.checkpoint_and_decide_exit),
            "saves and ends the run when an Early-Bird ticket has emerged",
            parameters=(
                "model",
                "optimizer",
                "opt_param_scheduler",
                "iteration",
                "num_floating_point_operations_so_far",
                "checkpointing_context",
                "train_data_iterator",
            ),
        ),
        Patch(
            "megatron.core.pipeline_parallel.schedules:set_current_microbatch",
            _through(training.set_current_microbatch),
            "names the micro-batch of the next forward pass, in every pipeline schedule",
            parameters=("model", "microbatch_id"),
            copies=("megatron.core.transformer.cuda_graphs",),
        ),
        Patch(
            f"{_TRAINING}:num_floating_point_operations",
            _through(training.num_floating_point_operations),
            "counts what is computed, so that the logged TFLOP/s are true",
            parameters=("args", "batch_size"),
        ),
        Patch(
            "megatron.core.datasets.bert_dataset:BERTMaskedWordPieceDataset.__init__",
            _before(bert_data.check_before),
            "refuses tokenizers and documents of which BERT's samples would be wrong, or never end",
            parameters=(
                "indexed_dataset",
                "dataset_path",
                "indexed_indices",
                "num_samples",
                "index_split",
                "config",
            ),
        ),
        Patch(
            "megatron.core.models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
            _through(layer.fused_rotary),
            "the fused kernel takes one set of positions for all samples of a micro-batch",
            copies=(
                "megatron.core.extensions.transformer_engine",
                "megatron.core.transformer",
                "megatron.core.models",
            ),
        ),
    )


def apply(training: Training) -> AppliedPatches:
    """Apply the table.

    Raises:
        VersionError: This Megatron is not one that random-LTD was tested with.
    """
    rows = versions.rows_for_release(patches_of(training))
    versions.check_versions(versions.find_problems(rows))
    versions.print_untested(rows)
    return mechanism.apply(rows)
