"""The studies' text: the Python standard library's own source, split by file.

    train, validation, tokenizer = prepare(folder)
    other, other_validation = prepare_headers(folder)    for a study of fine-tuning: C++

Which files are held out depends on a hash of their paths, so that they are spread over the whole
library. Every one gives its beginning only, so that no single file is most of a validation set;
files shorter than that are left out.
There are two validation sets: where they disagree about a difference between two arms, so much of
it is the choice of validation text.
"""

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from text_data.corpus import find_files

ROOT = Path(__file__).resolve().parents[2]
EXCLUDE = ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"]
VALIDATION_FILES = 20  # of each of the two sets
VALIDATION_CHARACTERS = 4000  # of each file, from its beginning
VOCABULARY = 2048
TOKEN_BYTES = 2  # on the disk, for that few tokens
VALIDATION_SETS = ("validation_a", "validation_b")


class TextError(Exception):
    """The text could not be prepared."""


def split(library: str, suffix: str = ".py") -> dict[str, list[str]]:
    """Return {set: texts} of a folder of files with a suffix, such as Python files."""
    files = find_files([library], [suffix], EXCLUDE)

    def path_hash(file: str) -> bytes:
        return hashlib.sha256(Path(file).relative_to(library).as_posix().encode()).digest()

    texts = [
        Path(file).read_bytes().decode("utf-8", errors="replace")
        for file in sorted(files, key=path_hash)
    ]
    texts = [text for text in texts if len(text) >= VALIDATION_CHARACTERS]
    held_out = [text[:VALIDATION_CHARACTERS] for text in texts[: 2 * VALIDATION_FILES]]
    a, b = VALIDATION_SETS
    return {
        "train": texts[2 * VALIDATION_FILES :],
        a: held_out[:VALIDATION_FILES],
        b: held_out[VALIDATION_FILES:],
    }


def prepare(folder: Path) -> tuple[str, list[str], Path]:
    """Tokenise the text into a folder, unless it is there already.

    Returns:
        The training set's prefix, those of the validation sets, and the tokenizer's folder.

    Raises:
        TextError: It did not work; why is on stderr.
    """
    tokenizer = folder / "train_tokenizer"
    prefixes = {name: str(folder / f"{name}_text_document") for name in ("train", *VALIDATION_SETS)}
    if not all(Path(f"{prefix}.idx").exists() for prefix in prefixes.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in split(sysconfig.get_path("stdlib")).items():
            _tokenise(folder, name, texts, tokenizer)
    return prefixes["train"], [prefixes[name] for name in VALIDATION_SETS], tokenizer


def prepare_headers(folder: Path) -> tuple[str, list[str]]:
    """Tokenise torch's C++ headers with the tokenizer of `prepare`, unless it is done already.

    Args:
        folder: That `prepare` was given.

    Returns:
        The training set's prefix and those of the validation sets.

    Raises:
        TextError: It did not work; why is on stderr.
    """
    import torch

    names = {name: f"headers_{name}" for name in ("train", *VALIDATION_SETS)}
    prefixes = {name: str(folder / f"{own}_text_document") for name, own in names.items()}
    if not all(Path(f"{prefix}.idx").exists() for prefix in prefixes.values()):
        headers = Path(torch.__file__).parent / "include" / "torch"
        for name, texts in split(str(headers), ".h").items():
            _tokenise(folder, names[name], texts, folder / "train_tokenizer")
    return prefixes["train"], [prefixes[name] for name in VALIDATION_SETS]


def _tokenise(folder: Path, name: str, texts: list[str], tokenizer: Path) -> None:
    """Write one set; the training set, which comes first, makes the tokenizer."""
    lines = folder / f"{name}.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--append-eod"]
    command += ["--input", str(lines), "--output-prefix", str(folder / name)]
    if name == "train":
        command += ["--tokenizer-type", "bpe", "--vocab-size", str(VOCABULARY)]
    else:
        command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise TextError(f"the text could not be tokenised into {folder}")
