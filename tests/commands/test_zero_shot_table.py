"""compare --eval, on results as lm_eval writes them."""

import json
import math

import pytest

from megatron_rltd.commands.compare import command as compare
from megatron_rltd.commands.compare import zero_shot_table
from tests import parallel  # noqa: F401  puts tools/ on the path

STAMP = "2026-01-0{}T00-00-00.000000"
# What each task's metric is called in the results of lm_eval 0.4.13.
FILTER = {"triviaqa": "remove_whitespace"}


def evaluation(folder, day=1, shots=0, limit=None, without=(), only=None, **changed):
    """Write what lm_eval would: 40% in every task but for `changed`, standard errors of 1%."""
    folder = folder / "__model"
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for task, metric in zero_shot_table.METRICS.items():
        if task in without or (only and task not in only):
            continue
        value = changed.get(task, 0.4)
        name, kind = ("acc", "none") if task == "multirc" else (metric, FILTER.get(task, "none"))
        results[task] = {"alias": task, f"{name},{kind}": value, f"{name}_stderr,{kind}": 0.01}
        if metric == "acc_norm":  # listed first by lm_eval, and not the experiment's
            results[task] = {"acc,none": 0.9, "acc_stderr,none": 0.9} | results[task]
    (folder / f"results_{STAMP.format(day)}.json").write_text(
        json.dumps(
            {
                "results": results,
                "n-shot": dict.fromkeys(results, shots),
                "config": {"limit": limit},
            }
        )
    )
    if "multirc" in results:
        questions(folder / f"samples_multirc_{STAMP.format(day)}.jsonl")
    return folder.parent


