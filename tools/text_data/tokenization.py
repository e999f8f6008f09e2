"""Tokenizers for preprocess_data.py: bytes, one of Hugging Face, or a BPE trained on the input.

The main process loads a tokenizer the way Megatron does, which takes seconds and imports torch. It
leaves the tokenizer as one file of the `tokenizers` package; worker processes read only that file.
"""

import contextlib
import functools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from text_data import wordpiece
from text_data.corpus import BadRecord, InputError, Record, parse, read_records
from text_data.sentences import splitter

BYTE, BPE, HUGGING_FACE = "byte", "bpe", "HuggingFaceTokenizer"
BYTE_VOCAB_SIZE = 257  # the bytes and the end-of-document token
BPE_EOD = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """What the main process needs to know of a tokenizer."""

    vocab_size: int
    eod: int | None
    """Id of the end-of-document token, None if there is none."""
    file: str | None
    """What workers encode with, in the format of the `tokenizers` package; None: bytes."""
    folder: str | None
    """What Megatron loads; None: bytes."""
    is_new: bool
    """Whether the folder was written in this run, into the scratch folder."""


BYTES = Tokenizer(BYTE_VOCAB_SIZE, BYTE_VOCAB_SIZE - 1, file=None, folder=None, is_new=False)


class Encoded(NamedTuple):
    """The tokens of one document."""

    ids: list
    """For each key an int32 array of all sentences' tokens."""
    lengths: list[list[int]]
    """For each key the number of tokens of each sentence that has any."""
    text_bytes: int
    read_bytes: int


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Let torch and Megatron be imported without their remarks on a machine that lacks a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def load_hugging_face(
    path: str, eod_token: str | None, scratch: str, add_special: bool = True
) -> Tokenizer:
    """Load a tokenizer as Megatron's HuggingFaceTokenizer does.

    Args:
        path: Its folder, or its tokenizer.json.
        eod_token: The end-of-document token; None: the one that the tokenizer names, if any.
        scratch: An existing folder to write in.
        add_special: Whether it adds special tokens to each text, such as [CLS] and [SEP].

    Raises:
        InputError: It cannot be loaded, lacks the token, or would encode otherwise in a worker.
    """
    with quiet_imports():
        from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer
    is_new = os.path.isfile(path) or eod_token is not None
    folder = os.path.join(scratch, "tokenizer") if is_new else path
    try:
        if is_new:
            store_hugging_face(path, eod_token, folder)
        megatron = HuggingFaceTokenizer(folder, include_special_tokens=add_special)
    except InputError:
        raise
    except Exception as problem:  # tokenizers raises bare Exception
        # Megatron puts the reason last; of transformers' sentences the first says it.
        reason = " ".join(str(problem).rpartition("Exception: ")[2].split()).split(". ")[0]
        raise InputError(
            f"--tokenizer-model {path} is not a tokenizer that transformers can load ({reason}); "
            "it must be a folder that save_pretrained wrote, or a tokenizer.json"
        ) from None
    backend = getattr(megatron.tokenizer, "backend_tokenizer", None)
    file = os.path.join(scratch, "backend.json")
    if backend is not None:
        backend.save(file)
    probe = "".join(["A  b\n\tc\u00e9\u65e5 ", *megatron.tokenizer.all_special_tokens, " d"])
    if backend is None or _encoder(file, add_special)(probe).tolist() != megatron.text_to_ids(
        probe
    ):
        raise InputError(
            f"--tokenizer-model {path} needs code outside of its tokenizer.json; use it with "
            "Megatron-LM's tools/preprocess_data.py"
        )
    if not add_special:
        _check_for_bert(megatron, path)
    return Tokenizer(megatron.vocab_size, megatron.eod, file, folder, is_new)


def _check_for_bert(megatron: Any, path: str) -> None:
    """Raise InputError if BERT's data set could not train with a tokenizer."""
    from megatron_rltd.training.bert_data import tokenizer_problems

    names = ("pad", "unk", "cls", "sep", "mask")
    ids = {name: getattr(megatron, f"{name}_id") for name in names}
    for problem in tokenizer_problems(SimpleNamespace(**ids, eod=megatron.eod)):
        raise InputError(f"--tokenizer-model {path}: {problem}")


