"""The convergence study: arms are what they claim, arithmetic, and a tiny study interrupted."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.test_plan_command import command

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "convergence"))

import analysis
import arms
import study
import training
from lib import text

FOLDER = Path(study.__file__).parent
ROOT = FOLDER.parents[1]
STEPS = 500
TIMEOUT_S = 600  # ends what hangs; nothing takes so long


@pytest.fixture(scope="module")
def plans():
    """What `plan` makes of the flags: Megatron's parser and scheduler, not `planned`."""

    def plan(name):
        words = training.run_flags(arms.ARMS[name], STEPS, seed=1, lr=1e-3, evaluations=1)
        at = words.index("--tokenizer-type")
        line = ["--json", "--", *words[:at], *words[at + 2 :], "--vocab-size", "2048"]
        status, output = command(line)
        assert status == 0, output
        return json.loads(output)

    return {
        name: plan(name)
        for name in ("ltd-same-compute", "ltd-same-data-plain-lr", "constant-same-data")
    }


@pytest.mark.parametrize(
    "arm", ["ltd-same-compute", "ltd-same-data-plain-lr", "constant-same-data"]
)
def test_arm_is_as_long_as_megatron_makes_it(plans, arm):
    run, planned = plans[arm]["runs"]["run"], arms.planned(arms.ARMS[arm], STEPS)
    assert run["iterations"] == planned.iteration
    assert run["samples"] == planned.samples
    assert run["layer_tokens"] == planned.layer_tokens
    rate = plans[arm]["learning_rate"]
    assert rate["minimum_reached"]["iteration"] == run["iterations"]  # decayed, and not before
    assert rate["by_layer_tokens"] == arms.ARMS[arm].layer_token_lr


def test_long_warm_up_is_as_long_as_layer_token_lr_makes_it(plans):
    warm_up = plans["ltd-same-compute"]["learning_rate"]["warmup_over"]
    words = arms.flags(arms.ARMS["dense-long-warm-up"], STEPS)
    samples = int(words[words.index("--lr-warmup-samples") + 1])
    assert samples == warm_up["iteration"] * arms.BATCH_SIZE > 2 * 0.05 * STEPS * arms.BATCH_SIZE


@pytest.mark.parametrize("steps", [arms.FEWEST_STEPS, 100, STEPS, 3001])
def test_arms_have_equal_samples_or_layer_tokens(steps):
    ends = {name: arms.planned(arm, steps) for name, arm in arms.ARMS.items()}
    one_step = arms.BATCH_SIZE * arms.SEQ_LENGTH * arms.NUM_LAYERS
    dense, short = ends["dense"], ends["dense-short"]
    assert dense.iteration == steps
    assert 0 <= dense.layer_tokens * 2 / 3 - short.layer_tokens < one_step
    for name, end in ends.items():
        if "same-data" in name:
            assert end.samples == dense.samples
        elif "same-compute" in name:
            assert 0 <= end.layer_tokens - dense.layer_tokens < one_step
            assert end.samples > dense.samples
    assert 0 <= ends["ltd-short"].layer_tokens - short.layer_tokens < one_step
    # One whole number of tokens kept throughout cannot be the mean of those of the ramp exactly.
    difference = ends["constant-same-data"].layer_tokens - ends["ltd-same-data"].layer_tokens
    assert abs(difference) <= dense.samples * arms.NUM_DROPPED / 2
    assert ends["ltd-same-data"].layer_tokens < 0.8 * dense.layer_tokens


def test_arms_of_a_question_differ_in_what_it_asks():
    differing = {
        (a, b): {
            name for name, value in vars(arms.ARMS[a]).items() if value != vars(arms.ARMS[b])[name]
        }
        for a, b, _ in arms.QUESTIONS
    }
    drops = {"dropping", "layer_token_lr"}  # without dropping the two learning rates are one
    assert differing == {
        ("ltd-same-data", "dense"): drops,
        ("ltd-same-data-plain-lr", "dense"): {"dropping"},
        ("ltd-same-compute", "dense"): drops | {"budget"},
        ("ltd-short", "dense-short"): drops | {"budget"},
        ("ltd-short", "dense"): drops | {"budget", "share"},
        ("dense-short", "dense"): {"share"},
        ("ltd-same-data", "ltd-same-data-plain-lr"): {"layer_token_lr"},
        ("ltd-same-compute", "ltd-same-compute-plain-lr"): {"layer_token_lr"},
        ("dense-long-warm-up", "dense"): {"long_warm_up"},
        ("ltd-same-data", "dense-long-warm-up"): drops | {"long_warm_up"},
        ("ltd-same-compute", "dense-long-warm-up"): drops | {"budget", "long_warm_up"},
        ("ltd-same-data", "constant-same-data"): {"dropping"},
        ("ltd-same-compute-strata", "ltd-same-compute"): {"strata"},
    }