def questions(path):
    """Write samples of 5 questions with 2 answers each; both answers are judged rightly of 2."""
    lines = []
    for question in range(5):
        for answer in range(2):
            label = (question + answer) % 2
            is_right = answer == 0 or question < 2
            yes = label if is_right else 1 - label
            lines.append(
                {
                    "doc": {
                        "idx": {"paragraph": question // 3, "question": question, "answer": answer},
                        "label": label,
                    },
                    "filtered_resps": [[str(-2.0 + yes), "False"], ["-1.5", "False"]],
                }
            )
    path.write_text("\n".join(map(json.dumps, lines)))


def compared(capsys, *arguments):
    """Run the tool; return the lines that it printed."""
    status = compare.main(["--eval", *map(str, arguments)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out.splitlines()


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_tasks_and_averages(tmp_path, capsys):
    dense = evaluation(tmp_path / "dense")
    ltd = evaluation(tmp_path / "ltd", hellaswag=0.59)
    lines = compared(capsys, f"dense={dense}", f"random-LTD={ltd}")
    assert cells(lines[0]) == ["task", "metric", "dense", "random-LTD"]
    table = {cells(line)[0]: cells(line)[1:] for line in lines[1:21]}
    assert list(table)[:19] == list(zero_shot_table.METRICS)
    assert table["hellaswag"] == ["acc_norm", "40.0 ± 1.0", "59.0 ± 1.0"]
    assert table["triviaqa"] == ["exact_match", "40.0 ± 1.0", "40.0 ± 1.0"]
    assert table["record"] == ["f1", "40.0 ± 1.0", "40.0 ± 1.0"]
    error = 100 * math.sqrt(0.4 * 0.6 / 4)  # 2 of 5 questions
    assert table["multirc"] == ["questions", f"40.0 ± {error:.1f}", f"40.0 ± {error:.1f}"]
    spread = math.sqrt(18 + error**2) / 19
    assert table["average of 19"] == [f"40.0 ± {spread:.1f}", f"41.0 ± {spread:.1f}"]
    assert published(lines) == [
        ["published average of 19", "0 examples"],
        ["dense 300B", "42.5"],
        ["dense 200B", "41.9"],
        ["dense 150B", "42.0"],
        ["random-LTD 300B", "43.7"],
        ["random-LTD 200B", "42.5"],
        ["random-LTD 150B", "42.7"],
    ]
    assert lines.index("") == 21  # the two tables are next to each other
    assert "no average" not in "".join(lines)


def test_ten_shots_are_compared_with_ten(tmp_path, capsys):
    ten = evaluation(tmp_path / "a", shots=10)
    lines = published(compared(capsys, ten))
    assert lines[:2] == [["published average of 19", "10 examples"], ["dense 300B", "44.0"]]
    assert ["random-LTD 150B", "43.5"] in lines
    assert not any(line[0] == "random-LTD 200B" for line in lines)  # not published
    none = evaluation(tmp_path / "c")
    lines = published(compared(capsys, f"none={none}", f"ten={ten}"))
    assert lines[0] == ["published average of 19", "0 examples", "10 examples"]
    assert ["random-LTD 200B", "42.5", "-"] in lines
    lines = compared(capsys, evaluation(tmp_path / "b", shots=5))
    assert published(lines) == []
    assert "averages were published only for 0 and for 10 examples" in "".join(lines)


def published(lines):
    """Return the cells of the table of the published averages."""
    start = next((i for i, line in enumerate(lines) if line.startswith("published av")), len(lines))
    return [cells(line) for line in [*lines[start:], ""][: [*lines[start:], ""].index("")]]


def averages(lines):
    return next(cells(line)[1:] for line in lines if line.startswith("average of 19"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"without": ["wsc", "copa"]}, "2 of 19 tasks are missing (copa, wsc)"),
        ({"limit": 10}, "evaluated with LIMIT: hellaswag, "),
    ],
)
def test_no_average_of_other_tasks(tmp_path, capsys, options, why):
    whole = evaluation(tmp_path / "whole")
    part = evaluation(tmp_path / "part", **options)
    lines = compared(capsys, f"whole={whole}", f"part={part}")
    assert [cell[:4] for cell in averages(lines)] == ["40.0", "-"]
    assert any(line.startswith(f"- part: no average: {why}") for line in lines)
    assert not any(line.startswith("- whole:") for line in lines)


def test_multirc_needs_the_samples(tmp_path, capsys):
    folder = evaluation(tmp_path / "a")
    next(folder.rglob("samples_*")).unlink()
    lines = compared(capsys, folder)
    assert averages(lines) == ["-"]
    assert any("1 of 19 tasks are missing (multirc)" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", " is empty: evaluate multirc again"),
        ('{"doc": {"idx": {"par', " is damaged (Unterminated string"),
        ('{"doc": {}}', " is damaged ('idx'): evaluate multirc again"),
    ],
)
def test_samples_that_cannot_be_read(tmp_path, capsys, content, said):
    folder = evaluation(tmp_path / "a")
    samples = next(folder.rglob("samples_*"))
    samples.write_text(content)
    assert compare.main(["--eval", f"a={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--eval {samples}{said}" in line


def test_tasks_evaluated_one_by_one_and_again(tmp_path, capsys):
    folder = evaluation(tmp_path / "a", day=1, without=["wsc"], piqa=0.1)
    evaluation(tmp_path / "a", day=2, only=["wsc", "piqa"], piqa=0.6)
    lines = compared(capsys, folder)
    assert averages(lines)[0].startswith("41.1")
    evaluation(tmp_path / "a", day=3, only=["wsc"], shots=10)
    lines = compared(capsys, folder)
    assert averages(lines) == ["-"]
    assert any(
        "a: no average: the tasks had different numbers of examples: 0, 10" in x for x in lines
    )


def test_beside_training_runs_and_as_files(tmp_path, capsys):
    from tests.commands.test_compare import log

    runs = [f"{name}={log(tmp_path / name)}" for name in ("dense", "again")]
    found = evaluation(tmp_path / "eval")
    path = tmp_path / "result.json"
    arguments = [*runs, "--eval", f"dense={found}", "--json", str(path), "--markdown"]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| LayerTokens |" in printed
    assert "iso-data" in printed
    assert "| average of 19 " in printed
    assert "| published average of 19 | 0 examples |" in printed
    assert "| dense 300B              |       42.5 |" in printed
    result = json.loads(path.read_text())
    assert [row["run"] for row in result["runs"]] == ["dense", "again"]
    model = result["evaluation"]["models"]["dense"]
    assert model["average"][0] == pytest.approx(40.0)
    assert model["scores"]["hellaswag"] == 40.0
    assert result["evaluation"]["published"]["0"]["dense 300B"] == 42.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--eval", "a={0}/nothing"], "holds no results_*.json of lm_eval; give an output folder"),
        (["--eval", "a={0}", "a={0}"], "two runs are called a"),
        (["--eval", "a={0}", "--plot", "{0}/x.png"], "are for training runs: give"),
        (["--eval", "a={0}", "--baseline", "a"], "are for training runs: give"),
        ([], "give two or more runs, each as NAME=FOLDER"),
    ],
)
def test_wrong_command_lines(tmp_path, capsys, arguments, said):
    evaluation(tmp_path)
    assert compare.main([argument.format(tmp_path) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_file_of_something_else(tmp_path, capsys):
    (tmp_path / "results_1.json").write_text("[]")
    assert compare.main(["--eval", f"a={tmp_path}"]) == 2
    assert "is not a result of lm_eval" in capsys.readouterr().err
