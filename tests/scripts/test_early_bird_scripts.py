"""The scripts of examples/early_bird: what each phase runs, and that any start goes on.

tests/scripts/slurm has the chain under SLURM.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_plan_command import command as plan
from tests.parallel import ROOT
from tests.scripts import gpt3_scripts
from tests.scripts.gpt3_scripts import (
    LIB,
    bash,
    environment,
    flags_of,
    processes_with,
    settings_of,
    starts,
)

FOLDER = ROOT / "examples" / "early_bird"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*_*b.sh"))
OF_THE_MODEL = gpt3_scripts.FOLDER / "pretrain.sh"
TRACKER = "latest_checkpointed_iteration.txt"

SEARCH = (
    "--early-bird --early-bird-num-attention-heads 12 --early-bird-ffn-hidden-size 4864 "
    "--early-bird-interval 2861 --early-bird-until 57220"
)
TICKET = "--num-attention-heads 12 --kv-channels 128 --ffn-hidden-size 4864"
LTD = (
    "--random-ltd --random-ltd-min-tokens 128 --random-ltd-increment 16 --random-ltd-strata 16 "
    "--random-ltd-ramp-iters 200000 --random-ltd-grow-micro-batch 2 --random-ltd-preflight "
    "--layer-token-lr --train-layer-tokens"
)
# {script: (folder of the next run without a ticket, and its flags)}
GOLDEN = {
    "ticket_300b": ("dense", f"{SEARCH} --train-samples 146484375"),
    "random_300b": ("dense", f"{SEARCH} --train-samples 146484375"),
    "scratch_300b": ("scratch", f"{TICKET} --train-samples 160327168"),
    "ltd_ticket_300b": ("dense", f"{SEARCH} {LTD} 300000000000"),
}

# Stands in for Python: each start of training trains two iterations and saves, until there are six;
# a search has its ticket at four, and then trains nothing more.
STUB = r"""#!/bin/bash
[ "$1" != -c ] || exit 1  # it has no APEX
after() { while [ $# -gt 0 ]; do [ "$1" != "$flag" ] || echo "$2"; shift; done; }
flag=--save folder=$(after "$@")
case " $* " in
  *"/report.py emerged "*) [ -e "$3/emerged" ] || exit 3; exit ;;
  *"/report.py table "*) echo "the table of $3"; exit ;;
  *"/draw_ticket.py "*)
    echo "draws ${*:2}"
    scratch=$(dirname "$folder")/.checkpoints-scratch
    mkdir "$scratch" || exit 9
    if [ "$STUB" = slow-draw ]; then exec sleep 600; fi
    [ "$STUB" != no-draw ] || exit 2
    echo 4 >"$scratch/latest_checkpointed_iteration.txt"
    mv -T "$scratch" "$folder"
    exit ;;
