"""BERT: padding masks against plain loops, and what is refused before it trains."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_rltd import ConfigError
from megatron_rltd.training import bert_data
from tests import gpt
from tests.megatron.test_random_ltd import (
    assert_equal_results,
    attached,
    expected_kept,
    results,
    step,
)

LAYERS, DROPPED = 6, [2, 3, 4, 5]


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def build():
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.models.bert.bert_model import BertModel

    model = BertModel(
        gpt.config(num_layers=LAYERS),
        num_tokentypes=2,
        transformer_layer_spec=bert_layer_specs.bert_layer_local_spec,
        vocab_size=gpt.VOCAB,
        max_sequence_length=gpt.SEQ,
    ).double()
    return gpt.with_random_weights(model)


def loss_of(logits, binary_logits, labels):
    """Return the loss of both heads; Megatron's own would compute the first in float32."""
    order = torch.arange(gpt.BATCH) % 2
    return gpt.cross_entropy(logits, labels) + gpt.cross_entropy(binary_logits[:, None], order)


# Megatron's masks: of the local layers, and of Transformer Engine's.
@pytest.mark.parametrize("form", ["b1ss", "b11s"])
def test_padding_masks(form):
    model = build()
    model.attn_mask_dimensions = form
    tokens, labels, _ = gpt.batch()
    types = (torch.arange(gpt.SEQ) > 5).long().expand(gpt.BATCH, -1)
    padding = torch.ones(gpt.BATCH, gpt.SEQ)
    padding[0, 12:] = padding[1, 1:] = 0
    kept = expected_kept(DROPPED)
    valid = torch.stack([padding[1, kept[layer][1].long()].sum() for layer in DROPPED])
    assert valid.min() == 0 and valid.max() > 0, "some layers keep nothing but padding, some more"
    mask = model.bert_extended_attention_mask(padding)
    assert mask.size(2) == (gpt.SEQ if form == "b1ss" else 1)

    def plain(kept):
        hidden = model.embedding(tokens, model.bert_position_ids(tokens), types)
        hidden = gpt.plain_layers(model.encoder.layers, hidden, kept, mask)
        hidden = model.encoder.final_layernorm(hidden)
        logits, _ = model.output_layer(model.lm_head(hidden))
        return loss_of(logits.transpose(0, 1), model.binary_head(model.pooler(hidden, 0)), labels)

    expected = results(model, plain(kept))
    assert (expected["loss"] - plain({})).abs() > 1e-3
    step(attached(model))
    logits, binary_logits = model(tokens, padding, tokentype_ids=types)
    assert_equal_results(results(model, loss_of(logits, binary_logits, labels)), expected)


def test_context_parallelism_is_refused_by_name():
    model = build()
    model.config.context_parallel_size = 2
    with pytest.raises(ConfigError, match="--context-parallel-size with BERT: .* use --context"):
        attached(model)


def test_a_vocabulary_that_megatron_ignores_is_refused():
    args = SimpleNamespace(tokenizer_type="BertWordPieceCase", vocab_file="v.txt")
    (problem,) = bert_data.vocabulary_problems(args)
    assert problem.startswith("--vocab-file v.txt would be ignored: --tokenizer-type BertWordPiece")
    assert "--tokenizer-type wordpiece --cased --vocab-file v.txt" in problem
    for name, value in (("vocab_file", None), ("tokenizer_type", "HuggingFaceTokenizer")):
        assert bert_data.vocabulary_problems(SimpleNamespace(**{**vars(args), name: value})) == []


GOOD = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "eod": 3}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"mask": None}, "has no [MASK], which"),
        ({"cls": None, "mask": None}, "has no [CLS] and no [MASK], which"),
        ({"cls": 3}, "has one token for [CLS] and [SEP], 3"),
        ({"pad": 1, "unk": 5}, "has padding token 1, but"),
        ({"pad": None}, "has no padding token, but"),
        ({"unk": 0}, "padding token is also its [UNK], so"),
        ({"sep": 0, "eod": 0}, "padding token is also its [SEP] and [EOD], so"),
    ],
)
def test_tokenizers(changed, said):
    problems = bert_data.tokenizer_problems(SimpleNamespace(**{**GOOD, **changed}))
    if said is None:
        assert problems == []
    else:
        (problem,) = problems
        assert said in problem and "--tokenizer-type wordpiece" in problem


def test_a_tokenizer_without_special_tokens():
    from megatron.core.tokenizers import MegatronTokenizer

    kind = {"library": "null-text"}
    tokenizer = MegatronTokenizer.from_pretrained(metadata_path=kind, vocab_size=9)
    (problem,) = bert_data.tokenizer_problems(tokenizer)
    assert "no [CLS] and no [SEP] and no [MASK]" in problem


