"""tools/preprocess_data.py for BERT: sentences, WordPiece, and what Megatron reads of them."""

import json
import os
import subprocess
import sys

import pytest
from text_data import sentences, wordpiece

from tests.tools.test_preprocess_data import (
    TOOLS,
    as_jsonl,
    megatron_tokenizer,
    printed_flags,
    read,
    run,
    source_files,
)

LISTS = [["One sentence.", "", "Caf\u00e9 two."], ["Alone."], [], ["x " * 600, "y"]]
VOCABULARY = [*wordpiece.SPECIAL.values(), *"abcdefghijklmnopqrstuvwxyz.", "##e", "one", "##ne"]


def write_vocabulary(path, tokens=VOCABULARY):
    path.write_text("\n".join(tokens) + "\n")
    return path


def wordpieces(jsonl, prefix, *flags):
    return (
        *("--input", jsonl, "--tokenizer-type", "wordpiece", "--output-prefix", prefix, *flags),
        "--split-sentences",
    )


def test_lists_are_sentences_without_special_tokens(tmp_path, capsys):
    jsonl, vocabulary = tmp_path / "in.jsonl", write_vocabulary(tmp_path / "vocab.txt")
    jsonl.write_text(as_jsonl(*({"text": sentences} for sentences in LISTS)))
    status = run(*wordpieces(jsonl, tmp_path / "out", "--vocab-file", vocabulary))
    stdout, stderr = capsys.readouterr()
    assert status == 0, stderr
    tokenizer = megatron_tokenizer(printed_flags(stdout)[2:])
    documents = read(tmp_path / "out_text_sentence")
    assert [len(document) for document in documents] == [2, 1, 0, 2]
    assert [len(s) for s in documents[3]] == [600, 1]
    spelled = [" ".join(tokenizer.inv_vocab[token] for token in s) for s in documents[0]]
    assert spelled == ["one [UNK] .", "[UNK] [UNK] ."]
    ids = {n: getattr(tokenizer, n) for n in ("pad", "unk", "cls", "sep", "mask")}
    assert ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizer.vocab_size == len(VOCABULARY)
    assert (tmp_path / "out_tokenizer" / "vocab.txt").read_text() == vocabulary.read_text()
    assert "warning: 1 of 4 documents have no token" in stdout
    assert "warning: 1 of 4 documents have one sentence; Megatron leaves them out" in stdout
    assert "warning: 1 of 4 documents have a sentence of more than 512 tokens" in stdout


def test_the_stored_tokenizer_adds_special_tokens_for_fine_tuning(tmp_path):
    from transformers import AutoTokenizer

    wordpiece.store(VOCABULARY, True, str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer("one", "a")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "one", "[SEP]", "a", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.tokenize("oNe") == ["[UNK]"]  # cased


def test_text_is_split_into_sentences(tmp_path, capsys):
    pytest.importorskip("sentencex")
    text = "Dr. Smith left. He took the 5 p.m. train!\n\nA heading\n\nIt ran."
    wanted = ["Dr. Smith left.", "He took the 5 p.m. train!", "A heading", "It ran."]
    assert sentences.splitter("en")(text) == wanted
    (tmp_path / "in.txt").write_text(text)
    flags = wordpieces(tmp_path / "in.txt", tmp_path / "out", "--vocab-size", "60")
    assert run(*flags) == 0, capsys.readouterr().err
    (document,) = read(tmp_path / "out_text_sentence")
    assert len(document) == len(wanted)


TRAIN = """
import json, sys
from text_data import wordpiece
texts = json.load(sys.stdin)
print("\\n".join(wordpiece.train(lambda: iter(texts), 900, False, threads=int(sys.argv[1]))))
"""


def test_wordpiece_training_depends_on_the_text_alone():
    # The trainer draws its hash keys anew in each process.
    texts = json.dumps([f.read_text() for f in source_files()])
    path = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    children = [
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(threads)],
            input=texts,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for threads in (1, 3, 2)
    ]
    tokens = children[0].stdout.splitlines()
    assert all(child.stdout == children[0].stdout for child in children)
    assert tokens[:5] == list(wordpiece.SPECIAL.values())
    assert len(tokens) == len(set(tokens)) == 900
    assert any(len(t.removeprefix("##")) > 3 for t in tokens if t.startswith("##"))
    assert not any(t.isupper() and t not in tokens[:5] for t in tokens)


def test_megatron_loads_what_was_trained(tmp_path, capsys):
    jsonl, texts = tmp_path / "in.jsonl", [f.read_text().split("\n") for f in source_files()]
    jsonl.write_text(as_jsonl(*({"text": text} for text in texts)))
    assert run(*wordpieces(jsonl, tmp_path / "out", "--vocab-size", "400")) == 0
    flags = printed_flags(capsys.readouterr().out)[2:]
    tokenizer = megatron_tokenizer([*flags, "--tokenizer-hf-no-include-special-tokens"])
    assert tokenizer.vocab_size == 400
    wanted = [[ids for ids in map(tokenizer.tokenize, text) if ids] for text in texts]
    assert read(tmp_path / "out_text_sentence") == wanted


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (VOCABULARY[:3] + VOCABULARY[4:], "lacks [SEP]; BERT's data sets need them"),
        (["a", *VOCABULARY[1:4]], "lacks [PAD], [MASK]; BERT's"),
        ([*VOCABULARY[1:], "[PAD]"], "the first line must be [PAD]"),
        ([*VOCABULARY, "a"], "has the token 'a' twice"),
    ],
)
def test_vocabularies_that_do_not_suit(tokens, said, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(as_jsonl({"text": ["a"]}))
    vocabulary = write_vocabulary(tmp_path / "vocab.txt", tokens)
    flags = wordpieces(tmp_path / "in.jsonl", tmp_path / "out", "--vocab-file", vocabulary)
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert f"--vocab-file {vocabulary}" in error and said in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tokenizer-type wordpiece", "needs --vocab-size N to train one, or --vocab-file"),
        ("--tokenizer-type wordpiece --vocab-size 5", "--vocab-size 5: 5 tokens are special"),
        ("--tokenizer-type wordpiece --vocab-file no", "--vocab-file no: there is no such file"),
        ("--tokenizer-type wordpiece --vocab-size 9 --append-eod", "has no end-of-document token"),
        ("--tokenizer-type bpe --vocab-size 300 --cased", "--cased is for --tokenizer-type wordp"),
        ("--tokenizer-type byte --split-sentences", "--split-sentences needs a tokenizer with"),
        (
            "--tokenizer-type wordpiece --vocab-size 9 --split-sentences --one-sequence",
            "--one-sequence is not; omit --one-sequence",
        ),
    ],
)
def test_flags_that_do_not_fit(flags, said, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(as_jsonl({"text": ["a"]}))
    given = ("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out")
    assert run(*given, *flags.split()) == 2
    assert said in capsys.readouterr().err


def test_a_missing_splitter_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    sentences.splitter.cache_clear()
    (tmp_path / "in.txt").write_text("a b")
    flags = wordpieces(tmp_path / "in.txt", tmp_path / "out", "--vocab-size", "60")
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert "run `pip install sentencex`, or give lists of sentences" in error
    assert "training" not in error


def test_special_tokens_of_a_tokenizer_are_checked_first(tmp_path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(tmp_path / "t")
    (tmp_path / "in.jsonl").write_text(as_jsonl({"text": ["a"]}))
    given = ("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "t")
    assert run(*given, *flags, "--split-sentences") == 2
    assert "has no [CLS] and no [MASK]" in capsys.readouterr().err
