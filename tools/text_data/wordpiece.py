"""WordPiece tokenizers, BERT's, for preprocess_data.py: from a vocabulary file, or trained.

They are made of the `tokenizers` package's parts, so any release of transformers loads the folder,
and Megatron with it. Ids 0 to 4 of a trained one are [PAD], [UNK], [CLS], [SEP] and [MASK].
"""

import os
from collections import Counter
from typing import Any

from text_data.corpus import InputError

WORDPIECE = "wordpiece"
# [PAD] first: Megatron writes its id where the mask should say "not a token", so it must be 0
# (megatron/core/datasets/bert_dataset.py, `mask_pads`).
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CONTINUES = "##"
# Characters that become tokens of their own, as in BERT's vocabularies: rarer ones are [UNK].
MAX_CHARACTERS = 1000


def read_vocabulary(path: str) -> list[str]:
    """Return the tokens of a vocabulary file, one a line in the order of their ids.

    Raises:
        InputError: It lacks a special token, [PAD] is not its first, or a token comes twice.
        OSError: It cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            tokens = file.read().split("\n")
        except UnicodeDecodeError:
            raise InputError(f"--vocab-file {path} is not UTF-8; name a vocab.txt") from None
    tokens = [token.removesuffix("\r") for token in tokens]
    while tokens and not tokens[-1]:
        tokens.pop()
    missing = [token for token in SPECIAL.values() if token not in tokens]
    if missing:
        raise InputError(
            f"--vocab-file {path} lacks {', '.join(missing)}; BERT's data sets need them: name a "
            "WordPiece vocabulary, one token a line"
        )
    if tokens[0] != SPECIAL["pad_token"]:
        raise InputError(
            f"--vocab-file {path}: the first line must be [PAD], because Megatron takes 0 for "
            "padding; move it there if the vocabulary is not in use yet"
        )
    twice = next((token for token, count in Counter(tokens).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"--vocab-file {path} has the token {twice!r} twice; name each once")
    return tokens


def train(texts: Any, vocab_size: int, is_cased: bool, threads: int) -> list[str]:
    """Return the tokens of a WordPiece vocabulary trained on texts.

    The result depends on the texts and the options alone.

    Args:
        texts: Call it for an iterator over the texts; it is called twice.
        vocab_size: Tokens at most; a small corpus may give fewer, many characters more.
        is_cased: Keep capital letters and accents.
        threads: How many to train with.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    from tokenizers import trainers

    tokenizer = untrained([], is_cased)
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(tokenizer.normalizer.normalize_str(text))
    usual = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    usual = sorted(usual[:MAX_CHARACTERS])
    # The trainer numbers the characters inside words in an order that changes from run to run, and
    # so do the tokens that it makes of them. Numbered beforehand, they stay.
    inside = [
        CONTINUES + c
        for c in usual
        if len(
            tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("a" + c))
        )
        == 1
    ]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL.values(), *inside],
        initial_alphabet=usual,
        limit_alphabet=len(usual),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(numbers, key=numbers.__getitem__)


def untrained(vocabulary: list[str], is_cased: bool) -> Any:
    """Return a tokenizer of the `tokenizers` package that splits text as BERT does.

    Args:
        vocabulary: Tokens in the order of their ids.
        is_cased: Keep capital letters and accents.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not is_cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    if vocabulary:
        # What GLUE and other fine-tuning need; the training data are written without.
        first, last = SPECIAL["cls_token"], SPECIAL["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(first, ids[first]), (last, ids[last])],
        )
    return tokenizer


def store(vocabulary: list[str], is_cased: bool, folder: str) -> None:
    """Write a tokenizer for transformers and Megatron to load, and its vocab.txt."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=untrained(vocabulary, is_cased),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL,
    )
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(token + "\n" for token in vocabulary)
