"""The command line, as a user types it."""

import re
import socket
import subprocess
import sys

import pytest

from megatron_rltd.config import FIELDS, flag
from megatron_rltd.cpu import adapter
from megatron_rltd.patching import versions
from megatron_rltd.pretrain import compiled_helper
from megatron_rltd.training import patches
from megatron_rltd.training.state import Training
from tests.megatron.test_training import BASE, LTD
from tests.parallel import RankError, environment, free_port, run_all


def _main(argv):
    import torch

    torch.set_num_threads(1)
    from megatron_rltd.__main__ import main

    try:
        return main(argv)
    except SystemExit as exit_:  # argparse
        return exit_.code


def cli(line: str, world_size: int = 1) -> tuple[int, str]:
    """Return exit status and output of ``python -m megatron_rltd LINE`` on every rank.

    Where LINE trains, on the CPU.
    """
    if line.startswith("pretrain_gpt"):
        line += " --cpu"
    results = run_all(world_size, _main, line.split())
    assert len({r["value"] for r in results}) == 1
    return results[0]["value"], "".join(r["output"] for r in results)


def test_usage():
    status, output = cli("")
    assert status == 2
    assert "python -m megatron_rltd SCRIPT ARGS..." in output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--chekc", "the first argument must be a script or a command, not --chekc"),
        (
            "plna -- --num-layers 2",
            "there is no script plna; bundled: pretrain_gpt, pretrain_bert, pretrain_hybrid, "
            "finetune_vit; commands: check, plan, compare, convert-deepspeed",
        ),
    ],
)
def test_what_is_no_script(line, message):
    status, output = cli(line)
    assert status == 2
    assert output.strip().endswith(f": {message}")
    assert output.startswith("megatron_rltd")


@pytest.mark.parametrize("flag", ["--sft", "--dataloader-inter-document-masking"])
def test_data_that_the_bundled_script_does_not_read(flag):
    if flag.startswith("--dataloader") and versions.release() < (0, 19):
        pytest.skip("a flag of Megatron 0.19")
    status, output = cli(f"pretrain_gpt {BASE} {LTD} --no-rope-fusion {flag}")
    assert status == 2
    said = f"- {flag} does not work with this script: use the pretrain_gpt.py of Megatron-LM"
    assert only_error(output).strip() == said


def _main_with_transformer_engine(argv):
    import importlib.util
    from unittest import mock

    with mock.patch.object(importlib.util, "find_spec", lambda name: name):
        return _main(argv)


@pytest.mark.parametrize("line", [f"pretrain_gpt {BASE} --cpu", "check"])
def test_no_training_on_a_cpu_with_transformer_engine(line):
    (result,) = run_all(1, _main_with_transformer_engine, line.split())
    assert result["value"] == (1 if line == "check" else 2)
    assert "Traceback" not in result["output"]
    assert "Transformer Engine is installed here" in result["output"]
    assert "an environment without it" in result["output"]


def test_check_lists_every_patch():
    status, output = cli("check")
    assert status == 0
    assert cli("--check") == (status, output)  # as it was called in 0.1
    for patch in versions.rows_for_release(patches.patches_of(Training())):
        assert f"ok       {patch.target}" in output
    for patch in versions.rows_for_release(adapter.PATCHES):
        assert patch.target in output
    assert "random-LTD can run here with --cpu." in output
    for patch in compiled_helper.PATCHES:
        assert patch.target in output


def test_help_has_our_flags():
    # Megatron 0.19's own --help fails on a percent sign in one of its texts.
    status, output = cli("--help")
    assert status == 0
    for name in FIELDS:
        assert flag(name) in output