def dataset(documents):
    """Return documents, lists of sentences' tokens, as Megatron's IndexedDataset shows them."""
    sentences = [np.array(s) for document in documents for s in document]
    lengths = np.array([len(s) for s in sentences], np.int32)
    ends = np.cumsum([0, *(len(document) for document in documents)])
    return _Dataset(sentences, lengths, ends)


class _Dataset(SimpleNamespace):
    def __init__(self, sentences, lengths, ends):
        super().__init__(sequence_lengths=lengths, document_indices=ends)
        self.sentences = sentences

    def __getitem__(self, number):
        return self.sentences[number]


def problems_of(documents, first=0, last=None, num_samples=9, min_sentences=2):
    tokenizer = SimpleNamespace(**GOOD)
    last = len(documents) if last is None else last
    return bert_data.document_problems(
        dataset(documents), first, last, num_samples, tokenizer, min_sentences, "data, train set"
    )


SENTENCE, LONG = [7, 8, 9], [7] * (bert_data.MAX_SENTENCE + 1)


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        ([[SENTENCE] * 2], {}, None),
        ([[SENTENCE], [], [SENTENCE, LONG], [SENTENCE] * 2], {}, None),
        ([[SENTENCE]], {}, "of 1 documents there is none with two sentences or more, "),
        ([[SENTENCE]], {"min_sentences": 1}, None),
        ([[SENTENCE, LONG]], {}, "at most 512 tokens each, so Megatron would search"),
        ([[SENTENCE, LONG]], {"min_sentences": 1}, "there is none of at most 512"),
        ([[LONG]], {"min_sentences": 1}, None),  # Megatron takes it and cuts it
        ([[SENTENCE] * 2, [SENTENCE]], {"first": 1}, "of 1 documents there is none"),
        ([[SENTENCE] * 2], {"first": 1}, "there is no document: use a larger share"),
        ([[SENTENCE] * 2], {"num_samples": 0}, "--eval-iters 0 asks for none"),
        ([[[2, 7, 3], [2, 8, 3]]], {}, "begin with [CLS] or end with [SEP]"),
        ([[[7, 8, 3]] * 2], {}, "begin with [CLS] or end with [SEP]"),
        ([[[2, 7], SENTENCE, SENTENCE]], {}, None),  # someone wrote of [CLS]
    ],
)
def test_documents(documents, options, said):
    problems = problems_of(documents, **options)
    if said is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.startswith("data, train set: ") and said in problem


@pytest.mark.parametrize("min_sentences", [1, 2])
def test_a_usable_document_is_one_of_which_megatron_makes_samples(min_sentences, monkeypatch):
    from megatron.core.datasets import helpers

    monkeypatch.setattr(bert_data, "CHUNK", 3)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(60):
        kinds = generator.choice(5, size=generator.integers(1, 9), p=[0.3, 0.3, 0.25, 0.1, 0.05])
        known = ([], [SENTENCE], [SENTENCE, LONG, SENTENCE], [LONG], [SENTENCE] * 2)
        made = [known[kind] for kind in kinds]
        data = dataset(made)
        samples = helpers.build_mapping(
            *(data.document_indices.astype(np.int64), data.sequence_lengths, 1, 1000, 61, 0.1, 1),
            *(False, min_sentences),
        )
        usable = bert_data._is_any_usable(data, 0, len(made), min_sentences)
        assert usable == (len(samples) > 0), made
        found.append(usable)
    assert set(found) == {True, False}


@pytest.mark.parametrize(
    ("documents", "tokenizer", "samples", "said"),
    [
        ([[SENTENCE] * 2], GOOD, 9, None),
        ([[SENTENCE] * 2], GOOD, None, None),  # one pass over the documents
        ([[SENTENCE]], GOOD, 0, None),  # none is made for --skip-train
        ([[SENTENCE]], GOOD, 9, "data, train set: of 1 documents there is none with two"),
        ([[SENTENCE] * 2], {**GOOD, "pad": 1}, 9, "padding token 1"),
    ],
)
def test_megatrons_data_set_is_made_after_the_check(documents, tokenizer, samples, said):
    def original(
        self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
    ):
        made.append((self, indexed_dataset, config))

    made, data = [], dataset(documents)
    config = SimpleNamespace(tokenizer=SimpleNamespace(**tokenizer), classification_head=True)
    indices, split = np.arange(len(documents)), SimpleNamespace(name="train")
    call = ("self", data, "data", indices, samples, split)
    if said is None:
        bert_data.check_before(original, *call, config=config)
        assert made == [("self", data, config)]
    else:
        with pytest.raises(ConfigError, match=said):
            bert_data.check_before(original, *call, config=config)
        assert made == []
