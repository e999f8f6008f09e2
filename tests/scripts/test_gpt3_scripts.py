"""The scripts of examples/gpt3_1.3b on one machine: what they run, what they refuse, how they end.

tests/scripts/slurm has the same under SLURM.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests.commands.test_plan_command import command as plan
from tests.parallel import ROOT
from tests.scripts.gpt3_scripts import (
    FOLDER,
    LIB,
    SCRIPTS,
    SETTINGS,
    TINY,
    bash,
    environment,
    flags_of,
    last_iteration,
    processes_with,
    starts,
    stub_in,
)
from tests.scripts.test_quickstart import processes_of

DATA = {"DATA_PATH": "/data/pile", "TOKENIZER": "/data/gpt2"}

# What the published launch scripts of the experiment have in common (arXiv 2211.11586, 2212.03597).
RECIPE = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 "
    "--max-position-embeddings 2048 --init-method-std 0.013 --global-batch-size 512 --min-lr 1e-6 "
    "--lr-decay-style cosine --lr-warmup-samples 1464844 --adam-beta1 0.9 --adam-beta2 0.95 "
    "--weight-decay 0.1 --clip-grad 1.0 --split 949,50,1 --seed 1234"
)
OURS = (
    "--bf16 --cross-entropy-loss-fusion --cross-entropy-fusion-impl native "
    "--transformer-impl transformer_engine --ckpt-format torch_dist --exit-signal-handler "
    "--exit-signal SIGUSR2 --num-workers 0 "
    "--use-distributed-optimizer --log-throughput --data-path /data/pile "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /data/gpt2"
)
DENSE = "--lr {} --train-samples {}"
LTD = (
    "--lr {} --random-ltd --random-ltd-min-tokens 128 --random-ltd-increment 16 "
    "--random-ltd-grow-micro-batch 2 --random-ltd-strata 16 --random-ltd-preflight "
    "--random-ltd-ramp-iters {} --train-layer-tokens {}000000000"
)
LTD_300B = LTD.format("2e-4", 200000, 300)
LAYER_TOKEN_LR = "--layer-token-lr"
LAYOUT = (
    "--tensor-model-parallel-size {} --pipeline-model-parallel-size {} --context-parallel-size {}"
)
# {script: (flags, layout, iterations, raw tokens in billions, peak learning rate)}
GOLDEN = {
    "dense_300b": (DENSE.format("2e-4", 146484375), (1, 1, 1), 286_102, 300.0, 2e-4),
    "dense_200b": (DENSE.format("3e-4", 97656250), (1, 1, 1), 190_734, 200.0, 3e-4),
    "dense_150b": (DENSE.format("4e-4", 73242188), (1, 1, 1), 143_051, 150.0, 4e-4),
    "ltd_300b": (f"{LTD_300B} {LAYER_TOKEN_LR}", (1, 1, 1), 372_757, 390.9, 2e-4),
    "ltd_200b": (
        f"{LTD.format('3e-4', 133333, 200)} {LAYER_TOKEN_LR}",
        (1, 1, 1),
        248_505,
        260.6,
        3e-4,
    ),
    "ltd_150b": (
        f"{LTD.format('4e-4', 100000, 150)} {LAYER_TOKEN_LR}",
        (1, 1, 1),
        186_379,
        195.4,
        4e-4,
    ),
    "ltd_300b_plain_lr": (LTD_300B, (1, 1, 1), 372_757, 390.9, 2e-4),
    "ltd_300b_constant": (
        "--lr 2e-4 --random-ltd --random-ltd-constant --random-ltd-min-tokens 1536 "
        "--random-ltd-increment 16 --random-ltd-grow-micro-batch 2 --random-ltd-strata 16 "
        "--random-ltd-preflight "
        f"--train-layer-tokens 300000000000 {LAYER_TOKEN_LR}",
        (1, 1, 1),
        371_160,
        389.2,
        2e-4,
    ),
    "ltd_300b_tp2": (f"{LTD_300B} {LAYER_TOKEN_LR}", (2, 1, 1), 372_757, 390.9, 2e-4),
    "ltd_300b_tp2_sp": (
        f"{LTD_300B} {LAYER_TOKEN_LR} --sequence-parallel",
        (2, 1, 1),
        372_757,
        390.9,
        2e-4,
    ),
    "ltd_300b_pp2": (
        f"{LTD_300B} {LAYER_TOKEN_LR}".replace("batch 2", "batch 16"),  # of one sample
        (1, 2, 1),
        372_757,
        390.9,
        2e-4,
    ),
    "ltd_300b_cp2": (f"{LTD_300B} {LAYER_TOKEN_LR}", (1, 1, 2), 372_757, 390.9, 2e-4),
}
# These decide what is compared with what: a script has them as given above or not at all.
DECISIVE = ("--random-ltd", "--layer-token-lr", "--train-", "--sequence-parallel", "--lr-decay")


def test_every_script_has_its_golden_values():
    assert set(GOLDEN) == set(SCRIPTS)


@pytest.mark.parametrize("name", GOLDEN)
def test_dry_run_prints_the_recipe(name, tmp_path):
    status, output, said = bash(name, cwd=tmp_path, DRY_RUN="1", RUN_DIR=tmp_path / "run", **DATA)
    assert (status, output.count("\n")) == (0, 1), said
    words = shlex.split(output)
    assert words[1:4] == ["-m", "megatron_rltd", "pretrain_gpt"]
    flags = flags_of(words[4:])
    own, layout, *_ = GOLDEN[name]
    golden = flags_of(f"{RECIPE} {OURS} {own} {LAYOUT.format(*layout)}".split())
    golden["--micro-batch-size"] = ["1" if layout[1] > 1 else "8"]  # a pipeline needs many
    assert {flag: flags.get(flag) for flag in golden} == golden
    decisive = {flag for flag in flags if flag.startswith(DECISIVE)}
    assert decisive <= set(golden)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", GOLDEN)
def test_megatron_takes_the_flags_for_the_experiment(name):
    line = f"--gpus 64 --json --from {FOLDER / name}.sh -- --vocab-size 50257"
    status, output = plan(line)
    assert status == 0, output
    numbers = json.loads(output)
    _, layout, steps, raw_tokens, peak = GOLDEN[name]
    assert numbers["runs"]["run"]["iterations"] == steps
    assert numbers["runs"]["run"]["raw_tokens"] / 1e9 == pytest.approx(raw_tokens, abs=0.05)
    assert numbers["data_parallel_size"] == 64 // (layout[0] * layout[1] * layout[2])
    rate = numbers["learning_rate"]
    assert (rate["maximum"], rate["minimum"]) == (peak, 1e-6)
    last = list(rate["points"].values())[-1]
    assert (last["iteration"], last["learning_rate"]) == (steps, pytest.approx(1e-6, rel=1e-4))
    if name == "ltd_300b":
        # 16,571 iterations of warm-up by LayerTokens, 2,862 by samples.
        assert rate["warmup_over"]["iteration"] == 16_571
    if name in ("ltd_300b_plain_lr", "dense_300b"):
        assert rate["warmup_over"]["iteration"] == 2_862


def test_scripts_differ_in_their_settings_alone():
    heads, tails = set(), set()
    for name in SCRIPTS:
        head, settings, tail = re.split(
            r"^(: .*?\n)\n", (FOLDER / f"{name}.sh").read_text(), flags=re.MULTILINE | re.DOTALL
        )
        lines = head.splitlines()
        assert lines[-1] == "set -euo pipefail"
        assert lines[-2].startswith("# ")
        heads.add("\n".join(lines[:-2]))
        tails.add(tail)
        assert set(re.findall(r"\{(\w+):=", settings)) <= SETTINGS
    assert len(heads) == len(tails) == 1
    (header,) = heads
    for option in ("--requeue", "--signal=TERM@600", "--open-mode=append"):
        assert option in header


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_shellcheck_has_nothing_to_say():
    folders = ("benchmarks", "examples", "tests", "tools")
    names = [str(f.relative_to(ROOT)) for name in folders for f in (ROOT / name).rglob("*.sh")]
    assert len(names) > len(SCRIPTS) + 9
    result = subprocess.run(
        ["shellcheck", "-x", *names], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_every_documented_setting_is_read():
    code = "".join(
        re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE)
        for file in (FOLDER / "pretrain.sh", *LIB.glob("*.sh"))
    )
    for setting in SETTINGS:
        assert re.search(rf"\b{setting}\b", code), setting


def test_settings_reach_the_command(tmp_path):
    settings = {
        "EXTRA_ARGS": "--async-save --lr 5e-5",
        "LAUNCHER": "apptainer exec --nv image.sif",
        "PYTHON": "python3.12",
        "PRETRAIN_GPT": "/megatron/pretrain_gpt.py",
        "EXIT_MINUTES": "55",
        "DATA_PATH": "0.3 /data/a 0.7 /data/b",
        "PRECISION": "fp16",
    }
    status, output, said = bash("ltd_300b", DRY_RUN="1", **{**DATA, **settings})
    assert status == 0, said
    assert output.startswith("python3.12 -m megatron_rltd /megatron/pretrain_gpt.py ")
    assert output.rstrip().endswith("--async-save --lr 5e-5")
    for part in (
        "--data-path 0.3 /data/a 0.7 /data/b --",
        " --exit-duration-in-mins 55 ",
        " --fp16 ",
    ):
        assert part in output
    assert "--bf16" not in output
    assert said.rstrip().endswith("; each apptainer exec --nv image.sif")


def test_fusions_are_those_that_work(tmp_path):
    def flags(**settings):
        status, output, said = bash("ltd_300b", DRY_RUN="1", **{**DATA, **settings})
        assert status == 0, said
        found = flags_of(shlex.split(output)[4:])
        return "--cross-entropy-loss-fusion" in found, "--no-gradient-accumulation-fusion" in found

    # What Megatron looks for, here and in an environment that has it.
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert flags() == (True, not has_apex)
    assert flags(PYTHONPATH=tmp_path) == (True, False)
    assert flags(PYTHONPATH=tmp_path, GRADIENT_FUSION="0") == (True, True)
    assert flags(GRADIENT_FUSION="1") == (True, False)
    assert flags(LAUNCHER="apptainer exec --nv image.sif") == (True, False)
    assert flags(CONTAINER="") == (True, not has_apex)
    # Its gradients are bfloat16 in any case.
    for precision in ("fp16", "fp32"):
        assert not flags(PRECISION=precision)[0]
    assert not flags(LOSS_FUSION="0")[0]


FEW = {"PROCESSES": "8", **DATA}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ltd_300b", {**FEW, "DATA_PATH": ""}, "DATA_PATH is not set: see the top of"),
        ("ltd_300b", {**FEW, "TOKENIZER": ""}, "TOKENIZER is not set"),
        ("ltd_300b", FEW, "/data/gpt2/tokenizer_config.json is missing or empty: check DATA_PATH"),
        ("dense_300b", FEW, "/data/pile.bin is missing or empty: check DATA_PATH"),
        ("dense_300b", {**FEW, "DATA_PATH": "0.3 /d/a 1 /d/b"}, "/d/b.idx is missing or empty"),
        (
            "ltd_300b_tp2",
            {**FEW, "PROCESSES": "3"},
            r"3 processes do not divide by TP\*PP\*CP = 2\*1\*1 = 2: change TP, PP, CP",
        ),
        (
            "ltd_300b_pp2",
            {"SCALE": "smoke", "PROCESSES": "6"},
            "GLOBAL_BATCH_SIZE=16 does not divide by MICRO_BATCH_SIZE=1 times 3 data-para",
        ),
        ("ltd_300b", DATA, "there is no GPU here: sbatch this script, set PROCESSES, or use SCALE"),
        ("ltd_300b", {"SCALE": "smoke", "SP": "false"}, "SP=false is not 0 or 1"),
        ("ltd_300b", {"SCALE": "smoke", "GRADIENT_FUSION": "auto"}, "GRADIENT_FUSION=auto is not"),
        (
            "ltd_300b",
            {"SCALE": "smoke", "TOKENS": "1000000"},
            "TOKENS=1000000, RAMP_ITERS=200000: SCALE=smoke",
        ),
        (
            "ltd_300b",
            {"SCALE": "smoke", "EXTRA_ARGS": "--lr 1 --load=x"},
            "EXTRA_ARGS has --load, and a requeued job would then not go on",
        ),
        (
            "ltd_300b",
            {"SCALE": "smoke", "START_FROM": "no"},
            "START_FROM=no is not a folder of checkpoints",
        ),
        (
            "ltd_300b",
            {"SCALE": "smoke", "TP": "3", "PROCESSES": "3"},
            "TP=3 does not divide the 4 attention heads",
        ),
        ("ltd_300b", {"SCALE": "smoke", "PP": "3"}, "PP=3 does not divide the 4 layers"),
        ("ltd_300b", {"SCALE": "tiny"}, "SCALE=tiny is not full or smoke"),
        ("ltd_300b", {"SCALE": "smoke", "TP": "two"}, "TP=two is not a whole number above 0"),
        (
            "ltd_300b",
            {"SCALE": "smoke", "METHOD": "drop"},
            "METHOD=drop is not dense, ltd or const",
        ),
        ("ltd_300b", {"SCALE": "smoke", "PRECISION": "16"}, "PRECISION=16 is not bf16, fp16 or"),
        (
            "ltd_300b",
            {"SCALE": "smoke", "CONTAINER": "a.sqsh"},
            "CONTAINER is for sbatch and pyxis; here use LAUNCHER",
        ),
        ("ltd_300b", {"SCALE": "smoke", "RUN_DIR": "/dev/null/x"}, "RUN_DIR=/dev/null/x cannot be"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_starts(tmp_path, name, settings, message):
    run = tmp_path / "run"
    stub = stub_in(tmp_path)
    status, output, said = bash(name, **{"RUN_DIR": run, "PYTHON": stub, **settings})
    assert (status, output) == (2, ""), said
    assert re.search(f"^{name}: .*{message}", said, re.MULTILINE), said
    assert not run.exists()
    if "is missing" not in message and "cannot be" not in message:
        # Nor is there a command to print.
        is_plan = any(part in message for part in ("no GPU", "is not set", "is not a folder"))
        assert bash(name, DRY_RUN="1", **settings)[0] == (0 if is_plan else 2)


def test_options_are_an_error(tmp_path):
    status, _, said = bash("ltd_300b", "--lr", "1", SCALE="smoke", RUN_DIR=tmp_path / "run")
    assert status == 2
    assert "there are no options (--lr): settings are variables, as in EXTRA_ARGS='--lr'" in said


def test_all_problems_are_said_at_once():
    status, _, said = bash("ltd_300b_tp2", PROCESSES="5", GLOBAL_BATCH_SIZE="512")
    assert status == 2
    assert said.count("\n") == said.count("ltd_300b_tp2: ") == 3


def stubbed(folder, name="ltd_300b", **settings):
    """Run a script with the stand-in for Python."""
    settings = {"SCALE": "smoke", "RUN_DIR": folder / "run", "PYTHON": stub_in(folder), **settings}
    return bash(name, **settings)


def test_one_process_for_each_gpu(tmp_path):
    status, output, said = stubbed(tmp_path, CUDA_VISIBLE_DEVICES="4,5,6,7", MASTER_PORT="17017")
    assert status == 130, said
    ranks = sorted(re.findall(r"^rank .*", output, re.MULTILINE))
    assert ranks == [f"rank {i} of 4, local {i}, 127.0.0.1:17017 1  " for i in range(4)]
    # A script that needs more of them starts as many where there is no GPU.
    status, output, said = stubbed(tmp_path, "ltd_300b_cp2")
    assert output.count(" of 2, ") == 2, output + said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "nothing"),
    ],
)
def test_memory_is_allocated_in_segments_that_grow(tmp_path, monkeypatch, settings, expected):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    _, output, said = stubbed(tmp_path, STUB="memory", **settings)
    assert f"rank 0 allocates by {expected}\n" in output, said


def test_a_stopped_run_is_continued_until_it_is_finished(tmp_path):
    endings = [stubbed(tmp_path) for _ in range(4)]
    assert [ending[0] for ending in endings] == [130, 130, 0, 0]
    last_lines = [ending[1].splitlines()[-1] for ending in endings]
    for line, iteration in zip(last_lines[:2], (2, 4), strict=True):
        assert f"stopped as requested, checkpoint of iteration {iteration} of 6; the same" in line
    assert last_lines[2:] == ["ltd_300b: finished: iteration 6 of 6"] * 2
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [line for ending in endings for line in ending[1].splitlines()] == log.splitlines()


def test_a_failed_run_says_so_and_leaves_no_process(tmp_path):
    status, output, _ = stubbed(tmp_path, STUB="fails", PROCESSES="2")  # the other sleeps 600 s
    assert status == 1
    assert "training failed (status 1), see above" in output.splitlines()[-1]
    assert processes_with(tmp_path) == []
    assert stubbed(tmp_path, STUB="is-stuck")[0] == 1


def test_without_a_python_of_its_own_it_takes_what_is_there(tmp_path):
    python3 = tmp_path / "python3"
    python3.write_text(f'#!/bin/bash\necho "here" >>{tmp_path}/used\nexec {sys.executable} "$@"\n')
    python3.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    settings = {"PATH": path, "SCALE": "smoke", "EXTRA_ARGS": "--no-such-flag"}
    status, output, said = bash("ltd_300b", RUN_DIR=tmp_path / "run", PYTHON="", **settings)
    assert status == 1, said
    assert "unrecognized arguments: --no-such-flag" in output
    assert output.splitlines()[-1].startswith("ltd_300b: training failed (status 1), see above")
    assert (tmp_path / "used").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_two_runs_do_not_share_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        holder = subprocess.Popen(["flock", str(lock.fileno())], pass_fds=[lock.fileno()])
        assert holder.wait() == 0
        status, _, said = stubbed(tmp_path)
    assert status == 2
    assert f"another run writes to RUN_DIR={tmp_path / 'run'}" in said
    assert stubbed(tmp_path)[0] == 130


@pytest.mark.parametrize(
    ("name", "whole_group", "sent"),
    [("ltd_300b", False, signal.SIGTERM), ("ltd_300b_tp2", True, signal.SIGINT)],
)
def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, name, whole_group, sent):
    """With Megatron. A terminal's Ctrl-C comes to all processes of the group, a kill to one."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        ["bash", str(FOLDER / f"{name}.sh")],
        env=environment(RUN_DIR=run, **TINY),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        # After a checkpoint: the process that Megatron saves with is there.
        if re.search(r"\] iteration +6/", line):
            (os.killpg if whole_group else os.kill)(process.pid, sent)
            break
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == 130, "".join(output) + rest
    assert "Traceback" not in rest
    stopped_at = last_iteration(run)
    assert f"checkpoint of iteration {stopped_at} of " in rest.splitlines()[-1]
    assert processes_of(process.pid) == processes_with(run) == []
    if sent == signal.SIGTERM:
        status, output, said = bash(name, RUN_DIR=run, **TINY)
        assert status == 0, output + said
        first, second = starts(run)
        length = last_iteration(run)
        assert [*first, *second] == list(range(1, length + 1))
        assert output.splitlines()[-1] == f"{name}: finished: iteration {length} of {length}"
        kept = [values["random-ltd kept tokens"] for values in (first | second).values()]
        assert kept == sorted(kept)
        assert (kept[0], kept[-1]) == (16, 128)


