"""Imported once by the server that `local_ranks` forks ranks from: all that a training imports."""

import logging
import os
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402, F401
import tensorboard  # noqa: E402, F401

import megatron_rltd.cpu.adapter  # noqa: E402
import megatron_rltd.training.state  # noqa: E402, F401
