"""The results of lm_eval for several models: each task, their average, and the published averages.

For `compare --eval`; tools/evaluation/eval_zero_shot.sh makes the folders. The 19 tasks and the
metric of each are those of the GPT-3 1.3B experiment (Megatron-DeepSpeed,
examples_deepspeed/data_efficiency/gpt/eval/ds_evalharness_gather_result.py): accuracy normalised by
the answer's length (acc_norm) where lm_eval has it, as the GPT-3 paper did, F1 for ReCoRD and plain
accuracy for the rest. The averages are of the DeepSpeed Data Efficiency blog post, 2022-12-12.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_rltd.commands.compare.run_logs import LogError
from megatron_rltd.commands.text_table import aligned

QUESTIONS = "questions"  # not of lm_eval: see `whole_questions`
# {task of lm_eval 0.4.13: metric}, in the experiment's order.
METRICS = {
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "triviaqa": "exact_match",
    "webqs": "exact_match",
    "winogrande": "acc",
    "piqa": "acc_norm",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "anli_r1": "acc",
    "anli_r2": "acc",
    "anli_r3": "acc",
    "openbookqa": "acc_norm",
    "race": "acc",
    "boolq": "acc",
    "copa": "acc",
    "rte": "acc",
    "wsc": "acc",
    "multirc": QUESTIONS,
    "record": "f1",
}
PERPLEXITY = {"wikitext": "word_perplexity"}
AVERAGE = f"average of {len(METRICS)}"
# {few-shot examples: {run: published average, per cent}}
PUBLISHED = {
    0: {
        "dense 300B": 42.5,
        "dense 200B": 41.9,
        "dense 150B": 42.0,
        "random-LTD 300B": 43.7,
        "random-LTD 200B": 42.5,
        "random-LTD 150B": 42.7,
    },
    10: {
        "dense 300B": 44.0,
        "dense 200B": 44.0,
        "dense 150B": 42.7,
        "random-LTD 300B": 44.9,
        "random-LTD 150B": 43.5,
    },
}
Score = tuple[float, float | None]  # value, standard error


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Return what lm_eval found of one model.

    Of several evaluations in a folder the newest of each task counts, so that tasks may be
    evaluated one by one and again.

    Returns:
        "scores" {task: (score, standard error or None)}, in per cent but for perplexities,
        "metrics" {task: metric}, "shots" {task: few-shot examples}, "limited": the tasks of which
        not every question was asked.

    Raises:
        LogError: There are no results, or they are not lm_eval's.
    """
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not files:
        raise LogError(
            f"--eval {folder} holds no results_*.json of lm_eval; give an output folder of "
            "tools/evaluation/eval_zero_shot.sh"
        )
    found: dict[str, Any] = {"scores": {}, "metrics": {}, "shots": {}, "limited": set()}
    for file in files:
        try:
            content = json.loads(file.read_text())
            results, shots = content["results"], content["n-shot"]
            limit = content.get("config", {}).get("limit")
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise LogError(f"--eval {file} is not a result of lm_eval ({problem})") from None
        for task, values in results.items():
            metric = METRICS.get(task) or PERPLEXITY.get(task) or _first_metric(values)
            score = whole_questions(file) if metric == QUESTIONS else _score(values, metric)
            if metric is None or score is None or task not in shots:
                continue
            found["scores"][task], found["metrics"][task] = score, metric
            found["shots"][task] = shots[task]
            (found["limited"].add if limit else found["limited"].discard)(task)
    return found


def _first_metric(values: dict[str, Any]) -> str | None:
    """Return what to show of a task that is not the experiment's."""
    names = [key.partition(",")[0] for key in values]
    return next((name for name in ("acc", "exact_match", "f1") if name in names), None)


def _score(values: dict[str, Any], metric: str | None) -> Score | None:
    """Return a metric of a task, whatever the filter of answers is called."""
    key = next((key for key in values if key.partition(",")[0] == metric), None)
    if key is None or not isinstance(values[key], int | float):
        return None
    error = values.get(key.replace(f"{metric},", f"{metric}_stderr,"))
    percent = 1 if metric in PERPLEXITY.values() else 100
    if not isinstance(error, int | float) or not math.isfinite(error):  # "N/A", or of one question
        return percent * values[key], None
    return percent * values[key], percent * error


def whole_questions(results: Path) -> Score | None:
    """Return the share of MultiRC's questions of which every answer was judged rightly.

    That was the accuracy of lm_eval 0.2.0, with which the experiment was evaluated; 0.4.13's is of
    single answers, and takes "yes" for the label of wrong ones.

    Args:
        results: Of an evaluation; its samples lie beside it (--log_samples).

    Raises:
        LogError: The samples are empty or damaged.
    """
    samples = results.with_name(
        re.sub(r"^results_(.*)\.json$", r"samples_multirc_\1.jsonl", results.name)
    )
    if not samples.is_file():
        return None
    judged = defaultdict(list)
    try:
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            index = sample["doc"]["idx"]
            (yes, _), (no, _) = sample["filtered_resps"]
            is_right = (float(yes) > float(no)) == (sample["doc"]["label"] == 1)
            judged[index["paragraph"], index["question"]].append(is_right)
    except (ValueError, KeyError, TypeError) as problem:
        raise LogError(f"--eval {samples} is damaged ({problem}): evaluate multirc again") from None
    if not judged:
        raise LogError(f"--eval {samples} is empty: evaluate multirc again")
    share, count = sum(map(all, judged.values())) / len(judged), len(judged)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return 100 * share, None if error is None else 100 * error


