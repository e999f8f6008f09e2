"""Write a GPT-2 or Llama of Hugging Face's transformers as a checkpoint that Megatron starts from.

    python tools/checkpoint/import_hf.py --input GPT2_FOLDER --output CHECKPOINTS

The folder is what save_pretrained wrote, or a download of a published model. The checkpoint loads
on any parallel layout, in Megatron-LM and here, with the flags that are printed:

    torchrun ... -m megatron_rltd pretrain_gpt --load CHECKPOINTS --finetune <the flags> ...

It holds weights and no optimizer. Models that Megatron's GPT would compute differently are refused.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

# This checkout's package, installed or not, and what makes its data.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export_hf import DTYPES

NEEDED = ("config.json", "*.safetensors")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors")
    add("--output", type=Path, required=True, metavar="FOLDER", help="a new folder, to --load")
    text = "rows of the embedding are a multiple of N (128); tensor parallelism must divide it"
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help=text)
    add("--seq-length", type=int, metavar="N", help="length to print (the model's positions)")
    add("--dtype", choices=DTYPES, help="dtype of the written weights (as stored)")
    options = parser.parse_args(argv)
    for pattern in NEEDED:
        if not any(options.input.glob(pattern)):
            parser.error(f"--input {options.input}: there is no {pattern} in it")
    if options.output.exists():
        parser.error(f"--output {options.output} exists; name a new folder")
    if options.make_vocab_size_divisible_by < 1:
        parser.error("--make-vocab-size-divisible-by must be at least 1")
    return options


def convert(options: argparse.Namespace, scratch: Path) -> tuple[Any, list[str]]:
    """Write the checkpoint into an empty folder; return the model's configuration and flags.

    Raises:
        ConversionError: The model cannot be imported.
    """
    import hf_checkpoint
    import hf_config
    import hf_tokenizer
    import hf_weights
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(options.input)
    except (ValueError, KeyError) as problem:
        reason = " ".join(str(problem).split()).split(". ")[0]
        raise hf_weights.ConversionError(f"--input {options.input}: {reason}") from None
    family = hf_config.check_config(config)
    shape = hf_config.shape_of_config(config)
    multiple = options.make_vocab_size_divisible_by
    rows = -(-config.vocab_size // multiple) * multiple
    flags = hf_config.flags_of(config)
    positions = config.max_position_embeddings
    if (options.seq_length or 0) > positions:
        raise hf_weights.ConversionError(
            f"--seq-length {options.seq_length}: the model has only {positions} positions; use less"
        )
    flags += ["--seq-length", str(options.seq_length or positions)]
    flags += ["--padded-vocab-size", str(rows)]
    has_tokenizer = any(options.input.glob("tokenizer*.json"))
    if has_tokenizer or (options.input / "vocab.json").is_file():
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer"]
        tokenizer += ["--tokenizer-model", str(options.input.absolute())]
    else:
        size = config.vocab_size - hf_tokenizer.tokens_beyond_vocab_size()
        tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]
    dtype = getattr(torch, options.dtype) if options.dtype else None
    stored = hf_weights.stored(options.input, family)
    hf_weights.check_tensors(options.input, hf_weights.theirs(family, shape), stored, shape.tied)

    def read(name: str) -> torch.Tensor:
        tensor = stored[name]()
        return tensor if dtype is None else tensor.to(dtype)

    args = hf_checkpoint.parse([*flags, *tokenizer])
    hf_checkpoint.write(scratch, args, hf_weights.to_megatron(family, shape, rows, read))
    return config, [*flags, *tokenizer]


def main(argv: list[str] | None = None) -> int:
    """Import; return the exit status."""
    options = parse_args(argv)
    import hf_checkpoint
    from hf_config import TANH_GELUS, require_transformers
    from hf_weights import ConversionError

    try:
        require_transformers()
        with hf_checkpoint.alone(), hf_checkpoint.new_folder(options.output) as scratch:
            config, flags = convert(options, scratch)
    except (ConversionError, OSError) as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return 2
    load = ["--load", str(options.output), "--finetune"]
    print(f"{options.output}: a {config.model_type}; train it with\n")
    print("  " + shlex.join([*load, *flags]) + "\n")
    print(
        "or with --use-checkpoint-args, which replaces all of these except "
        f"{shlex.join(not_stored(flags))}"
    )
    if getattr(config, "activation_function", None) in TANH_GELUS:
        print(
            f"{config.activation_function} is Megatron's GELU fused with the bias, the default on "
            "a GPU; with --no-bias-gelu-fusion, and on a CPU, GELU is exact"
        )
    return 0


def not_stored(flags: list[str]) -> list[str]:
    """Return what --use-checkpoint-args leaves to the command line.

    Source: ``megatron/training/checkpointing.py:load_args_from_checkpoint``.
    """
    kept: list[str] = []
    for flag in flags:
        if flag.startswith("--"):
            takes = flag in ("--norm-epsilon", "--no-bias-gelu-fusion") or "tokenizer" in flag
            takes = takes or flag == "--vocab-size"
        if takes:
            kept.append(flag)
    return kept


if __name__ == "__main__":
    sys.exit(main())
