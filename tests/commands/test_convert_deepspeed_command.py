"""`python -m megatron_rltd convert-deepspeed` as a user types it, and what it refuses."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rltd.commands.convert_deepspeed import command as convert_deepspeed
from megatron_rltd.commands.convert_deepspeed import launch
from megatron_rltd.training.arguments import add_arguments
from tests.commands.deepspeed_recipes import FULL, GPT3, RECIPES, changed, convert, gpt3

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "migrating_from_deepspeed.md"


def main(capsys, *argv):
    """Return exit status, output and errors."""
    status = convert_deepspeed.main([str(word) for word in argv])
    return status, *capsys.readouterr()


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(GPT3))
    return path


def test_output_is_one_line_of_flags(capsys, config_file):
    status, out, err = main(capsys, config_file, "--", *gpt3(300, 200_000)[1].split())
    assert status == 0
    assert out == RECIPES["GPT-3 1.3B, 300B tokens"][2] + "\n"
    assert re.fullmatch(r"((removed|warning): .+\n)+", err)
    assert "removed: --zero-stage 1: " in err


def test_json_output(capsys, config_file):
    status, out, err = main(capsys, config_file, "--json", "--", *gpt3(300, 200_000)[1].split())
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert " ".join(result["flags"]) == RECIPES["GPT-3 1.3B, 300B tokens"][2]
    assert result["removed"]["--train-tokens 300000000000"] == "now --train-layer-tokens"
    assert len(result["warnings"]) == 3


def test_launch_script(capsys, config_file, tmp_path):
    launch = tmp_path / "launch.sh"
    launch.write_text(
        "#!/bin/bash\n# --seq-length 4096\ndeepspeed --num_gpus 8 ${dir}/pretrain_gpt.py \\\n"
        "  --random-ltd --seq-length=2048 --num-layers 24 \\\n  --lr ${lr} --titles 'a b' \\\n"
        "  --split 949,50,1 --log-interval 100 &>> log/${jobname}.log --num-layers 7\n"
    )
    status, out, _ = main(capsys, config_file, "--launch", launch, "--pass-through")
    assert status == 0
    assert out == (
        "--random-ltd --random-ltd-min-tokens 128 --random-ltd-ramp-iters 200000 "
        "--random-ltd-increment 16 --global-batch-size 512 --seq-length 2048 --num-layers 24 "
        "--lr ${lr} --titles 'a b' --split 949,50,1 --log-interval 100\n"
    )


def test_launch_file_with_flags_only(capsys, config_file, tmp_path):
    launch = tmp_path / "flags"
    launch.write_text("--random-ltd\n--encoder-seq-length 2048\n  # --lr 2\n--lr 1e-4\n")
    status, out, err = main(capsys, config_file, "--launch", launch, "--pass-through")
    assert status == 0
    assert out.endswith(
        "--random-ltd-increment 16 --global-batch-size 512 --seq-length 2048 --lr 1e-4\n"
    )
    assert "removed: --encoder-seq-length 2048: now --seq-length\n" in err


def test_it_runs_from_anywhere_without_an_installation(config_file, tmp_path):
    process = subprocess.run(
        # -S: no installed packages
        [sys.executable, "-S", "-m", "megatron_rltd", "convert-deepspeed", str(config_file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("--random-ltd --random-ltd-min-tokens 128 ")


def test_what_is_removed():
    removed = convert(*gpt3(300, 200_000)).removed
    assert removed == {
        "model_mask_name, model_type, hidden_state_order": "known from the model",
        "--train-tokens 300000000000": "now --train-layer-tokens",
        "--train-samples 292968750": "only a limit beside --train-tokens; an error beside "
        "--train-layer-tokens",
        "--lr-warmup-tokens 3000000000": "now --lr-warmup-samples",
        "--lr-decay-tokens 300000000000": "now --lr-decay-samples",
        **{
            flag: f"not a flag of Megatron-LM; in its place: {launch.RECOMPUTE}"
            for flag in ("--checkpoint-activations", "--deepspeed-activation-checkpointing")
        },
        "--zero-stage 1": "not a flag of Megatron-LM; in its place: --use-distributed-optimizer "
        "for stage 1",
        **dict.fromkeys(
            (
                "--data-impl mmap",
                "--deepspeed",
                "--deepspeed_config ds_config.json",
                "--no-pipeline-parallel",
            ),
            "not a flag of Megatron-LM",
        ),
    }


@pytest.fixture(scope="module")
def megatron_parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def test_megatron_takes_what_passes_through(megatron_parser):
    result = convert(*gpt3(300, 200_000), pass_through=True)
    args, unknown = megatron_parser.parse_known_args(result.flags)
    # Flags of ours that not every version of the parser has.
    assert set(unknown) <= {"--layer-token-lr", "--train-layer-tokens", "300000000000"}
    assert (args.random_ltd, args.lr_decay_samples, args.num_layers) == (True, 146484375, 24)
    assert (args.train_samples, args.train_iters, args.data_path) == (
        None,
        None,
        ["my-gpt2_text_document"],
    )
    assert args.override_opt_param_scheduler
    repeated = [f for f in result.flags if f.startswith("--") and result.flags.count(f) > 1]
    assert repeated == []


def test_megatron_has_none_of_the_foreign_flags(megatron_parser):
    known = {name for action in megatron_parser._actions for name in action.option_strings}
    assert len(known) > 500
    exits = {"--checkpoint-activations"}  # parsed, to say that it is no longer valid
    assert {flag for flag in known if launch.is_foreign(flag)} == exits
    for instead in launch.INSTEAD.values():
        names = re.findall(r"--[\w-]+", instead)
        assert names
        assert set(names) <= known


TEMPLATE = json.dumps(GPT3).replace('"train_batch_size": 512', '"train_batch_size": CONFIG_GBS')
TEMPLATE = TEMPLATE.replace('"require_steps": 200000', '"require_steps": LTDSTEP')
LTD = "data_efficiency.data_routing.random_ltd"
STEPS = "random_ltd_schedule.schedule_config"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (TEMPLATE, "", "has placeholders: replace CONFIG_GBS, LTDSTEP"),
        ("{'a': 1}", "", "is not JSON"),
        ('{"a": 1,} // done', "", "is not JSON (which allows no comments or trailing commas)"),
        ("", "", "is not JSON"),
        (b"\xff\xfe", "", "it is not text"),
        ([1], "", "data_efficiency.data_routing.random_ltd is not an object"),
        ({}, "", f"nothing to convert: there is no {LTD}"),
        ({"data_efficiency": {"data_routing": 1}}, "", "data_efficiency.data_routing"),
        (changed(GPT3, "enabled", False), "", f"nothing to convert: {LTD}.enabled is false"),
        (changed(GPT3, "enabled", KeyError), "", f"nothing to convert: {LTD}.enabled is false"),
        (changed(GPT3, "enabled", "LTD_ENABLED"), "", f'{LTD}.enabled is "LTD_ENABLED"'),
        (changed(GPT3, "random_ltd_schedule", KeyError), "", "schedule_type is null"),
        (
            changed(GPT3, "random_ltd_schedule.schedule_type", "fixed_root"),
            "",
            'schedule_type is "fixed_root": DeepSpeed knows fixed_linear only',
        ),
        (changed(GPT3, "random_ltd_schedule.min_value", KeyError), "", "min_value is missing"),
        (
            changed(GPT3, "random_ltd_schedule.min_value", "LTD_MIN"),
            "",
            'min_value is "LTD_MIN", not a positive whole number',
        ),
        (changed(GPT3, f"{STEPS}.require_steps", 0), "", "require_steps is 0, not a positive"),
        (changed(GPT3, f"{STEPS}.require_steps", 1.5), "", "require_steps is 1.5, not a positive"),
        (changed(GPT3, f"{STEPS}.seq_per_step", True), "", "seq_per_step is true, not a positive"),
        (changed(GPT3, "total_layer_num", KeyError), "", f"{LTD}.total_layer_num is missing"),
        (changed(GPT3, "random_ltd_layer_num", 21), "", "is 21, random_ltd_layer_id has 22 layers"),
        (changed(GPT3, "random_ltd_layer_id", [1] * 22), "", "has 1 layers in 22 entries"),
        (
            changed(GPT3, "random_ltd_layer_id", "1-22"),
            "",
            "must be a list of layers, counted from 0",
        ),
        (changed(GPT3, "random_ltd_layer_id", [-1]), "", "must be a list of layers"),
        (changed(GPT3, "total_layer_num", 22), "", "goes up to 22, but the 22 layers are 0 to 21"),
        (GPT3, FULL.replace("24", "12"), "goes up to 22, but the 12 layers are 0 to 11"),
        (
            GPT3,
            "--seq-length 4096",
            "max_value is 2048, but here the kept length grows to --seq-length 4096: set max_value "
            "to that (require_steps 413333 is as steep as now)",
        ),
        (GPT3, "--seq-length 128", "nothing to convert: min_value 128"),
        (changed(GPT3, "random_ltd_schedule.max_value", 128), "", "add -- --seq-length N"),
        (changed(GPT3, "random_ltd_schedule.max_value", 64), "", "--seq-length 64 drop nothing"),
        (GPT3, "--train-tokens 3e9", "--train-tokens 3e9: must be one whole number"),
        (GPT3, "--train-tokens ${tokens}", "replace shell variables by values"),
        (GPT3, "--train-tokens", "--train-tokens: must be one whole number"),
        (GPT3, "--num-layers 0", "--num-layers 0: must be at least 1"),
        (
            GPT3,
            "pretrain_gpt.py ${options}",
            "the launch line has ${options}, which may hold flags",
        ),
        (GPT3, "--lr 1 $data_options", "the launch line has $data_options"),
        (GPT3, "pretrain_gpt.py", "the launch line has no flags"),
        (GPT3, "--lr '1", "the launch line cannot be read: No closing quotation"),
        (GPT3, FULL + "--lr-warmup-tokens 9", "learning rate can follow only one unit"),
        (
            GPT3,
            FULL + "--lr-decay-tokens 99 --lr-warmup-fraction 0.1",
            "--lr-warmup-fraction 0.1: it is a share of --train-samples",
        ),
        (
            GPT3,
            FULL + "--lr-decay-tokens 99 --lr-warmup-iters 3 --rampup-batch-size 32 32 9",
            "converting --lr-warmup-iters needs a --global-batch-size that does not change",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_line(capsys, tmp_path, content, line, message):
    path, launch = tmp_path / "ds.json", tmp_path / "launch.sh"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    launch.write_text(line)
    status, out, err = main(capsys, path, *(("--launch", launch) if line else ()))
    assert (status, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"convert-deepspeed: .+\n", err)


def test_files_that_are_not_there(capsys, config_file, tmp_path):
    for argv in (tmp_path / "no.json",), (config_file, "--launch", tmp_path / "no.sh"):
        status, out, err = main(capsys, *argv)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"convert-deepspeed: cannot read .*: No such file .*\n", err)
    status, _, err = main(capsys, config_file, "--launch", config_file, "--", "--lr", "1")
    assert (status, "not both" in err) == (2, True)


def test_the_page_shows_what_happens(capsys, tmp_path, monkeypatch):
    page = PAGE.read_text()
    config, command, output = (
        text for _, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    )
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(config)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:4] == ["python", "-m", "megatron_rltd", "convert-deepspeed"]
    argv = words[4:]
    status, out, err = main(capsys, *argv)
    assert status == 0
    assert err + out == output
