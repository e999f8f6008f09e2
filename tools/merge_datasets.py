"""Join token files into one, in the order given: PREFIX.bin and PREFIX.idx, and PREFIX.sha256.

    python tools/merge_datasets.py --input data/shards/*.idx --output-prefix data/pile_text_document

Every input is a .idx that tools/preprocess_data.py (or Megatron-LM's) wrote, with its .bin next to
it. If a .sha256 of both lies next to them, as `sha256sum` writes it, it is checked while the tokens
are copied. Nothing appears under the output's name before it is complete.

Unlike Megatron-LM's tool of this name, it takes files, not a folder. It checks that they are whole
and of one kind, and it reports documents and tokens.
"""

import argparse
import hashlib
import os
import signal
import sys
import tempfile
from dataclasses import dataclass

from text_data import token_files
from text_data.corpus import InputError
from text_data.tokenization import quiet_imports


@dataclass
class Merged:
    """What was joined."""

    documents: int = 0
    tokens: int = 0


def check_inputs(indices: list[str], output_prefix: str) -> list[str]:
    """Return the prefixes of the inputs.

    Raises:
        InputError: An input is no .idx, is given twice, has no .bin, or is the output.
    """
    prefixes: list[str] = []
    for path in indices:
        prefix, ending = os.path.splitext(path)
        if ending != ".idx":
            raise InputError(f"--input {path} does not end in .idx; name the index files")
        for file in (path, prefix + ".bin"):
            if not os.path.isfile(file):
                raise InputError(f"--input {path}: there is no {file}; tokenize this part again")
        if os.path.realpath(prefix) in map(os.path.realpath, prefixes):
            raise InputError(f"--input {path} is named twice; name each file once")
        if os.path.realpath(prefix) == os.path.realpath(output_prefix):
            raise InputError(f"--output-prefix {output_prefix} is an input too; choose another")
        prefixes.append(prefix)
    return prefixes


def check_sums(prefix: str) -> None:
    """Compare a .bin and .idx with the .sha256 beside them, if there is one.

    Raises:
        InputError: One of them is not what was written.
    """
    sums = prefix + ".sha256"
    if not os.path.exists(sums):
        return
    with open(sums, encoding="utf-8") as file:
        lines = (line.rstrip("\n").partition("  ") for line in file)
        expected = {name: digest for digest, _, name in lines}
    for path in (prefix + ".bin", prefix + ".idx"):
        if sha256(path) != expected.get(os.path.basename(path)):
            raise InputError(
                f"{path} does not match the checksum in {sums}; remove both and tokenize this part "
                "again"
            )


def sha256(path: str) -> str:
    """Return the checksum of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def merge(prefixes: list[str], output_prefix: str) -> Merged:
    """Join the files under `prefixes` into `output_prefix`; whole or not at all.

    Raises:
        InputError: A file is damaged, or the files hold tokens of different types.
        OSError: A file cannot be read or written.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, _IndexReader
    folder, name = os.path.split(output_prefix)
    os.makedirs(folder or ".", exist_ok=True)
    merged = Merged()
    with (
        tempfile.TemporaryDirectory(".tmp", name + ".", folder or ".") as scratch,
        quiet_imports(),  # Megatron wonders at each file which rank this is
    ):
        kind, first = None, ""
        for number, prefix in enumerate(prefixes, start=1):
            check_sums(prefix)
            try:
                part = _IndexReader(prefix + ".idx", multimodal=False)
            except Exception as problem:  # whatever a damaged index leads to
                raise InputError(
                    f"{prefix}.idx is not an index of tokens ({problem}); tokenize this part again"
                ) from None
            tokens = int(part.sequence_lengths.sum())
            size = os.path.getsize(prefix + ".bin")
            if size != tokens * part.dtype_size:
                raise InputError(
                    f"{prefix}.bin has {size:,} bytes, but its index says "
                    f"{tokens * part.dtype_size:,}; tokenize this part again"
                )
            if kind is None:
                kind, first = part.dtype, prefix
                builder = IndexedDatasetBuilder(os.path.join(scratch, "all.bin"), kind)
            if part.dtype != kind:
                raise InputError(
                    f"{prefix}.bin holds {part.dtype.__name__}, {first}.bin {kind.__name__}: "
                    "they come from different tokenizers; tokenize one of them again"
                )
            merged.documents += len(part.document_indices) - 1
            merged.tokens += tokens
            del part  # its maps of the files
            builder.add_index(prefix)
            print(
                f"{number}/{len(prefixes)} {prefix}: {tokens:,} tokens", file=sys.stderr, flush=True
            )
        builder.finalize(os.path.join(scratch, "all.idx"))
        lines = [
            f"{sha256(os.path.join(scratch, 'all' + ending))}  {name}{ending}\n"
            for ending in (".bin", ".idx")
        ]
        sums = output_prefix + ".sha256"
        if os.path.exists(sums):
            os.remove(sums)  # never old checksums beside new files
        token_files.publish(scratch, {"all": output_prefix}, {})
        with open(sums, "w", encoding="utf-8") as file:
            file.writelines(lines)
    return merged


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="merge_datasets.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = "index files; they are joined in this order"
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE.idx", help=text)
    text = "write PREFIX.bin, .idx and .sha256, and replace older ones"
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help=text)
    args = parser.parse_args(argv)
    try:
        merged = merge(check_inputs(args.input, args.output_prefix), args.output_prefix)
    except KeyboardInterrupt:
        print("merge_datasets.py: stopped; no incomplete file is left", file=sys.stderr)
        return 128 + signal.SIGINT
    except InputError as problem:
        message = str(problem)
    except OSError as problem:
        where = problem.filename or f"--output-prefix {args.output_prefix}"
        message = f"{where}: {problem.strerror or problem}; check path, permissions and free space"
    else:
        print(
            f"{merged.documents:,} documents, {merged.tokens:,} tokens: "
            f"--data-path {args.output_prefix}"
        )
        return 0
    print(f"merge_datasets.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up
    sys.exit(main())
