"""The options of the benchmarks that train a GPT."""

import argparse
import dataclasses

import torch

from lib.attention import (
    DESCRIBED,
    TRANSFORMER_ENGINE,
    default_attention,
    has_transformer_engine,
)
from lib.common import BenchmarkError
from lib.gpt import DTYPES, FUSED, PRESETS, UNFUSED, Shape, Trainer, default_cross_entropy
from megatron_rltd.tokens.ops import BACKENDS


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a GPT and how it is trained."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="sizes (small)")
    for field in dataclasses.fields(Shape):
        flag = f"--{field.name.replace('_', '-')}"
        add(flag, type=field.type, help="instead of the preset's")
    add("--micro-batches", type=int, metavar="N", help="of a step (8; 2 with --quick)")
    add("--attention", choices=DESCRIBED, help="(te if Transformer Engine is there, else sdpa)")
    add("--cross-entropy", choices=(FUSED, UNFUSED), help="(fused in bfloat16 on a GPU)")
    add("--backend", choices=BACKENDS, default="auto", help="random-LTD's (auto)")


def chosen_shape(options: argparse.Namespace, device: torch.device) -> Shape:
    """Return the preset with what the options change; set the other model options' defaults.

    Raises:
        BenchmarkError: What they ask for cannot be measured here.
    """
    if device.type == "cpu" and torch.cuda.is_available():
        raise BenchmarkError("--device cpu: Megatron runs on the CPU only where there is no GPU")
    preset = PRESETS["tiny" if options.quick else options.preset]
    names = [field.name for field in dataclasses.fields(Shape)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    shape = dataclasses.replace(preset, **given)
    if shape.dtype not in DTYPES:
        raise BenchmarkError(f"--dtype {shape.dtype} must be one of {', '.join(DTYPES)}")
    options.micro_batches = options.micro_batches or (2 if options.quick else 8)
    options.attention = options.attention or default_attention()
    if options.attention == TRANSFORMER_ENGINE and not has_transformer_engine():
        raise BenchmarkError("--attention te: Transformer Engine cannot run here; sdpa can")
    options.cross_entropy = options.cross_entropy or default_cross_entropy(shape, device)
    if options.cross_entropy == FUSED and shape.dtype != "bfloat16":
        raise BenchmarkError(
            "--cross-entropy fused rounds its gradients to bfloat16: --dtype bfloat16"
        )
    return shape


def trainer_of(
    options: argparse.Namespace, shape: Shape, least: int, device: torch.device
) -> Trainer:
    """Return a trainer as the options, with their defaults, say."""
    most_joined = getattr(options, "grow_micro_batch", 1)
    chosen = options.backend, options.attention, options.cross_entropy, most_joined
    return Trainer(shape, least, device, *chosen)
