"""Documents as BERT's data sets need them, for preprocess_data.py: split into sentences."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from text_data.corpus import InputError

# megatron/core/datasets/helpers.cpp, `LONG_SENTENCE_LEN`: a document with a longer one is left out.
MAX_TOKENS = 512


@functools.cache
def splitter(language: str) -> Callable[[str], list[str]]:
    """Return the function from a text to its sentences.

    Args:
        language: Its ISO code, such as en; it decides which abbreviations end no sentence.

    Raises:
        InputError: The package is missing.
    """
    try:
        from sentencex import segment
    except ImportError:
        raise InputError(
            "--split-sentences needs the Python package sentencex for text that is not a list of "
            "sentences; run `pip install sentencex`, or give lists of sentences"
        ) from None
    return lambda text: [s for s in map(str.strip, segment(language, text)) if s]


@dataclass
class Unused:
    """Documents that Megatron's BERT data set leaves out, without a word.

    Attributes:
        documents: All, each counted once for every key.
        single: With fewer than two sentences.
        long: With two or more, of which one is longer than `MAX_TOKENS`.
        empty: Without any.
    """

    documents: int = 0
    empty: int = 0
    single: int = 0
    long: int = 0

    def count(self, lengths: Iterable[int]) -> None:
        """Count a document by the tokens of each of its sentences."""
        lengths = list(lengths)
        self.documents += 1
        if len(lengths) < 2:
            self.single += bool(lengths)
            self.empty += not lengths
        else:
            self.long += max(lengths) > MAX_TOKENS

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each reason why documents will be left out."""
        total = f"of {self.documents:,} documents"
        if self.empty:
            yield f"warning: {self.empty:,} {total} have no token; Megatron leaves them out"
        if self.single:
            yield (
                f"warning: {self.single:,} {total} have one sentence; Megatron leaves them out, "
                "but for a run with --bert-no-binary-head"
            )
        if self.long:
            yield (
                f"warning: {self.long:,} {total} have a sentence of more than {MAX_TOKENS} tokens; "
                "Megatron leaves the whole document out, so cut such sentences first"
            )