def store_hugging_face(path: str, eod_token: str | None, folder: str) -> None:
    """Write a copy of a tokenizer that names its end-of-document token, for Megatron to load."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if os.path.isfile(path):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
    if eod_token is not None:
        if eod_token not in tokenizer.get_vocab():
            raise InputError(
                f"--eod-token {eod_token} is not a token of {path}; name one that the model knows"
            )
        tokenizer.eos_token = eod_token
    tokenizer.save_pretrained(folder)
    name_class_for_all(folder)


def name_class_for_all(folder: str) -> None:
    """Let older releases of transformers load a folder that `save_pretrained` wrote."""
    # transformers 5 writes a class name that 4 does not know; both know the older name.
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, ensure_ascii=False)


def texts_of(files: list[str], keys: list[str], skip: bool) -> Iterator[str]:
    """Yield the texts of a corpus to train a tokenizer on.

    Raises:
        BadRecord: A document cannot be used, and `skip` is false.
    """
    for record in read_records(files):
        try:
            for sentences in parse(record, keys):
                yield from sentences
        except BadRecord:
            if not skip:
                raise


def train_bpe(
    files: list[str], keys: list[str], vocab_size: int, skip: bool, threads: int, path: str
) -> None:
    """Train a byte-level BPE on the corpus and write it in the format of the `tokenizers` package.

    The result depends on the corpus and `vocab_size` alone, not on the number of threads.

    Args:
        files: The corpus.
        keys: JSON fields to take.
        vocab_size: Tokens at most, with the 256 bytes and the end-of-document token; a small
            corpus may give fewer.
        skip: Leave bad documents out.
        threads: How many to train with.
        path: The file to write.

    Raises:
        BadRecord: A document cannot be used, and `skip` is false.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BPE_EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(files, keys, skip), trainer)
    tokenizer.save(path)


def train_wordpiece(
    files: list[str],
    keys: list[str],
    vocab_size: int,
    is_cased: bool,
    skip: bool,
    threads: int,
    folder: str,
) -> None:
    """Train a WordPiece vocabulary on the corpus and store its tokenizer in a folder.

    Args and errors: as of `train_bpe`; `is_cased`: keep capital letters and accents.
    """
    vocabulary = wordpiece.train(lambda: texts_of(files, keys, skip), vocab_size, is_cased, threads)
    store_wordpiece(vocabulary, is_cased, folder)


def store_wordpiece(vocabulary: list[str], is_cased: bool, folder: str) -> None:
    """Write the tokenizer of a vocabulary, for Megatron to load."""
    wordpiece.store(vocabulary, is_cased, folder)
    name_class_for_all(folder)


def training_flags(folder: str | None) -> list[str]:
    """Return the flags that make Megatron train with the tokenizer of a folder, or with bytes."""
    if folder is not None:
        return ["--tokenizer-type", HUGGING_FACE, "--tokenizer-model", folder]
    with quiet_imports():
        from megatron.core.package_info import MAJOR, MINOR
    # megatron/core/tokenizers/text/libraries/null_tokenizer.py: the end-of-document token is the
    # last of --vocab-size tokens, but in 0.17 the one after them.
    size = BYTE_VOCAB_SIZE - 1 if (MAJOR, MINOR) < (0, 18) else BYTE_VOCAB_SIZE
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]


@functools.cache
def _encoder(file: str | None, add_special: bool = True) -> Callable:
    """Return the function from a text to the int32 array of its tokens."""
    import numpy as np

    if file is None:
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The fast variant leaves out the offsets in the text, and takes lists only.

    def encode(text: str):
        encoded = tokenizer.encode_batch_fast([text], add_special_tokens=add_special)
        return np.array(encoded[0].ids, np.int32)

    return encode


def encode_records(
    file: str | None,
    keys: list[str],
    eod: int | None,
    language: str | None,
    records: list[Record],
) -> list[Encoded | BadRecord]:
    """Return for each record its tokens or what is wrong with it. Runs in the workers.

    Args:
        file: Of the tokenizer, None for bytes.
        keys: JSON fields to take.
        eod: The token to end each document with that has any token; None: do not.
        language: Split texts of this language into sentences, and add no special token to any;
            None: do neither.
        records: Documents.

    Raises:
        InputError: The package that splits is missing.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores to use
    encode = _encoder(file, language is None)
    return [_encode(encode, keys, eod, language, record) for record in records]


def _encode(
    encode: Callable, keys: list[str], eod: int | None, language: str | None, record: Record
):
    import numpy as np

    try:
        if language is None:
            texts = parse(record, keys)
        else:
            texts = parse(record, keys, lambda text: splitter(language)(text))
    except BadRecord as problem:
        return problem
    ids, lengths = [], []
    for sentences in texts:
        parts = [part for part in map(encode, sentences) if part.size]
        sizes = [part.size for part in parts]
        if parts and eod is not None:
            parts.append(np.array([eod], np.int32))
            sizes[-1] += 1
        ids.append(np.concatenate(parts) if parts else np.array([], np.int32))
        lengths.append(sizes)
    text_bytes = sum(len(text.encode()) for sentences in texts for text in sentences)
    return Encoded(ids, lengths, text_bytes, len(record.data))
