"""Fine-tune a BERT on classification tasks as papers do on GLUE, with transformers' own Trainer.

    python tools/evaluation/bert_glue.py finetune FOLDER --output RESULTS/mrpc \\
        --train train.jsonl --validation validation.jsonl --metric accuracy f1
    python tools/evaluation/bert_glue.py table dense=RESULTS-1 random-LTD=RESULTS-2

FOLDER is what tools/checkpoint/export_hf.py wrote of a BERT, with a tokenizer, or any model that
transformers fine-tunes for sequence classification. Nothing is downloaded.

The files are .jsonl, .csv or .tsv with a label and one or two texts in each record, under the names
that GLUE's tasks have (sentence; sentence1 and sentence2; premise and hypothesis; ...) or those of
--texts. Labels are numbers or names. Records with label -1 are an error: GLUE hides the labels of
its test sets, so results are of the validation set.

`finetune` trains once for each learning rate and seed, and evaluates after the last epoch. Each
result is stored when it is there, so the same command continues what was stopped. Its defaults are
those of DeepSpeed's Data Efficiency for BERT-large: seeds 1234 to 1238, learning rates 2e-5 to
5e-5, 3 epochs, batch 32, 10% warm-up, linear decay.

`table` compares folders that hold one folder of results for each task: by task, the median over
seeds at the best learning rate, of the first metric; below, the mean over the tasks.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# This checkout's tools.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from text_data.corpus import InputError

from evaluation.glue_results import OF_NUMBERS, RESULTS, SCORES, report, score, table

# Of GLUE's tasks.
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)


class Example(NamedTuple):
    """One text or two, and their label."""

    texts: tuple[str, ...]
    label: Any


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="bert_glue.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    finetune_parser = commands.add_parser("finetune", allow_abbrev=False)
    add = finetune_parser.add_argument
    add("model", type=Path, metavar="FOLDER", help="an exported BERT with a tokenizer")
    add("--train", type=Path, required=True, metavar="FILE", help=".jsonl, .csv or .tsv")
    add("--validation", type=Path, required=True, metavar="FILE", help="of the same columns")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for the results; may exist")
    add("--texts", nargs="+", metavar="NAME", help="columns of the one or two texts (GLUE's)")
    add("--label", default="label", metavar="NAME", help="column of the label (label)")
    text = "the first counts; pearson and spearman train on scores (accuracy)"
    add("--metric", nargs="+", choices=SCORES, default=["accuracy"], metavar="NAME", help=text)
    seeds, rates = [1234, 1235, 1236, 1237, 1238], [2e-5, 3e-5, 4e-5, 5e-5]
    add("--seeds", type=int, nargs="+", default=seeds, metavar="N", help="1234 to 1238")
    add("--learning-rates", type=float, nargs="+", default=rates, metavar="X", help="2e-5 to 5e-5")
    add("--epochs", type=float, default=3, metavar="N", help="3")
    add("--batch-size", type=int, default=32, metavar="N", help="of each device (32)")
    add("--max-length", type=int, default=128, metavar="N", help="tokens of an example (128)")
    add("--warmup", type=float, default=0.1, metavar="X", help="share of the steps (0.1)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="0.01")
    add("--bf16", action="store_true", help="compute in bfloat16")
    table_parser = commands.add_parser("table", allow_abbrev=False)
    text = "what to call a model, and the folder with a folder for each task"
    table_parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help=text)
    options = parser.parse_args(argv)
    if options.command == "table":
        if any("=" not in model for model in options.models):
            parser.error("give each model as NAME=FOLDER")
        return options
    if options.texts and len(options.texts) > 2:
        parser.error("--texts: one or two columns")
    if len({metric in OF_NUMBERS for metric in options.metric}) > 1:
        parser.error("--metric: pearson and spearman are of scores, the others of classes")
    return options


def read_examples(file: Path, texts: Sequence[str] | None, label: str) -> list[Example]:
    """Return the records of a file.

    Args:
        texts: The columns; None for those that GLUE's tasks have.

    Raises:
        InputError: It has none, lacks a column, or hides labels.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".jsonl":
            records = [json.loads(line) for line in lines if line.strip()]
        elif file.suffix == ".csv":
            records = list(csv.DictReader(lines))
        elif file.suffix == ".tsv":  # in GLUE's, quotes mean nothing
            records = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            raise InputError(f"{file}: give a .jsonl, .csv or .tsv file")
    if not records:
        raise InputError(f"{file} has no record")
    known = [columns for columns in TEXTS if all(name in records[0] for name in columns)]
    if not texts and not known:
        raise InputError(f"{file} has columns {', '.join(records[0])}: name the texts with --texts")
    columns = texts or known[0]
    examples = []
    for number, record in enumerate(records, 1):
        missing = [name for name in (*columns, label) if record.get(name) is None]
        if missing:
            raise InputError(f"{file}, record {number}: there is no {missing[0]}")
        if str(record[label]) == "-1":
            raise InputError(f"{file}, record {number}: label -1 hides the label, as in a test set")
        examples.append(Example(tuple(record[name] for name in columns), record[label]))
    return examples


