"""The study's samples: blocks of real text, for a causal and for a masked language model.

A sample is a pure function of (text, seed, its number), so that all arms of a seed read the same
samples in the same order, with the same tokens masked.

Shapes: b samples, s sequence length.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from lib import text
from lib.samples import read_tokens
from torch import Tensor

CAUSAL, MASKED = "causal", "masked"
TASKS = (CAUSAL, MASKED)
# Tokens of the text: of the tokenizer's, or bytes. A masked model predicts few tokens of a sample
# and in a run this short would learn no more of the tokenizer's than how frequent each is.
TEXT_TOKENS = {CAUSAL: text.VOCABULARY, MASKED: 256}
VOCABULARY = {task: count + 1 for task, count in TEXT_TOKENS.items()}
MASK_ID = TEXT_TOKENS  # the last of the vocabulary
END_OF_DOCUMENT = 0
MASKED_SHARE = 0.15  # of the tokens; 80% of them become [MASK], 10% any token, 10% stay
NOT_MASKED = -1  # the label of what is not masked, as in Megatron's BERT data sets
EVALUATION_SEED = 0  # of the masks of the held-out text
EVALUATED_CHARACTERS = 2000  # of each held-out file, where the tokens are bytes


@dataclass(frozen=True)
class Batch:
    """Samples of one task.

    Attributes:
        ids: [b, s] int64, what the model reads.
        labels: [b, s] int64, what it predicts; NOT_MASKED where that does not count.
    """

    ids: Tensor
    labels: Tensor


def read_texts(task: str, folder: Path) -> list[Tensor]:
    """Return the tokens to train on and those of the two validation sets, int64.

    Args:
        folder: Of `lib.text.prepare`, which tokenises the text there unless it has done so.
    """
    if task == CAUSAL:
        train_prefix, validation_prefixes, _ = text.prepare(folder)
        return [read_tokens(prefix) for prefix in (train_prefix, *validation_prefixes)]
    sets = text.split(sysconfig.get_path("stdlib"))
    return [_as_bytes(sets["train"])] + [
        _as_bytes([own[:EVALUATED_CHARACTERS] for own in sets[name]])
        for name in text.VALIDATION_SETS
    ]


def _as_bytes(texts: list[str]) -> Tensor:
    joined = "".join(own + chr(END_OF_DOCUMENT) for own in texts)
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def batch(task: str, own: Tensor, seed: int, first: int) -> Batch:
    """Return samples as a model of a task reads them.

    Args:
        own: [b, s + 1] blocks.
        seed: Of the masks.
        first: Number of the first sample, which decides the masks too.
    """
    if task == CAUSAL:
        return Batch(own[:, :-1], own[:, 1:])
    ids = own[:, :-1]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
    masked = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
    how = torch.rand(ids.shape, generator=generator)
    others = torch.randint(TEXT_TOKENS[task], ids.shape, generator=generator)
    read = torch.where(masked & (how < 0.8), MASK_ID[task], ids)
    read = torch.where(masked & (how >= 0.9), others, read)
    return Batch(read, torch.where(masked, ids, NOT_MASKED))
