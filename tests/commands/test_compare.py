import csv
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_rltd.commands.compare import command as compare
from megatron_rltd.commands.compare import plot as comparison_plot
from megatron_rltd.commands.compare import run_logs
from megatron_rltd.training import tags

SEQ_LENGTH, NUM_LAYERS, NUM_DROPPED = 8, 4, 2
DENSE_FLOPS = 2e12  # of a sample

# All numbers are such that float32, which an event file holds, has them exactly.


def log(
    folder,
    iterations=8,
    *,
    start=0,
    start_samples=0,
    kept=None,
    batch=4,
    seconds=1.0,
    warm_up=4.0,
    flops=DENSE_FLOPS,
    world_size=2,
    log_interval=2,
    tensorboard_log_interval=1,
    eval_interval=4,
    validation_loss=3.0,
    after=(),
    layer_tokens=0,
    without=(),
    **args,
):
    """Log what Megatron logs in one start; `kept`, `batch`, `flops` may be functions.

    The validation losses of a start begin at `validation_loss` and fall by a quarter; `after` are
    those after training.
    """

    def of(value, iteration):
        return value(iteration) if callable(value) else value

    args = {
        "seq_length": SEQ_LENGTH,
        "num_layers": NUM_LAYERS,
        "world_size": world_size,
        "consumed_train_samples": start_samples,
        "random_ltd": kept is not None,
    } | args
    samples, loss = start_samples, 0.0
    with SummaryWriter(folder) as writer:

        def scalar(tag, value, iteration):
            if tag not in without:
                writer.add_scalar(tag, value, iteration)
                writer.add_scalar(f"{tag} vs samples", value, samples)

        for name, value in args.items():
            if name not in without:
                writer.add_text(name, str(value), global_step=start)
        for i in range(start + 1, iterations + 1):
            size = of(batch, i)
            samples += size
            length = SEQ_LENGTH if kept is None else of(kept, i)
            full = SEQ_LENGTH * (NUM_LAYERS - NUM_DROPPED)
            layer_tokens += size * (full + NUM_DROPPED * length)
            if i % tensorboard_log_interval == 0:
                scalar("lm loss", 4.0 - i / 8, i)
                scalar("batch-size", size, i)
                if kept is not None:
                    scalar("random-ltd kept tokens", length, i)
                    scalar("random-ltd layer tokens", layer_tokens, i)
            if i % log_interval == 0:
                is_first = i - start <= log_interval
                time = warm_up if is_first else seconds
                scalar("iteration-time", time, i)
                scalar("throughput", of(flops, i) * size / (time * 1e12 * world_size), i)
            if i % eval_interval == 0:
                scalar("lm loss validation", validation_loss + loss, i)
                loss -= 0.25
        for value in after:
            scalar("lm loss validation", value, i)
    return folder


