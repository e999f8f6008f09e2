"""Turn text into the token files that Megatron trains on: PREFIX_text_document.bin and .idx.

Bytes as tokens, without any download; every .py file of a folder is one document:

    python tools/preprocess_data.py --input projects/ --suffixes .py --exclude site-packages \\
        'test*' --tokenizer-type byte --append-eod --output-prefix data/code

A tokenizer of 8192 tokens trained on the input itself, stored in data/wiki_tokenizer:

    python tools/preprocess_data.py --input wiki-*.jsonl.gz --tokenizer-type bpe \\
        --vocab-size 8192 --append-eod --output-prefix data/wiki

A Hugging Face tokenizer that lies on the disk:

    python tools/preprocess_data.py --input wiki.jsonl --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model gpt2/ --append-eod --output-prefix data/wiki

Sentences for BERT, with a WordPiece vocabulary trained on the input, or with one that exists:

    python tools/preprocess_data.py --input wiki.jsonl --split-sentences \\
        --tokenizer-type wordpiece --vocab-size 30000 --output-prefix data/bert
    python tools/preprocess_data.py --input wiki.jsonl --split-sentences \\
        --tokenizer-type wordpiece --vocab-file vocab.txt --output-prefix data/bert

A text for fine-tuning, its records joined as transformers' run_clm.py joins them:

    python tools/preprocess_data.py --input train.jsonl --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model gpt2/ --one-sequence --output-prefix data/train

Each run ends by printing the Megatron flags to train with. For bytes (ids 0 to 255, end of document
256) they are --tokenizer-type NullTokenizer --vocab-size 257 (256 with Megatron 0.17, which counts
differently). Otherwise they are --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER.

Files ending in .jsonl or .json, and compressed ones (.gz, .zst), hold one JSON object a line. Each
is a document with its text under --json-keys. Any other file is one document of UTF-8 text. Folders
are searched with their subfolders in sorted order; hidden files are ignored. Documents stay in the
order of --input. Nothing appears under the output's name before it is complete.

Flags and files are those of Megatron-LM's tools/preprocess_data.py. With the same Hugging Face
tokenizer the files are equal byte for byte. --partitions is missing. Sentences are split by the
package sentencex, not by nltk; a JSON list of strings is taken for the sentences of a document.
A bpe reads the whole input twice, a wordpiece three times. For many GB, train it on a part and then
use its folder.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shlex
import signal
import sys
import tempfile
import time
from typing import Any

from text_data import token_files, tokenization
from text_data.corpus import (
    BadRecord,
    InputError,
    batches,
    find_files,
    is_jsonl,
    parse,
    read_records,
)
from text_data.sentences import splitter
from text_data.token_files import Counts
from text_data.tokenization import BPE, BYTE, BYTE_VOCAB_SIZE, HUGGING_FACE, Tokenizer
from text_data.wordpiece import SPECIAL, WORDPIECE, read_vocabulary
from text_data.workers import WorkerKilled, WorkerPool


class Parser(argparse.ArgumentParser):
    """Reports wrong flags in one sentence, without the usage."""

    def error(self, message: str):
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, each checked by itself."""
    parser = Parser(
        prog="preprocess_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several: dict[str, Any] = {"nargs": "+", "default": []}
    add = parser.add_argument_group("input").add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders")
    text = "fields of JSON documents to use, each written to its own files (default: text)"
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help=text)
    text = "endings of the files to take from folders (default: all files)"
    add("--suffixes", **several, type=_suffix, metavar=".EXT", help=text)
    text = "names of files and subfolders to ignore in folders; * and ? are wildcards"
    add("--exclude", **several, metavar="NAME", help=text)
    text = (
        "skip documents that are not UTF-8, not JSON or lack a key, and report them; without it, "
        "the first one is an error"
    )
    add("--skip-bad-lines", action="store_true", help=text)

    add = parser.add_argument_group("tokenizer").add_argument
    text = (
        "bytes as tokens, a byte-level BPE or BERT's WordPiece trained on the input, or a "
        "tokenizer of Hugging Face (by Megatron's name)"
    )
    add("--tokenizer-type", required=True, choices=[BYTE, BPE, WORDPIECE, HUGGING_FACE], help=text)
    text = f"{HUGGING_FACE}: its folder or tokenizer.json; nothing is downloaded"
    add("--tokenizer-model", metavar="PATH", help=text)
    text = f"{BPE}, {WORDPIECE}: how many tokens to train; a {BPE} needs {BYTE_VOCAB_SIZE}"
    add("--vocab-size", type=_positive, metavar="N", help=text)
    text = f"{WORDPIECE}: its tokens, one a line, instead of training them"
    add("--vocab-file", metavar="FILE", help=text)
    text = f"{WORDPIECE}: keep capital letters and accents"
    add("--cased", action="store_true", help=text)
    text = (
        f"{HUGGING_FACE}: the token that ends a document, if the tokenizer names none; a copy "
        "that names it is stored in PREFIX_tokenizer"
    )
    add("--eod-token", metavar="TOKEN", help=text)
    text = (
        "split each document into sentences, one sequence each, without special tokens, as BERT's "
        "data sets need them; the files are then PREFIX_KEY_sentence.bin and .idx"
    )
    add("--split-sentences", action="store_true", help=text)
    text = "language of the text to split, by its ISO code (default: %(default)s)"
    add("--language", default="en", metavar="CODE", help=text)
    text = "end each document with the end-of-document token"
    add("--append-eod", action="store_true", help=text)
    text = (
        "tokenize each document alone, and join the tokens of all into one document with nothing "
        "between them, so that Megatron trains on them in their order in pieces of --seq-length"
    )
    add("--one-sequence", action="store_true", help=text)

    add = parser.add_argument_group("output").add_argument
    text = "write PREFIX_KEY_document.bin and .idx, and replace older ones"
    add("--output-prefix", required=True, metavar="PREFIX", help=text)

    add = parser.add_argument_group("run").add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = "processes that tokenize (default: one for each core, here %(default)s)"
    add("--workers", type=_positive, default=cores, metavar="N", help=text)
    text = "documents between lines of progress when not in a terminal (default: %(default)s)"
    add("--log-interval", type=_positive, default=1000, metavar="N", help=text)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _suffix(text: str) -> str:
    return "." + text.removeprefix(".")


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for flags that do not fit together."""
    kind = args.tokenizer_type
    used_by = {
        "tokenizer_model": (HUGGING_FACE,),
        "eod_token": (HUGGING_FACE,),
        "vocab_size": (BPE, WORDPIECE),
        "vocab_file": (WORDPIECE,),
        "cased": (WORDPIECE,),
    }
    for name, wanted in used_by.items():
        flag = "--" + name.replace("_", "-")
        if getattr(args, name) not in (None, False) and kind not in wanted:
            raise InputError(
                f"{flag} is for --tokenizer-type {' or '.join(wanted)}, not {kind}; omit {flag}"
            )
    if kind == BPE and (args.vocab_size or 0) < BYTE_VOCAB_SIZE:
        raise InputError(
            f"--tokenizer-type {BPE} needs --vocab-size of at least {BYTE_VOCAB_SIZE}: "
            "256 bytes and the end-of-document token"
        )
    if kind == WORDPIECE:
        _check_wordpiece(args)
    if args.split_sentences and (args.append_eod or args.one_sequence):
        flag = "--append-eod" if args.append_eod else "--one-sequence"
        raise InputError(f"--split-sentences is for BERT's data sets, {flag} is not; omit {flag}")
    if args.split_sentences and kind == BYTE:
        raise InputError(
            f"--split-sentences needs a tokenizer with [CLS], [SEP] and [MASK]; use "
            f"--tokenizer-type {WORDPIECE}"
        )
    if kind == HUGGING_FACE and args.tokenizer_model is None:
        raise InputError(f"--tokenizer-type {HUGGING_FACE} needs --tokenizer-model PATH")
    if kind == HUGGING_FACE and not os.path.exists(args.tokenizer_model):
        raise InputError(
            f"--tokenizer-model {args.tokenizer_model}: there is no such file or folder; download "
            "a tokenizer first with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    if args.one_sequence and args.append_eod:
        raise InputError(
            "--one-sequence joins documents with nothing between them; omit --append-eod"
        )
    if len(set(args.json_keys)) < len(args.json_keys):
        raise InputError(f"--json-keys {' '.join(args.json_keys)}: name each key once")
    for key in args.json_keys:
        if "/" in key:
            raise InputError(f"--json-keys {key}: keys become file names; use one without '/'")
    for name in args.exclude:
        if "/" in name:
            raise InputError(
                f"--exclude {name}: names are compared, not paths; give only the last part"
            )
    for path in output_paths(args).values():
        for file in (path + ".bin", path + ".idx"):
            if os.path.isdir(file):
                raise InputError(f"--output-prefix: {file} is a folder; choose another prefix")


def _check_wordpiece(args: argparse.Namespace) -> None:
    if bool(args.vocab_size) == bool(args.vocab_file):
        raise InputError(
            f"--tokenizer-type {WORDPIECE} needs --vocab-size N to train one, or --vocab-file "
            "FILE; give one of them"
        )
    if args.vocab_size and args.vocab_size <= len(SPECIAL):
        raise InputError(
            f"--vocab-size {args.vocab_size}: {len(SPECIAL)} tokens are special; use a larger one"
        )
    if args.append_eod:
        raise InputError(
            f"--append-eod: --tokenizer-type {WORDPIECE} has no end-of-document token; omit it"
        )
    if args.vocab_file and not os.path.isfile(args.vocab_file):
        raise InputError(f"--vocab-file {args.vocab_file}: there is no such file; correct the path")


def output_paths(args: argparse.Namespace) -> dict[str, str]:
    """Return {key: path of its output without ending}."""
    level = "sentence" if args.split_sentences else "document"  # Megatron-LM's names
    return {key: f"{args.output_prefix}_{key}_{level}" for key in args.json_keys}


def stored_tokenizer(args: argparse.Namespace) -> str:
    """Return the folder for a tokenizer that this script makes."""
    return args.output_prefix + "_tokenizer"


def make_tokenizer(
    args: argparse.Namespace, files: list[str], pool: WorkerPool, scratch: str
) -> Tokenizer:
    """Return the tokenizer that the flags ask for; train it first if it is to be trained."""
    if args.tokenizer_type == BYTE:
        return tokenization.BYTES
    path, eod_token = args.tokenizer_model, args.eod_token
    folder, name = os.path.split(os.path.abspath(path or ""))
    if name == "tokenizer.json" and os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        path = os.path.dirname(path) or "."
    if args.tokenizer_type == BPE:
        print(f"training a BPE of {args.vocab_size} tokens", file=sys.stderr, flush=True)
        path, eod_token = os.path.join(scratch, "bpe.json"), tokenization.BPE_EOD
        # In a worker because training in the main process would not hear Ctrl-C.
        options = (files, args.json_keys, args.vocab_size, args.skip_bad_lines, args.workers, path)
        pool.call(tokenization.train_bpe, *options)
    if args.tokenizer_type == WORDPIECE:
        return _make_wordpiece(args, files, pool, scratch)
    tokenizer = tokenization.load_hugging_face(path, eod_token, scratch, not args.split_sentences)
    if args.append_eod and tokenizer.eod is None:
        raise InputError(
            f"--append-eod: {path} names no end-of-document token; name one with --eod-token"
        )
    return tokenizer


def _make_wordpiece(
    args: argparse.Namespace, files: list[str], pool: WorkerPool, scratch: str
) -> Tokenizer:
    folder = os.path.join(scratch, "wordpiece")
    if args.vocab_file:
        tokenization.store_wordpiece(read_vocabulary(args.vocab_file), args.cased, folder)
    else:
        print(f"training a WordPiece of {args.vocab_size} tokens", file=sys.stderr, flush=True)
        size, skip = args.vocab_size, args.skip_bad_lines
        options = (files, args.json_keys, size, args.cased, skip, args.workers, folder)
        pool.call(tokenization.train_wordpiece, *options)
    loaded = tokenization.load_hugging_face(folder, None, scratch, not args.split_sentences)
    return dataclasses.replace(loaded, is_new=True)


def run(args: argparse.Namespace) -> None:
    """Do what the flags say and print what was done.

    Raises:
        InputError: The flags or the input do not allow it.
        OSError: A file cannot be read or written.
    """
    start = time.monotonic()
    check_args(args)
    files = find_files(args.input, args.suffixes, args.exclude)
    plain = [file for file in files if not is_jsonl(file)]
    if plain and len(args.json_keys) > 1:
        raise InputError(f"--json-keys: {plain[0]} is not a JSONL file; give only one key")
    if args.split_sentences:
        _try_to_split(args, files)
    compressed = any(file.lower().endswith((".gz", ".zst")) for file in files)
    read_bytes = None if compressed else sum(map(os.path.getsize, files))
    folder, name = os.path.split(args.output_prefix)
    os.makedirs(folder or ".", exist_ok=True)
    with (
        tempfile.TemporaryDirectory(".tmp", name + ".", folder or ".") as scratch,
        WorkerPool(args.workers) as pool,
    ):
        tokenizer = make_tokenizer(args, files, pool, scratch)
        encoded = pool.in_order(
            tokenization.encode_records,
            batches(read_records(files)),
            tokenizer.file,
            args.json_keys,
            tokenizer.eod if args.append_eod else None,
            args.language if args.split_sentences else None,
        )
        counts = token_files.write(
            encoded,
            args.json_keys,
            tokenizer.vocab_size,
            scratch,
            skip=args.skip_bad_lines,
            one_sequence=args.one_sequence,
            sentences=args.split_sentences,
            read_bytes=read_bytes,
            log_interval=args.log_interval,
        )
        folders: dict[str, str] = {}
        if tokenizer.is_new and tokenizer.folder:
            folders[tokenizer.folder] = stored_tokenizer(args)
        token_files.publish(scratch, output_paths(args), folders)
    report(args, tokenizer, counts, time.monotonic() - start)


def _try_to_split(args: argparse.Namespace, files: list[str]) -> None:
    """Raise InputError now, and not after minutes of training, if the package is missing."""
    for record in itertools.islice(read_records(files), 1):
        with contextlib.suppress(BadRecord):
            parse(record, args.json_keys, lambda text: splitter(args.language)(text))


def report(args: argparse.Namespace, tokenizer: Tokenizer, counts: Counts, seconds: float) -> None:
    """Print what was done, and how to train with it."""
    tokens = sum(counts.tokens.values())
    lines = [
        f"{counts.documents:,} documents, {tokens:,} tokens, {counts.text_bytes / 1e6:,.1f} MB of "
        f"text in {seconds:.1f} s, {counts.text_bytes / tokens:.2f} bytes per token"
    ]
    if args.one_sequence:
        lines.append("joined into one document of one sequence")
    if counts.unused:
        lines += counts.unused.warnings()
    if counts.skipped:
        lines.append(f"{counts.skipped:,} bad documents skipped")
    model = tokenizer.folder
    if tokenizer.is_new:
        model = stored_tokenizer(args)
        lines.append(f"stored a tokenizer of {tokenizer.vocab_size} tokens in {model}")
    flags = [
        *tokenization.training_flags(model),
        *split_flags(1 if args.one_sequence else counts.documents),
    ]
    for path in output_paths(args).values():
        lines.append(f"train with: --data-path {shlex.join([path, *flags])}")
    # In one piece, so that a pipe to head does not break between two of them.
    sys.stdout.write("".join(line + "\n" for line in lines))


def split_flags(documents: int) -> list[str]:
    """Return the flags for a data set too small for Megatron's default --split 969,30,1.

    A set without a document would keep Megatron searching for ever.
    """
    if documents >= 1000:
        return []
    return ["--split", "90,10,0"] if documents >= 5 else ["--split", "100,0,0", "--eval-iters", "0"]


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; return the exit status."""
    args = parse_args(argv)
    try:
        run(args)
        return 0
    except KeyboardInterrupt:
        print("preprocess_data.py: stopped; no incomplete file is left", file=sys.stderr)
        return 128 + signal.SIGINT
    except InputError as problem:
        message = str(problem)
    except WorkerKilled:
        message = "a worker was killed, most likely for lack of memory; use fewer --workers"
    except ModuleNotFoundError as problem:
        package = str(problem.name).split(".")[0].replace("megatron", "megatron-core")
        message = f"the Python package {package} is missing; run `pip install {package}`"
    except OSError as problem:
        where = problem.filename or f"--output-prefix {args.output_prefix}"
        message = f"{where}: {problem.strerror or problem}; check path, permissions and free space"
    print(f"preprocess_data.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # Nothing is compiled here, and torch takes seconds to import what compiles.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is named must lie here
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