esac
echo "rank $RANK trains in $folder"
if [ "$STUB" = slow-train ]; then exec sleep 601; fi
[ "$RANK" = 0 ] || exit 0
[ ! -e "$folder/emerged" ] || exit 0
mkdir -p "$folder"
at=$(cat "$folder/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0)
[ "$at" -ge 6 ] || at=$((at + 2))
echo " [now] iteration $at/  6 | lm loss: 1.0E+00 |"
echo "$at" >"$folder/latest_checkpointed_iteration.txt"
[ "$at" = 4 ] && [ "$STUB" != never-emerges ] || exit 0
case " $* " in *" --early-bird "*) touch "$folder/emerged" ;; esac
if [ "$STUB" = stopped ]; then kill -TERM "$(ps -o ppid= "$PPID" | tr -d ' ')"; sleep 2; fi
"""


def run(name, *arguments, **settings):
    return bash(name, *arguments, folder=FOLDER, **settings)


def stub_in(folder):
    path = folder / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


def stubbed(folder, name="ticket_300b", **settings):
    settings = {"SCALE": "smoke", "RUN_DIR": folder / "run", "PYTHON": stub_in(folder), **settings}
    return run(name, **settings)


def test_every_script_has_its_golden_values():
    assert set(GOLDEN) == set(SCRIPTS)


def flags(name, **settings):
    status, output, said = run(name, DRY_RUN="1", **settings)
    assert (status, output.count("\n")) == (0, 1), said
    return flags_of(shlex.split(output)[4:])


@pytest.mark.parametrize("name", GOLDEN)
def test_dry_run_prints_what_comes_next(name, tmp_path):
    folder, golden = GOLDEN[name]
    found, expected = flags(name, RUN_DIR=tmp_path), flags_of(golden.split())
    assert {flag: found.get(flag) for flag in expected} == expected
    decisive = ("--early-bird", "--random-ltd", "--train-", "--kv-channels", "--ffn-", "--layer-to")
    assert {flag for flag in found if flag.startswith(decisive)} <= set(expected)
    assert found["--save"] == found["--load"] == [f"{tmp_path / folder}/checkpoints"]
    assert found["--lr"] == ["2e-4"]
    assert "--use-distributed-optimizer" in found and "--bf16" in found
    # All else is the recipe of GPT-3 1.3B.
    script = "ltd_300b" if name.startswith("ltd") else "dense_300b"
    model = flags_of(shlex.split(bash(script, DRY_RUN="1", RUN_DIR=tmp_path)[1])[4:])
    differing = {flag for flag in {*found, *model} if found.get(flag) != model.get(flag)}
    folders = {"--save", "--load", "--tensorboard-dir"}
    assert differing - folders <= set(expected)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ticket_300b", "ticket"),
        ("random_300b", "ticket-random-seed1"),
        ("ltd_ticket_300b", "ticket"),
    ],
)
def test_a_ticket_that_is_there_comes_next(name, folder, tmp_path):
    search = flags(name, RUN_DIR=tmp_path)
    checkpoints = tmp_path / folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / TRACKER).write_text("57221")
    found = flags(name, RUN_DIR=tmp_path)
    assert found["--save"] == found["--load"] == [str(checkpoints)]
    expected = flags_of(TICKET.split())
    assert {flag: found[flag] for flag in expected} == expected
    # The schedule is that of the search.
    ours = {"--save", "--load", "--tensorboard-dir", *expected}
    rest = {k: v for k, v in found.items() if k not in ours}
    kept = {k: v for k, v in search.items() if k not in ours and not k.startswith("--early-bird")}
    assert rest == kept


@pytest.mark.parametrize("ltd", [0, 1])
@pytest.mark.parametrize("scale", ["full", "smoke"])
def test_the_small_model_computes_as_much(ltd, scale, tmp_path):
    """Its TOKENS are those of the plan of search and ticket."""
    plans = []
    for name in ("ticket_300b", "scratch_300b"):
        settings = {"RUN_DIR": tmp_path, "SCALE": scale, "LTD": ltd, "DRY_RUN": "1"}
        status, output, said = run(name, **settings)
        assert status == 0, said
        (tmp_path / name).write_text(output)
        more = "-- --vocab-size 50257" if scale == "full" else ""
        status, output = plan(f"--gpus 1 --json --from {tmp_path / name} {more}")
        assert status == 0, output
        plans.append(json.loads(output))
    chain, scratch = plans
    *_, (when, draw) = chain["ticket"]["draws"].items()
    assert when.startswith("--early-bird-until")
    assert scratch["runs"]["run"]["iterations"] == draw["from_scratch"]["iterations"]
    assert scratch["ticket"] is None
    assert bool(chain["dropped_layers"]) == bool(scratch["dropped_layers"]) == bool(ltd)
    if scale == "full" and not ltd:
        assert round(draw["in_units_of_run"], 3) == 0.743
        assert draw["iteration"] == 57_221


def test_scripts_differ_in_their_settings_alone():
    texts = set()
    of_the_chain = settings_of(FOLDER / "chain.sh")
    for name in SCRIPTS:
        text = (FOLDER / f"{name}.sh").read_text()
        head, settings, tail = re.split(
            r"^(: .*?\n)\n", re.sub(r"^# [^\n]*\n", "", text, flags=re.M), flags=re.M | re.S
        )
        assert set(re.findall(r"\{(\w+):=", settings)) <= of_the_chain
        texts.add(head + tail)
    assert len(texts) == 1
    for option in ("--requeue", "--signal=TERM@600", "--open-mode=append"):
        assert option in min(texts)


def test_every_documented_setting_is_read():
    files = (FOLDER / "chain.sh", OF_THE_MODEL, *LIB.glob("*.sh"))
    code = "".join(re.sub(r"^#.*\n", "", f.read_text(), flags=re.MULTILINE) for f in files)
    for setting in settings_of(FOLDER / "chain.sh"):
        assert re.search(rf"\b{setting}\b", code), setting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TICKET_HEADS": "none"}, "TICKET_HEADS=none is not a whole number above 0"),
        ({"INTERVAL": "0"}, "INTERVAL=0 is not a whole number above 0"),
        ({"SIGNAL": "taylor"}, "SIGNAL=taylor is not norm or random"),
        ({"ARM": "both"}, "ARM=both is not ticket or scratch"),
        ({"LTD": "yes"}, "LTD=yes is not 0 or 1"),
        ({"SCALE": "full", "PROCESSES": "8"}, "DATA_PATH is not set: see the top of"),
        ({"ARM": "scratch", "TP": "2", "PROCESSES": "2"}, "TP=2 does not divide the 3 attention"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_starts(tmp_path, settings, message):
    status, output, said = stubbed(tmp_path, **settings)
    assert (status, output) == (2, ""), said
    assert f"ticket_300b: {message}" in said
    assert not (tmp_path / "run").exists()


def test_one_script_goes_through_all_phases(tmp_path):
    """TOKENS is given, and exported: what a start scales down must not be scaled by the next."""
    settings = {"TOKENS": "1500000000000", "PROCESSES": "2"}
    folder = tmp_path / "run"
    status, output, said = stubbed(tmp_path, **settings)
    assert status == 130, output + said
    assert output.splitlines()[-1].endswith("of iteration 2 of 6; the same command continues")
    status, output, said = stubbed(tmp_path, **settings)
    assert status == 0, output + said
    dense, ticket = folder / "dense" / "checkpoints", folder / "ticket" / "checkpoints"
    said = [
        "from iteration 2, 2 processes",
        f"rank 0 trains in {dense}\n",
        f"draws --load {dense} --save {ticket} --signal norm\n",
        "the ticket is drawn; now it trains\n",
        "from iteration 4, 2 processes",
        f"rank 0 trains in {ticket}\n",
        f"the table of {folder}\n",
        "finished: iteration 6 of 6\n",
    ]
    places = [output.index(part) for part in said]
    assert places == sorted(places)
    # Each run has its own log, and what was printed is all of both.
    logs = [(folder / name / "log.txt").read_text() for name in ("dense", "ticket")]
    assert output == logs[0][-len(output) + len(logs[1]) :] + logs[1]
    status, output, said = stubbed(tmp_path, **settings)
    assert status == 0 and "finished: iteration 6 of 6" in output.splitlines()[-1]
    assert "draws" not in output and str(dense) not in output
    # The control draws from the same dense checkpoint and trains nothing dense.
    status, output, said = stubbed(tmp_path, "random_300b", **settings)
    assert status == 0, output + said
    random = folder / "ticket-random-seed1" / "checkpoints"
    assert f"draws --load {dense} --save {random} --signal random --seed 1\n" in output
    assert "iteration 6/" in output and (dense / TRACKER).read_text() == "4\n"


def test_a_draw_that_fails_or_is_stopped_is_made_again(tmp_path):
    folder = tmp_path / "run"
    assert stubbed(tmp_path)[0] == 130
    status, output, _ = stubbed(tmp_path, STUB="no-draw")
    assert status == 1
    assert "the ticket was not drawn, see above" in output.splitlines()[-1]
    for sent, expected in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            ["bash", str(FOLDER / "ticket_300b.sh")],
            env=environment(
                SCALE="smoke", RUN_DIR=folder, PYTHON=stub_in(tmp_path), STUB="slow-draw"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for line in process.stdout:
            if line.startswith("draws"):
                break
        if sent == signal.SIGKILL and shutil.which("flock"):
            # What it leaves behind goes on, and keeps others out.
            process.kill()
            assert process.wait(60) == expected
            status, _, said = stubbed(tmp_path)
            assert status == 2 and "another run writes to" in said
            (left,) = drawing(tmp_path)
            os.kill(left, signal.SIGKILL)
            process.stdout.close()
            break
        process.send_signal(sent)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == expected, rest
        assert "stopped while the ticket was drawn; the same command draws it" in rest
        assert not drawing(tmp_path)
    assert not (folder / "ticket" / "checkpoints").exists()
    status, output, said = stubbed(tmp_path)
    assert status == 0, output + said
    assert not list((folder / "ticket").glob(".checkpoints-*"))


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_ranks_of_a_killed_script_keep_others_out(tmp_path):
    settings = environment(
        SCALE="smoke", RUN_DIR=tmp_path / "run", PYTHON=stub_in(tmp_path), STUB="slow-train"
    )
    with subprocess.Popen(
        ["bash", str(FOLDER / "ticket_300b.sh")],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while "trains in" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
        process.wait(60)
        status, _, said = stubbed(tmp_path)
        left = drawing(tmp_path, b"601")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.stdout.close()
    assert left
    assert status == 2 and "another run writes to" in said
    assert stubbed(tmp_path)[0] == 130


def test_a_search_that_is_stopped_as_it_ends_draws_nothing(tmp_path):
    assert stubbed(tmp_path)[0] == 130
    status, output, said = stubbed(tmp_path, STUB="stopped")
    assert status == 130, output + said
    assert "draws" not in output
    assert "stopped as requested, checkpoint of iteration 4 of 6" in output.splitlines()[-1]
    status, output, said = stubbed(tmp_path)
    assert status == 0 and "draws --load" in output, output + said


def drawing(folder, seconds=b"600") -> list[int]:
    """Return the stand-ins for the draw, or the ranks, that are alive: they sleep so long."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            values = (entry / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        is_ours = f"\0RUN_DIR={folder / 'run'}".encode() in b"\0" + values
        if is_ours and seconds in words or str(folder / "python").encode() in words:
            found.append(int(entry.name))
    return found