def average(evaluation: dict[str, Any]) -> Score | None:
    """Return the average of the experiment's tasks, None if there is a `reason` against one."""
    if reason(evaluation):
        return None
    values, errors = zip(*(evaluation["scores"][task] for task in METRICS), strict=True)
    error = None if None in errors else math.hypot(*errors) / len(METRICS)
    return sum(values) / len(METRICS), error


def reason(evaluation: dict[str, Any]) -> str | None:
    """Return why there is no average that could be compared with the published ones."""
    missing = [task for task in METRICS if task not in evaluation["scores"]]
    if missing:
        return (
            f"{len(missing)} of {len(METRICS)} tasks are missing ({', '.join(missing)}), and an "
            "average without them cannot be compared"
        )
    limited = [task for task in METRICS if task in evaluation["limited"]]
    if limited:
        return f"evaluated with LIMIT: {', '.join(limited)}"
    shots = sorted({evaluation["shots"][task] for task in METRICS})
    if len(shots) > 1:
        return f"the tasks had different numbers of examples: {', '.join(map(str, shots))}"
    return None


def shots_of(evaluations: dict[str, dict[str, Any]]) -> set[int]:
    """Return the numbers of few-shot examples that the experiment's tasks had."""
    return {
        shots
        for evaluation in evaluations.values()
        for task, shots in evaluation["shots"].items()
        if task in METRICS
    }


def table(evaluations: dict[str, dict[str, Any]], markdown: bool = False) -> str:
    """Return all scores and their average, a column for each model, and the published averages."""
    metrics: dict[str, str] = {}
    for evaluation in evaluations.values():
        metrics |= evaluation["metrics"]
    own = [task for task in METRICS if task in metrics]
    others = [task for task in sorted(metrics) if task not in METRICS]
    lines = [["task", "metric", *evaluations]]
    lines += [_line(task, metrics[task], evaluations) for task in own]
    lines.append([AVERAGE, "", *(_cell(average(e)) for e in evaluations.values())])
    lines += [_line(task, metrics[task], evaluations) for task in others]
    published = _published(sorted(shots_of(evaluations) & {*PUBLISHED}))
    return "\n\n".join(aligned(rows, markdown) for rows in (lines, published) if rows)


def _published(shots: list[int]) -> list[list[str]]:
    """Return the lines of a table of the published averages, a column for each of `shots`."""
    if not shots:
        return []
    lines = [[f"published {AVERAGE}", *(f"{count} examples" for count in shots)]]
    for run in PUBLISHED[0]:
        averages = [PUBLISHED[count].get(run) for count in shots]
        if any(averages):
            lines.append([run, *("-" if a is None else f"{a:.1f}" for a in averages)])
    return lines


def _line(task: str, metric: str, evaluations: dict[str, dict[str, Any]]) -> list[str]:
    return [task, metric, *(_cell(e["scores"].get(task)) for e in evaluations.values())]


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    value, error = score
    return f"{value:.1f}" if error is None else f"{value:.1f} ± {error:.1f}"


def notes(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """Say why an average is missing, and what the published averages mean."""
    lines = ["per cent ± standard error of drawing the questions, except for perplexities"]
    for name, evaluation in evaluations.items():
        why = reason(evaluation)
        if why:
            lines.append(f"{name}: no average: {why}")
    shots = sorted(shots_of(evaluations))
    if shots:
        lines.append(
            "multirc counts questions for which every answer is judged correctly, as in lm_eval "
            "0.2.0; it needs the samples_multirc_*.jsonl of --log_samples"
        )
    if len(shots) > 1:
        lines.append(
            f"models or tasks had different numbers of examples ({', '.join(map(str, shots))}): "
            "do not compare them"
        )
    if not {*shots} <= {*PUBLISHED}:
        lines.append("averages were published only for 0 and for 10 examples")
    if shots:
        lines.append(
            "the published averages are from lm_eval 0.2.0; in 0.4 prompts differ, and triviaqa's "
            "answers are generated: compare differences between models, not averages"
        )
    return lines


def result(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return all of it for JSON, at full precision."""
    return {
        "models": {
            name: {
                "scores": {task: score[0] for task, score in evaluation["scores"].items()},
                "standard_errors": {t: score[1] for t, score in evaluation["scores"].items()},
                "metrics": evaluation["metrics"],
                "average": average(evaluation),
            }
            for name, evaluation in evaluations.items()
        },
        "published": {count: PUBLISHED.get(count) for count in shots_of(evaluations)},
        "notes": notes(evaluations),
    }
