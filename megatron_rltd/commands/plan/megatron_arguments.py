"""Megatron's validated arguments, as training would have them, on a machine without its GPUs."""

import contextlib
import importlib.util
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from megatron_rltd.config import ConfigError
from megatron_rltd.patching import versions
from megatron_rltd.refusals import refuse_command_line
from megatron_rltd.vision import arguments as vision

GPT2_VOCABULARY = 50257  # what GPT2BPETokenizer reads from GPT-2's --vocab-file
DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}  # of Megatron-LM's pretrain_gpt.py and of ours
WITHOUT_FILES = ("NullTokenizer", "NullMultimodalTokenizer")


class PlanError(Exception):
    """Why there is no plan, in one line."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Keep Megatron quiet, and make whatever it raises a PlanError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except PlanError:
        raise
    except ConfigError as error:
        problems = "; ".join(error.problems)
        raise PlanError(f"megatron_rltd refuses these arguments: {problems}") from error
    except versions.VersionError as error:
        raise PlanError(_one_line(str(error))) from error
    except SystemExit as error:  # argparse has said why
        said = printed.getvalue().rpartition("error: ")[2].strip().splitlines()
        raise PlanError(_REFUSED + (said[-1] if said else "it exits")) from error
    except Exception as error:
        raise PlanError(_REFUSED + _reason(error)) from error


_REFUSED = "Megatron refuses these arguments: "


def _reason(error: Exception) -> str:
    if not str(error):  # a bare assert
        return traceback.extract_tb(error.__traceback__)[-1].line or repr(error)
    plain = (AssertionError, ValueError, RuntimeError)
    kind = "" if isinstance(error, plain) else f"{type(error).__name__}: "
    return kind + _one_line(str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def prepare(flags: list[str], training: Any) -> None:
    """Do what ``python -m megatron_rltd`` does before Megatron runs.

    Args:
        training: A `megatron_rltd.training.state.Training`.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # saves seconds of unneeded imports
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    versions.check_installed()
    refuse_command_line(flags)
    versions.allow_untested(flags)
    from megatron_rltd.cpu import adapter

    if adapter.is_needed():
        adapter.enable()
        # The run will be on GPUs: what is checked is what the flags say, not what works here.
        adapter.CPU_ARGUMENTS.clear()
        adapter.GPU_LAYERS.clear()
    from megatron_rltd.training import patches

    patches.apply(training)
    from megatron.training import arguments

    if importlib.util.find_spec("transformer_engine") is None:
        # Nor is Transformer Engine needed here: the plan is for a new one.
        arguments.is_te_min_version = lambda version, check_equality=True: True


def parse(flags: list[str], gpus: int | None, of_vit: bool = False) -> Any:
    """Return what Megatron's parser makes of the flags, for a world of that many GPUs.

    Args:
        of_vit: Whether they are the flags of `finetune_vit`, which has some of its own.
    """
    from megatron.training.arguments import parse_args

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(gpus or 1))
    sys.argv = ["pretrain_gpt.py", *flags]
    args = parse_args(vision.add_arguments if of_vit else None)
    problems = vision.find_problems(args) if of_vit else []
    if problems:
        raise ConfigError(problems)
    if gpus is None:
        args.world_size = (
            args.tensor_model_parallel_size
            * args.pipeline_model_parallel_size
            * args.context_parallel_size
        )
    if args.use_checkpoint_args:
        raise PlanError("--use-checkpoint-args: a plan reads no checkpoint; give the flags instead")
    if args.lr is None:
        raise PlanError("there is no learning rate: add --lr")
    return args


def validate(args: Any, of_vit: bool = False) -> None:
    """Let Megatron, and then this package, check and complete the arguments."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import arguments

    # Megatron asks the environment for it; the run's will be what its launcher sets.
    fsdp = getattr(args, "use_torch_fsdp2", None) or getattr(args, "use_megatron_fsdp", None)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if fsdp else "1"
    arguments.validate_args(args, vision.defaults(args) if of_vit else DEFAULTS)
    # Its parameters differ between releases; each has the name of an argument.
    names = inspect.signature(init_num_microbatches_calculator).parameters
    init_num_microbatches_calculator(**{name: getattr(args, name, None) for name in names})


def set_vocabulary(args: Any) -> list[str]:
    """Set ``padded_vocab_size`` as Megatron does with its tokenizer; return what to note."""
    from megatron.core.tokenizers.utils import build_tokenizer

    if args.padded_vocab_size:
        return []
    if args.vocab_size and args.tokenizer_type in WITHOUT_FILES:
        build_tokenizer.build_tokenizer(args)  # of it Megatron's releases differ in the size
        return []
    if args.tokenizer_type == "HuggingFaceTokenizer" and os.path.isdir(args.tokenizer_model or ""):
        build_tokenizer.build_tokenizer(args)
        return []
    size, notes = args.vocab_size, []
    if size is None and args.tokenizer_type == "GPT2BPETokenizer":
        size = GPT2_VOCABULARY
        notes.append(f"the vocabulary is taken to be GPT-2's {size:,}; if not, add --vocab-size N")
    if size is None:
        raise PlanError(
            f"the vocabulary of --tokenizer-type {args.tokenizer_type} is not known without its "
            "files: add --vocab-size N (before padding) or --padded-vocab-size N"
        )
    padded = build_tokenizer.vocab_size_with_padding(size, args, logging_enabled=False)
    args.padded_vocab_size = padded
    return notes