@pytest.mark.parametrize(
    ("name", "processes"), [("dense_150b", 1), ("ltd_300b_constant", 1), ("ltd_300b_pp2", 2)]
)
def test_other_experiments_train(tmp_path, name, processes):
    run = tmp_path / "run"
    settings = {**TINY, "TOKENS": "90000000000", "PROCESSES": str(processes)}
    status, output, said = bash(name, RUN_DIR=run, **settings)
    assert status == 0, output + said
    (steps,) = starts(run)
    assert list(steps) == list(range(1, max(steps) + 1))
    assert f"finished: iteration {max(steps)} of {max(steps)}" in output
    assert ("random-ltd kept tokens" in steps[1]) == name.startswith("ltd")


def test_weights_to_start_from_are_taken_once(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    settings = {**TINY, "TOKENS": "60000000000", "PROCESSES": "1"}
    assert bash("dense_300b", RUN_DIR=first, **settings)[0] == 0
    settings |= {"START_FROM": str(first / "checkpoints")}
    status, output, said = bash("dense_300b", RUN_DIR=second, **settings)
    assert status == 0, output + said
    (fresh,), (tuned,) = starts(first), starts(second)
    assert list(fresh) == list(tuned)
    assert tuned[1]["lm loss"] < fresh[1]["lm loss"]
