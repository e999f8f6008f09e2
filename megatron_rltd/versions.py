"""The Megatron versions that random-LTD was tested with, and what it relies on in them.

`fingerprints.json` holds, for every Megatron function that random-LTD wraps or whose behaviour it
relies on, the fingerprint of its source in each tested version. A function that is missing or has
another source stops the run before anything is patched: its behaviour is unknown.
``tools/fingerprints.py`` writes the file.
"""

import functools
import json
import os
from importlib import metadata
from pathlib import Path

from megatron_rltd import patching
from megatron_rltd.patching import Patch

OLDEST, NEWER_THAN_TESTED = (0, 17), (0, 20)
ALLOW_UNTESTED = "MEGATRON_RLTD_ALLOW_UNTESTED"

# Called, called by, or imitated, but not replaced.
RELIED_ON: tuple[str, ...] = (
    "megatron.core.transformer.transformer_block:TransformerBlock.forward",
    "megatron.core.transformer.transformer_layer:TransformerLayer.forward",
    "megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention",
    "megatron.core.transformer.module:GraphableMegatronModule.__call__",
    "megatron.core.tensor_parallel.random:checkpoint",
    "megatron.core.tensor_parallel.mappings:_split_along_first_dim",
    "megatron.core.models.common.embeddings.rope_utils:apply_rotary_pos_emb",
    "megatron.core.pipeline_parallel.schedules:forward_step",
    "megatron.training.datasets.data_samplers:MegatronPretrainingSampler.__iter__",
)


class VersionError(RuntimeError):
    """This Megatron is not one that random-LTD was tested with. Nothing has been patched."""


def megatron_version() -> str:
    """Return the version of the megatron-core in this process, such as "0.19.2".

    Megatron appends the commit of whatever git repository it lies in, a virtual environment in a
    checkout of something else included ("0.19.2+20505b2"); that says nothing about its source.
    """
    from megatron.core.package_info import __version__

    return __version__.partition("+")[0]


@functools.cache
def known_fingerprints() -> dict[str, dict[str, str]]:
    """Return {symbol: {version: fingerprint}} of the tested versions."""
    return json.loads((Path(__file__).parent / "fingerprints.json").read_text())


def tested_versions() -> list[str]:
    """Return the tested versions, oldest first."""
    return sorted({v for hashes in known_fingerprints().values() for v in hashes})


def known() -> dict[str, set[str]]:
    """Return {symbol: fingerprints}, to compare sources with; empty if the user allowed any."""
    if os.environ.get(ALLOW_UNTESTED):
        return {}
    return {symbol: set(hashes.values()) for symbol, hashes in known_fingerprints().items()}


def problems() -> list[str]:
    """Return what differs, in the functions of `RELIED_ON`, from the tested versions."""
    # Copies elsewhere are fine: these functions stay as they are.
    rows = [Patch(s, lambda original: original, "", copies=("megatron",)) for s in RELIED_ON]
    return [problem for row in rows for problem in patching.check(row, known())]


def require(found: list[str]) -> None:
    """Raise VersionError, naming versions and the way out, if problems were found."""
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found)
        raise VersionError(
            f"megatron-core {megatron_version()} is not one that random-LTD was tested with "
            f"({', '.join(tested_versions())}):{lines}\n"
            f"Install a tested version. {ALLOW_UNTESTED}=1 skips the comparison of sources."
        )


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
