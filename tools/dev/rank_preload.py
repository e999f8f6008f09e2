"""Imported once by the server that `local_ranks` forks ranks from: all that a training imports."""

import argparse
import functools
import inspect
import logging
import os
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.arguments  # noqa: E402
import megatron.training.training  # noqa: E402
import tensorboard  # noqa: E402, F401

import megatron_rltd.cpu.adapter  # noqa: E402, F401
from megatron_rltd.patching import versions  # noqa: E402
from megatron_rltd.training import patches  # noqa: E402
from megatron_rltd.training.state import Training  # noqa: E402

# Every rank compares the sources of the functions that it replaces, and Megatron reads its own for
# the help texts of its flags. They do not change while a server runs: it reads them once for all.
inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
versions.find_problems(versions.rows_for_release(patches.patches_of(Training())))
