"""Perplexity of a Hugging Face folder on a text, as papers on GPT-2 report it.

    python tools/evaluation/perplexity.py FOLDER TEXT                 blocks, as run_clm.py has them
    python tools/evaluation/perplexity.py FOLDER TEXT --stride 512    a sliding window

FOLDER is what tools/checkpoint/export_hf.py writes, or a download of a published GPT-2 or Llama.
TEXT is read as tools/preprocess_data.py --one-sequence reads it: a file of plain text is tokenized
in one piece; of a .jsonl file (also .gz, .zst) each record's "text" is tokenized alone, and the
tokens are joined with nothing between them. This choice changes the number; keep to one.

Blocks: the tokens are cut into blocks of --block-size tokens; what remains is dropped. A block's
first token has no context and is not predicted, so a block has --block-size - 1 predictions.

Sliding window: a window of --block-size tokens moves by --stride tokens. Every token but the
text's first is predicted once, in the first window that reaches it. A smaller stride gives more
context and takes longer. The last window is shorter, unless the text ends with it.

Perplexity is exp(the mean of -log p over all predictions). Word-level perplexity is exp(the text's
-log p / its words); words are what white space separates, and line ends count as none. The text's
-log p is the mean times its tokens without the first, so that dropped tokens count as the others.

Sources: transformers' examples/pytorch/language-modeling/run_clm.py, and "Perplexity of
fixed-length models" in its documentation.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What reads the text for preprocess_data.py, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from text_data.corpus import BadRecord, InputError, parse, read_records

DTYPES = ("float32", "bfloat16", "float64")


class Window(NamedTuple):
    """Tokens that the model sees at once; positions in the text."""

    start: int
    end: int
    first: int
    """The first token to predict, start + 1 at least; all from it to `end` are predicted."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="perplexity.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="FOLDER", help="a Hugging Face folder with its tokenizer")
    add("text", type=Path, metavar="TEXT", help="a file of plain text, or .jsonl")
    add("--json-key", default="text", metavar="KEY", help="field of .jsonl records (%(default)s)")
    text = "tokens of a block or window (the model's positions)"
    add("--block-size", type=_positive, metavar="N", help=text)
    text = "use a sliding window that moves by N tokens, fewer than the block's"
    add("--stride", type=_positive, metavar="N", help=text)
    add("--batch-size", type=_positive, default=4, metavar="N", help="blocks at once (%(default)s)")
    add("--device", metavar="DEVICE", help="such as cpu or cuda:1 (a GPU if there is one)")
    text = "dtype of weights and arithmetic (%(default)s); losses are at least float32"
    add("--dtype", choices=DTYPES, default="float32", help=text)
    add("--json", type=Path, metavar="FILE", help="write the results here, too")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def check_paths(options: argparse.Namespace) -> None:
    """Raise InputError for what is missing on the disk, before anything slow."""
    folder = options.model
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a folder with a config.json; tools/checkpoint/export_hf.py makes one "
            "from a checkpoint"
        )
    if not any(folder.glob("tokenizer*.json")) and not (folder / "vocab.json").is_file():
        raise InputError(f"{folder} holds no tokenizer; export it again with --tokenizer FOLDER")
    if not options.text.is_file():
        raise InputError(f"{options.text}: there is no such file")
    if options.json and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: there is no folder {options.json.parent}")


def read_texts(path: Path, key: str) -> list[str]:
    """Return the file's records, of which a file of plain text has one.

    Raises:
        InputError: There is no word in it, or a record is not text.
    """
    try:
        texts = [
            text
            for record in read_records([str(path)])
            for sentences in parse(record, [key])
            for text in sentences
        ]
    except BadRecord as problem:
        raise InputError(str(problem.args[0])) from None
    if not any(text.split() for text in texts):
        raise InputError(f"{path} is empty: it holds no word")
    return texts


def windows(tokens: int, block_size: int, stride: int | None) -> list[Window]:
    """Return what the model sees of a text of so many tokens: blocks, or with a stride windows."""
    if stride is None:
        starts = range(0, tokens - block_size + 1, block_size)
        return [Window(start, start + block_size, start + 1) for start in starts]
    found, seen = [], 1
    for start in range(0, tokens, stride):
        end = min(start + block_size, tokens)
        found.append(Window(start, end, seen))
        seen = end
        if end == tokens:
            break
    return found


