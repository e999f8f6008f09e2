"""The scripts of examples/gpt3_1.3b on two nodes of a real SLURM: stopped in every way there is.

A job that is stopped must go on exactly where it was, by itself where that is right, and its losses
must be those of the same script in one process. tests/scripts/slurm/cluster.sh is the SLURM.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.parallel import ROOT
from tests.scripts.gpt3_scripts import (
    FOLDER,
    TINY,
    assert_same,
    environment,
    last_iteration,
    starts,
    stub_in,
)
from tests.scripts.test_early_bird_scripts import FOLDER as CHAIN
from tests.scripts.test_early_bird_scripts import stub_in as chain_stub_in

CLUSTER = Path(__file__).parent / "cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"there is no {', '.join(MISSING)}: apt-get install slurm-wlm munge",
)
TIMEOUT_S = 600  # ends what hangs; nothing takes so long
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def four_free_ports() -> int:
    while True:
        first = random.randrange(10000, 16000)
        try:
            for port in range(first, first + 4):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


@pytest.fixture(scope="module")
def slurm():
    """The environment in which sbatch and the like talk to a SLURM of two nodes."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # a short path
        variables = {
            "SLURM_LOCAL_DIR": f"{folder}/cluster",
            "SLURM_LOCAL_PORT": str(four_free_ports()),
        }
        started = subprocess.run(
            [str(CLUSTER), "up", str(os.getpid())],
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert started.returncode == 0, started.stderr
        try:
            yield {"SLURM_CONF": f"{folder}/cluster/slurm.conf"}
        finally:
            subprocess.run(
                [str(CLUSTER), "down"], env=environment(**variables), check=True, timeout=TIMEOUT_S
            )


def command(slurm, *arguments, cwd=None, **settings) -> str:
    result = subprocess.run(
        [str(argument) for argument in arguments],
        env=environment(**slurm, **settings),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def no_job_is_left(slurm):
    """A test that fails leaves its job; it would keep the nodes from the next one."""
    yield
    command(slurm, "scancel", "--state=PENDING")
    command(slurm, "scancel", "--state=RUNNING")


def submit(slurm, folder, script, *options, **settings) -> str:
    """Submit a script of examples/gpt3_1.3b, or a path, for two nodes; return the job's number.

    From a folder of its own, so that nothing is found beside where the user happens to be.
    """
    path = script if isinstance(script, Path) else FOLDER / f"{script}.sh"
    number = command(
        slurm,
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=20", *options, path),
        cwd=folder,
        **{"RUN_DIR": folder / "run", **settings},
    )
    return number.strip()


def job(slurm, number) -> dict[str, str]:
    """Return what SLURM says of a job."""
    return dict(re.findall(r"(\w+)=(\S*)", command(slurm, "scontrol", "show", "job", number)))


def wait_for(what, *arguments):
    """Return the first true value of a function."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := what(*arguments)):
        assert time.monotonic() < deadline, f"{what.__name__}: nothing in {TIMEOUT_S} s"
        time.sleep(0.2)
    return value


def ended(slurm, number, folder) -> tuple[dict[str, str], str]:
    """Wait until a job has ended for good; return what SLURM says of it and what it printed."""

    def has_ended():
        state = job(slurm, number)
        return state if state["JobState"] in ENDED else None

    state = wait_for(has_ended)
    (log,) = folder.glob(f"*-{number}.log")
    return state, log.read_text()


def reach(slurm, number, run, iteration):
    """Wait until a run has logged an iteration."""

    def has_reached():
        return job(slurm, number)["JobState"] in ENDED or last_iteration(run) >= iteration

    wait_for(has_reached)
    assert job(slurm, number)["JobState"] == "RUNNING", (run / "log.txt").read_text()


def saved_in(run) -> int:
    return int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The iterations of ltd_300b in one process without SLURM."""
    run = tmp_path_factory.mktemp("alone")
    result = subprocess.run(
        ["bash", str(FOLDER / "ltd_300b.sh")],
        env=environment(RUN_DIR=run, PROCESSES="1", **TINY),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (steps,) = starts(run)
    assert list(steps) == list(range(1, 21))
    assert [steps[n]["random-ltd kept tokens"] for n in (1, 5, 20)] == [16, 48, 128]
    return steps


def stop_steps(slurm, number):
    """Send the processes the signal that goes before preemption and the time limit."""
    command(slurm, "scancel", "--signal=TERM", number)


def requeue(slurm, number):
    command(slurm, "scontrol", "requeue", number)


@pytest.mark.parametrize(
    ("stop", "script"), [(stop_steps, "ltd_300b_tp2_sp"), (requeue, "ltd_300b_cp2")]
)
def test_a_stopped_job_goes_on_where_it_was(slurm, alone, tmp_path, stop, script):
    number = submit(slurm, tmp_path, script, **{**TINY, "SAVE_INTERVAL": "3"})
    reach(slurm, number, tmp_path / "run", 4)  # what Megatron saves with is there
    stop(slurm, number)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), output
    # Each iteration was trained once.
    first, second = starts(tmp_path / "run")
    assert [*first, *second] == list(alone)
    again = f"start 1 of job {number} from iteration {max(first)}, 2 processes on 2 nodes"
    assert again in output
    assert output.splitlines()[-1] == f"{script}: finished: iteration 20 of 20"
    assert_same(first | second, alone)


def test_a_killed_job_stays_down_and_goes_on_from_its_checkpoint(slurm, alone, tmp_path):
    run = tmp_path / "run"
    settings = {**TINY, "SAVE_INTERVAL": "3"}
    number = submit(slurm, tmp_path, "ltd_300b", **settings)
    reach(slurm, number, run, 5)
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = process.read_bytes().split(b"\0")
            program = (process.parent / "exe").readlink().name
        except OSError:
            continue
        ours = f"SLURM_JOB_ID={number}".encode() in variables and b"RANK=1" in variables
        if ours and program.startswith("python"):
            os.kill(int(process.parent.name), signal.SIGKILL)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), output
    saved, reached = saved_in(run), last_iteration(run)
    assert 3 <= saved <= reached < len(alone)
    assert f"not requeued. The same command continues from iteration {saved}" in output
    # Continued by hand, what had been trained after the checkpoint is trained again, to the bit.
    again = submit(slurm, tmp_path, "ltd_300b", **settings)
    state, output = ended(slurm, again, tmp_path)
    assert state["JobState"] == "COMPLETED", output
    first, second = starts(run)
    assert list(second) == list(range(saved + 1, len(alone) + 1))
    assert all(second[n] == values for n, values in first.items() if n > saved)
    assert_same(first, alone)
    assert_same(second, alone)


def stubbed(slurm, folder, *options, script="ltd_300b", **settings):
    """Submit a script that runs the stand-in for Python."""
    settings = {"SCALE": "smoke", "PYTHON": stub_in(folder), **settings}
    return submit(slurm, folder, script, *options, **settings)


def test_a_job_requeues_itself_until_it_is_finished(slurm, tmp_path):
    number = stubbed(slurm, tmp_path, "--cpus-per-task=3", NCCL_DEBUG="INFO")
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), output
    assert [int(n) for n in re.findall(r"from iteration (\d)", output)] == [0, 2, 4]
    assert output.count("stopped as requested, checkpoint of iteration") == 2
    assert output.splitlines()[-1] == "ltd_300b: finished: iteration 6 of 6"
    # One process on each node, which reach the first under an address that means something.
    ranks = sorted(set(re.findall(r"^rank .*", output, re.MULTILINE)))
    assert {line.split(":")[0] for line in ranks} == {
        f"rank {rank} of 2, local 0, 127.0.0.1" for rank in (0, 1)
    }
    assert all(line.endswith(" 1 INFO 3") for line in ranks)
    assert state["Command"] == str(FOLDER / "ltd_300b.sh")
    # What the job printed is also in the log, once.
    assert (tmp_path / "run" / "log.txt").read_text() == "".join(
        line for line in output.splitlines(keepends=True) if not line.startswith("slurmstepd")
    )