def run(capsys, *arguments):
    """Run the tool; return (what it printed, the JSON it wrote)."""
    path = next(Path(str(a).partition("=")[2]) for a in arguments if "=" in str(a)) / "result.json"
    status = compare.main([*map(str, arguments), "--json", str(path)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out, json.loads(path.read_text())


def rows(result):
    return {row["run"]: row for row in result["runs"]}


@pytest.fixture
def dense(tmp_path):
    return log(tmp_path / "dense")


def test_every_column(dense, tmp_path, capsys):
    ltd = log(tmp_path / "ltd", kept=4, seconds=0.75, flops=0.75e12, validation_loss=3.125)
    printed, result = run(capsys, f"dense={dense}", f"ltd={ltd}")
    # 8 iterations of 4 samples; a dense sample costs 8*4 LayerTokens, a dropped one 8*2 + 4*2.
    assert rows(result)["dense"] == {
        "run": "dense",
        "validation_loss": 2.75,
        "validation_iteration": 8,
        "iteration": 8,
        "samples": 32,
        "layer_tokens": 1024,
        "layer_tokens_per_sample": 1.0,
        "flops": 64e12,
        "seconds": 8.0,
        "compute_saved": None,
        "wall_clock_saved": None,
        "saving_realised": None,
        "iso_data": True,
        "iso_compute": True,
    }
    assert rows(result)["ltd"] == {
        "run": "ltd",
        "validation_loss": 2.875,
        "validation_iteration": 8,
        "iteration": 8,
        "samples": 32,
        "layer_tokens": 768,
        "layer_tokens_per_sample": 0.75,
        "flops": 24e12,
        "seconds": 6.0,
        "compute_saved": 0.625,
        "wall_clock_saved": 0.25,
        "saving_realised": 0.4,
        "iso_data": True,
        "iso_compute": False,
    }
    table = [re.split(r"\s{2,}", line) for line in printed.splitlines()[:3]]
    assert table == [
        [*compare.COLUMNS],
        ["dense", "2.7500", "8", "32", "1,024", "100.0%", "-", "-", "-"],
        ["ltd", "2.8750", "8", "32", "768", "75.0%", "62.5%", "25.0%", "40%"],
    ]
    assert result["verdict"] == "compared with dense: ltd is iso-data (same samples)"
    assert result["verdict"] in printed


def test_baseline_chosen(dense, tmp_path, capsys):
    ltd = log(tmp_path / "ltd", kept=4, seconds=0.5, flops=0.5e12)
    _, result = run(capsys, f"dense={dense}", f"ltd={ltd}", "--baseline", "ltd")
    row = rows(result)["dense"]
    assert (row["compute_saved"], row["wall_clock_saved"]) == (-3.0, -1.0)
    assert row["saving_realised"] is None  # there is none
    assert row["layer_tokens_per_sample"] == pytest.approx(4 / 3)
    assert rows(result)["ltd"]["compute_saved"] is None


def test_flops_count_every_iteration_of_an_interval(dense, tmp_path, capsys):
    # Megatron reports the FLOPs at kept lengths 4 and 8, the last of each interval. The lengths in
    # between are 2, counted as the nearest, and 6, half-way.
    ltd = log(
        tmp_path / "ltd", kept=lambda i: min(2 * i, 8), flops=lambda i: 1e12 if i < 4 else 2e12
    )
    _, result = run(capsys, f"dense={dense}", f"ltd={ltd}")
    assert rows(result)["ltd"]["flops"] == 4 * (1e12 + 1e12 + 1.5e12 + 5 * 2e12)


def test_batch_size_that_grows(dense, tmp_path, capsys):
    grown = log(tmp_path / "grown", batch=lambda i: 2 if i <= 3 else 8)
    _, result = run(capsys, f"dense={dense}", f"grown={grown}")
    row = rows(result)["grown"]
    assert row["samples"] == 3 * 2 + 5 * 8
    assert row["layer_tokens"] == 46 * 32
    assert row["flops"] == 46 * DENSE_FLOPS


def test_sparse_points_and_a_tail_without_interval(dense, tmp_path, capsys):
    ltd = log(tmp_path / "ltd", 11, kept=4, log_interval=4, tensorboard_log_interval=2)
    _, result = run(capsys, f"dense={dense}", f"ltd={ltd}")
    row = rows(result)["ltd"]  # known up to iteration 10
    assert (row["samples"], row["seconds"], row["flops"]) == (40, 10.0, 40 * DENSE_FLOPS)
    assert row["layer_tokens"] == 40 * 24


def test_iterations_without_kept_tokens_are_filled(dense, tmp_path, capsys):
    # fp16: no loss is reported for an iteration whose update was skipped.
    ltd = log(tmp_path / "ltd", kept=4, flops=1e12)
    points = run_logs.read_run(ltd)
    del points.scalars[tags.KEPT_TOKENS][4]
    assert run_logs.total_flops(points) == 32e12


def test_every_point_of_a_long_run_is_kept(tmp_path):
    # TensorBoard itself draws a sample of 10,000.
    folder = log(tmp_path / "long", 10_010, without=["lm loss"], log_interval=5_000)
    assert list(run_logs.read_run(folder).points("batch-size")) == list(range(1, 10_011))


def test_at_or_after():
    points = {2: 20.0, 4: 40.0}
    assert run_logs.at_or_after(points, [1, 2, 3, 4, 5]) == [20, 20, 40, 40, 40]


def test_validation_loss_is_the_one_of_the_training_loop(dense, tmp_path, capsys):
    # When training is done, Megatron validates again and then writes the loss on the test set,
    # both under the tag of the validation loss and at the last iteration.
    other = log(tmp_path / "other", after=(3.5, 7.0))
    _, result = run(capsys, f"dense={dense}", f"other={other}")
    assert rows(result)["other"]["validation_loss"] == 2.75


def test_several_validation_sets(dense, tmp_path, capsys):
    other = log(tmp_path / "other", without=["lm loss validation"])
    with SummaryWriter(other) as writer:
        for name in ("seq_length", "num_layers", "world_size", "consumed_train_samples"):
            writer.add_text(name, "8", global_step=8)
        writer.add_scalar("batch-size", 4, 9)
        writer.add_scalar("batch-size vs samples", 4, 36)
        for tag, loss in {"b": 2.0, "a": 1.0, "a ppl": 2.7, "a vs samples": 5.0}.items():
            writer.add_scalar(f"lm loss validation-{tag}", loss, 9)
    printed, result = run(capsys, f"dense={dense}", f"other={other}")
    assert rows(result)["other"]["validation_loss"] == 1.0
    assert (
        "there are several validation sets; the table shows the loss 'lm loss validation-a'"
        in printed
    )


def test_restart_replaces_what_lay_beyond_its_checkpoint(dense, tmp_path, capsys):
    # Trained to 12, then again from 6 with half the batch, so far to 10; validated at 4 and 8.
    folder = log(tmp_path / "run", 12, seconds=1.0)
    for old in folder.iterdir():  # so that the order of the names is not the order of the starts
        old.rename(folder / "z.tfevents")
    log(folder, 10, start=6, start_samples=24, batch=2, seconds=2.0, validation_loss=1.5)
    _, result = run(capsys, f"dense={dense}", f"run={folder}")
    row = rows(result)["run"]
    assert (row["iteration"], row["samples"]) == (10, 24 + 4 * 2)
    assert (row["validation_iteration"], row["validation_loss"]) == (8, 1.5)
    # Both warm-ups at the pace of the interval that follows: 1-6 and 7-10.
    assert row["seconds"] == 6 * 1.0 + 4 * 2.0
    assert row["flops"] == 32 * DENSE_FLOPS
    assert row["layer_tokens"] == 32 * 32
    assert run_logs.read_run(folder).points("lm loss") == {i: 4 - i / 8 for i in range(1, 11)}


def test_restart_between_log_lines(dense, tmp_path, capsys):
    # The interval 5-8 of the first start was abandoned; 5 and 6 are in no interval that is left.
    folder = log(tmp_path / "run", 8, log_interval=4)
    log(folder, 16, start=6, start_samples=24, log_interval=4, seconds=2.0)
    row = rows(run(capsys, f"dense={dense}", f"run={folder}")[1])["run"]
    assert row["seconds"] == 16 * 2.0  # 1-4 and 7-8 are warm-up, and 9-12 is what follows
    assert row["samples"] == 64


def test_restart_forgets_a_validation_that_it_did_not_repeat(dense):
    log(dense, 10, start=7, start_samples=28, eval_interval=100)
    assert run_logs.validation(run_logs.read_run(dense))[1] == {4: 3.0}


def test_runs_from_the_same_checkpoint(tmp_path, capsys):
    options = {"iterations": 12, "start": 4, "start_samples": 16}
    dense = log(tmp_path / "dense", **options)
    ltd = log(
        tmp_path / "ltd", kept=4, layer_tokens=16 * 32, seconds=0.75, flops=0.75e12, **options
    )
    row = rows(run(capsys, f"dense={dense}", f"ltd={ltd}")[1])["ltd"]
    assert (row["samples"], row["layer_tokens"]) == (48, 16 * 32 + 32 * 24)
    assert (row["seconds"], row["flops"]) == (8 * 0.75, 24e12)
    assert (row["wall_clock_saved"], row["compute_saved"]) == (0.25, 0.625)


def test_start_without_a_step_replaces_nothing(dense, tmp_path, capsys):
    log(dense, 0)
    with SummaryWriter(dense):
        pass
    other = log(tmp_path / "other")
    assert rows(run(capsys, f"dense={dense}", f"other={other}")[1])["dense"]["samples"] == 32


def test_random_ltd_from_a_dense_checkpoint_and_back(dense, tmp_path, capsys):
    folder = log(tmp_path / "run", 4)
    log(folder, 8, start=4, start_samples=16, kept=4, layer_tokens=16 * 32)
    assert run_logs.read_run(folder).last(tags.LAYER_TOKENS) == 16 * 32 + 16 * 24
    log(folder, 10, start=8, start_samples=32)
    joined = run_logs.read_run(folder)
    assert joined.last(tags.LAYER_TOKENS) == 16 * 32 + 16 * 24 + 8 * 32
    assert [*joined.points(tags.KEPT_TOKENS).values()] == [8.0] * 4 + [4.0] * 4 + [8.0] * 2


def test_iso_compute(dense, tmp_path, capsys):
    # 1024 LayerTokens dense; 42 samples of 24 are 1008, 1.6% less, and 43 are 1032, 0.8% more.
    ltd = {n: log(tmp_path / str(n), n, kept=4, batch=1) for n in (42, 43)}
    _, result = run(capsys, f"dense={dense}", *(f"{n}={f}" for n, f in ltd.items()))
    assert [row["iso_compute"] for row in result["runs"]] == [True, False, True]
    assert [row["iso_data"] for row in result["runs"]] == [True, False, False]
    assert [row["layer_tokens_per_sample"] for row in result["runs"]] == [1.0, 0.75, 0.75]
    assert result["verdict"] == (
        "compared with dense: 42 is neither iso-data nor iso-compute, so its savings mean little; "
        "43 is iso-compute (LayerTokens within 1%)"
    )


def test_iso_both(dense, tmp_path, capsys):
    _, result = run(capsys, f"dense={dense}", f"again={log(tmp_path / 'again')}")
    assert "again is iso-data and iso-compute" in result["verdict"]
    assert rows(result)["again"]["compute_saved"] == 0.0
    assert rows(result)["again"]["saving_realised"] is None  # of nothing


@pytest.mark.parametrize(
    ("tag", "flags", "missing"),
    [
        ("iteration-time", ["--log-timers-to-tensorboard"], "compute_saved wall_clock_saved"),
        ("throughput", ["--log-throughput", "--log-timers-to-tensorboard"], "compute_saved"),
        ("lm loss validation", ["--eval-interval"], "validation_loss validation_iteration"),
        ("random-ltd layer tokens", ["random-ltd layer tokens"], "layer_tokens"),
        ("random-ltd kept tokens", ["random-ltd kept tokens"], "flops compute_saved"),
    ],
)
def test_missing_tag(dense, tmp_path, capsys, tag, flags, missing):
    ltd = log(tmp_path / "ltd", kept=4, seconds=0.75, flops=0.75e12, without=[tag])
    printed, result = run(capsys, f"dense={dense}", f"ltd={ltd}")
    (note,) = (note for note in result["notes"] if note.startswith("ltd: "))
    assert all(flag in note for flag in flags)
    assert f"- {note}" in printed
    row = rows(result)["ltd"]
    unknown = {key for key, value in row.items() if value is None}
    assert {*missing.split()} <= unknown
    assert "saving_realised" in unknown or "saved" not in missing
    # What the tag has no part in is there all the same.
    assert row["samples"] == 32
    assert tag == "iteration-time" or row["wall_clock_saved"] == 0.25
    line = next(line for line in printed.splitlines() if line.startswith("ltd "))
    assert line.split().count("-") == len(unknown & {key for key, _ in compare.COLUMNS.values()})


def test_nothing_to_note(dense, tmp_path, capsys):
    _, result = run(capsys, f"dense={dense}", f"again={log(tmp_path / 'again')}")
    assert len(result["notes"]) == 2
    assert "warm-up" in result["notes"][1]


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"iterations": 3}, "only one log interval"),
        ({"world_size": 4}, "different numbers of GPUs"),
        ({"start": 4, "start_samples": 16}, "its log begins at iteration 4, dense's at 0"),
        ({"num_layers": 8, "fp8": "hybrid"}, "num_layers 8, not 4; fp8 hybrid, not None"),
    ],
)
def test_note(dense, tmp_path, capsys, options, note):
    other = log(tmp_path / "other", **options)
    _, result = run(capsys, f"dense={dense}", f"other={other}")
    assert any(n.startswith("other: ") and note in n for n in result["notes"])
    row = rows(result)["other"]
    assert (row["wall_clock_saved"] is None) == ("start" in options or "world_size" in options)
    assert (row["compute_saved"] is None) == ("start" in options)


