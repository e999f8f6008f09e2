"""Write documents of tokens into Megatron's .bin and .idx files for preprocess_data.py.

Everything is written into a scratch folder first and moved when it is complete.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from text_data.corpus import BadRecord, InputError
from text_data.sentences import Unused
from text_data.tokenization import Encoded, quiet_imports
from text_data.workers import STOP_SIGNALS, held

SHOWN_SKIPS = 10
# megatron/core/datasets/indexed_dataset.py stores the lengths of sequences as int32.
MAX_SEQUENCE = 2**31 - 1


@dataclass
class Counts:
    """What was written so far."""

    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """For each key."""
    text_bytes: int = 0
    skipped: int = 0
    unused: Unused | None = None
    """By BERT's data set, if that is what is written."""


def write(
    batches: Iterable[list[Encoded | BadRecord]],
    keys: list[str],
    vocab_size: int,
    scratch: str,
    *,
    skip: bool,
    one_sequence: bool,
    sentences: bool,
    read_bytes: int | None,
    log_interval: int,
) -> Counts:
    """Write KEY.bin and KEY.idx and report progress on stderr.

    Args:
        batches: Documents in the order to write them.
        keys: One for each sequence of tokens that a document has.
        vocab_size: Sets the type of the tokens on the disk.
        scratch: An existing folder.
        skip: Leave bad documents out.
        one_sequence: Join the documents into one.
        sentences: Count what BERT's data set will leave out.
        read_bytes: Size of all documents, None if that is not known.
        log_interval: Documents between lines of progress where there is no bar.

    Raises:
        BadRecord: A document is bad, and `skip` is false.
        InputError: No document has a token under some key: Megatron cannot map an empty file; or
            there are too many for one sequence.
    """
    from tqdm import tqdm

    counts, start = Counts(unused=Unused() if sentences else None), time.monotonic()
    builders: dict = {}
    # disable=None: no bar unless stderr is a terminal.
    bar = tqdm(total=read_bytes, unit="B", unit_scale=True, disable=None)
    try:
        for document in _usable(batches, skip, counts):
            # Not earlier: Megatron takes seconds to import, an error at the start need not wait.
            builders = builders or _builders(keys, vocab_size, scratch)
            for key, ids, lengths in zip(keys, document.ids, document.lengths, strict=True):
                builders[key].add_document(ids, lengths)
                counts.tokens[key] = counts.tokens.get(key, 0) + ids.size
                if counts.unused:
                    counts.unused.count(lengths)
            counts.documents += 1
            counts.text_bytes += document.text_bytes
            bar.update(document.read_bytes)
            if bar.disable and counts.documents % log_interval == 0:
                megabytes = counts.text_bytes / 1e6
                rate = megabytes / (time.monotonic() - start)
                line = f"{counts.documents:,} documents, {megabytes:,.1f} MB ({rate:.1f} MB/s)"
                print(line, file=sys.stderr, flush=True)
        for key in keys:
            if not counts.tokens.get(key):
                raise InputError(
                    f"--input: none of {counts.documents} documents has text under '{key}' "
                    f"({counts.skipped} bad ones skipped); name files with text"
                )
            if one_sequence:
                _join(builders[key], counts.tokens[key])
            builders[key].finalize(os.path.join(scratch, f"{key}.idx"))
    finally:
        bar.close()
        for builder in builders.values():
            builder.data_file.close()  # some network filesystems cannot remove open files
    return counts


def _usable(
    batches: Iterable[list[Encoded | BadRecord]], skip: bool, counts: Counts
) -> Iterator[Encoded]:
    """Yield the good documents; the bad ones are an error or counted."""
    from tqdm import tqdm

    for batch in batches:
        for problem in (document for document in batch if isinstance(document, BadRecord)):
            if not skip:
                raise problem
            counts.skipped += 1
            if counts.skipped <= SHOWN_SKIPS:
                tqdm.write(f"skipped: {problem.args[0]}", file=sys.stderr)
        yield from (document for document in batch if isinstance(document, Encoded))


def _builders(keys: list[str], vocab_size: int, scratch: str) -> dict:
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    dtype = DType.optimal_dtype(vocab_size)
    return {key: IndexedDatasetBuilder(os.path.join(scratch, f"{key}.bin"), dtype) for key in keys}


def _join(builder, tokens: int) -> None:
    """Make one document of one sequence of all that a builder has written."""
    if tokens > MAX_SEQUENCE:
        raise InputError(
            f"--one-sequence: {tokens:,} tokens are too many, a sequence has {MAX_SEQUENCE:,} at "
            "most; use less text or omit --one-sequence"
        )
    builder.sequence_lengths, builder.document_indices = [tokens], [0, 1]


def publish(scratch: str, outputs: dict[str, str], folders: dict[str, str]) -> None:
    """Move what `write` wrote, and copy folders, to where the user wants them.

    Args:
        scratch: As for `write`.
        outputs: {key: path without ending}.
        folders: {folder: copy to make of it}.
    """
    with held(*STOP_SIGNALS):
        for folder, copy in folders.items():
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        for key, path in outputs.items():
            if os.path.exists(path + ".idx"):
                os.remove(path + ".idx")  # never an old index beside new tokens
            for ending in (".bin", ".idx"):
                os.replace(os.path.join(scratch, key + ending), path + ending)