def test_a_job_searches_draws_and_continues(slurm, tmp_path):
    """It has 20 minutes, so that it leaves the draw to its next start, as DRAW_MINUTES is 30."""
    settings = {"SCALE": "smoke", "PYTHON": chain_stub_in(tmp_path)}
    number = submit(slurm, tmp_path, CHAIN / "ticket_300b.sh", **settings)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), output
    run = tmp_path / "run"
    began = re.findall(r"start (\d) of job \d+ from iteration (\d), 2 processes .* (\S+)", output)
    folders = [str(run / name) for name in ("dense", "dense", "dense", "ticket")]
    assert began == list(zip("0122", "0244", folders, strict=True))
    assert re.search(r"\d+ minutes are left: the ticket is drawn in the next start", output)
    assert output.count("draws --load") == 1  # by one process
    assert f"the table of {run}\n" in output
    assert output.splitlines()[-1] == "ticket_300b: finished: iteration 6 of 6"


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        ("fails", r"training failed \(status \d+\), see above; not requeued"),
        ("is-stuck", "nothing was trained and saved since iteration 0; not requeued"),
    ],
)
def test_what_fails_or_gets_nowhere_is_not_requeued(slurm, tmp_path, stub, said):
    number = stubbed(slurm, tmp_path, STUB=stub)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), output
    assert re.search(f"ltd_300b: {said}", output.splitlines()[-1])


def preempt(slurm, number, folder):
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    command(slurm, "sbatch", *urgent, "--wrap=sleep 1", cwd=folder)


def time_out(slurm, number, folder):
    """Move the time limit so near that SLURM sends the signal that goes before it."""
    command(slurm, "scontrol", "update", f"JobId={number}", "TimeLimit=10")


@pytest.mark.parametrize("end", [preempt, time_out])
def test_a_job_that_slurm_ends_requeues_itself(slurm, tmp_path, end):
    number = stubbed(slurm, tmp_path, "--exclusive", STUB="waits")
    reach(slurm, number, tmp_path / "run", 2)
    end(slurm, number, tmp_path)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), output
    assert "stopped as requested, checkpoint of iteration 2 of 6; requeued" in output


