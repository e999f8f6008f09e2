"""Which tokenizer, and how many tokens, an exported model gets."""

import argparse
import json

import pytest

from tests import parallel  # noqa: F401  puts tools/ on the path

import hf_tokenizer  # isort: skip
from hf_weights import ConversionError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with GPT-2's kind of BPE: vocab.json, merges.txt and tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bpe")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "ab", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def of_run(**changes):
    named = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": None}
    return argparse.Namespace(**{**named, "vocab_file": None, "merge_file": None, **changes})


def paths(folder):
    return {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}


@pytest.mark.parametrize("source", ["given", "given files", "run", "run's files"])
def test_every_way_to_name_it(files, tmp_path, source):
    args, given, vocab, merges = of_run(), None, None, None
    if source == "given":
        given = files / "tokenizer.json"
    elif source == "given files":
        vocab, merges = files / "vocab.json", files / "merges.txt"
    elif source == "run":
        args = of_run(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(files / "tokenizer.json")
        )
    else:
        args = of_run(tokenizer_type="GPT2BPETokenizer", **paths(files))
    tokenizer = hf_tokenizer.write(tmp_path, args, given, vocab, merges)
    assert len(tokenizer) == 258
    assert tokenizer("ab c")["input_ids"] == [
        256,
        *tokenizer.convert_tokens_to_ids(["\u0120", "c"]),
    ]
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "ab c"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer("<|endoftext|>")["input_ids"] == [257]
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_tokenizer_that_is_no_longer_there(files, tmp_path):
    args = of_run(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="/no/such/folder")
    assert hf_tokenizer.write(tmp_path, args, None, None, None) is None
    with pytest.raises(ConversionError) as error:
        hf_tokenizer.vocabulary(args, None, None, 300)
    assert "HuggingFaceTokenizer /no/such/folder) is not here: give --tokenizer FOLDER" in str(
        error.value
    )


def test_files_that_are_no_tokenizer(files, tmp_path):
    other = tmp_path / "vocab.json"
    other.write_text(json.dumps({"a": 0}))
    with pytest.raises(ConversionError, match="are not the two files of one byte-level"):
        hf_tokenizer.write(tmp_path / "o", of_run(), None, other, files / "merges.txt")


def test_how_many_tokens():
    tokenizer = range(258)  # all that is asked of it is its length
    run = of_run(tokenizer_type="HuggingFaceTokenizer")
    assert hf_tokenizer.vocabulary(run, tokenizer, None, 384) == 258
    assert hf_tokenizer.vocabulary(run, tokenizer, 300, 384) == 300
    assert hf_tokenizer.vocabulary(run, None, 300, 384) == 300
    # What the run was trained with counts, and not a smaller tokenizer that goes with it.
    assert hf_tokenizer.vocabulary(of_run(vocab_size=260), tokenizer, None, 384) == 260
    with pytest.raises(ConversionError, match="258 tokens, but the model was trained with 200"):
        hf_tokenizer.vocabulary(of_run(vocab_size=200), tokenizer, None, 384)
    with pytest.raises(ConversionError, match="258 tokens, but the model only 256 rows"):
        hf_tokenizer.vocabulary(run, tokenizer, None, 256)