def test_a_run_that_ends_without_a_ticket_says_so(tmp_path):
    endings = [stubbed(tmp_path, STUB="never-emerges") for _ in range(3)]
    assert [ending[0] for ending in endings] == [130, 130, 1]
    last_line = endings[-1][1].splitlines()[-1]
    assert (
        "the run has ended, but no ticket has emerged: the last check was before UNTIL=9"
        in last_line
    )


# 17 iterations of 8 samples in a model of a width of 64, whose ticket is drawn after the fifth.
TINY = {
    **gpt3_scripts.TINY,
    "EXTRA_ARGS": f"{gpt3_scripts.TINY['EXTRA_ARGS']} --kv-channels 16",
    "TICKET_HEADS": "2",
    "TICKET_FFN": "128",
    "INTERVAL": "1",
    "UNTIL": "4",
    "SAVE_INTERVAL": "2",
    "PROCESSES": "1",
    "SEARCH_ARGS": "--early-bird-threshold 0",
}


def start(folder, until) -> tuple[subprocess.Popen, str]:
    """Start the chain and read its output up to a pattern; return it and what was read."""
    process = subprocess.Popen(
        ["bash", str(FOLDER / "ticket_300b.sh")],
        env=environment(RUN_DIR=folder, **TINY),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = ""
    for line in process.stdout:
        output += line
        if re.search(until, line):
            return process, output
    raise AssertionError(output)


def test_a_chain_that_is_killed_and_stopped_comes_to_its_end(tmp_path):
    """With Megatron: SIGKILL in the search, SIGTERM while the ticket trains, and once more."""
    folder = tmp_path / "run"
    process, output = start(folder, r"\] iteration +3/")
    process.kill()
    for number, _ in processes_with(folder):
        os.kill(number, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    if shutil.which("flock"):  # what was killed may take a moment to end
        free = ["flock", "--wait", "60", str(folder / "dense" / "lock"), "true"]
        subprocess.run(free, check=True)
    assert saved_in(folder / "dense") == 2

    process, output = start(folder, r"\] iteration +9/")
    os.kill(process.pid, signal.SIGTERM)
    output += process.communicate(timeout=600)[0]
    assert process.returncode == 130, output
    assert "continues with the masks of iterations 1" in output
    assert "early-bird: saved iteration 5 and the run ends" in output
    assert "ticket_300b: the ticket is drawn; now it trains" in output
    assert saved_in(folder / "dense") == 5
    stopped_at = saved_in(folder / "ticket")
    assert 9 <= stopped_at < 17
    assert "the same command continues" in output.splitlines()[-1]
    # The iteration that was lost was trained again, with the same loss.
    first, second = starts(folder / "dense")
    assert (list(first), list(second)) == ([1, 2, 3], [3, 4, 5])
    assert first[3] == second[3]

    status, output, said = run("ticket_300b", RUN_DIR=folder, **TINY)
    assert status == 0, output + said
    heading, dense, ticket, last_line = output.splitlines()[-4:]
    assert last_line == "ticket_300b: finished: iteration 17 of 17"
    assert heading.split()[:2] == ["iterations", "parameters"]
    (dense, ticket) = (row.split("  ") for row in (dense, ticket))
    assert [row[0] for row in (dense, ticket)] == ["dense, at the draw", "ticket"]
    numbers = [[cell.strip() for cell in row[1:] if cell.strip()] for row in (dense, ticket)]
    assert [row[0] for row in numbers] == ["5", "17"]
    # Of each of 4 layers: 2 of 4 heads of 16, 128 of 256 neurons; the biases of what is pruned.
    pruned = 4 * (2 * 16 * 64 * 4 + 2 * 16 * 3 + 128 * 64 * 2 + 128)
    parameters = [int(row[1].replace(",", "")) for row in numbers]
    assert parameters[0] - parameters[1] == pruned
    losses = [float(row[3]) for row in numbers]
    assert losses[1] < losses[0]
    assert numbers[0][4] == "?"  # it was not evaluated before
    assert float(numbers[1][4]) < losses[0]
    assert "early-bird: " not in output
    first, second = starts(folder / "ticket")
    assert [*first, *second] == list(range(6, 18))

    script = str(FOLDER / "report.py")
    asked = [sys.executable, script, "emerged", str(folder / "dense" / "checkpoints"), "--heads"]
    asked += ["3", "--ffn", "128"]
    result = subprocess.run(asked, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert "has searched for 2 heads and 128 FFN neurons, not for TICKET_HEADS=3" in result.stderr


def saved_in(run) -> int:
    return int((run / "checkpoints" / TRACKER).read_text())