def check_lengths(options: argparse.Namespace, tokens: int, positions: int | None) -> int:
    """Return the block size.

    Args:
        options: The command's.
        tokens: Of the text.
        positions: Of the model, None if it says nothing of them.

    Raises:
        InputError: Block, stride, text and model do not fit together.
    """
    size = options.block_size or positions
    if size is None:
        raise InputError("the model names no number of positions; give --block-size")
    if positions and size > positions:
        raise InputError(f"--block-size {size}: the model has {positions} positions; use less")
    if size < 2:
        raise InputError(f"--block-size {size} leaves nothing to predict; use at least 2")
    if options.stride and options.stride >= size:
        # At the block's size, too: the first token of a window would have no context.
        raise InputError(
            f"--stride {options.stride} must be smaller than the block of {size} tokens, so that "
            "windows overlap; omit --stride for blocks"
        )
    if options.stride and tokens < 2:
        raise InputError(f"{options.text} has {tokens} tokens: there is nothing to predict")
    if not options.stride and tokens < size:
        raise InputError(
            f"{options.text} has {tokens} tokens, fewer than a block of {size}; use a "
            "smaller --block-size or --stride"
        )
    return size


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return tokenizer and model.

    Raises:
        InputError: They cannot be loaded, or do not belong together.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # a text longer than the model is no mistake here
    logging.disable_progress_bar()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(f"--device {device} cannot be used here ({reason})") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
    except Exception as problem:  # tokenizers and safetensors raise their own, some bare
        reason = " ".join(str(problem).split()).split(". ")[0]
        raise InputError(f"{options.model} cannot be loaded ({reason})") from None
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer in {options.model} has {len(tokenizer)} tokens, but the model only "
            f"{rows}; use the tokenizer that it was trained with"
        )
    return tokenizer, model.eval().to(place)


def batches(found: list[Window], size: int) -> Iterator[list[Window]]:
    """Yield windows of equal length together, `size` at most."""
    batch: list[Window] = []
    for window in found:
        length = window.end - window.start
        if batch and (len(batch) == size or length != batch[0].end - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def total_loss(model: Any, tokens: Any, found: list[Window], batch_size: int) -> float:
    """Return the sum of -log p over all tokens to predict, summed in float64.

    Args:
        model: A causal model of transformers.
        tokens: All of the text, int64 [tokens].
        found: What the model sees.
        batch_size: Windows at once.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    total = torch.zeros((), dtype=torch.float64)
    bar = tqdm(total=len(found), unit="block", disable=None)  # None: only in a terminal
    done, shown = 0, 0
    for batch in batches(found, batch_size):
        ids = torch.stack([tokens[w.start : w.end] for w in batch]).to(model.device)
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1]
            if logits.dtype == torch.bfloat16:
                logits = logits.float()
            # [b, v, s - 1] and [b, s - 1], as torch has it.
            losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for row, window in zip(losses.double().cpu(), batch, strict=True):
            total += row[window.first - window.start - 1 :].sum()
        done += len(batch)
        bar.update(len(batch))
        if bar.disable and done * 10 // len(found) > shown:
            shown = done * 10 // len(found)
            print(f"{done:,} of {len(found):,} blocks", file=sys.stderr, flush=True)
    bar.close()
    return float(total)


def _exp(loss: float) -> float | None:
    """Return a perplexity, None if it is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results by name.

    Raises:
        InputError: What the user asked for cannot be done.
    """
    import torch

    check_paths(options)
    texts = read_texts(options.text, options.json_key)
    tokenizer, model = load(options)
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    tokens = torch.tensor(ids, dtype=torch.int64)
    positions = getattr(model.config, "max_position_embeddings", None)
    size = check_lengths(options, len(ids), positions)
    found = windows(len(ids), size, options.stride)
    predicted = sum(window.end - window.first for window in found)
    try:
        loss = total_loss(model, tokens, found, options.batch_size) / predicted
    except torch.OutOfMemoryError:
        raise InputError(
            f"{model.device} has too little memory for {options.batch_size} blocks of {size} "
            "tokens; use a smaller --batch-size"
        ) from None
    if not math.isfinite(loss):
        raise InputError(f"the loss of {options.model} is {loss}: its weights are damaged")
    words = sum(len(text.split()) for text in texts)
    return {
        "model": str(options.model),
        "text": str(options.text),
        "mode": "strided" if options.stride else "block",
        "block_size": size,
        "stride": options.stride,
        "dtype": options.dtype,
        "device": str(model.device),
        "tokens": len(ids),
        "blocks": len(found),
        "predicted_tokens": predicted,
        "words": words,
        "loss": loss,
        "perplexity": _exp(loss),
        "word_perplexity": _exp(loss * (len(ids) - 1) / words),
    }


def report(results: dict[str, Any]) -> str:
    """Return the results for people."""

    def shown(name: str) -> str:
        return "too large to print" if results[name] is None else f"{results[name]:.4f}"

    kind = f"blocks of {results['block_size']:,} tokens"
    if results["stride"]:
        kind = f"windows of {results['block_size']:,} tokens at stride {results['stride']:,}"
    return (
        f"{results['text']}: {results['tokens']:,} tokens, {results['words']:,} words\n"
        f"{results['blocks']:,} {kind}, {results['predicted_tokens']:,} tokens predicted\n"
        f"loss {results['loss']:.6f}   perplexity {shown('perplexity')}   "
        f"word-level perplexity {shown('word_perplexity')}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run with these options; return the exit status."""
    options = parse_args(argv)
    try:
        results = measure(options)
        print(report(results))
        if options.json:
            # Nothing under this name that is not complete.
            part = options.json.with_name(options.json.name + ".part")
            part.write_text(json.dumps(results, indent=2) + "\n")
            part.replace(options.json)
        return 0
    except KeyboardInterrupt:
        print("perplexity.py: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as problem:
        message = f"the Python package {problem.name} is missing; run `pip install {problem.name}`"
    except (InputError, OSError) as problem:
        message = " ".join(str(problem).split())
    print(f"perplexity.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is named must lie here
    sys.exit(main())
