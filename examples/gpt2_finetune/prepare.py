"""What prepare_data.sh calls: the data and the weights of the GPT-2 finetuning, in one folder.

    python prepare.py --model FOLDER --train FILE --valid FILE --test FILE --output FOLDER
    python prepare.py --smoke --output FOLDER

Each set becomes records (SET.jsonl), the tokens of train and valid are joined
(tools/preprocess_data.py --one-sequence), and the model becomes a checkpoint of Megatron
(tools/checkpoint/import_hf.py), with its flags in model_flags, one word a line. All in one process,
because each of these tools takes longer to import than to run on a small text.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pydoc_data.topics
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "checkpoint"))

import import_hf
import preprocess_data
from text_data import tokenization
from text_data.corpus import InputError, is_jsonl, parse, read_records

SETS = ("train", "valid", "test")
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


def tokenize(jsonl: Path, model: Path, prefix: Path, workers: int) -> None:
    """Write the tokens of all records as one sequence.

    Raises:
        InputError: The tool has said what is wrong.
    """
    flags = ["--input", jsonl, "--one-sequence", "--output-prefix", prefix, "--workers", workers]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]
    flags += ["--log-interval", 100_000]
    with contextlib.redirect_stdout(io.StringIO()):
        status = preprocess_data.main(list(map(str, flags)))
    if status:
        raise InputError(f"{jsonl} was not tokenized, see above")


def import_model(model: Path, checkpoint: Path) -> list[str]:
    """Write the weights for Megatron; return the flags of the model and its tokenizer.

    Raises:
        InputError: The tool has said what is wrong.
    """
    shutil.rmtree(checkpoint, ignore_errors=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = import_hf.main(["--input", str(model), "--output", str(checkpoint)])
    if status:
        raise InputError(f"{model} was not imported, see above")
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("  --load")]
    # Without --load FOLDER --finetune: a run loads its own checkpoints.
    return shlex.split(line)[3:]


def settings_of(kind: str, model: Path, texts: dict[str, Path]) -> str:
    """Return what the results depend on, one thing a line."""
    lines = [f"records {kind}", f"model {model}"]
    for name, file in {"config.json": model / "config.json", **texts}.items():
        with file.open("rb") as opened:
            lines.append(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}")
    return "".join(line + "\n" for line in lines)


def prepare(options: argparse.Namespace) -> None:
    """Make all that is not there.

    Raises:
        InputError: Something cannot be used; the message or one before it says what.
    """
    output, model = options.output.resolve(), options.model
    texts = {name: getattr(options, name) for name in SETS}
    if options.smoke:
        raw = output / "raw"
        model, texts = raw / "model", {name: raw / f"{name}.txt" for name in SETS}
        if not model.exists():
            print("prepare_data: text, tokenizer and a random GPT-2 for SCALE=smoke", flush=True)
            smoke(raw)
    model = model.resolve()
    settings, made = settings_of(options.records, model, texts), output / "settings"
    if made.exists():
        if made.read_text() != settings:
            raise InputError(
                f"OUTPUT={output} was made from other files or settings; choose another, or "
                "remove it"
            )
    else:
        for name, text in texts.items():
            records(options.records, text, output / f"{name}.jsonl")
        for name in ("train", "valid"):
            print(f"prepare_data: tokenizing {name}", flush=True)
            tokenize(output / f"{name}.jsonl", model, output / name, options.workers)
        print("prepare_data: weights for Megatron", flush=True)
        flags = import_model(model, output / "checkpoint")
        (output / "model_flags").write_text("".join(flag + "\n" for flag in flags))
        made.write_text(settings)
    print(f"prepare_data: finetune with DATA={output}")


def main(argv: list[str] | None = None) -> int:
    """Prepare; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name in ("model", *SETS):
        add(f"--{name}", type=Path)
    add("--output", type=Path, required=True)
    add("--records", choices=["lines", "file"], default="lines")
    add("--workers", type=int, default=1)
    add("--smoke", action="store_true")
    options = parser.parse_args(argv)
    try:
        prepare(options)
    except (InputError, OSError) as problem:
        print(f"prepare_data: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
