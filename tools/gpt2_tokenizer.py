"""Make the folder of a GPT-2 tokenizer from its published vocab.json and merges.txt.

    python tools/gpt2_tokenizer.py --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt \\
        --output data/gpt2_tokenizer

For tools/preprocess_data.py and for training: --tokenizer-type HuggingFaceTokenizer
--tokenizer-model data/gpt2_tokenizer. Megatron's own GPT2BPETokenizer takes the two files as well,
but then asks the Hugging Face hub for the rest, which compute nodes often cannot reach.
"""

import argparse
import os
import shutil
import sys
import tempfile
from typing import Any

from text_data.corpus import InputError
from text_data.tokenization import BPE_EOD, quiet_imports, store_hugging_face


def byte_level_bpe(vocab_file: str, merge_file: str) -> Any:
    """Return the tokenizer of the two files, of the `tokenizers` package.

    Raises:
        InputError: They are not a GPT-2 tokenizer's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not os.path.isfile(path):
            raise InputError(f"{flag} {path}: there is no such file; correct the path")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    except Exception as problem:  # tokenizers raises bare Exception
        raise InputError(
            f"--vocab-file {vocab_file} and --merge-file {merge_file} are not the two files of one "
            f"byte-level BPE ({problem}); for GPT-2, download vocab.json and merges.txt again"
        ) from None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    missing = sum(tokenizer.token_to_id(byte) is None for byte in alphabet)
    if missing or tokenizer.token_to_id(BPE_EOD) is None:
        lacks = f"{missing} of the 256 bytes" if missing else BPE_EOD
        raise InputError(
            f"--vocab-file {vocab_file} lacks {lacks}, so it is not GPT-2's; give another "
            "tokenizer by its folder"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([BPE_EOD])
    return tokenizer


def make_tokenizer(vocab_file: str, merge_file: str, folder: str) -> int:
    """Write the folder, whole or not at all; return how many tokens the tokenizer has.

    Raises:
        InputError: The files do not make a GPT-2 tokenizer, or the folder exists.
        OSError: A file cannot be read or written.
    """
    if os.path.exists(folder):
        raise InputError(f"--output {folder} exists; choose another or remove it")
    tokenizer = byte_level_bpe(vocab_file, merge_file)
    parent, name = os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", name + ".", parent) as scratch:
        alone = os.path.join(scratch, "alone.json")
        tokenizer.save(alone)
        whole = os.path.join(scratch, "whole")
        with quiet_imports():
            store_hugging_face(alone, BPE_EOD, whole)
        # What other programs take: Megatron's GPT2BPETokenizer, Hugging Face's slow tokenizer.
        shutil.copyfile(vocab_file, os.path.join(whole, "vocab.json"))
        shutil.copyfile(merge_file, os.path.join(whole, "merges.txt"))
        os.replace(whole, folder)
    return tokenizer.get_vocab_size()


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="gpt2_tokenizer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--vocab-file", required=True, metavar="PATH", help="vocab.json")
    parser.add_argument("--merge-file", required=True, metavar="PATH", help="merges.txt")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    args = parser.parse_args(argv)
    try:
        size = make_tokenizer(args.vocab_file, args.merge_file, args.output)
    except InputError as problem:
        print(f"gpt2_tokenizer.py: error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"gpt2_tokenizer.py: error: {problem}; check path and permissions", file=sys.stderr)
        return 2
    print(f"{size:,} tokens: --tokenizer-type HuggingFaceTokenizer --tokenizer-model {args.output}")
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