def rows(arm, losses, **columns):
    """Return rows of runs.csv, a tenth of a nat apart on the two validation sets."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "validation_loss": loss,
            "validation_a": loss - 0.05,
            "validation_b": loss + 0.05,
            "iterations": 10,
            "samples": 40,
            "layer_tokens": 1000,
            "flops": 2e6,
        }
        | columns
        for seed, loss in losses.items()
    ]


def test_differences_are_paired_by_seed():
    runs = rows("dense", {1: 4.0, 2: 5.0, 3: 6.0}) + rows(
        "ltd-same-data", {3: 5.9, 1: 3.8, 2: 4.7, 9: 1.0}, layer_tokens=750, flops=1.5e6
    )
    found = analysis.differences(runs, "ltd-same-data", "dense")
    assert found == pytest.approx({1: -0.2, 2: -0.3, 3: -0.1})
    assert analysis.spread(found.values()) == pytest.approx(0.1)
    # Student's quantile for two degrees of freedom.
    assert analysis.half_interval(found.values()) == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    text = analysis.tables(runs)
    assert "| dense | 3 | 5.0000 ± 1.0000 | 40 | 1.000 | 1.000 |" in text
    assert "| ltd-same-data | 4 | 3.8500 ± 2.0857 | 40 | 0.750 | 0.750 |" in text
    assert "| -0.1000, -0.2000, -0.3000 | -0.2000 | 0.1000 | -0.4484 to +0.0484 |" in text
    assert "Spread of a difference over seeds: 0.1000" in text
    assert "constant" not in text  # nothing is said of arms that were not trained


def test_one_seed_has_no_spread():
    table = analysis.tables(rows("dense", {1: 4.0}) + rows("ltd-same-data", {1: 3.9}))
    assert "| dense | 1 | 4.0000 |" in table
    assert "| -0.1000 | -0.1000 | - | - | one seed: nothing |" in table
    assert "over seeds: -." in table
    assert "nan" not in table


def test_verdicts():
    assert analysis.verdict([-0.20, -0.21, -0.22]) == "lower loss"
    assert analysis.verdict([0.20, 0.21, 0.22]) == "higher loss"
    assert analysis.verdict([-0.2, -0.3, -0.1]) == "the spread covers it"
    assert analysis.verdict([-0.2]) == "one seed: nothing"
    assert analysis.verdict([-0.20, -0.21, -0.22], text_noise=0.1) == "lower loss"
    text = "may be due to the validation text"
    assert analysis.verdict([-0.20, -0.21, -0.22], text_noise=0.11) == text


def test_evaluation_noise_is_what_the_validation_sets_disagree_by():
    runs = rows("dense", {1: 4.0, 2: 4.0}) + rows("ltd-same-data", {1: 3.9, 2: 3.9})
    assert analysis.evaluation_noise(runs) == pytest.approx(0)
    for row in runs:
        if row["arm"] == "dense":
            row["validation_a"] += 0.02
            row["validation_b"] -= 0.02
    assert analysis.evaluation_noise(runs) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "3 is less than 10"),
        (["--arms", "sparse"], "invalid choice: 'sparse'"),
        (["--seeds", "0"], "0 is less than 1"),
        (["--seeds", "one"], "invalid whole number value: 'one'"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit):
        study.parse_args(words)
    assert message in capsys.readouterr().err


def test_a_run_is_not_continued_with_other_flags(tmp_path):
    training.check_same_flags(tmp_path / "run", ["--lr", "1"])
    training.check_same_flags(tmp_path / "run", ["--lr", "1"])
    with pytest.raises(training.StudyError, match="was begun with other flags"):
        training.check_same_flags(tmp_path / "run", ["--lr", "2"])


def test_text_is_split_by_file_and_has_enough_for_one_pass(tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(60):
        (library / f"{number}.py").write_text(f"# {number}\n" + "x = 1\n" * 1000)
    (library / "short.py").write_text("x = 1\n")
    sets = text.split(str(library))
    assert [len(texts) for texts in sets.values()] == [20, 20, 20]
    first_lines = [one.split("\n")[0] for texts in sets.values() for one in texts]
    assert len(set(first_lines)) == 60  # no file is in two sets
    assert {len(one) for name in text.VALIDATION_SETS for one in sets[name]} == {4000}
    assert sets == text.split(str(library))
    assert [len(one) for one in sets["train"]] > [4000] * 20

    prefix = tmp_path / "train_text_document"
    Path(f"{prefix}.bin").write_bytes(b"\0" * 2 * 1000 * arms.SEQ_LENGTH)
    study.check_one_pass(str(prefix), ["dense", "ltd-same-compute"], 380)
    with pytest.raises(training.StudyError, match="--steps 420: .* reads .* samples of .* 999"):
        study.check_one_pass(str(prefix), ["dense", "ltd-same-compute"], 420)
    study.check_one_pass(str(prefix), ["dense"], 420)


def start(folder, **variables):
    """Start a study of two arms and two seeds in a process group of its own."""
    words = "--steps 10 --evaluations 1 --seeds 1 2 --arms dense ltd-same-compute".split()
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "study.py"), *words, "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(folder):
    """Return the living processes whose command line names a folder."""
    listed = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and line[0] != "Z"]


def all_end(folder):
    """Wait for the processes of a folder to end; return whether they did."""
    deadline = time.monotonic() + TIMEOUT_S
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def kill(running, when):
    """Kill the study when a predicate holds; return what it printed."""
    deadline = time.monotonic() + TIMEOUT_S
    while not when():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
        time.sleep(0.1)
    running.kill()
    return running.communicate(timeout=TIMEOUT_S)[0]


def sample_orders(cache):
    """Return the order of samples, by seed and length of the run, that Megatron stored."""
    orders = {}
    for path in cache.glob("*-GPTDataset-train-description.txt"):
        described = json.loads(path.read_text())
        indices = (
            path.with_name(path.name.replace("description.txt", f"{name}_index.npy")).read_bytes()
            for name in ("document", "sample", "shuffle")
        )
        orders[described["random_seed"], described["num_samples"]] = tuple(indices)
    return orders


def test_study_survives_ctrl_c_and_kill(tmp_path, monkeypatch):
    def little(library):
        texts = [path.read_text() for path in sorted((ROOT / "megatron_rltd").rglob("*.py"))]
        a, b = ([texts[i][: text.VALIDATION_CHARACTERS]] for i in (0, 1))
        return {"train": texts[2:], "validation_a": a, "validation_b": b}

    monkeypatch.setattr(text, "split", little)
    text.prepare(tmp_path / "data")

    dense, ltd = (tmp_path / "10-steps" / f"{arm}-seed-1" for arm in ("dense", "ltd-same-compute"))

    def steps_of(run):
        log = run / "log.txt"
        return log.read_text().count("elapsed time per iteration") if log.exists() else 0

    stopped = start(tmp_path, PYTHONPATH=str(ROOT / "tests" / "ctrl_c"))
    output = stopped.communicate(timeout=TIMEOUT_S)[0]
    assert stopped.returncode == 130, output
    assert "the same command continues" in output
    assert "Traceback" not in output
    saved = dense / "checkpoints" / "latest_checkpointed_iteration.txt"
    stopped_at = int(saved.read_text())
    assert stopped_at == 2

    killed = start(tmp_path)
    output = kill(killed, (ltd / "log.txt").exists)
    assert "[1/4] seed 1 dense: 10 steps" in output
    assert saved.read_text() == "10"
    assert steps_of(dense) == 10  # none twice
    assert all_end(tmp_path)

    whole = start(tmp_path)
    output = whole.communicate(timeout=TIMEOUT_S)[0]
    assert whole.returncode == 0, output
    assert "[1/4] seed 1 dense: trained already" in output
    assert "[4/4] seed 2 ltd-same-compute: 13 steps" in output
    with (tmp_path / "results" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(run["arm"], run["seed"]) for run in runs] == [
        (arm, seed) for arm in ("dense", "ltd-same-compute") for seed in "12"
    ]
    for run in runs:
        end = arms.planned(arms.ARMS[run["arm"]], 10)
        assert int(run["iterations"]) == end.iteration
        assert int(run["samples"]) == end.samples
        assert int(run["layer_tokens"]) == end.layer_tokens
        assert 5 < float(run["validation_loss"]) < 8
        parts = float(run["validation_a"]) + float(run["validation_b"])
        assert float(run["validation_loss"]) == pytest.approx(parts / 2)
    assert len({run["validation_loss"] for run in runs}) == 4
    orders = sample_orders(tmp_path / "data" / "cache")
    assert sorted(orders) == [(1, 20), (1, 26), (2, 20), (2, 26)]  # (seed, samples of a run)
    assert orders[1, 20] == orders[1, 26]
    assert orders[2, 20] == orders[2, 26]
    assert orders[1, 20] != orders[2, 20]
    table = (tmp_path / "results" / "tables.md").read_text()
    assert table in output
    assert analysis.tables(analysis.read_csv(tmp_path / "results" / "runs.csv")) == table
    assert (tmp_path / "results" / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_findings_show_the_committed_results():
    runs = analysis.read_csv(FOLDER / "results" / "runs.csv")
    assert {run["arm"] for run in runs} == set(arms.ARMS)
    assert {(run["arm"], run["seed"]) for run in runs} == {
        (arm, seed) for arm in arms.ARMS for seed in study.SEEDS
    }
    for run in runs:
        end = arms.planned(arms.ARMS[run["arm"]], study.STEPS)
        assert (run["iterations"], run["layer_tokens"]) == (end.iteration, end.layer_tokens)
    assert analysis.tables(runs) in (FOLDER / "README.md").read_text()
    assert (FOLDER / "results" / "tables.md").read_text() == analysis.tables(runs)
