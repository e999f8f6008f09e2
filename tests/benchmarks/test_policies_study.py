"""The study of policies: arms cost the same, tables are right, and a tiny study interrupted."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from tests.parallel import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from lib import paired
from lib.samples import blocks, order
from policies import analysis, arms, samples, study

FOLDER = ROOT / "benchmarks" / "policies"
TIMEOUT_S = 600  # ends what hangs; nothing takes so long


@pytest.mark.parametrize("size", arms.SIZES.values(), ids=arms.SIZES)
def test_arms_of_a_level_have_equal_layer_tokens(size):
    dense = arms.DENSE.layer_tokens(size)
    assert dense == size.steps * size.batch_size * size.seq_length * size.num_layers
    costs = {
        level: {arm.layer_tokens(size) / dense for arm in of_level.values()}
        for level, of_level in arms.LEVELS.items()
    }
    # 3 of 8 layers drop half or 7/8 of the tokens, or 6 drop 7/8.
    assert costs == {"mild": {1 - 1.5 / 8}, "medium": {1 - 21 / 64}, "severe": {1 - 42 / 64}}


def test_arms_of_a_question_differ_in_what_it_asks():
    differing = {
        (a, b): {
            name for name, value in vars(arms.ARMS[a]).items() if value != vars(arms.ARMS[b])[name]
        }
        for a, b, _ in arms.questions()
        if a.startswith("mild")
    }
    # The same LayerTokens in other layers need another kept length.
    where = {"layers", "kept"}
    assert differing == {
        ("mild/bypass", "mild/bypass-random"): {"random_share"},
        ("mild/bypass-half", "mild/bypass"): {"random_share"},
        ("mild/bypass", "mild/random-late"): {"policy"},
        ("mild/bypass-half", "mild/random-late"): {"policy", "random_share"},
        ("mild/bypass-random", "mild/random-late"): {"policy", "random_share"},
        ("mild/bypass", "mild/random"): where | {"policy"},
        ("mild/bypass-half", "mild/random"): where | {"policy", "random_share"},
        ("mild/random-late", "mild/random"): where,
        ("mild/balanced", "mild/random"): {"policy"},
        ("mild/strata", "mild/random"): {"strata"},
        ("mild/random", "dense"): {"policy", "kept"},
    }
    for arm, against, _ in arms.questions():
        if arm.startswith("severe") and against != "dense":
            assert arms.ARMS[arm].layers == arms.ARMS[against].layers == arms.MIDDLE
            assert arms.ARMS[arm].kept == arms.ARMS[against].kept


def test_chances_are_students():
    def values(t, count):
        """Return so many values whose mean is t standard errors from 0."""
        spread = paired.spread(range(count)) / math.sqrt(count)
        return [i - (count - 1) / 2 + t * spread for i in range(count)]

    # Quantiles from a table of the t distribution.
    for t, degrees, chance in [(12.706, 1, 0.05), (2.776, 4, 0.05), (-4.604, 4, 0.01)]:
        assert paired.chance(values(t, degrees + 1)) == pytest.approx(chance, rel=1e-3)
    assert paired.chance(values(0.0, 5)) == pytest.approx(1.0)
    assert math.isnan(paired.chance([1.0]))


def test_chances_are_corrected_for_many_questions():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.6, math.nan, 0.7])[::2] == pytest.approx([1.0, 1.0])


HAND_MADE = """task,arm,seed,validation_loss,validation_a,validation_b,steps,samples,layer_tokens
causal,dense,1,5.0,5.0,5.0,10,40,1000
causal,dense,2,5.2,5.0,5.4,10,40,1000
causal,dense,3,5.1,5.0,5.2,10,40,1000
causal,mild/random,1,4.9,5.0,4.8,10,40,800
causal,mild/random,2,5.0,5.0,5.0,10,40,800
causal,mild/random,3,4.8,5.0,4.6,10,40,800
causal,mild/bypass,3,5.801,5.0,5.0,10,40,800
causal,mild/bypass,1,5.9,5.0,5.0,10,40,800
causal,mild/bypass,2,5.999,5.0,5.0,10,40,800
masked,dense,1,3.0,3.0,3.0,10,40,1000
masked,mild/random,1,2.75,3.0,2.5,10,40,800
"""


def test_tables_of_a_hand_made_file(tmp_path):
    (tmp_path / "runs.csv").write_text(HAND_MADE)
    command = [sys.executable, str(FOLDER / "analysis.py"), str(tmp_path / "runs.csv")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert "| dense | 3/1 | 5.1000 ± 0.1000 | 1.000 | 3.0000 | 1.000 |" in text
    assert "| mild/random | 3/1 | 4.9000 ± 0.1000 | 0.800 | 2.7500 | 0.800 |" in text
    assert "| mild/bypass | 3/0 | 5.9000 ± 0.0990 | 0.800 | - | - |" in text
    # Differences 1.0, 0.999 and 1.001; two of three questions of the causal model remain certain.
    line = next(line for line in text.splitlines() if "mild/bypass - random<" in line)
    assert "| 3 | +1.0000 | +0.9975 to +1.0025 | 0.000 | higher loss |" in line
    # Differences -0.1, -0.2 and -0.3: 4.303 * 0.1 / sqrt(3); t = 3.46 with 2 degrees of freedom.
    line, of_masked = (line for line in text.splitlines() if "mild/random - dense<" in line)
    assert "| 3 | -0.2000 | -0.4484 to +0.0484 | 0.074 | the spread covers it |" in line
    assert "| 1 | -0.2500 | - | - | one seed: nothing |" in of_masked
    assert "severe" not in text  # nothing is said of arms that were not trained
    assert "all 3 questions" in text


def test_verdicts():
    assert analysis.verdict([0.20, 0.21, 0.22], 0.01) == "higher loss"
    assert analysis.verdict([-0.20, -0.21, -0.22], 0.01) == "lower loss"
    only = "lower loss, if it were the only question"
    assert analysis.verdict([-0.20, -0.21, -0.22], 0.06) == only
    assert analysis.verdict([-0.2, -0.3, -0.1], 0.04) == "the spread covers it"
    assert analysis.verdict([-0.2], math.nan) == "one seed: nothing"


def test_samples_of_both_tasks():
    own = torch.arange(40 * 101).view(40, 101) % 250
    causal = samples.batch(samples.CAUSAL, own, seed=1, first=0)
    assert torch.equal(causal.ids, own[:, :-1]) and torch.equal(causal.labels, own[:, 1:])
    masked = samples.batch(samples.MASKED, own, seed=1, first=0)
    counts = masked.labels >= 0
    assert torch.equal(masked.ids[~counts], own[:, :-1][~counts])
    assert torch.equal(masked.labels[counts], own[:, :-1][counts])
    assert counts.float().mean() == pytest.approx(0.15, abs=0.02)
    read, true = masked.ids[counts], masked.labels[counts]
    assert (read == samples.MASK_ID[samples.MASKED]).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (read == true).float().mean() == pytest.approx(0.1, abs=0.04)
    again = samples.batch(samples.MASKED, own, seed=1, first=0)
    assert torch.equal(again.ids, masked.ids)
    other = samples.batch(samples.MASKED, own, seed=1, first=4)
    assert not torch.equal(other.ids, masked.ids)


def test_blocks_and_their_order():
    found = blocks(torch.arange(11), 3)
    assert found.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert sorted(order(9, 1).tolist()) == list(range(9))
    assert order(9, 1).tolist() != order(9, 2).tolist()


TINY_ARMS = ["dense", "mild/bypass-half", "severe/random", "severe/balanced"]
# A study of little text. With a number, it gets a Ctrl-C in the run of that number.
TINY = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from lib import text
from policies import study, training
own = [path.read_text()[:4000] for path in sorted(Path({str(ROOT)!r}).glob("megatron_rltd/*.py"))]
text.split = lambda _: {{"train": own[2:], "validation_a": own[:1], "validation_b": own[1:2]}}
runs, train, stopped_at = [], training.train, int(sys.argv.pop(1))
def counted(*args):
    runs.append(args)
    if len(runs) == stopped_at:
        os.kill(os.getpid(), signal.SIGINT)
    return train(*args)
training.train = counted
sys.exit(study.main(sys.argv[1:]))
"""