def test_a_cancelled_job_is_not_requeued(slurm, tmp_path):
    number = stubbed(slurm, tmp_path, STUB="waits")
    reach(slurm, number, tmp_path / "run", 2)
    command(slurm, "scancel", number)
    state, _ = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.parametrize(
    ("script", "options", "settings", "said"),
    [
        (
            "ltd_300b_tp2",
            ["--ntasks=3", "--ntasks-per-node=2"],
            {},
            r"3 processes do not divide by TP\*PP\*CP = 2\*1\*1 = 2",
        ),
        (
            "ltd_300b",
            ["--gpus-per-node=8"],
            {"SCALE": "full", "DRY_RUN": "1", "DATA_PATH": "x", "TOKENIZER": "x"},
            "SLURM gave 8 GPUs and 1 tasks on each node, but a task drives one GPU: submit with",
        ),
    ],
)
def test_jobs_that_cannot_run_fail_before_anything_starts(
    slurm, tmp_path, script, options, settings, said
):
    number = stubbed(slurm, tmp_path, *options, script=script, **settings)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert re.search(f"^{script}: {said}", output, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_a_signal_that_comes_too_early_is_told_again(slurm, tmp_path):
    number = stubbed(slurm, tmp_path, STUB="late")
    reach(slurm, number, tmp_path / "run", 2)
    stop_steps(slurm, number)
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), output


def test_a_job_that_a_job_submits_is_one_like_any_other(slurm, tmp_path):
    settings = {"SCALE": "smoke", "PYTHON": stub_in(tmp_path), "RUN_DIR": tmp_path / "run"}
    options = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--time=20")
    submitted = ("sbatch", "--parsable", *options, FOLDER / "ltd_300b.sh")
    number = command(slurm, "srun", "--ntasks=1", *submitted, cwd=tmp_path, **settings).strip()
    state, output = ended(slurm, number, tmp_path)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), output
    assert "2 processes on 2 nodes" in output


def test_a_script_without_its_file_says_so(slurm, tmp_path):
    text = (FOLDER / "ltd_300b.sh").read_text()
    result = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"],
        env=environment(**slurm, SCALE="smoke", RUN_DIR=tmp_path / "run"),
        cwd=tmp_path,
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    state, output = ended(slurm, result.stdout.strip(), tmp_path)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert "give sbatch the file, not its text: sbatch SCRIPT" in output


def test_a_container_is_handed_to_srun(slurm, tmp_path):
    settings = {"DRY_RUN": "1", "CONTAINER": "a.sqsh", "CONTAINER_MOUNTS": "/data,/home"}
    state, output = ended(slurm, stubbed(slurm, tmp_path, **settings), tmp_path)
    assert state["JobState"] == "COMPLETED", output
    assert "ltd_300b: 2 processes on 2 nodes; in SLURM srun --kill-on-bad-exit=1 " in output
    assert "--container-image=a.sqsh --container-mounts=/data,/home" in output
    del settings["CONTAINER_MOUNTS"]
    _, output = ended(slurm, stubbed(slurm, tmp_path, **settings), tmp_path)
    for folder in (tmp_path, ROOT, tmp_path / "run"):
        assert re.search(rf"--container-mounts=(\S*,)?{folder}:{folder}[, ]", output)
    assert f"--container-workdir={tmp_path}" in output


def test_data_is_prepared_by_an_array_of_jobs_and_joined(slurm, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    (tmp_path / "raw").mkdir()
    rooms = ("tokens/ops", "cpu/adapter", "model/layer")
    texts = [(ROOT / f"megatron_rltd/{name}.py").read_text() for name in rooms]
    for number, text in enumerate(texts):
        line = json.dumps({"text": text})
        (tmp_path / f"raw/{number}.jsonl").write_text(f"{line}\n{line}\n")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(tmp_path))
    settings = {
        "INPUT": "raw",
        "OUTPUT": "data",
        "VOCAB_FILE": "vocab.json",
        "MERGE_FILE": "merges.txt",
        "PYTHON": sys.executable,
    }
    script = FOLDER / "prepare_data.sh"
    sbatch = ("sbatch", "--parsable", "--time=20")
    array = command(slurm, *sbatch, "--array=0-1", script, cwd=tmp_path, **settings).strip()
    dependency = f"--dependency=afterok:{array}"
    joined = command(slurm, *sbatch, dependency, script, cwd=tmp_path, **settings).strip()
    state, output = ended(slurm, joined, tmp_path)
    assert state["JobState"] == "COMPLETED", output
    assert "6 documents, " in output
    assert ".jsonl\n" not in output  # the array had made every shard
    assert (tmp_path / "data/text_document.idx").exists()
    logs = [path.read_text() for path in tmp_path.glob("*.log")]
    assert sorted(re.findall(r"(\d) shards made", "".join(logs))) == ["1", "2"]
