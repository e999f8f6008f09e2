"""bert_glue.py: an exported BERT is fine-tuned on real text, and what it says of the results."""

import json
import re
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from tests.parallel import ROOT  # noqa: F401  puts tools/ on the path
from tests.tools.bert_models import bert

import export_hf  # isort: skip
import import_hf
from evaluation import bert_glue, glue_results

WORDS = 400


def sentences(topic):
    """Return the sentences of a chapter of Python's manual."""
    whole = (" ".join(part.split()) for part in re.split(r"(?<=[.])\s", topics[topic]))
    return [sentence for sentence in whole if 30 < len(sentence) < 200]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an exported BERT in `model`, and sentences of two chapters."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    root = tmp_path_factory.mktemp("glue")
    chapters = {"import": sentences("import"), "strings": sentences("formatstrings")}
    records = [
        {"sentence": sentence, "label": label}
        for pair in zip(*chapters.values(), strict=False)
        for label, sentence in zip(chapters, pair, strict=True)
    ]
    assert len(records) > 80
    for name, part in (("validation", records[:24]), ("train", records[24:88])):
        text = "".join(json.dumps(record) + "\n" for record in part)
        (root / f"{name}.jsonl").write_text(text)
    words = BertWordPieceTokenizer()
    words.train_from_iterator((r["sentence"] for r in records), WORDS, show_progress=False)
    vocabulary = words.get_vocab()
    assert vocabulary["[PAD]"] == 0
    BertTokenizer(vocab=vocabulary).save_pretrained(root / "tokenizer")
    options = {"initializer_range": 0.02, "vocab_size": len(vocabulary), "num_hidden_layers": 2}
    bert(**options).save_pretrained(root / "hf")
    run = ["--input", str(root / "hf"), "--output", str(root / "megatron")]
    assert import_hf.main(run) == 0
    run = ["--load", str(root / "megatron"), "--output", str(root / "model")]
    assert export_hf.main([*run, "--tokenizer", str(root / "tokenizer")]) == 0
    return root


def finetune(files, output, *options):
    given = [files / "model", "--output", output, "--train", files / "train.jsonl"]
    given += ["--validation", files / "validation.jsonl"]
    return bert_glue.main([str(x) for x in ("finetune", *given, *options)])


RUNS = "--seeds 1 2 --learning-rates 1e-9 3e-3 --epochs 5 --batch-size 8 --max-length 32".split()


def test_it_learns_and_continues_what_was_stopped(files, tmp_path, capsys):
    # The model is too small and random to learn more than the very sentences.
    run = [*RUNS, "--validation", files / "train.jsonl"]
    assert finetune(files, tmp_path / "o", *run) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4 + 4  # nothing of the Trainer's
    stored = tmp_path / "o" / "results.json"
    results = json.loads(stored.read_text())
    runs = results["runs"]
    assert [(run["learning_rate"], run["seed"]) for run in runs] == [
        (rate, seed) for rate in (1e-9, 3e-3) for seed in (1, 2)
    ]
    values = {
        rate: [r["accuracy"] for r in runs if r["learning_rate"] == rate] for rate in (1e-9, 3e-3)
    }
    median = np.median(values[3e-3])
    assert median > 80 > np.median(values[1e-9]) + 10  # which is a guess
    assert f"best learning rate by median accuracy: 0.003, {median:.2f}" in printed
    # The run that is taken away is done again, to the last digit.
    gone = runs.pop()
    stored.write_text(json.dumps(results))
    assert finetune(files, tmp_path / "o", *run) == 0
    printed = capsys.readouterr().out
    assert printed.count("seed ") == 1
    again = json.loads(stored.read_text())["runs"]
    assert again == [*runs, gone]
    # Results of other options are not mixed.
    assert finetune(files, tmp_path / "o", *run, "--weight-decay", "0") == 2
    assert "is of other options: name another --output" in capsys.readouterr().err


def test_scores_and_pairs_in_tsv(files, tmp_path, capsys):
    rows = [
        f'{n}\t"{a}\t{b}\t{n % 6}' for n, (a, b) in enumerate([("one", "two"), ("an", "in")] * 6)
    ]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.tsv").write_text(
            "\n".join(["index\tsentence1\tsentence2\tscore", *rows])
        )
    given = [files / "model", "--output", tmp_path / "o", "--train", tmp_path / "train.tsv"]
    given += ["--validation", tmp_path / "validation.tsv", "--label", "score", "--epochs", "1"]
    given += "--metric pearson spearman --seeds 1 --learning-rates 1e-4".split()
    assert bert_glue.main([str(x) for x in ("finetune", *given)]) == 0
    (run,) = json.loads((tmp_path / "o" / "results.json").read_text())["runs"]
    assert -100 <= run["pearson"] <= 100
    assert run.keys() == {"learning_rate", "seed", "pearson", "spearman"}
    (example, *_) = bert_glue.read_examples(tmp_path / "train.tsv", None, "score")
    assert example == (('"one', "two"), "0")


