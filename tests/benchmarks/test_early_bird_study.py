"""The study of Early-Bird tickets: budgets, FLOPs, cutting, and a tiny study from end to end."""

import csv
import dataclasses
import math
import os
import subprocess
import sys
import types

import pytest
import torch

from tests.parallel import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from early_bird import arms, curves, study
from lib import paired, text

FOLDER = ROOT / "benchmarks" / "early_bird"
TIMEOUT_S = 600  # ends what hangs; nothing takes so long
TINY = dataclasses.replace(
    arms.Size(),
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    kept_ffn_hidden_size=48,
    seq_length=16,
    batch_size=2,
    steps=20,
    tuning_steps=10,
    validation_samples=4,
)


@pytest.mark.parametrize("which", ["dense", "ticket"])
def test_flops_are_megatrons(which):
    from megatron.training.training import num_floating_point_operations as megatrons

    size = arms.Size()
    shape = getattr(size, which)()
    args = types.SimpleNamespace(
        num_layers=shape.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn_hidden_size,
        seq_length=size.seq_length,
        padded_vocab_size=text.VOCABULARY,
        group_query_attention=False,
        swiglu=False,
        attention_output_gate=False,
        multi_latent_attention=False,
        num_experts=None,
        moe_layer_freq=1,
        mtp_num_layers=None,
        moe_shared_expert_intermediate_size=None,
        moe_ffn_hidden_size=None,
        moe_router_topk=1,
        moe_latent_size=None,
        hybrid_layer_pattern=None,
        is_hybrid_model=False,
        hybrid_override_pattern=None,
        experimental_attention_variant=None,
        linear_attention_freq=None,
    )
    assert arms.flops_of_step(size, shape) == megatrons(args, size.batch_size)


@pytest.mark.parametrize("steps", [100, arms.Size.steps, 1000])
def test_budgets(steps):
    size = dataclasses.replace(arms.Size(), steps=steps)
    plans = {name: arms.plan(arm, size) for name, arm in arms.ARMS.items()}
    dense, ticket = (arms.flops_of_step(size, shape) for shape in (size.dense(), size.ticket()))
    assert plans["dense"].flops == steps * dense
    assert plans["ticket"].flops == steps // 5 * dense + (steps - steps // 5) * ticket
    assert 0.7 < plans["ticket"].flops / plans["dense"].flops < 0.8
    for name, arm in arms.ARMS.items():
        own = plans[name]
        if arm.budget == arms.EQUAL_STEPS:
            assert own.schedule == size.steps_of(arm.phase)
            continue
        wanted = plans["dense" if arm.budget == arms.DENSES else "ticket"].flops
        a_step = dense if arm.units == arms.ALL else ticket
        assert 0 <= wanted - own.flops < a_step
    assert plans["random"] == plans["ticket"] == plans["ticket-reset"]
    assert plans["random-long"] == plans["ticket-long"]
    # Rewinding pays for its search, but the learning rate goes back.
    rewound, continued = plans["rewind-long"], plans["ticket-long"]
    assert rewound.flops == continued.flops and rewound.after == continued.after
    assert rewound.start == steps // 20 < continued.start == rewound.before == steps // 5


def test_arms_of_a_question_differ_in_what_it_asks():
    def differing(a, b):
        ours, theirs = vars(arms.ARMS[a]), vars(arms.ARMS[b])
        return {name for name in ours if ours[name] != theirs[name]}

    found = {(a, b): differing(a, b) for a, b, _ in arms.QUESTIONS}
    choices = [("ticket", "random"), ("ticket-long", "random-long")]
    choices += [("unstructured", "unstructured-random")]
    choices += [("tuning/ticket", f"tuning/{b}") for b in ("random", "largest-removed", "dense")]
    for pair in [*choices, ("ticket", "dense"), ("small-long", "ticket-long")]:
        assert found[pair] == {"units"}
    assert found["rewind-long", "ticket-long"] == {"rewinds"}
    assert found["ticket-reset", "ticket"] == {"resets"}