def classes_of(training: list[Example], validation: list[Example]) -> list[str]:
    """Return the names of the classes, in the order of their numbers or else of their names.

    Raises:
        InputError: There is only one, or validation has one that training lacks.
    """
    names = {str(example.label) for example in training}
    if len(names) < 2:
        raise InputError(f"--train has one class only: {', '.join(names)}")
    more = {str(example.label) for example in validation} - names
    if more:
        raise InputError(f"--validation has classes that --train lacks: {', '.join(sorted(more))}")
    if all(name.isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def train_once(
    options: argparse.Namespace,
    tokenizer: Any,
    data: tuple[list[dict], list[dict]],
    classes: list[str] | None,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """Fine-tune with one learning rate and seed; return the metrics on the validation set.

    Args:
        data: The encoded training and validation set.
        classes: Their names; None if labels are scores.
    """
    import transformers

    transformers.set_seed(seed)  # of the fresh head
    more: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if classes:
        more = {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
        more["label2id"] = {name: i for i, name in enumerate(classes)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, **more)
    scratch = options.output / "trainer"
    settings = transformers.TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=4 * options.batch_size,
        num_train_epochs=options.epochs,
        learning_rate=rate,
        warmup_steps=options.warmup,  # a share, as it is below 1
        lr_scheduler_type="linear",
        weight_decay=options.weight_decay,
        bf16=options.bf16,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=data[0],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    logits = trainer.predict(data[1]).predictions
    predicted = logits.argmax(-1) if classes else logits[:, 0]
    labels = [example["labels"] for example in data[1]]
    return {metric: score(metric, predicted, labels) for metric in options.metric}


def finetune(options: argparse.Namespace) -> dict[str, Any]:
    """Do all trainings that are not stored yet; return what is stored.

    Raises:
        InputError: The files or the model cannot be used.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sets = [
        read_examples(file, options.texts, options.label)
        for file in (options.train, options.validation)
    ]
    classes = None if options.metric[0] in OF_NUMBERS else classes_of(*sets)
    if not any(
        file for name in ("tokenizer*.json", "vocab.*") for file in options.model.glob(name)
    ):
        # From a folder with only a configuration, transformers makes a tokenizer without words.
        raise InputError(f"there is no tokenizer in {options.model}: export with --tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    config = transformers.AutoConfig.from_pretrained(options.model)
    length = min(options.max_length, getattr(config, "max_position_embeddings", sys.maxsize))

    def encoded(example: Example) -> dict[str, Any]:
        tokens = tokenizer(*example.texts, truncation=True, max_length=length)
        label = classes.index(str(example.label)) if classes else float(example.label)
        return {**tokens, "labels": label}

    data = tuple([encoded(example) for example in examples] for examples in sets)
    stored = options.output / RESULTS
    setting = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("command", "output", "seeds", "learning_rates")
    }
    results: dict[str, Any] = {"setting": setting, "runs": []}
    if stored.exists():
        results = json.loads(stored.read_text())
        if results["setting"] != setting:
            raise InputError(f"{stored} is of other options: name another --output")
    options.output.mkdir(parents=True, exist_ok=True)
    done = {(run["learning_rate"], run["seed"]) for run in results["runs"]}
    for rate in options.learning_rates:
        for seed in options.seeds:
            if (rate, seed) in done:
                continue
            metrics = train_once(options, tokenizer, data, classes, rate, seed)  # type: ignore[arg-type]
            results["runs"].append({"learning_rate": rate, "seed": seed, **metrics})
            shown = "   ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            print(f"learning rate {rate:g}, seed {seed}: {shown}", flush=True)
            part = stored.with_name(RESULTS + ".part")
            part.write_text(json.dumps(results, indent=2) + "\n")
            part.replace(stored)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run with these options; return the exit status."""
    options = parse_args(argv)
    try:
        print(table(options.models) if options.command == "table" else report(finetune(options)))
        return 0
    except KeyboardInterrupt:
        print("bert_glue.py: stopped; the same command continues", file=sys.stderr)
        return 130
    except ModuleNotFoundError as problem:
        message = f"the Python package {problem.name} is missing; run `pip install {problem.name}`"
    except (InputError, OSError, json.JSONDecodeError) as problem:
        message = " ".join(str(problem).split())
    print(f"bert_glue.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is named must lie here
    sys.exit(main())