def only_error(output: str) -> str:
    """Return what follows Megatron's own output, which must hold no traceback."""
    assert "Traceback" not in output
    assert output.count("cannot run with these arguments:") == 1
    return output.partition("cannot run with these arguments:")[2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_wrong_arguments_are_one_error_on_one_rank(world_size):
    line = f"{BASE} {LTD} --random-ltd-layers 2-7 --random-ltd-ramp-samples 5 --perform-rl-step"
    status, output = cli(f"pretrain_gpt {line}", world_size)
    assert status == 2
    problems = only_error(output).strip().splitlines()
    assert len(problems) == 3
    assert "--perform-rl-step trains on rollouts" in problems[0]
    assert "--random-ltd-ramp-samples" in problems[1]
    assert "--random-ltd-layers 2-7" in problems[2]


def test_an_option_without_the_switch():
    status, output = cli(f"pretrain_gpt {BASE} --random-ltd-min-tokens 16")
    assert status == 2
    assert "--random-ltd-min-tokens does nothing without --random-ltd" in only_error(output)


def test_missing_and_empty_data(tmp_path):
    base = BASE.replace("--mock-data", "")
    status, output = cli(f"pretrain_gpt {base}")
    assert status == 2
    assert "there is no data: give --data-path PREFIX" in only_error(output)
    (tmp_path / "text.bin").touch()
    status, output = cli(f"pretrain_gpt {base} --data-path {tmp_path}/text")
    assert status == 2
    assert f"{tmp_path}/text.bin is empty" in only_error(output)
    assert f"{tmp_path}/text.idx is missing" in only_error(output)


def test_torchrun(tmp_path):
    """The command that the README gives, with real processes of their own."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "import helper_beside_the_script\n"
        "from megatron_rltd.pretrain.pretrain_gpt import main\n"
        "assert __name__ == '__main__' and sys.argv[0] == __file__\n"
        "main()\n"
    )
    (tmp_path / "helper_beside_the_script.py").touch()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), "-m", "megatron_rltd", str(script)),
        *f"{BASE} {LTD} --tensor-model-parallel-size 2 --sequence-parallel --cpu".split(),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("replaced symbols") == 1
    assert result.stdout.count("these Megatron arguments are changed for the CPU: ") == 1
    lines = [line for line in result.stdout.splitlines() if line.startswith("random-LTD: ")]
    assert lines == [
        "random-LTD: kept tokens: 16 of 64 tokens at first, all after 9 iterations, in steps of 8",
        "random-LTD: layers that drop: 2-3 of 4; layers that see all tokens: 1,4",
        "random-LTD: draws: seed 1234, 8 strata, one draw for each sample",
        "random-LTD: LayerTokens of the first step: 62.5% of a dense one's",
    ]
    kept = re.findall(r"iteration +6/.*random-ltd kept tokens: ([0-9.E+]+)", result.stdout)
    assert [float(k) for k in kept] == [40]


def _main_of_rank(lines: list[str], ranks_with_gpu: list[int]):
    """Run another command line on each rank, of which some have a GPU."""
    import os
    from unittest import mock

    import torch

    rank = int(os.environ["RANK"])
    with mock.patch.object(torch.cuda, "is_available", lambda: rank in ranks_with_gpu):
        return _main(lines[rank].split())


def of_rank(lines: list[str], ranks_with_gpu: tuple[int, ...] = ()) -> tuple[list[int], list[str]]:
    """Return exit statuses and outputs."""
    results = run_all(len(lines), _main_of_rank, lines, list(ranks_with_gpu))
    return [r["value"] for r in results], [r["output"] for r in results]


@pytest.fixture
def script(tmp_path):
    """A training script that says that it runs, and nothing else."""
    path = tmp_path / "train.py"
    path.write_text("print('trained')\n")
    return path


def test_a_rank_without_a_gpu_says_so(script):
    statuses, outputs = of_rank([f"{script} --lr 1"] * 3, ranks_with_gpu=(0, 1))
    assert statuses == [0, 0, 2]
    assert "trained" in outputs[0] and "trained" in outputs[1]
    (line,) = [line for line in outputs[2].splitlines() if line.startswith("megatron_rltd")]
    assert line.startswith(f"megatron_rltd on {socket.gethostname()}, rank 2: cannot run")
    assert "no CUDA device is visible to this process" in line
    assert "add --cpu to the script's arguments" in line
    assert "trained" not in outputs[2]


def test_the_cpu_can_be_asked_for_by_a_variable(script, monkeypatch):
    command = [sys.executable, "-m", "megatron_rltd", str(script)]
    for value, status in (("1", 0), ("", 2), ("0", 2)):
        result = subprocess.run(
            command,
            env={**environment(), "MEGATRON_RLTD_CPU": value, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert result.returncode == status, result.stderr
        assert ("trained" in result.stdout) == (status == 0)
        assert ("(CUDA_VISIBLE_DEVICES=)" in result.stderr) == (status == 2)


def test_the_cpu_is_refused_where_there_is_a_gpu(script):
    (status,), (output,) = of_rank([f"{script} --cpu"], ranks_with_gpu=(0,))
    assert status == 2
    assert "omit --cpu and MEGATRON_RLTD_CPU, or hide the GPUs" in output


def test_a_file_that_one_node_lacks(script, tmp_path):
    missing = f"pretrain_gpt {BASE.replace('--mock-data', '')} --data-path {tmp_path}/no --cpu"
    statuses, outputs = of_rank([f"{script} --cpu", missing])
    assert statuses == [0, 2]
    assert f"on {socket.gethostname()}, rank 1: cannot run with these arguments" in outputs[1]
    assert f"{tmp_path}/no.bin is missing" in outputs[1]


def test_a_stage_whose_layers_are_others(script, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        "import torch\n"
        "from megatron_rltd import RandomLTD, RandomLTDConfig\n"
        "from tests.gpt import build, one_process\n"
        "with one_process(with_adapter=False):\n"
        "    model = build()\n"
        "    model.decoder.layers[2] = torch.nn.Identity()\n"
        "    model.decoder.layers[2].layer_number = 3\n"
        "    RandomLTD(RandomLTDConfig(min_tokens=8, ramp_iters=9, increment=8)).attach(model)\n"
    )
    statuses, outputs = of_rank([f"{script} --cpu", f"{other} --cpu"])
    assert statuses == [0, 2]
    assert "rank 1: random-LTD: layer 3 is a Identity, not a Transf" in outputs[1]
    assert "Traceback" not in outputs[1]


def test_kernels_and_a_script_that_one_node_lacks(script):
    cuda = f"pretrain_gpt {BASE} {LTD} --random-ltd-backend cuda --cpu"
    lines = [f"{script} --cpu", cuda, f"{script}.not --cpu", f"{script} --cpu"]
    statuses, outputs = of_rank(lines)
    assert statuses == [0, 2, 2, 0]
    assert "rank 1: cannot run with these arguments: --random-ltd-backend cuda: the" in outputs[1]
    assert f"rank 2: there is no script {script}.not" in outputs[2]


def test_other_errors_keep_their_traceback(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise RuntimeError('NCCL error')\n")
    with pytest.raises(RankError, match="NCCL error"):
        cli(f"{script} --cpu")