def hand_made(iteration, *pruned):
    from megatron_rltd.early_bird import masks

    bits = torch.zeros(20, dtype=torch.bool)
    bits[list(pruned)] = True
    return masks.Mask(iteration, {"weights": 20}, {"weights": {1: masks.pack(bits)}})


def test_rows_of_hand_made_masks():
    # 40 steps, so that the warm-up has 2: the check at 1 counts for no preset.
    found = [hand_made(1, 0, 1), hand_made(2, 0, 1), hand_made(3, 0, 2), hand_made(4, 0, 2)]
    rows = curves.rows_of(found, {"interval": 0.025, "pattern": "p"}, 40)
    assert math.isnan(rows[0]["distance"])
    assert [row["distance"] for row in rows[1:]] == [0, 0.1, 0]
    assert [row["distance_to_last"] for row in rows] == [0.1, 0.1, 0, 0]
    assert rows[2]["share_of_chance"] == pytest.approx(0.1 / 0.18)
    assert [row["early-transformers"] for row in rows] == [0, 0, 0, 1]
    assert [row["early-transformers-vision"] for row in rows] == [0, 0, 1, 1]
    assert [row["early-bird"] for row in rows] == [0, 0, 0, 0]
    assert curves.first_emerged(rows, 0.025, "p", "early-transformers") == 0.1
    assert math.isnan(curves.first_emerged(rows, 0.025, "p", "early-bird"))


# A study of little text and of small models. With a number, it gets a Ctrl-C in that run.
END_TO_END = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import torch
from lib import small_models
from early_bird import arms, study, training
study.size_of = lambda options: arms.Size({", ".join(f"{k}={v!r}" for k, v in vars(TINY).items())})
numbers = torch.randint(2048, (4000,), generator=torch.Generator().manual_seed(1))
own = training.Texts(numbers, [numbers[:100], numbers[100:200]])
training.read_texts = lambda folder: {{arms.PRETRAINING: own, arms.TUNING: own}}
runs, train_one, stopped_at = [], study.train_one, int(sys.argv.pop(1))
def counted(*args):
    runs.append(args)
    if len(runs) == stopped_at:
        os.kill(os.getpid(), signal.SIGINT)
    return train_one(*args)
