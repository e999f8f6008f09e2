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


@pytest.fixture(scope="module")
def training():
    from early_bird import training
    from lib.small_models import megatron

    with megatron():
        yield training


@pytest.fixture
def texts(training):
    numbers = torch.randint(2048, (2000,), generator=torch.Generator().manual_seed(1))
    own = training.Texts(numbers, [numbers[:100], numbers[100:200]])
    return {arms.PRETRAINING: own, arms.TUNING: own}


def seed_of(training, texts, folder, size=TINY):
    return training.Seed(size, 3, texts, folder / "dense.pt")


@pytest.mark.parametrize("units", [arms.NORM, arms.RANDOM, arms.LARGEST_REMOVED])
def test_a_ticket_is_the_dense_model_with_zeroed_columns(training, texts, tmp_path, units):
    from early_bird import tickets

    from megatron_rltd.early_bird.units import FFN, HEADS

    dense = seed_of(training, texts, tmp_path).at_draw(arms.ARMS["ticket"])
    model = training.model_of(dense, TINY)
    mask = tickets.choose(units, model, dense.step, TINY, 3)
    ticket = training.model_of(tickets.cut(dense, mask, TINY), TINY).double()
    model.double()
    head = TINY.dense().kv_channels
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers, start=1):
            pruned = mask.of_layer(HEADS, number)
            assert pruned.sum() == TINY.heads - TINY.kept_heads
            layer.self_attention.linear_proj.weight[:, pruned.repeat_interleave(head)] = 0
            layer.mlp.linear_fc2.weight[:, mask.of_layer(FFN, number)] = 0
        own = texts[arms.PRETRAINING].train[:51].view(3, 17)
        ids, positions = own[:, :-1], torch.arange(16).expand(3, -1)
        # Megatron's own loss is in float32.
        ours, theirs = (
            torch.nn.functional.cross_entropy(
                m(ids, positions, None).flatten(0, 1), own[:, 1:].flatten(), reduction="none"
            )
            for m in (ticket, model)
        )
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_choices(training, texts, tmp_path):
    from early_bird import tickets

    from megatron_rltd.early_bird.model import layers_of
    from megatron_rltd.early_bird.units import importance

    model = training.model_of(seed_of(training, texts, tmp_path).at_draw(arms.ARMS["ticket"]), TINY)
    units = (arms.NORM, arms.LARGEST_REMOVED, arms.RANDOM)
    least, most, drawn = (tickets.choose(each, model, 4, TINY, 3) for each in units)
    other = tickets.choose(arms.RANDOM, model, 4, TINY, 4)
    for number, weights in layers_of(model).items():
        for kind, values in importance(weights, TINY.dense()).items():
            pruned, removed = least.of_layer(kind, number), most.of_layer(kind, number)
            assert values[pruned].max() < values[~pruned].min()
            assert values[removed].min() > values[~removed].max()
            assert pruned.sum() == removed.sum() == drawn.of_layer(kind, number).sum()
            assert not torch.equal(drawn.of_layer(kind, number), other.of_layer(kind, number))


def test_a_ticket_carries_the_moments_of_what_it_keeps(training, texts, tmp_path):
    from early_bird import tickets

    from megatron_rltd.early_bird.units import FFN, HEADS

    seed = seed_of(training, texts, tmp_path)
    dense, ticket = seed.at_draw(arms.ARMS["ticket"]), seed.drawn(arms.ARMS["ticket"])
    mask = tickets.choose(arms.NORM, training.model_of(dense, TINY), 4, TINY, 3)
    head = TINY.dense().kv_channels
    for number in range(1, TINY.num_layers + 1):
        heads, neurons = ~mask.of_layer(HEADS, number), ~mask.of_layer(FFN, number)
        columns, rows = heads.repeat_interleave(head), heads.repeat_interleave(3 * head)
        parts = {
            "self_attention.linear_qkv.weight": lambda m, r=rows: m[r],
            "self_attention.linear_qkv.bias": lambda m, r=rows: m[r],
            "self_attention.linear_proj.weight": lambda m, c=columns: m[:, c],
            "self_attention.linear_proj.bias": lambda m: m,
            "mlp.linear_fc1.weight": lambda m, n=neurons: m[n],
            "mlp.linear_fc2.weight": lambda m, n=neurons: m[:, n],
        }
        for name, part in parts.items():
            name = f"decoder.layers.{number - 1}.{name}"
            for key in ("exp_avg", "exp_avg_sq"):
                whole = dense.moments[name][key]
                assert whole.any()
                assert torch.equal(ticket.moments[name][key], part(whole))
            assert ticket.moments[name]["step"] == dense.step == ticket.step == 4
    assert seed.drawn(arms.ARMS["ticket-reset"]).moments == {}
    # Rewound: the same choice, but the weights and moments of step 1.
    rewound = seed.drawn(arms.ARMS["rewind-long"])
    assert rewound.step == 1 and rewound.moments["output_layer.weight"]["step"] == 1


def test_a_state_goes_on_as_if_it_had_not_stopped(training, texts, tmp_path):
    seed = seed_of(training, texts, tmp_path)
    whole = seed.train(arms.ARMS["dense"])
    stopped = seed.at_draw(arms.ARMS["unstructured"])  # the same schedule
    assert stopped.step == 4
    again = seed.run(arms.ARMS["dense"]).train(stopped, TINY.steps)
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    assert not torch.equal(
        whole.weights["output_layer.weight"], stopped.weights["output_layer.weight"]
    )


@pytest.mark.parametrize("name", ["unstructured", "unstructured-random", "2:4"])
def test_masks_of_weights_are_enforced(training, texts, tmp_path, name):
    seed = seed_of(training, texts, tmp_path)
    trained = seed.train(arms.ARMS[name])
    for layer in range(TINY.num_layers):
        weight = trained.weights[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]
        assert (weight == 0).float().mean() == 0.5
        fours = (weight == 0).view(-1, 4).sum(1)
        assert bool((fours == 2).all()) == (name == "2:4")


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


def test_a_seed_of_another_process_is_left_to_it(tmp_path, training, texts, monkeypatch, capsys):
    monkeypatch.setattr(training, "read_texts", lambda folder: texts)
    monkeypatch.setattr(study, "size_of", lambda options: TINY)
    words = ["--folder", str(tmp_path), "--seeds", "1", "--arms", "dense"]
    options = study.parse_args(words)

    def train_one(*_):
        study.train_all(options)  # as another process would, meanwhile
        return {"run": {"validation_loss": 1.0}}

    monkeypatch.setattr(study, "train_one", train_one)
    study.train_all(options)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "seed 1: another process trains it"
    assert said[1].startswith("[1/1] seed 1 dense: validation loss 1.0000")


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