def tiny_study(folder, stopped_at, *words):
    command = [sys.executable, "-c", TINY, str(stopped_at), "--folder", str(folder)]
    return subprocess.run(
        [*command, "--arms", *TINY_ARMS, "--seeds", "7", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_study_interrupted(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    # As if it was tokenised already.
    numbers = torch.randint(2048, (3000,), generator=torch.Generator().manual_seed(1))
    for name in ("train", "validation_a", "validation_b"):
        (data / f"{name}_text_document.idx").touch()
        path = data / f"{name}_text_document.bin"
        path.write_bytes(numbers.to(torch.int16).numpy().tobytes())

    stopped = tiny_study(tmp_path, 3, "--steps", "2")
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped; the same command continues" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    noted = {path: path.read_text() for path in tmp_path.glob("causal/*-seed-7.json")}
    assert len(noted) == 2
    assert not list(tmp_path.glob("*/*.new"))

    whole = tiny_study(tmp_path, 0, "--steps", "2")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("trained already") == 2
    assert {path: path.read_text() for path in noted} == noted
    with (tmp_path / "results" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(run["task"], run["arm"]) for run in runs] == [
        (task, name) for task in samples.TASKS for name in TINY_ARMS
    ]
    for run in runs:
        size = arms.Size(**json.loads((tmp_path / run["task"] / "size.json").read_text()))
        assert size.steps == int(run["steps"]) == 2
        assert int(run["samples"]) == 2 * size.batch_size
        # Counted while training; the other number is planned.
        assert int(run["layer_tokens"]) == arms.ARMS[run["arm"]].layer_tokens(size)
        parts = float(run["validation_a"]) + float(run["validation_b"])
        assert float(run["validation_loss"]) == pytest.approx(parts / 2)
        assert 4 < float(run["validation_loss"]) < 12
    # Every arm computes something else, from the same start: two steps apart, not two models.
    for task in samples.TASKS:
        losses = [float(run["validation_loss"]) for run in runs if run["task"] == task]
        assert len(set(losses)) == len(losses)
        assert max(losses) - min(losses) < 0.5
    table = (tmp_path / "results" / "tables.md").read_text()
    assert table in whole.stdout
    again = paired.read_csv(tmp_path / "results" / "runs.csv", ("task", "arm"))
    assert analysis.tables(again) == table
    assert (tmp_path / "results" / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_runs_of_another_size_are_not_mixed(tmp_path):
    study.check_same_size(tmp_path / "causal", arms.Size(steps=2))
    study.check_same_size(tmp_path / "causal", arms.Size(steps=2))
    with pytest.raises(study.StudyError, match="are of another size"):
        study.check_same_size(tmp_path / "causal", arms.Size(steps=3))


def test_no_run_reads_the_text_twice(tmp_path, monkeypatch):
    texts = [torch.zeros(10 * arms.Size.batch_size * arms.Size.seq_length + 1)]
    monkeypatch.setattr(study, "read_texts", lambda task, folder: texts)
    monkeypatch.setattr(study, "train_one", lambda *_: {"validation_loss": 1.0})
    words = ["--folder", str(tmp_path), "--tasks", "masked", "--seeds", "1", "--arms", "dense"]
    study.train_all(study.parse_args([*words, "--steps", "10"]))
    other = study.parse_args([*words, "--steps", "11", "--folder", str(tmp_path / "other")])
    with pytest.raises(study.StudyError, match="--steps 11: .* reads 44 samples of .* 40"):
        study.train_all(other)


def test_a_run_of_another_process_is_left_to_it(tmp_path, monkeypatch, capsys):
    texts = [torch.zeros(10_000)]
    monkeypatch.setattr(study, "read_texts", lambda task, folder: texts)
    words = ["--folder", str(tmp_path), "--tasks", "masked", "--seeds", "1", "--arms", "dense"]
    options = study.parse_args([*words, "--steps", "2"])

    def train_one(*_):
        study.train_all(options)  # as another process would, meanwhile
        return {"validation_loss": 1.0}

    monkeypatch.setattr(study, "train_one", train_one)
    study.train_all(options)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "[1/1] seed 1 masked dense: another process trains it"
    assert said[1].startswith("[1/1] seed 1 masked dense: validation loss 1.0000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "0 is less than 1"),
        (["--arms", "mildest"], "invalid choice: 'mildest'"),
        (["--tasks", "vision"], "invalid choice: 'vision'"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit):
        study.parse_args(words)
    assert message in capsys.readouterr().err


def test_findings_show_the_committed_results():
    runs = paired.read_csv(FOLDER / "results" / "runs.csv", ("task", "arm"))
    trained = {run["arm"] for run in runs}
    assert {(run["task"], run["arm"], run["seed"]) for run in runs} == {
        (task, arm, seed) for task in samples.TASKS for arm in trained for seed in study.SEEDS
    }
    for run in runs:
        assert run["layer_tokens"] == arms.ARMS[run["arm"]].layer_tokens(arms.SIZES[run["task"]])
    assert analysis.tables(runs) in (FOLDER / "README.md").read_text()
    assert (FOLDER / "results" / "tables.md").read_text() == analysis.tables(runs)
