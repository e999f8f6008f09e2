"""The compiled kernels of ``csrc/``: load them if they are built; otherwise say how to build them.

`ops` works without them, in plain torch.
"""

import ctypes
import functools
import logging
import os
import socket
from pathlib import Path

import torch

LIBRARY = "MEGATRON_RLTD_KERNELS"  # environment variable: another library to load; empty: none
BUILD = "MEGATRON_RLTD_CUDA=1 pip install --no-build-isolation --no-deps ."


@functools.cache
def load() -> str | None:
    """Load the kernels once; return why there are none, or None."""
    library = _library()
    if library is None:
        return f"not built; build them in a checkout of megatron_rltd: {BUILD}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"built for another torch ({str(error).splitlines()[0]}); build again: {BUILD}"
    return None


def missing_for(device_type: str) -> str | None:
    """Return why there are no kernels for "cpu" or "cuda", or None if there are.

    They may be there without a GPU. This creates no CUDA context.
    """
    missing = load()
    if missing is None and not torch._C._dispatch_has_kernel_for_dispatch_key(
        "megatron_rltd::gather", device_type.upper()
    ):
        missing = _missing_in_library() if device_type == "cuda" else None
        missing = missing or f"built without {device_type.upper()}; build again: {BUILD}"
    return missing


def _library() -> str | None:
    """Return the path of the library to load, if there is one."""
    chosen = os.environ.get(LIBRARY)
    if chosen is not None:
        return chosen or None
    built = sorted(Path(__file__).parents[1].glob("_C*.so"))
    return str(built[0]) if built else None


def _missing_in_library() -> str | None:
    """Return what a library built for CUDA says it misses in this torch."""
    missing = getattr(ctypes.CDLL(_library()), "megatron_rltd_without_cuda", None)
    if missing is None:
        return None
    missing.restype = ctypes.c_char_p
    return missing().decode()


def warn_if_missing(device_type: str) -> None:
    """Log, on one rank of each node, how to build the kernels if a model on a GPU has none."""
    missing = missing_for(device_type) if device_type == "cuda" else None
    if missing and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        logging.getLogger(__name__).warning(
            "random-LTD: on %s tokens move in plain torch, because the kernels are %s",
            socket.gethostname(),
            missing,
        )