def test_noisy_times_are_noted(dense, tmp_path):
    other = log(tmp_path / "other", 20, log_interval=2)
    runs = {"dense": run_logs.read_run(dense), "other": run_logs.read_run(other)}
    assert not any("wall-clock is rough" in note for note in compare.notes(runs, "dense"))
    times = runs["other"].scalars[run_logs.ITERATION_TIME]
    times.update({i: 1.0 + 0.06 * (i % 4 == 0) for i in times})
    assert "other: neighbouring log intervals differ by over 5%, so wall-clock is rough" in (
        compare.notes(runs, "dense")
    )
    assert compare.summarise(runs, "dense")[1]["wall_clock_saved"] is not None
    times.update({i: 1.0 + 0.6 * (i % 4 == 0) for i in times})
    assert any("so the time means nothing" in note for note in compare.notes(runs, "dense"))
    row = compare.summarise(runs, "dense")[1]
    assert row["wall_clock_saved"] is row["saving_realised"] is None
    assert row["compute_saved"] is not None


def test_files_hold_full_precision(dense, tmp_path, capsys):
    ltd = log(tmp_path / "ltd", kept=4, flops=1 / 3 * 1e12)
    table = tmp_path / "table.csv"
    _, result = run(capsys, f"dense={dense}", f"ltd={ltd}", "--csv", table)
    with table.open() as file:
        _, row = csv.DictReader(file)
    expected = rows(result)["ltd"]
    assert row.keys() == expected.keys()
    assert float(row["compute_saved"]) == expected["compute_saved"] == pytest.approx(5 / 6)
    assert row["run"] == "ltd"


