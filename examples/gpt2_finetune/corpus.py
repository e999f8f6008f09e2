"""The texts of the GPT-2 finetuning: records of a corpus, and what SCALE=smoke trains on.

    python corpus.py records lines IN.txt OUT.jsonl     a record a line, as Penn Treebank is used
    python corpus.py records file IN.txt OUT.jsonl      the whole file is one record, as WikiText
    python corpus.py smoke FOLDER                       train.txt, valid.txt, test.txt and model/

prepare_data.sh calls it. A .jsonl (also .gz, .zst) is taken as it is.
"""

import json
import os
import pydoc_data.topics
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What reads text for preprocess_data.py, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from text_data import tokenization
from text_data.corpus import InputError, is_jsonl, parse, read_records

SMOKE_WORDS = {"train": 8_000, "valid": 800, "test": 800}


def records(kind: str, source: Path, output: Path) -> None:
    """Write a corpus as one JSON object a line, its text under "text".

    Args:
        kind: "lines" (each stripped; empty ones are left out) or "file".
        source: UTF-8 text; or JSONL, which is copied, or if compressed read as it is.
        output: Ends in .jsonl.

    Raises:
        InputError: It is not UTF-8, or holds no word.
    """
    if is_jsonl(str(source)):
        texts = _texts_of(source)
    elif kind == "file":
        texts = iter([_decoded(source)])
    else:
        # Not splitlines(), which knows more ends of lines than files have.
        texts = (line.strip() for line in _decoded(source).split("\n"))
    part, words = output.with_name(output.name + ".part"), 0
    with part.open("w", encoding="utf-8") as file:
        for text in texts:
            words += bool(text.split())
            if text:
                file.write(json.dumps({"text": text}) + "\n")
    if not words:
        part.unlink()
        raise InputError(f"{source} is empty: it holds no word")
    part.replace(output)


def _decoded(source: Path) -> str:
    try:
        return source.read_bytes().decode().replace("\r\n", "\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"{source} is not UTF-8 ({problem.reason})") from None


def _texts_of(source: Path) -> Iterator[str]:
    for record in read_records([str(source)]):
        for texts in parse(record, ["text"]):
            yield from texts


def smoke(folder: Path) -> None:
    """Write a small corpus of real text, and a random GPT-2 with a tokenizer of this text."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    topics = list(pydoc_data.topics.topics.values())
    random.Random(1234).shuffle(topics)  # so that the three sets are of one kind
    lines = [line for topic in topics for line in topic.split("\n") if line.strip()]
    for name, words in SMOKE_WORDS.items():
        taken: list[str] = []
        while words > 0:
            taken.append(lines.pop())
            words -= len(taken[-1].split())
        (folder / f"{name}.txt").write_text("\n".join(taken) + "\n", encoding="utf-8")
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        bpe = str(scratch / "bpe.json")
        tokenization.train_bpe([str(folder / "train.txt")], ["text"], 1000, False, 1, bpe)
        tokenization.store_hugging_face(bpe, tokenization.BPE_EOD, str(scratch))
        os.remove(bpe)
        set_seed(1234)
        config = GPT2Config(
            vocab_size=1000,
            n_positions=64,
            n_embd=64,
            n_layer=4,
            n_head=4,
            activation_function="gelu",  # which Megatron computes on a CPU
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder / "model")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run a command; return the exit status."""
    try:
        match arguments:
            case ["records", ("lines" | "file") as kind, source, output]:
                records(kind, Path(source), Path(output))
            case ["smoke", folder]:
                smoke(Path(folder))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (InputError, OSError) as problem:
        print(f"corpus.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main(sys.argv[1:]))
