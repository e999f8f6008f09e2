"""The tokenizer of a run, written beside an exported model, and how many tokens the model knows."""

import tempfile
from pathlib import Path
from typing import Any

from gpt2_tokenizer import byte_level_bpe
from hf_weights import ConversionError
from text_data import tokenization
from text_data.corpus import InputError

from megatron_rltd.patching import versions

WITHOUT_FILES = "NullTokenizer"


def write(folder: Path, args: Any, given: Path | None, vocab: Path | None, merges: Path | None):
    """Write the tokenizer's files; return the tokenizer as transformers loads it, None if none.

    Args:
        folder: Where to.
        args: Megatron's arguments, which may name a tokenizer that is still there.
        given: A folder that save_pretrained wrote, or a tokenizer.json.
        vocab: With `merges`: the vocab.json of GPT-2's BPE.
        merges: Its merges.txt.

    Raises:
        ConversionError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not given and not vocab:
        given, vocab, merges = _of_run(args)
    if not given and not vocab:
        return None
    try:
        bpe = byte_level_bpe(str(vocab), str(merges)) if vocab else None
    except InputError as problem:
        raise ConversionError(str(problem)) from None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if bpe is not None:
                given = Path(scratch) / "tokenizer.json"
                bpe.save(str(given))
            tokenization.store_hugging_face(str(given), None, str(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            if tokenizer.eos_token is None and tokenization.BPE_EOD in tokenizer.get_vocab():
                # A tokenizer.json names none; without one there is nothing to begin a text with.
                tokenization.store_hugging_face(str(given), tokenization.BPE_EOD, str(folder))
                tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer
    except (InputError, OSError, ValueError) as problem:
        reason = " ".join(str(problem).split()).split(". ")[0]
        raise ConversionError(
            f"--tokenizer {given}: no tokenizer can be loaded from it ({reason})"
        ) from None


def _of_run(args: Any) -> tuple[Path | None, Path | None, Path | None]:
    """Return what of `write` the run was trained with, as far as it is on this machine."""
    model, vocab, merges = (
        Path(name) if name and Path(name).exists() else None
        for name in (args.tokenizer_model, args.vocab_file, args.merge_file)
    )
    if args.tokenizer_type == "HuggingFaceTokenizer" and model:
        return model, None, None
    if args.tokenizer_type == "GPT2BPETokenizer" and vocab and merges:
        return None, vocab, merges
    return None, None, None


def tokens_beyond_vocab_size() -> int:
    """Return how many tokens Megatron's NullTokenizer has beyond its --vocab-size.

    In 0.17 the end-of-document token comes after them, since then it is the last of them.
    """
    return int(versions.release() < (0, 18))


def vocabulary(args: Any, tokenizer: Any, asked: int | None, rows: int) -> int:
    """Return the tokens that a model knows, the rows of its embedding without padding.

    Args:
        args: Megatron's arguments.
        tokenizer: As `write` returns it.
        asked: --vocab-size, None if not given.
        rows: Of the embedding, with padding.

    Raises:
        ConversionError: It is not known, or is not that of the model.
    """
    trained = None
    if args.tokenizer_type == WITHOUT_FILES:
        trained = args.vocab_size + tokens_beyond_vocab_size()
    size = asked or trained or (len(tokenizer) if tokenizer else None)
    if size is None:
        raise ConversionError(
            f"the tokenizer of the run ({args.tokenizer_type} "
            f"{args.tokenizer_model or args.vocab_file}) is not here: give --tokenizer FOLDER, "
            "--vocab-file FILE --merge-file FILE, or --vocab-size N without padding"
        )
    if size > rows:
        raise ConversionError(
            f"the vocabulary has {size} tokens, but the model only {rows} rows with padding: give "
            "the --tokenizer or --vocab-size that it was trained with"
        )
    if tokenizer and len(tokenizer) > size:
        raise ConversionError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model was trained with {size}: "
            "give the --tokenizer that it was trained with"
        )
    return size
