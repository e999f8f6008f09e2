"""The Megatron versions that random-LTD was tested with, and what it relies on in them.

`fingerprints.json` holds, for every Megatron function that random-LTD wraps or whose behaviour it
relies on, the fingerprint of its source in each tested version. If a function is missing or has
another source, its behaviour is unknown, and the run stops before anything is patched.
``tools/dev/fingerprints.py`` writes the file.
"""

import functools
import importlib.util
import json
import os
import sys
from importlib import metadata
from pathlib import Path

from megatron_rltd.patching import mechanism
from megatron_rltd.patching.mechanism import Patch

OLDEST, NEWER_THAN_TESTED = (0, 17), (0, 20)
ALLOW_UNTESTED = "MEGATRON_RLTD_ALLOW_UNTESTED"
UNTESTED_FLAG = "--random-ltd-untested-megatron"


def _relied_on(target: str, since: tuple[int, ...] = (), before: tuple[int, ...] = ()) -> Patch:
    # A row that changes nothing. Other modules may hold copies: these functions stay as they are.
    return Patch(target, lambda f: f, "", copies=("",), since=since, before=before)


_LATENT = "megatron.core.transformer.multi_latent_attention"
_ROTARY = "megatron.core.models.common.embeddings"
# We call these, they call us, or we imitate them. None of them is replaced.
RELIED_ON: tuple[Patch, ...] = (
    _relied_on("megatron.core.transformer.transformer_block:TransformerBlock.forward"),
    _relied_on(
        "megatron.core.transformer.transformer_block:TransformerBlock._checkpointed_forward",
        before=(0, 18),
    ),
    _relied_on("megatron.core.recompute:checkpointed_forward", since=(0, 18)),
    _relied_on("megatron.core.models.hybrid.hybrid_block:HybridStack.forward", since=(0, 18)),
    _relied_on("megatron.core.ssm.mamba_layer:MambaLayer.forward"),
    _relied_on("megatron.core.transformer.transformer_layer:TransformerLayer.forward"),
    _relied_on("megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention"),
    _relied_on("megatron.core.transformer.module:GraphableMegatronModule.__call__"),
    _relied_on("megatron.core.models.gpt.gpt_model:GPTModel.forward"),
    _relied_on("megatron.core.models.bert.bert_model:BertModel.forward"),
    _relied_on("megatron.core.tensor_parallel.random:checkpoint"),
    _relied_on("megatron.core.tensor_parallel.mappings:_split_along_first_dim"),
    _relied_on("megatron.core.models.common.embeddings.rope_utils:apply_rotary_pos_emb"),
    _relied_on(f"{_LATENT}:MLASelfAttention.get_query_key_value_tensors"),
    _relied_on(f"{_ROTARY}.rotary_pos_embedding:RotaryEmbedding.forward"),
    _relied_on(f"{_ROTARY}.yarn_rotary_pos_embedding:YarnRotaryEmbedding.forward"),
    _relied_on("megatron.core.pipeline_parallel.schedules:forward_step"),
    _relied_on("megatron.core.pipeline_parallel.schedules:forward_step_calc_loss"),
    _relied_on("megatron.core.transformer.moe.router:TopKRouter.routing"),
    _relied_on("megatron.core.transformer.moe.router:TopKRouter._apply_aux_loss"),
    _relied_on("megatron.core.transformer.moe.router:TopKRouter._apply_seq_aux_loss"),
    _relied_on("megatron.core.transformer.moe.router:TopKRouter._apply_global_aux_loss"),
    _relied_on("megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.step_with_ready_grads"),
    _relied_on("megatron.core.optimizer.optimizer:FP32Optimizer.step_with_ready_grads"),
    _relied_on("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.step"),
    _relied_on("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.state_dict"),
    _relied_on("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict"),
    _relied_on("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr"),
    _relied_on("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_wd"),
    _relied_on("megatron.training.training:update_train_iters"),
    _relied_on("megatron.training.training:save_checkpoint_and_time"),
    _relied_on("megatron.training.training:get_train_valid_test_num_samples"),
    _relied_on("megatron.core.num_microbatches_calculator:_build_num_microbatches_calculator"),
    _relied_on("megatron.training.datasets.data_samplers:MegatronPretrainingSampler.__iter__"),
)


class VersionError(RuntimeError):
    """This Megatron is not one that random-LTD was tested with. Nothing has been patched."""