def test_markdown(dense, tmp_path, capsys):
    ltd = log(tmp_path / "ltd", kept=4, without=["lm loss validation"])
    printed, _ = run(capsys, f"dense={dense}", f"ltd={ltd}", "--markdown")
    lines = printed.splitlines()[:4]
    assert [line.count("|") for line in lines] == [10] * 4
    assert re.fullmatch(r"\| -+ \|( -+: \|){8}", lines[1])
    assert [cell.strip() for cell in lines[3].split("|")][1:4] == ["ltd", "-", "-"]


def test_text_is_aligned(dense, tmp_path, capsys):
    other = log(tmp_path / "other")
    printed, _ = run(capsys, f"dense={dense}", f"a-longer-name={other}")
    assert len({len(line) for line in printed.splitlines()[:3]}) == 1


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 20_000
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_plot_of_three_runs(dense, tmp_path, capsys):
    others = [f"ltd{k}={log(tmp_path / str(k), kept=k)}" for k in (2, 4)]
    png = tmp_path / "plot.png"
    printed, _ = run(capsys, f"dense={dense}", *others, "--plot", png)
    assert size_of_png(png) == (1560, 504)
    assert f"{png} shows the validation loss" in printed


def test_plot_falls_back_to_the_training_loss_of_all_runs(dense, tmp_path, capsys):
    other = log(tmp_path / "other", 201, without=["lm loss validation"])
    log(dense, 100, start=8, start_samples=32)
    png = tmp_path / "plot.png"
    printed, _ = run(capsys, f"dense={dense}", f"other={other}", "--plot", png)
    size_of_png(png)
    assert "shows the training loss, mean of each 2 logged iterations" in printed
    runs = {name: run_logs.read_run(tmp_path / name) for name in ("dense", "other")}
    curves = comparison_plot.loss_curves(runs)[1]
    assert list(curves["other"]) == list(range(2, 201, 2))
    assert curves["other"][2] == 4.0 - 1.5 / 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_plot_of_a_run_that_diverged(dense, tmp_path, capsys, value):
    other = log(tmp_path / "other", validation_loss=value)
    png = tmp_path / "plot.png"
    run(capsys, f"dense={dense}", f"other={other}", "--plot", png)
    size_of_png(png)