study.train_one = counted
sys.exit(study.main(sys.argv[1:]))
"""


def tiny_study(folder, stopped_at, *words):
    command = [sys.executable, "-c", END_TO_END, str(stopped_at), "--folder", str(folder)]
    return subprocess.run(
        [*command, "--seeds", "7", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_study_interrupted(tmp_path):
    from early_bird import analysis

    stopped = tiny_study(tmp_path, 4)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped; the same command continues" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    noted = {path: path.read_text() for path in tmp_path.glob("*-seed-7.json")}
    assert len(noted) == 3
    whole = tiny_study(tmp_path, 0)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("trained already") == 3
    assert {path: path.read_text() for path in noted} == noted
    with (tmp_path / "results" / "runs.csv").open() as file:
        raw = list(csv.DictReader(file))
    assert [run["arm"] for run in raw] == list(arms.ARMS)
    runs = paired.read_csv(tmp_path / "results" / "runs.csv")
    for run in runs:
        own = arms.plan(arms.ARMS[run["arm"]], TINY)
        assert run["flops"] == own.flops
        assert (run["steps_before_draw"], run["steps_after_draw"]) == (own.before, own.after)
        assert math.isnan(run["loss_at_draw"]) == (run["arm"] in NOT_DRAWN)
        assert run["validation_loss"] == (run["validation_a"] + run["validation_b"]) / 2
        assert 5 < run["validation_loss"] < 9
    assert len({run["validation_loss"] for run in runs}) == len(runs)
    words = ("phase", "pattern", "kind")
    distances = paired.read_csv(tmp_path / "results" / "distances.csv", words)
    assert {row["phase"] for row in distances} == {arms.PRETRAINING, arms.TUNING}
    table = (tmp_path / "results" / "tables.md").read_text()
    assert table in whole.stdout
    assert analysis.tables(runs, distances) == table
    assert (tmp_path / "results" / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


NOT_DRAWN = ("dense-short", "small-long", "small-short")


def test_lengths_follow_from_the_steps():
    size = study.size_of(study.parse_args(["--steps", "600"]))
    assert (size.steps, size.tuning_steps) == (600, 200)
    assert study.size_of(study.parse_args([])) == arms.Size()


def test_no_run_reads_a_text_twice():
    options = study.parse_args(["--arms", "small-long", "tuning/dense"])
    size = arms.Size()
    longest = arms.plan(arms.ARMS["small-long"], size).schedule
    tokens = longest * size.batch_size * size.seq_length + 1
    study.check_one_pass(options, size, {arms.PRETRAINING: tokens, arms.TUNING: tokens})
    with pytest.raises(study.StudyError, match="--steps 300: .* of the pretraining text"):
        study.check_one_pass(options, size, {arms.PRETRAINING: tokens - 1, arms.TUNING: tokens})
    with pytest.raises(study.StudyError, match="reads 400 samples of the tuning text's 0"):
        study.check_one_pass(options, size, {arms.PRETRAINING: tokens, arms.TUNING: 1})


STEPS = "steps_before_draw,steps_after_draw"
HAND_MADE = f"""arm,seed,validation_loss,validation_a,validation_b,loss_at_draw,{STEPS},flops
dense,1,5.0,5.0,5.0,6.0,0,10,1000
dense,2,5.2,5.0,5.4,6.0,0,10,1000
dense,3,5.1,5.0,5.2,6.0,0,10,1000
dense-short,1,5.3,5.0,5.4,nan,0,7,700
ticket,1,4.9,5.0,4.8,6.1,2,8,750
ticket,2,5.0,5.0,5.0,6.1,2,8,750
ticket,3,4.8,5.0,4.6,6.1,2,8,750
random,3,4.8,5.0,4.6,6.4,2,8,750
"""


def test_tables_of_a_hand_made_file(tmp_path):
    (tmp_path / "runs.csv").write_text(HAND_MADE)
    command = [sys.executable, str(FOLDER / "analysis.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = result.stdout
    assert "| dense | 3 | 10 | 1.000 | 6.0000 ± 0.0000 | 5.1000 ± 0.1000 |" in said
    assert "| dense-short | 1 | 7 | 0.700 | - | 5.3000 |" in said
    assert "| ticket | 3 | 2 + 8 | 0.750 | 6.1000 ± 0.0000 | 4.9000 ± 0.1000 |" in said
    # Differences -0.1, -0.2 and -0.3: 4.303 * 0.1 / sqrt(3); t = 3.46 with 2 degrees of freedom.
    line = next(line for line in said.splitlines() if "| ticket - dense<" in line)
    assert "| 3 | -0.2000 | -0.4484 to +0.0484 | 0.074 | the spread covers it |" in line
    first, at_draw = (line for line in said.splitlines() if "| ticket - random<" in line)
    assert "| 1 | +0.0000 | - | - | one seed: nothing |" in first
    assert "just after the draw | 1 | -0.3000 |" in at_draw
    assert "tuning" not in said.split("Loss in nats")[0]  # nothing is said of what was not trained


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "0 is less than 1"),
        (["--arms", "ticketest"], "invalid choice: 'ticketest'"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit):
        study.parse_args(words)
    assert message in capsys.readouterr().err


def test_findings_show_the_committed_results():
    from early_bird import analysis

    runs, distances = analysis.read_results(FOLDER / "results")
    trained = {run["arm"] for run in runs}
    assert {(run["arm"], run["seed"]) for run in runs} == {
        (arm, seed) for arm in trained for seed in study.SEEDS
    }
    for run in runs:
        own = arms.plan(arms.ARMS[run["arm"]], arms.Size())
        assert (run["flops"], run["steps_after_draw"]) == (own.flops, own.after)
    tables = analysis.tables(runs, distances)
    assert (FOLDER / "results" / "tables.md").read_text() == tables
    findings = (FOLDER / "README.md").read_text()
    for table in tables.strip().split("\n\n"):
        assert table in findings