def test_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(3)
    for classes in (2, 3):
        ours, theirs = random.integers(0, classes, (2, 50))
        theirs[:20] = ours[:20]
        for name, function in (
            ("accuracy", metrics.accuracy_score),
            ("matthews", metrics.matthews_corrcoef),
        ):
            assert glue_results.score(name, ours, theirs) == pytest.approx(
                100 * function(theirs, ours)
            )
        if classes == 2:
            f1 = 100 * metrics.f1_score(theirs, ours)
            assert glue_results.score("f1", ours, theirs) == pytest.approx(f1)
    ours, theirs = random.normal(size=40), np.round(random.normal(size=40))
    ours[:9] = ours[0]  # with ties
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = 100 * function(ours, theirs)[0]
        assert glue_results.score(name, ours, theirs) == pytest.approx(expected)
    assert glue_results.score("pearson", [1, 1], [1, 2]) == 0
    assert glue_results.score("f1", [0, 0], [0, 0]) == 0


def results_of(folder, task, metric, runs):
    (folder / task).mkdir(parents=True)
    rows = [{"learning_rate": rate, "seed": s, metric: v} for rate, s, v in runs]
    text = json.dumps({"setting": {"metric": [metric]}, "runs": rows})
    (folder / task / "results.json").write_text(text)


def test_the_table_takes_the_median_at_the_best_learning_rate(tmp_path, capsys):
    runs = [
        (2e-5, 1, 60),
        (2e-5, 2, 70),
        (2e-5, 3, 90),
        (3e-5, 1, 99),
        (3e-5, 2, 10),
        (3e-5, 3, 11),
    ]
    results_of(tmp_path / "a", "mrpc", "accuracy", runs)
    results_of(tmp_path / "a", "cola", "matthews", [(5e-5, 1, 40)])
    results_of(tmp_path / "b", "mrpc", "accuracy", [(2e-5, 1, 80)])
    assert bert_glue.main(["table", f"dense={tmp_path / 'a'}", f"ltd={tmp_path / 'b'}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["task", "metric", "dense", "ltd"]
    assert rows[1] == ["cola", "matthews", "40.00", "(1", "x", "5e-05)", "-"]
    assert rows[2] == [
        "mrpc",
        "accuracy",
        "70.00",
        "(3",
        "x",
        "2e-05)",
        "80.00",
        "(1",
        "x",
        "2e-05)",
    ]
    assert rows[3] == ["mean", "55.00", "-"]
    assert bert_glue.main(["table", f"dense={tmp_path}"]) == 2
    assert "there is no TASK/results.json in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "options", "said"),
    [
        ({"sentence": "a", "label": -1}, (), "record 1: label -1 hides the label"),
        ({"words": "a", "label": 1}, (), "has columns words, label: name the texts with --texts"),
        ({"sentence": "a"}, (), "record 1: there is no label"),
        ({"sentence": "a", "label": 1}, (), "--train has one class only: 1"),
        ({"sentence": "a", "label": 1}, ("--texts", "b"), "there is no b"),
    ],
)
def test_files_that_cannot_be_used(files, tmp_path, capsys, record, options, said):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record))
    options = ["--train", path, *options]
    assert finetune(files, tmp_path / "o", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_model_without_tokenizer(files, tmp_path, capsys):
    given = ["--train", str(files / "train.jsonl"), "--validation", str(files / "validation.jsonl")]
    assert (
        bert_glue.main(["finetune", str(files / "hf"), "--output", str(tmp_path / "o"), *given])
        == 2
    )
    assert "export with --tokenizer" in capsys.readouterr().err


def test_classes_are_ordered_by_number_or_name():
    def examples(*labels):
        return [bert_glue.Example(("a",), label) for label in labels]

    assert bert_glue.classes_of(examples(10, 2, "2"), []) == ["2", "10"]
    assert bert_glue.classes_of(examples("b", "a"), examples("a")) == ["a", "b"]
    with pytest.raises(bert_glue.InputError, match="--validation has classes .* lacks: c"):
        bert_glue.classes_of(examples("b", "a"), examples("c"))


def test_a_seed_gives_its_own_head(files, tmp_path, monkeypatch):
    # So that the spread over seeds is one.
    import transformers

    heads = []

    def keep_head(trainer):
        heads.append(trainer.model.classifier.weight.detach().clone())

    monkeypatch.setattr(transformers.Trainer, "train", keep_head)
    options = "--learning-rates 1e-3 1e-4 --seeds 1 2".split()
    assert finetune(files, tmp_path / "o", *options) == 0
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    assert torch.equal(heads[1], heads[3])
