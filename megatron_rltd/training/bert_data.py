"""What Megatron's BERT data sets need of a tokenizer and of documents, checked before they train.

Without it, Megatron trains on wrong masks without an error, or searches for samples forever.
Source: ``megatron/core/datasets/bert_dataset.py``, ``masked_dataset.py`` and ``helpers.cpp``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_rltd.config import ConfigError, RankConfigError

# helpers.cpp, `LONG_SENTENCE_LEN`: a document of several sentences with a longer one is left out.
MAX_SENTENCE = 512
CHUNK = 1 << 16  # documents looked at together
LOOKED_AT = 64  # sentences in which special tokens are searched
TOOL = "tools/preprocess_data.py --split-sentences"
_WORDPIECE = ("BertWordPieceLowerCase", "BertWordPieceCase")


def vocabulary_problems(args: Any) -> list[str]:
    """Return a sentence if Megatron would ignore ``--vocab-file``, without building a tokenizer.

    Args:
        args: Megatron's arguments.
    """
    if args.tokenizer_type not in _WORDPIECE or not args.vocab_file:
        return []
    case = " --cased" if args.tokenizer_type == "BertWordPieceCase" else ""
    return [
        f"--vocab-file {args.vocab_file} would be ignored: --tokenizer-type {args.tokenizer_type} "
        "loads a tokenizer of that kind from the Hugging Face hub, with its vocabulary: make a "
        f"folder of the file with {TOOL} --tokenizer-type wordpiece{case} --vocab-file "
        f"{args.vocab_file}, and use --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER"
    ]


def tokenizer_problems(tokenizer: Any) -> list[str]:
    """Return what of a tokenizer BERT's data set cannot work with, as sentences.

    Args:
        tokenizer: Megatron's, as the data set gets it.
    """
    names = ("pad", "cls", "sep", "mask", "unk", "eod")
    ids = {name: _id_of(tokenizer, name) for name in names}
    spelled = {name: f"[{name.upper()}]" for name in names}
    missing = [spelled[name] for name in ("cls", "sep", "mask") if ids[name] is None]
    way_out = f"use a BERT vocabulary; {TOOL} --tokenizer-type wordpiece makes one"
    if missing:
        listed = " and no ".join(missing)
        return [
            f"the tokenizer has no {listed}, which BERT's data set puts into samples: {way_out}"
        ]
    if ids["cls"] == ids["sep"]:
        return [f"the tokenizer has one token for [CLS] and [SEP], {ids['cls']}: {way_out}"]
    if ids["pad"] != 0:
        found = "no padding token" if ids["pad"] is None else f"padding token {ids['pad']}"
        return [
            f"the tokenizer has {found}, but Megatron's BERT data set takes 0 for padding and "
            f"would leave padding unmasked: put [PAD] first in the vocabulary, or {way_out}"
        ]
    shared = [spelled[name] for name in names[1:] if ids[name] == 0]
    if shared:
        return [
            f"the tokenizer's padding token is also its {' and '.join(shared)}, so Megatron would "
            f"not mask padding: give [PAD] a token of its own, number 0, or {way_out}"
        ]
    return []


def _id_of(tokenizer: Any, name: str) -> int | None:
    try:
        return getattr(tokenizer, name)
    except (AttributeError, NotImplementedError, IndexError, TypeError):
        return None  # how Megatron's kinds of tokenizers say that there is none


def document_problems(
    dataset: Any,
    first: int,
    last: int,
    num_samples: int | None,
    tokenizer: Any,
    min_sentences: int,
    where: str,
) -> list[str]:
    """Return why no sample, or a wrong one, would be made of a set's documents, as sentences.

    Args:
        dataset: Megatron's ``IndexedDataset``; each sequence is a sentence.
        first, last: The documents are first to last - 1.
        num_samples: That Megatron asks for; None: those of one pass over the documents.
        tokenizer: As in `tokenizer_problems`, which found nothing.
        min_sentences: 2, or 1 without the head that tells the order of two segments.
        where: The set and its files, for the message.
    """
    if num_samples == 0:
        return [
            f"{where}: --eval-iters 0 asks for none of its samples, and Megatron fails on an empty "
            "set: use --split 100,0,0, or a larger --eval-iters"
        ]
    if first >= last:
        return [
            f"{where}: there is no document: use a larger share, or 0 as in --split 90,10,0 or "
            "--split 100,0,0 --eval-iters 0"
        ]
    if not _is_any_usable(dataset, first, last, min_sentences):
        several = "with two sentences or more, " if min_sentences > 1 else ""
        alone = " or add --bert-no-binary-head, or" if min_sentences > 1 else ""
        return [
            f"{where}: of {last - first} documents there is none {several}of at most "
            f"{MAX_SENTENCE} tokens each, so Megatron would search for samples forever: split them "
            f"into sentences with {TOOL},{alone} cut long sentences"
        ]
    looked_at = _sentences_of(dataset, first, last)
    framed = sum(s[0] == tokenizer.cls or s[-1] == tokenizer.sep for s in looked_at)
    if 2 * framed > len(looked_at):
        return [
            f"{where}: sentences begin with [CLS] or end with [SEP], which Megatron adds to each "
            f"sample itself: write the data with {TOOL}, or in Megatron-LM's preprocess_data.py "
            "with --tokenizer-hf-no-include-special-tokens"
        ]
    return []


def _is_any_usable(dataset: Any, first: int, last: int, min_sentences: int) -> bool:
    """Return whether Megatron makes a sample of at least one document."""
    ends, sizes = dataset.document_indices, dataset.sequence_lengths
    for start in range(first, last, CHUNK):
        bounds = np.asarray(ends[start : min(start + CHUNK, last) + 1], dtype=np.int64)
        is_long = sizes[bounds[0] : bounds[-1]] > MAX_SENTENCE
        long_before = np.concatenate([[0], np.cumsum(is_long)])[bounds - bounds[0]]
        sentences = np.diff(bounds)
        # Megatron looks for a long sentence only in documents of several.
        is_kept = (sentences < 2) | (np.diff(long_before) == 0)
        if np.any((sentences >= min_sentences) & is_kept):
            return True
    return False


def _sentences_of(dataset: Any, first: int, last: int) -> list[np.ndarray]:
    """Return some sentences of the documents, from all over them."""
    start, end = (int(dataset.document_indices[i]) for i in (first, last))
    numbers = np.unique(np.linspace(start, end - 1, LOOKED_AT).astype(np.int64))
    return [s for s in (dataset[int(number)] for number in numbers) if len(s)]


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ConfigError if BERT's data set cannot work with a tokenizer."""
    problems = tokenizer_problems(tokenizer)
    if problems:
        raise ConfigError(problems)


def check_before(original: Callable, *call: Any, **kwargs: Any) -> None:
    """Check what a ``BERTMaskedWordPieceDataset`` is made of, then make it.

    Args:
        original: Its ``__init__``.
        call, kwargs: What that is called with, the object itself first.

    Raises:
        ConfigError: The tokenizer does not suit.
        RankConfigError: The documents do not.
    """
    given = inspect.signature(original).bind(*call, **kwargs).arguments
    config, indices, samples = given["config"], given["indexed_indices"], given["num_samples"]
    check_tokenizer(config.tokenizer)
    is_train = given["index_split"].name == "train"
    if samples != 0 or not is_train:  # with --skip-train, none are made of it
        first, last = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        where = f"{given['dataset_path']}, {given['index_split'].name} set"
        min_sentences = 2 if config.classification_head else 1
        dataset = given["indexed_dataset"]
        problems = document_problems(
            dataset, first, last, samples, config.tokenizer, min_sentences, where
        )
        if problems:
            raise RankConfigError(problems)
    original(*call, **kwargs)
