"""Read a corpus for preprocess_data.py: files and folders, then records, then their texts.

A record is one document as it lies on the disk: a whole text file, or one line of a JSONL file.
Files are read in blocks and records come one by one, so memory holds one document, not the corpus.
Nothing here knows of tokens.
"""

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

JSONL_SUFFIXES = (".jsonl", ".json", ".gz", ".zst")
_BLOCK_BYTES = 1 << 20
# What one worker gets at a time: some tenths of a second of work.
BATCH_BYTES, BATCH_RECORDS = 1 << 18, 512


class InputError(ValueError):
    """What the user asked for cannot be done; the message is one sentence with the way out."""


class BadRecord(InputError):
    """One document cannot be used, the others can."""

    def __init__(self, message: str):
        super().__init__(message)

    def __str__(self):
        return f"{super().__str__()}; correct it, or skip such documents with --skip-bad-lines"


class Record(NamedTuple):
    """One document, undecoded."""

    path: str
    line: int | None
    """From 1 in a JSONL file, None for a text file."""
    data: bytes

    @property
    def place(self) -> str:
        """Where the user finds it."""
        return self.path if self.line is None else f"{self.path}, line {self.line}"


def is_jsonl(path: str) -> bool:
    """Return whether each line of the file is a document, rather than the file as a whole."""
    return path.lower().endswith(JSONL_SUFFIXES)


def find_files(inputs: list[str], suffixes: list[str], exclude: list[str]) -> list[str]:
    """Return the files that the inputs stand for, in an order that does not depend on the machine.

    Args:
        inputs: Files, taken as they are, and folders, searched with all their subfolders.
        suffixes: Endings of the file names to take from folders; empty: all files.
        exclude: Shell patterns; files and folders whose name matches one are left out of folders,
            and so are those whose name begins with a dot.

    Raises:
        InputError: An input does not exist, a folder has no such file, or all files are empty.
        OSError: A folder cannot be listed.
    """
    files = []
    for path in inputs:
        if os.path.isdir(path):
            found = list(_walk(path, tuple(s.lower() for s in suffixes), exclude))
            if not found:
                wanted = f"file ending in {' or '.join(suffixes)}" if suffixes else "file"
                raise InputError(
                    f"--input {path}: this folder has no {wanted} (hidden and excluded files do "
                    "not count); change --input, --suffixes or --exclude"
                )
            files += found
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise InputError(f"--input {path}: there is no such file or folder; correct the path")
    if not any(os.path.getsize(file) for file in files):
        raise InputError(f"--input {' '.join(inputs)}: all files are empty; name a file with text")
    return files


def _walk(folder: str, suffixes: tuple[str, ...], exclude: list[str]) -> Iterator[str]:
    def is_wanted(name: str) -> bool:
        return not name.startswith(".") and not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in exclude
        )

    def stop(problem: OSError) -> None:
        raise problem  # os.walk would silently skip the folder

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(filter(is_wanted, folders))
        for name in sorted(filter(is_wanted, names)):
            path = os.path.join(parent, name)
            if name.lower().endswith(suffixes or "") and os.path.isfile(path):
                yield path


def read_records(files: Iterable[str]) -> Iterator[Record]:
    """Yield the documents of the files in order. Blank lines of JSONL files are ignored.

    Raises:
        InputError: A compressed file is damaged, or cannot be read without a missing package.
        OSError: A file cannot be read.
    """
    for path in files:
        if is_jsonl(path):
            for number, line in enumerate(_lines(_blocks(path)), start=1):
                if not line.isspace() and line:
                    yield Record(path, number, line)
        else:
            with open(path, "rb") as file:
                yield Record(path, None, file.read())


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines without their line feeds; the last one is empty if the file ends in one."""
    begun: list[bytes] = []
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end])
            begun = []
        begun.append(rest)
    yield b"".join(begun)


def _blocks(path: str) -> Iterator[bytes]:
    """Yield the content of a file, decompressed."""
    zstandard = _zstandard(path) if path.lower().endswith(".zst") else None
    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if zstandard:
        broken = (EOFError, zstandard.ZstdError)
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            blocks = iter(lambda: file.read(_BLOCK_BYTES), b"")
            yield from _unzstd(zstandard, blocks) if zstandard else blocks
    except broken as problem:
        raise InputError(
            f"{path}: the compressed data are damaged or end early ({problem}); "
            "get the file again or remove it from --input"
        ) from None


def _unzstd(zstandard, blocks: Iterable[bytes]) -> Iterator[bytes]:
    # Not zstandard.open: it takes a file that was cut off for one that ends there.
    frame = None
    for block in blocks:
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the last frame is not complete")


def _zstandard(path: str):
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{path}: .zst files need the Python package zstandard; "
            "run `pip install zstandard` or decompress the file with `zstd -d`"
        ) from None
    return zstandard


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the records in lists of about BATCH_BYTES, or of one larger record."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parse(
    record: Record, keys: list[str], split: Callable[[str], list[str]] = lambda text: [text]
) -> list[list[str]]:
    """Return the texts of a document: for each key a list of sentences, mostly of one.

    A list of strings in a JSON field stands for the sentences of one document, as in Megatron-LM.

    Args:
        keys: JSON fields to take.
        split: From a text that is no such list to its sentences.

    Raises:
        BadRecord: It is not UTF-8, not JSON, lacks a key, or holds something else than text.
    """
    try:
        # Editors of some systems begin UTF-8 files with a mark that is no part of the text.
        content = record.data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadRecord(
            f"{record.place} is not UTF-8 (byte 0x{record.data[problem.start]:02x} "
            f"at offset {problem.start})"
        ) from None
    if record.line is None:
        if "\0" in content:
            raise BadRecord(f"{record.place} is not text (it holds a null byte)")
        return [split(content)]
    try:
        fields = json.loads(content)
    except json.JSONDecodeError as problem:
        raise BadRecord(
            f"{record.place} is not JSON ({problem.msg} at column {problem.colno})"
        ) from None
    except RecursionError:
        raise BadRecord(f"{record.place} is nested too deeply for JSON") from None
    if not isinstance(fields, dict):
        raise BadRecord(f"{record.place} is not a JSON object")
    return [_sentences(record, fields, key, split) for key in keys]


def _sentences(record: Record, fields: dict, key: str, split: Callable) -> list[str]:
    if key not in fields:
        present = ", ".join(fields) or "none"
        raise BadRecord(f"{record.place} lacks the key '{key}' of --json-keys (it has: {present})")
    sentences = fields[key] if isinstance(fields[key], list) else [fields[key]]
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise BadRecord(
                f"{record.place} has {type(sentence).__name__}, not text, under the key '{key}'"
            )
        try:
            sentence.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{record.place} holds half of a surrogate pair") from None
    return sentences if isinstance(fields[key], list) else split(sentences[0])
