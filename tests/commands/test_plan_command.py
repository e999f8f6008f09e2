"""The command that plans a run: what it prints, what it refuses, where it takes the flags from."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from megatron_rltd.commands.plan import command as plan
from megatron_rltd.patching import versions
from tests.commands.test_plan import IN_SAMPLES, RUNS, SPLITS_ATTENTION, plan_of
from tests.megatron.test_training import BASE, LTD, MODEL, SEQ
from tests.parallel import ROOT, run_all


def _main(argv: list[str]) -> int:
    return plan.main(argv)


def command(line: str | list[str]) -> tuple[int, str]:
    """Return exit status and output of ``python -m megatron_rltd plan LINE``."""
    argv = shlex.split(line) if isinstance(line, str) else line
    result = run_all(1, _main, argv)[0]
    return result["value"], result["output"]


def test_as_its_users_call_it(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "megatron_rltd", "plan", "--", *f"{BASE} {LTD}".split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (0, result.stdout) == command(f"-- {BASE} {LTD}")
    assert not list(tmp_path.iterdir())


def test_json_says_what_the_table_says():
    status, text = command(f"--tflops 100 -- {BASE} {LTD}")
    assert status == 0
    status, output = command(f"--tflops 100 --json -- {BASE} {LTD}")
    assert status == 0
    numbers = json.loads(output)
    ours, dense = numbers["runs"]["run"], numbers["runs"]["same_samples"]
    assert re.search(rf"^LayerTokens +{ours['layer_tokens']:,} ", text, re.MULTILINE)
    counted = re.escape(f"{ours['flops_causal_attention']:.4e}")
    assert re.search(rf"^FLOPs, causal attention +{counted} ", text, re.MULTILINE)
    saved = f"{ours['layer_tokens'] / dense['layer_tokens']:.3f}"
    assert re.search(rf"^  LayerTokens +{saved} ", text, re.MULTILINE)
    assert ours["gpu_hours"] == pytest.approx(ours["flops_causal_attention"] / 1e14 / 3600)
    assert ours["hours"] == ours["gpu_hours"]
    assert "WARNING: the run ends while 40 of 64 tokens are kept" in text
    assert numbers["kept_tokens"]["nothing_dropped_from"] is None
    assert numbers["kept_tokens"]["from_iteration"] == [[0, 16], [2, 24], [3, 32], [5, 40]]
    rate = numbers["learning_rate"]
    assert rate["warmup_over"]["iteration"] == 1 == rate["points"]["first step"]["iteration"]
    assert rate["warmup_over"]["learning_rate"] == 3e-3 == rate["maximum"]
    assert rate["minimum_reached"]["iteration"] == 6
    assert rate["minimum_reached"]["learning_rate"] == 1e-4 == rate["minimum"]
    for point in rate["points"].values():
        assert f"{point['learning_rate']:.4e}" in text


def test_joined_micro_batches_are_named():
    line = f"{BASE} {LTD} --random-ltd-layers 1-4 --micro-batch-size 1"
    assert "in one pass" not in command(f"-- {line}")[1]
    status, text = command(f"-- {line} --random-ltd-grow-micro-batch 8")
    assert status == 0
    said = "micro-batches in one pass (8 in a step): 4 from 16 kept tokens, 2 from 24 kept tokens"
    assert said in text
    status, output = command(f"--json -- {line} --random-ltd-grow-micro-batch 8")
    assert json.loads(output)["micro_batches_per_pass_from_kept_tokens"][:2] == [[16, 4], [24, 2]]


def test_hours_are_for_all_gpus():
    line = f"--gpus 4 --tflops 100 --json -- {BASE} {LTD} --tensor-model-parallel-size 2"
    status, output = command(line)
    numbers = json.loads(output)
    assert (status, numbers["gpus"], numbers["data_parallel_size"]) == (0, 4, 2)
    ours = numbers["runs"]["run"]
    assert ours["hours"] == ours["gpu_hours"] / 4
    # One replica by default.
    numbers = json.loads(command(line.removeprefix("--gpus 4"))[1])
    assert (numbers["gpus"], numbers["data_parallel_size"]) == (2, 1)


def test_a_dense_run_is_planned_alone():
    status, text = command(f"-- {BASE}")
    assert status == 0
    assert text.startswith("dense run on Megatron")
    assert "kept" not in text
    assert "same samples" not in text
    assert "same LayerTokens" in command(f"-- {BASE} {LTD}")[1]


@pytest.mark.skipif(versions.release() < (0, 19), reason="no such symbols")
def test_layers_that_need_a_gpu_are_planned_without_one():
    before, after = f"{BASE} {LTD}".split("--num-layers 4")
    status, text = command(f"-- {before} --hybrid-layer-pattern '*-M-*-M-*-' {after}")
    assert (status, "5 groups of the 10 layers" in text) == (0, True), text
    assert "of which 1 drop tokens" in text and "counts no FLOPs" not in text
    status, text = command(f"-- {before} --hybrid-layer-pattern +-+-D- {after} --no-rope-fusion")
    assert (status, "attention of + and D in the" in text) == (0, True), text


def test_warnings():
    text = command(f"-- {BASE} {LTD} --layer-token-lr --lr-decay-iters 20")[1]
    assert "WARNING: the run ends at a learning rate of 2." in text
    text = command(f"-- {BASE} {LTD} --lr-decay-iters 20 --lr-warmup-iters 10")[1]
    assert "WARNING: the run ends before the learning rate's warm-up" in text
    full = f"{BASE} {LTD}".replace("--train-iters 6", "--train-iters 10")
    text = command(f"-- {full}")[1]
    assert "WARNING" not in text
    assert "nothing is dropped after iteration 9, 90.0% of the run" in text


@pytest.mark.parametrize("flags", [f"{BASE} {LTD}", RUNS["budget"], BASE])
def test_plot(flags, tmp_path):
    file = tmp_path / "plan.png"
    status, output = command(f"--plot {file} -- {flags}")
    assert status == 0, output
    assert file.read_bytes().startswith(b"\x89PNG")


REFUSED = "Megatron refuses these arguments: "
OURS = "megatron_rltd refuses these arguments: "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give the flags of training after --, or --from FILE"),
        ("--num-layers 2", "unrecognized arguments: --num-layers 2"),
        (f"--gpus 0 -- {BASE}", "argument --gpus: invalid positive int value: '0'"),
        (f"--tflops inf -- {BASE}", "argument --tflops: invalid positive float value: 'inf'"),
        (f"--dense-tokens 1e9 -- {BASE}", "argument --dense-tokens: invalid"),
        ("--from no/such/file", "--from no/such/file: "),
        (f"-- {BASE} --num-layers x", f"{REFUSED}argument --num-layers: invalid int value: 'x'"),
        (f"-- {BASE} --chekc", f"{REFUSED}unrecognized arguments: --chekc"),
        (f"-- {MODEL}", "there is no learning rate: add --lr"),
        (f"-- {MODEL} --lr 1 --micro-batch-size 1", "either train-iters or train-samples"),
        (f"-- {MODEL} --lr 1", f"{REFUSED}assert args.micro_batch_size is not None"),
        (f"-- {BASE} --train-samples 8", f"{REFUSED}expected iteration-based training"),
        (f"-- {BASE} --micro-batch-size 3", "divisible by"),
        (f"--gpus 3 -- {BASE} --tensor-model-parallel-size 2", "is not divisible by"),
        (f"-- {IN_SAMPLES} --global-batch-size 8 --train-samples 7", "shorter than one global"),
        (f"-- {BASE} --use-checkpoint-args", "a plan reads no checkpoint"),
        (f"-- {BASE} --random-ltd-min-tokens 8", f"{OURS}--random-ltd-min-tokens does nothing"),
        (f"-- {BASE} {LTD} --perform-rl-step", f"{OURS}--perform-rl-step trains on rollouts"),
        (f"-- {BASE} {LTD} --random-ltd-increment 9", "--random-ltd-increment 9 must be"),
        (f"-- {BASE} --yaml-cfg x.yaml", f"{OURS}--yaml-cfg replaces the parsed flags"),
        (f"-- {BASE} --train-layer-tokens 9", f"{OURS}--train-layer-tokens 9 needs --random-ltd"),
        (
            f"-- {BASE} --tokenizer-type HuggingFaceTokenizer".replace("--vocab-size 127", ""),
            "is not known without its files: add --vocab-size N",
        ),
        (f"--plot /no/such/folder/x.png -- {BASE}", "No such file or directory"),
    ],
)
def test_what_is_wrong_is_one_line(line, message):
    status, output = command(line)
    assert status == 2
    assert output.startswith("plan: ")
    assert output.count("\n") == 1
    assert message in output


@pytest.mark.skipif(versions.release() < (0, 18), reason="another ramp-up of the batch size")
def test_batch_sizes_that_do_not_fit_the_gpus():
    line = f"{IN_SAMPLES} {LTD} --train-samples 45 --step-batch-size-schedule"
    status, output = command(f"-- {line} 0:4,{16 * SEQ}:7")
    assert status == 2
    assert "current global batch size (7) is not divisible by" in output
    assert command(f"-- {line} 0:4,{160 * SEQ}:7")[0] == 0  # never reached


def test_vocabulary():
    def padded(more: str) -> int:
        flags = BASE.replace("--vocab-size 127", "").replace("--tokenizer-type NullTokenizer", "")
        return plan_of(f"{flags} {more}")["padded_vocab_size"]

    assert padded("--make-vocab-size-divisible-by 128") == 50304
    assert padded("--make-vocab-size-divisible-by 64 --tensor-model-parallel-size 4") == 50432
    assert padded("--vocab-size 1001") == 1008
    assert padded("--tokenizer-type SentencePieceTokenizer --vocab-size 32000") == 32000
    assert padded("--padded-vocab-size 50000") == 50000


@pytest.mark.parametrize(
    "flags",
    [
        "--transformer-impl transformer_engine --bf16 --fp8-format hybrid --fp8-recipe blockwise",
        "--bf16 --fp4-format e2m1",
        "--bf16 --delay-wgrad-compute --overlap-grad-reduce --use-distributed-optimizer",
        "--num-experts 4 --moe-grouped-gemm --moe-permute-fusion",
        "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
        "--log-max-attention-logit",
    ],
)
def test_a_run_on_gpus_is_planned_without_one(flags):
    status, output = command(f"-- {BASE} {flags} --micro-batch-size 8")
    assert status == 0, output


def test_bert_says_which_row_to_read(tmp_path):
    line = BASE.replace("--tokenizer-type NullTokenizer --vocab-size 127", "")
    file = tmp_path / "flags.txt"
    file.write_text(f"torchrun -m megatron_rltd pretrain_bert {line} {LTD}")
    status, text = command(f"--from {file}")
    assert status == 0
    assert "taken to be that of bert-large-uncased, 30,522" in text
    assert "read the row 'FLOPs, full attention'" in text
    status, text = command(f"--gpu h100 -- {BASE} {LTD} --bert-no-binary-head")
    assert status == 2 and "--gpu estimates causal attention only, and BERT's is full" in text
    status, text = command(f"-- {BASE} {LTD}")
    assert status == 0 and "BERT" not in text


def test_flags_are_checked_for_the_gpus_of_the_run():
    # On the CPU training would switch the fused kernel off.
    status, output = command(f"-- {BASE} {LTD} --sft")
    assert status == 2
    assert "with fused RoPE numbers the tokens" in output
    status, output = command(f"-- {BASE} {LTD} --sft --no-rope-fusion")
    assert status == 0
    assert "FLOPs are an upper bound" in output
    status, output = command(f"-- {BASE} {LTD} --fp8-format hybrid --micro-batch-size 1")
    assert status == 2
    assert "FP8 needs a multiple of 16 rows" in output


@pytest.mark.skipif(not SPLITS_ATTENTION, reason="there is less to print")
def test_the_documentation_shows_what_is_printed():
    text = (ROOT / "docs" / "planning.md").read_text()
    shown = re.findall(
        r"```bash\npython -m megatron_rltd plan (.*?)```\n\n```\n(.*?)```", text, re.S
    )
    assert shown
    for line, expected in shown:
        status, output = command(line.replace("\\\n", " "))
        assert status == 0, output
        first, *lines = expected.splitlines()
        # But for the release, or what "..." stands for.
        assert output.splitlines()[-len(lines) if first == "..." else 1 :] == lines
