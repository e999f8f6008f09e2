"""The data sets of check_layouts.py: short documents, and sentences for BERT with a vocabulary.

Tokens rise with a random stride: something to learn, unlike noise.
"""

import string
import sys
from pathlib import Path
from typing import Any

from layout_matrix import VOCAB_SIZE
from local_ranks import ROOT, run

if str(ROOT / "tools") not in sys.path:
    sys.path.append(str(ROOT / "tools"))  # for text_data, also on the ranks

DOCUMENTS, SENTENCES, TOKENIZER = "documents", "sentences", "tokenizer"
_NUMBER_OF_DOCUMENTS, _LONGEST = 400, 60
_SENTENCES, _LONGEST_SENTENCE = 5, 25


def prepare(folder: Path, with_sentences: bool) -> dict[str, str]:
    """Write the data sets; return the versions that the ranks run with."""
    return run(1, _prepare, str(folder), with_sentences)[0]


def _prepare(folder: str, with_sentences: bool) -> dict[str, str]:
    import megatron.core
    import numpy
    import torch

    _write_documents(f"{folder}/{DOCUMENTS}", numpy.random.default_rng(1))
    if with_sentences:
        write_tokenizer(Path(folder, TOKENIZER))
        write_sentences(f"{folder}/{SENTENCES}", numpy.random.default_rng(2))
    return {"megatron-core": megatron.core.__version__, "torch": torch.__version__}


def _write_documents(path: str, generator: Any) -> None:
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=VOCAB_SIZE
    )
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=numpy.uint16)
    for _ in range(_NUMBER_OF_DOCUMENTS):
        tokens = _rising(generator, _LONGEST, 0, VOCAB_SIZE - 1)
        tokens[-1] = tokenizer.eod
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{path}.idx")


def _rising(generator: Any, longest: int, lowest: int, end: int) -> Any:
    """Return 5 to `longest` - 1 tokens of `lowest` to `end` - 1."""
    import numpy
    import torch

    length, first, stride = generator.integers((5, 0, 1), (longest, VOCAB_SIZE, 9))
    tokens = (first + stride * numpy.arange(length)) % (end - lowest) + lowest
    return torch.from_numpy(tokens)


def write_tokenizer(folder: Path) -> None:
    """Write a WordPiece tokenizer of `VOCAB_SIZE` tokens."""
    from text_data import tokenization, wordpiece

    letters = string.ascii_lowercase
    words = [*letters, *(f"##{c}" for c in letters), *(f"{c}{d}" for c in letters for d in letters)]
    vocabulary = [*wordpiece.SPECIAL.values(), *words][:VOCAB_SIZE]
    tokenization.store_wordpiece(vocabulary, False, str(folder))


def write_sentences(path: str, generator: Any) -> None:
    """Write documents of a few sentences, none with a special token."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from text_data.wordpiece import SPECIAL

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=numpy.uint16)
    for _ in range(_NUMBER_OF_DOCUMENTS):
        sentences = [
            _rising(generator, _LONGEST_SENTENCE, len(SPECIAL), VOCAB_SIZE)
            for _ in range(generator.integers(2, _SENTENCES + 1))
        ]
        builder.add_document(torch.cat(sentences), [len(tokens) for tokens in sentences])
    builder.finalize(f"{path}.idx")