def empty(folder):
    folder.mkdir()


def not_there(folder):
    pass


def a_file(folder):
    folder.write_text("")


def garbage(folder):
    folder.mkdir()
    (folder / "events.out.tfevents.1.host.1.0").write_bytes(bytes(range(256)) * 20)


def a_folder_as_file(folder):
    (folder / "events.out.tfevents.1.host.1.0").mkdir(parents=True)


def one_level_up(folder):
    log(folder / "tensorboard")


def no_step(folder):
    log(folder, 0)


def not_megatron(folder):
    log(folder, without=["seq_length"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "holds no TensorBoard event file; give the --tensorboard-dir of a run"),
        (not_there, "is not a folder; give the --tensorboard-dir of a run"),
        (a_file, "is not a folder"),
        (garbage, "holds no event file in which Megatron's arguments can be read"),
        (a_folder_as_file, "cannot be read: "),
        (one_level_up, "holds no TensorBoard event file; did you mean {folder}/tensorboard?"),
        (no_step, "holds no training step yet: train longer"),
        (not_megatron, "holds no event file in which Megatron's arguments can be read"),
    ],
)
def test_wrong_folder(dense, tmp_path, capsys, make, message):
    folder = tmp_path / "wrong"
    make(folder)
    assert compare.main([f"dense={dense}", f"wrong={folder}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"compare: {folder} {message.format(folder=folder)}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a={0}", "a={0}"], "two runs are called a; name each one as NAME=FOLDER"),
        (["{0}", "{0}"], "two runs are called dense;"),
        (["a={0}"], "give two or more runs"),
        (["a={0}", "b={0}", "--baseline", "c"], "--baseline c is not one of the runs: a, b"),
        (["a={0}", "b={0}", "--csv", "{0}/no/such.csv"], "No such file or directory"),
    ],
)
def test_wrong_command_line(dense, capsys, arguments, message):
    assert compare.main([argument.format(dense) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_runs_are_named_after_their_folders(tmp_path):
    texts = [str(tmp_path / "a" / "tensorboard"), str(tmp_path / "lr=1"), "b=x=y"]
    for text in texts[:2]:
        Path(text).mkdir(parents=True)
    named = compare.named_folders(texts)
    assert named == {"a": Path(texts[0]), "lr=1": Path(texts[1]), "b": Path("x=y")}


def test_as_a_command(dense, tmp_path):
    script = [sys.executable, "-m", "megatron_rltd", "compare"]
    result = subprocess.run(
        [*script, f"a={dense}", f"b={tmp_path / 'no'}"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
    result = subprocess.run([*script, f"a={dense}", f"b={dense}"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "b is iso-data and iso-compute" in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom megatron_rltd.__main__ import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'numpy', 'tensorboard', 'matplotlib', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--markdown" in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"


def test_tags_are_those_that_megatron_logs():
    (folder,) = importlib.util.find_spec("megatron.training").submodule_search_locations
    text = (Path(folder) / "training.py").read_text()
    for tag in (run_logs.BATCH_SIZE, run_logs.ITERATION_TIME, run_logs.THROUGHPUT):
        assert f"writer.add_scalar('{tag}', " in text
    assert f"'{run_logs.BATCH_SIZE}{run_logs.VS_SAMPLES}', batch_size, args.consumed_train" in text
    assert "'{} validation{}'.format(key, suffix)" in text
