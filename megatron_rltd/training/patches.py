"""The table of every Megatron symbol that random-LTD replaces in a process, and why that one.

Rows hold no logic: each wrapper calls one function of another module and always calls the
original. The forwards of a model's block and layers are not here: `RandomLTD.attach` overrides them
on those instances only, and `versions.RELIED_ON` lists them.
"""

import functools
from collections.abc import Callable

from megatron_rltd import config
from megatron_rltd.model import layer
from megatron_rltd.patching import mechanism, versions
from megatron_rltd.patching.mechanism import Applied, Patch
from megatron_rltd.pretrain import compiled_helper
from megatron_rltd.training import state


def _add_arguments(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_megatron_arguments(parser):
        return config.add_arguments(original(parser))

    return add_megatron_arguments


def _validate_args(original: Callable) -> Callable:
    return functools.wraps(original)(functools.partial(state.validate_args, original))


def _setup_model_and_optimizer(original: Callable) -> Callable:
    @functools.wraps(original)
    def setup_model_and_optimizer(*args, **kwargs):
        result = original(*args, **kwargs)
        state.begin_training(result[0])
        return result

    return setup_model_and_optimizer


def _get_optimizer_param_scheduler(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_optimizer_param_scheduler(*args, **kwargs):
        return state.schedule_learning_rate(original(*args, **kwargs))

    return get_optimizer_param_scheduler


def _check_checkpoint_args(original: Callable) -> Callable:
    @functools.wraps(original)
    def check_checkpoint_args(checkpoint_args, *rest, **kwargs):
        result = original(checkpoint_args, *rest, **kwargs)
        state.resume(checkpoint_args)
        return result

    return check_checkpoint_args


def _train_step(original: Callable) -> Callable:
    return functools.wraps(original)(functools.partial(state.train_step, original))


def _training_log(original: Callable) -> Callable:
    return functools.wraps(original)(functools.partial(state.training_log, original))


def _set_current_microbatch(original: Callable) -> Callable:
    @functools.wraps(original)
    def set_current_microbatch(model, microbatch_id):
        state.begin_micro_batch(microbatch_id)
        return original(model, microbatch_id)

    return set_current_microbatch


def _num_floating_point_operations(original: Callable) -> Callable:
    count = functools.partial(state.floating_point_operations, original)
    return functools.wraps(original)(count)


def _fused_apply_rotary_pos_emb(original: Callable | None) -> Callable | None:
    if original is None:  # no Transformer Engine
        return None
    return functools.wraps(original)(functools.partial(layer.fused_rotary, original))


def _compile_helpers(original: Callable) -> Callable:
    @functools.wraps(original)
    def compile_helpers():
        if not compiled_helper.is_importable():
            original()

    return compile_helpers


_TRAINING = "megatron.training.training"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.training.arguments:add_megatron_arguments",
        _add_arguments,
        "adds the flags; every script's parser is built by it",
        parameters=("parser",),
    ),
    Patch(
        "megatron.training.arguments:validate_args",
        _validate_args,
        "checks the flags once Megatron has derived the layout",
        parameters=("args",),
        copies=("megatron.training.initialize",),
    ),
    Patch(
        "megatron.training.initialize:validate_args",
        _validate_args,
        "the same in Megatron 0.17, where this module holds and calls a copy",
        parameters=("args",),
        copies=("megatron.training.arguments",),
        before=(0, 18),
    ),
    Patch(
        f"{_TRAINING}:setup_model_and_optimizer",
        _setup_model_and_optimizer,
        "attaches to the model and, once a checkpoint is loaded, sets how long the run goes on",
    ),
    Patch(
        f"{_TRAINING}:get_optimizer_param_scheduler",
        _get_optimizer_param_scheduler,
        "lets the learning rate follow LayerTokens or end with their budget, if asked to",
    ),
    Patch(
        "megatron.training.checkpointing:check_checkpoint_args",
        _check_checkpoint_args,
        "the only place that sees the arguments a checkpoint was trained with",
        parameters=("checkpoint_args",),
    ),
    Patch(
        f"{_TRAINING}:train_step",
        _train_step,
        "sets the kept length of a step, then counts its LayerTokens",
        parameters=("forward_step_func", "data_iterator", "model", "optimizer"),
    ),
    Patch(
        f"{_TRAINING}:training_log",
        _training_log,
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
        "megatron.core.pipeline_parallel.schedules:set_current_microbatch",
        _set_current_microbatch,
        "names the micro-batch of the next forward pass, in every pipeline schedule",
        parameters=("model", "microbatch_id"),
        copies=("megatron.core.transformer.cuda_graphs",),
    ),
    Patch(
        f"{_TRAINING}:num_floating_point_operations",
        _num_floating_point_operations,
        "counts what is computed, so that the logged TFLOP/s are true",
        parameters=("args", "batch_size"),
    ),
    Patch(
        "megatron.core.models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
        _fused_apply_rotary_pos_emb,
        "the fused kernel takes one set of positions for all samples of a micro-batch",
        copies=(
            "megatron.core.extensions.transformer_engine",
            "megatron.core.transformer",
            "megatron.core.models",
        ),
    ),
)


# With or without random-LTD, where Megatron's own way to its compiled helper cannot work.
HELPER_PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.datasets.utils:compile_helpers",
        _compile_helpers,
        "runs make at start-up; a wheel brings the compiled helper and no Makefile",
    ),
)


def use_compiled_helper(even_in_clone: bool) -> Applied:
    """Let Megatron's data sets use the compiled helper of the megatron-core wheel.

    Args:
        even_in_clone: Also in a clone of Megatron-LM, where Megatron would compile it.
    """
    wanted = even_in_clone or not compiled_helper.can_be_made()
    if wanted:
        compiled_helper.load()
    return mechanism.apply(HELPER_PATCHES if wanted else ())


def apply() -> Applied:
    """Apply the table.

    Raises:
        VersionError: This Megatron is not one that random-LTD was tested with.
    """
    rows = versions.rows(PATCHES)
    found = versions.problems()
    found += [problem for patch in rows for problem in mechanism.check(patch, versions.known())]
    versions.require(found)
    return mechanism.apply(rows)


def table() -> str:
    """Return the table for the Megatron in this process as text, a row for each symbol."""
    patches = versions.rows(PATCHES)
    width = max(len(patch.target) for patch in patches)
    return "\n".join(f"  {patch.target:<{width}}  {patch.reason}" for patch in patches)
