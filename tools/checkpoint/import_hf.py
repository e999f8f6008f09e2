"""Write a model of Hugging Face's transformers as a checkpoint that Megatron starts from.

    python tools/checkpoint/import_hf.py --input GPT2_FOLDER --output CHECKPOINTS

The model is a GPT-2, a Llama, a MegatronBert or a ViT, also one of timm's. The folder is what
save_pretrained wrote, or a download of a published model. The checkpoint loads on any parallel
layout, in Megatron-LM and here, with the script and the flags that are printed:

    torchrun ... -m megatron_rltd pretrain_gpt --load CHECKPOINTS --finetune <the flags> ...

It holds weights and no optimizer. Models that Megatron would compute differently are refused.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

# This checkout's package, installed or not, and what makes its data.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export_hf import DTYPES

NEEDED = ("config.json", "*.safetensors")
SCRIPTS = {"megatron-bert": "pretrain_bert", "vit": "finetune_vit"}


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
    text = "of a ViT: classes to train; another number than the model's leaves its head out"
    add("--num-classes", type=int, metavar="N", help=text)
    add("--dtype", choices=DTYPES, help="dtype of the written weights (as stored)")
    options = parser.parse_args(argv)
    for pattern in NEEDED:
        if not any(options.input.glob(pattern)):
            parser.error(f"--input {options.input}: there is no {pattern} in it")
    if options.output.exists():
        parser.error(f"--output {options.output} exists; name a new folder")
    for name in ("make_vocab_size_divisible_by", "num_classes"):
        if (1 if (value := getattr(options, name)) is None else value) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def convert(options: argparse.Namespace, scratch: Path) -> tuple[Any, list[str]]:
    """Write the checkpoint into an empty folder; return the model's configuration and flags.

    Raises:
        ConversionError: The model cannot be imported.
    """
    import hf_bert
    import hf_checkpoint
    import hf_config
    import hf_names
    import hf_tokenizer
    import hf_weights
    import torch

    config = read_config(options.input)
    if config is None or config.model_type == "vit":
        return convert_vit(options, scratch, config)
    if options.num_classes:
        raise hf_weights.ConversionError("--num-classes is for a ViT: omit it")
    stored = hf_weights.stored(options.input, hf_names.MODEL_TYPES[config.model_type])
    if config.model_type == hf_bert.MODEL_TYPE:
        family = hf_bert.check_config(config, stored)
        shape, flags = hf_bert.shape_of_config(config), hf_bert.flags_of(family, config)
        if family == "bert_mlm":
            hf_bert.drop_types(stored)
    else:
        family = hf_config.check_config(config)
        shape, flags = hf_config.shape_of_config(config), hf_config.flags_of(config)
    hf_weights.check_tensors(options.input, hf_weights.theirs(family, shape), stored, shape.tied)
    multiple = options.make_vocab_size_divisible_by
    rows = -(-config.vocab_size // multiple) * multiple
    positions = config.max_position_embeddings
    if (options.seq_length or 0) > positions:
        raise hf_weights.ConversionError(
            f"--seq-length {options.seq_length}: the model has only {positions} positions; use less"
        )
    flags += ["--seq-length", str(options.seq_length or positions)]
    flags += ["--padded-vocab-size", str(rows)]
    patterns = ("tokenizer*.json", "vocab.json", "vocab.txt")
    if any(file for pattern in patterns for file in options.input.glob(pattern)):
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer"]
        tokenizer += ["--tokenizer-model", str(options.input.absolute())]
    else:
        size = config.vocab_size - hf_tokenizer.tokens_beyond_vocab_size()
        tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]
    args = hf_checkpoint.parse([*flags, *tokenizer])
    dtype = getattr(torch, options.dtype) if options.dtype else None
    read = reader(stored, dtype)
    hf_checkpoint.write(scratch, family, args, hf_weights.to_megatron(family, shape, rows, read))
    return config, [*flags, *tokenizer]


def convert_vit(options: argparse.Namespace, scratch: Path, config: Any) -> tuple[Any, list[str]]:
    """Do what `convert` does, for a ViT.

    Args:
        config: Transformers' configuration; None for a folder of timm's.
    """
    import hf_checkpoint
    import hf_names
    import hf_vit
    import hf_weights
    import torch

    from megatron_rltd.vision.arguments import add_arguments

    if options.seq_length:
        raise hf_weights.ConversionError(
            "--seq-length of a ViT is its patches and the class token: omit it"
        )
    family = "timm" if config is None else "vit"
    stored = hf_weights.stored(options.input, "" if config is None else "vit.")
    if config is None:
        config = hf_vit.timm_config(options.input, stored)
    names = {name: pair[1][0] for name, pair in hf_names.FAMILIES[family].of_model.items()}
    there = {name: tuple(stored[t]().shape) for name, t in names.items() if t in stored}
    positions = there.get("position_embeddings.weight", (1, 0))[1]
    hf_vit.check_config(config, options.input, positions)
    found = there.get("head.weight", (0,))[0]
    classes = options.num_classes or found
    if not classes:
        raise hf_weights.ConversionError(
            f"--input {options.input} has no head: give --num-classes N, and finetune_vit makes one"
        )
    keeps_head = classes == found
    for name in (
        *hf_vit.POOLER,
        *(() if keeps_head else (names["head.weight"], names["head.bias"])),
    ):
        stored.pop(name, None)
    shape = hf_vit.shape_of_config(config, keeps_head)
    hf_weights.check_tensors(options.input, hf_weights.theirs(family, shape), stored, False)
    flags, tokens = hf_vit.flags_of(config, classes, options.input), str(hf_vit.tokens_of(config))
    # What finetune_vit adds by itself.
    added = ["--seq-length", tokens, "--max-position-embeddings", tokens]
    added += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(classes)]
    args = hf_checkpoint.parse([*flags, *added], add_arguments)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    read = reader(stored, dtype)
    hf_checkpoint.write(scratch, family, args, hf_weights.to_megatron(family, shape, 0, read))
    config.num_labels = found
    return config, flags


def reader(stored: dict[str, Any], dtype: Any) -> Any:
    """Return the function that returns a tensor by name, in `dtype` if it is not None."""

    def read(name: str) -> Any:
        tensor = stored[name]()
        return tensor if dtype is None else tensor.to(dtype)

    return read


def read_config(folder: Path) -> Any:
    """Return the configuration of a model that may be one of ours; None for one of timm's.

    Raises:
        ConversionError: It is none.
    """
    import hf_bert
    from hf_names import MODEL_TYPES
    from hf_weights import ConversionError
    from transformers import AutoConfig

    try:
        given = json.loads((folder / "config.json").read_text())
        if "architecture" in given and "model_type" not in given:
            return None
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as problem:
        reason = " ".join(str(problem).split()).split(". ")[0]
        raise ConversionError(f"--input {folder}: {reason}") from None
    if config.model_type in hf_bert.POST_NORM:
        raise ConversionError(
            f"model_type {config.model_type}: its norms are behind attention and MLP (post-LN), "
            "those of Megatron's BertModel before them, so that its weights mean something else "
            "there; only megatron-bert is imported"
        )
    if config.model_type == "deit":
        raise ConversionError(
            "model_type deit: it has a distillation token beside the class token, and Megatron's "
            "ViT has one token; a DeiT without it is a vit, and is imported"
        )
    if config.model_type not in MODEL_TYPES:
        *first, last = MODEL_TYPES
        known = f"{', '.join(first)} and {last}"
        raise ConversionError(f"model_type {config.model_type}: only {known} are imported")
    return config


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
    script = SCRIPTS.get(config.model_type, "pretrain_gpt")
    print(f"{options.output}: a {config.model_type}; train it with {script} and\n")
    print("  " + shlex.join([*load, *flags]) + "\n")
    print(
        "or with --use-checkpoint-args, which replaces all of these except "
        f"{shlex.join(not_stored(flags))}"
    )
    activation = getattr(config, "activation_function", getattr(config, "hidden_act", None))
    if activation in TANH_GELUS:
        print(
            f"{activation} is Megatron's GELU fused with the bias, the default on "
            "a GPU; with --no-bias-gelu-fusion, and on a CPU, GELU is exact"
            + ("; in the language-model head it always is" if script == "pretrain_bert" else "")
        )
    if script == "pretrain_bert" and "NullTokenizer" in flags:
        print(
            "the folder has no tokenizer, and BERT's data need one with [CLS], [SEP], [MASK] and "
            "[PAD]: give yours instead of the NullTokenizer"
        )
    if script == "finetune_vit":
        classes = int(flags[flags.index("--num-classes") + 1])
        print(
            f"the head is that of the model's {classes:,} classes"
            if config.num_labels == classes
            else f"the head is left out: finetune_vit makes one of {classes:,} classes, by --seed"
        )
    return 0


def not_stored(flags: list[str]) -> list[str]:
    """Return what --use-checkpoint-args leaves to the command line.

    Source: ``megatron/training/checkpointing.py:load_args_from_checkpoint``.
    """
    left = "norm-epsilon no-bias-gelu-fusion vocab-size bert-no-binary-head num-classes img-h img-w"
    left += " patch-dim num-channels image-mean image-std"
    kept: list[str] = []
    for flag in flags:
        if flag.startswith("--"):
            takes = flag[2:] in left.split() or "tokenizer" in flag
        if takes:
            kept.append(flag)
    return kept


if __name__ == "__main__":
    sys.exit(main())