def check_installed() -> None:
    """Raise VersionError, saying how to get it, if Python finds no megatron-core or torch."""
    for package, module in (("torch", "torch"), ("megatron-core[training]", "megatron.core")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the parent package
            found = None
        if not found:
            raise VersionError(
                f"{sys.executable} finds no {module}: run pip install '{package}', run the script "
                "of a Megatron-LM checkout, or use the environment where Megatron is installed"
            )


def megatron_version() -> str:
    """Return the version of the megatron-core in this process, such as "0.19.2".

    Megatron appends the commit of the git repository around it ("0.19.2+20505b2"). That may be any
    checkout that holds the virtual environment, so it says nothing about Megatron's source.
    """
    from megatron.core.package_info import __version__

    return __version__.partition("+")[0]


def release() -> tuple[int, ...]:
    """Return (major, minor) of the megatron-core in this process, such as (0, 19)."""
    return tuple(int(number) for number in megatron_version().split(".")[:2])


def rows_for_release(patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
    """Return the rows of a table that are for the megatron-core in this process."""
    return tuple(patch for patch in patches if patch.is_for(release()))


@functools.cache
def known_fingerprints() -> dict[str, dict[str, str]]:
    """Return {symbol: {version: fingerprint}} of the tested versions."""
    return json.loads((Path(__file__).parent / "fingerprints.json").read_text())


def tested_versions() -> list[str]:
    """Return the tested versions, oldest first."""
    found = {version for hashes in known_fingerprints().values() for version in hashes}
    return sorted(found, key=lambda version: [int(number) for number in version.split(".")])


def newest_of_each_minor() -> list[str]:
    """Return the newest tested version of each minor release, oldest first."""
    return list({version.rpartition(".")[0]: version for version in tested_versions()}.values())


def tested_fingerprints() -> dict[str, set[str]]:
    """Return {symbol: fingerprints} to compare with; empty if the user allows untested sources."""
    if os.environ.get(ALLOW_UNTESTED):
        return {}
    return {symbol: set(hashes.values()) for symbol, hashes in known_fingerprints().items()}


def find_problems(patches: tuple[Patch, ...] = ()) -> list[str]:
    """Return what differs from the tested versions, in `RELIED_ON` and in `patches`."""
    tested = tested_fingerprints()
    checked = rows_for_release(RELIED_ON) + patches
    return [problem for row in checked for problem in mechanism.find_problems(row, tested)]


def allow_untested(argv: list[str]) -> None:
    """Skip the comparison of sources in this process and its children if a flag asks for it."""
    if UNTESTED_FLAG in argv:
        os.environ[ALLOW_UNTESTED] = "1"


def describe_untested(patches: tuple[Patch, ...] = ()) -> str:
    """Return a warning that lists what differs from the tested versions; "" if nothing does.

    Only if the user allows untested sources. Otherwise the same is an error.
    """
    if not os.environ.get(ALLOW_UNTESTED):
        return ""
    tested = {symbol: set(hashes.values()) for symbol, hashes in known_fingerprints().items()}
    checked = rows_for_release(RELIED_ON) + patches
    differing = [row.target for row in checked if mechanism.find_problems(row, tested)]
    if not differing:
        return ""
    bar = "!" * 78
    listed = "".join(f"\n  - {target}" for target in differing)
    return (
        f"{bar}\nmegatron_rltd WARNING: megatron-core {megatron_version()} is not one that "
        f"random-LTD was tested with ({', '.join(tested_versions())}). You asked to run anyway. "
        f"The sources of these functions are not as in any tested version:{listed}\n"
        "If one of them changed what random-LTD relies on, training is wrong without an error. "
        f"python -m megatron_rltd check --against PATH prints their diffs.\n{bar}"
    )


def print_untested(patches: tuple[Patch, ...] = ()) -> None:
    """Print the same on rank 0."""
    warning = describe_untested(patches)
    if warning and os.environ.get("RANK", "0") == "0":
        print(warning, file=sys.stderr, flush=True)


def check_versions(problems: list[str]) -> None:
    """Raise VersionError, naming versions and the way out, if problems were found."""
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise VersionError(
            f"megatron-core {megatron_version()} is not one that random-LTD was tested with "
            f"({', '.join(tested_versions())}):{lines}\n"
            "Install a tested version. To skip the comparison of sources, add "
            f"{UNTESTED_FLAG}, or set {ALLOW_UNTESTED}=1 in a loop of your own."
        )


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
