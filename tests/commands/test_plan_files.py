"""Plans of runs whose flags are in a file, or printed by a launch script that is not to train."""

from pathlib import Path

import pytest

from tests.commands.test_plan_command import command, plan
from tests.megatron.test_training import BASE, LTD


@pytest.mark.parametrize(
    ("text", "script", "flags"),
    [
        ("--lr 1 --bf16", None, ["--lr", "1", "--bf16"]),
        ("torchrun --nproc-per-node 8 pretrain_gpt.py --lr 1", "pretrain_gpt.py", ["--lr", "1"]),
        (
            "torchrun --nnodes 2 -m megatron_rltd m/pretrain_gpt.py --lr 1 --spec a.py b",
            "m/pretrain_gpt.py",
            ["--lr", "1", "--spec", "a.py", "b"],
        ),
        ("python -m megatron_rltd pretrain_gpt --lr 1", "pretrain_gpt", ["--lr", "1"]),
        ("python -u -m megatron_rltd", None, []),
        ("srun train --lr 1", None, ["--lr", "1"]),
        ("", None, []),
    ],
)
def test_commands(text, script, flags):
    assert plan.split_command(text.split()) == (script, flags)


def test_words():
    text = (
        "# a comment\n--lr 1 \\\n  --data-path 'a b' \\  # another\n  --bf16\\\n --x \"#\"\n\n"
        "# --fp16 \\\n--y ''\n"
    )
    words = ["--lr", "1", "--data-path", "a b", "--bf16", "--x", "#", "--y", ""]
    assert plan.words_of(text) == words
    with pytest.raises(plan.PlanError, match="No closing quotation"):
        plan.words_of("--x 'a")


def test_from_a_file_of_flags(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text(
        f"# dense\ntorchrun -m megatron_rltd pretrain_gpt.py \\\n  {BASE} \\\n  {LTD}\n"
    )
    assert command(["--from", str(file)]) == command(f"-- {BASE} {LTD}")
    more = ["--from", str(file), "--", "--train-iters", "10"]
    assert command(more) == command(f"-- {BASE} {LTD} --train-iters 10")


def script_in(folder: Path, name: str, body: str) -> tuple[Path, Path]:
    """Write a launch script that leaves a file when it trains; return both."""
    script, trained = folder / name, folder / "trained"
    script.write_text(f"#!/usr/bin/env bash\nset -eu\ntrain() {{ touch {trained}; }}\n{body}")
    return script, trained


def test_from_a_script(tmp_path):
    body = (
        'ARGS=(--random-ltd "$@")\n'
        f'COMMAND=(torchrun --nproc-per-node 2 pretrain_gpt.py {BASE} {LTD} "${{ARGS[@]}}")\n'
        "echo not --this one\n"
        'if [ -n "${DRY_RUN:-}" ]; then printf "%q " "${COMMAND[@]}"; echo; echo done; exit; fi\n'
        "train\n"
    )
    script, trained = script_in(tmp_path, "run.sh", body)
    assert command(["--from", str(script)]) == command(f"-- {BASE} {LTD}")
    assert not trained.exists()
    more = ["--from", str(script), "--", "--train-iters", "10"]
    assert command(more) == command(f"-- {BASE} {LTD} --train-iters 10")
    # As its users print it, too.
    lines = body.replace('printf "%q "', r"printf '%q \\\n  '")
    assert lines != body
    script, trained = script_in(tmp_path, "no-suffix", lines)
    assert command(["--from", str(script)]) == command(f"-- {BASE} {LTD}")
    assert not trained.exists()


@pytest.mark.parametrize("name", ["run.sh", "run.sbatch", "no-suffix"])
@pytest.mark.parametrize("mention", ["", "# DRY_RUN=1 is for others\n"])
def test_a_script_without_dry_run_is_not_run(tmp_path, name, mention):
    script, trained = script_in(tmp_path, name, f"{mention}train\necho --lr 1\n")
    status, output = command(["--from", str(script)])
    assert (status, output.count("\n")) == (2, 1)
    assert f"--from {script}: the script does not know DRY_RUN, so running it would" in output
    assert not trained.exists()
    # The same script does leave its trace where it is run.
    script, trained = script_in(tmp_path, name, 'echo "$DRY_RUN"; train; echo --lr 1\n')
    command(["--from", str(script)])
    assert trained.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "[ $DRY_RUN ] && { echo no GPUs >&2; exit 3; }\n",
            "exit status 3 with DRY_RUN=1: no GPUs",
        ),
        ("[ $DRY_RUN ] && echo nothing\n", "it printed no command with DRY_RUN=1"),
        ("read -r line || [ $DRY_RUN ]\necho --lr\n", "argument --lr: expected one argument"),
    ],
)
def test_scripts_that_print_no_command(tmp_path, body, message):
    script, _ = script_in(tmp_path, "run.sh", body)
    status, output = command(["--from", str(script)])
    assert (status, output.count("\n")) == (2, 1)
    assert message in output
