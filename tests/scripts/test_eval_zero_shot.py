"""eval_zero_shot.sh: lm_eval itself on an exported model, offline, and its tasks' names."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import export_hf
import import_hf
import pytest

from megatron_rltd.commands.compare import command as compare
from megatron_rltd.commands.compare import zero_shot_table
from tests.parallel import ROOT, environment
from tests.tools.hf_models import gpt2

SCRIPT = ["bash", "tools/evaluation/eval_zero_shot.sh"]
TASKS = "tests/scripts/lm_eval_tasks"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: pip install -c constraints.txt lm_eval",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of export_hf.py, with a tokenizer of the bytes and the words of the task."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (ROOT / TASKS / "next_number.jsonl").read_text().splitlines()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.model.save(str(folder))
    gpt2(vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder / "hf")
    arguments = ["--input", str(folder / "hf"), "--output", str(folder / "megatron")]
    assert import_hf.main(arguments) == 0
    files = ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]
    arguments = ["--load", str(folder / "megatron"), "--output", str(folder / "exported")]
    assert export_hf.main([*arguments, *files]) == 0
    return folder / "exported"


def evaluate(*arguments, **variables):
    """Run the script; return its exit status and what it said."""
    env = environment() | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", **variables}
    result = subprocess.run(
        [*SCRIPT, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


def test_the_exported_tokenizer(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "three, four,\n five  <|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"][-1] == tokenizer.eos_token_id
    config = json.loads((model / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["vocab_size"] == len(tokenizer)


def scores_by_hand(model):
    """Return lm_eval's accuracy of the task: the choice of the largest log-likelihood."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, net = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model),
    )
    right = []
    for line in (ROOT / TASKS / "next_number.jsonl").read_text().splitlines():
        question = json.loads(line)
        start = tokenizer(question["question"], return_tensors="pt")["input_ids"]
        scores = []
        for choice in question["choices"]:
            whole = tokenizer(f"{question['question']} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                likelihoods = net(whole[:, :-1]).logits.log_softmax(-1)
            of_next = likelihoods[0].gather(1, whole[0, 1:, None])
            scores.append(float(of_next[start.shape[1] - 1 :].sum()))
        right.append(scores.index(max(scores)) == question["answer"])
    return sum(right) / len(right)


@needs_lm_eval
def test_lm_eval_runs_on_an_export(model, tmp_path, capsys):
    variables = {"TASKS": "next_number", "INCLUDE_PATH": TASKS, "DEVICE": "cpu"}
    status, said = evaluate(model, tmp_path / "out", **variables)
    assert status == 0, said
    assert "next_number" in said
    assert compare.main(["--eval", f"tiny={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    score = 100 * scores_by_hand(model)
    line = next(line for line in printed.splitlines() if line.startswith("next_number"))
    assert f" {score:.1f} ± " in line
    assert "tiny: no average: 19 of 19 tasks are missing" in printed
    assert list((tmp_path / "out").rglob("samples_next_number_*.jsonl"))


@needs_lm_eval
def test_without_a_network_the_way_out_is_said(model, tmp_path):
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    status, said = evaluate(model, tmp_path / "out", TASKS="copa", DEVICE="cpu", **cache)
    assert status == 2
    assert "eval_zero_shot: a data set could not be downloaded" in said
    assert "HF_HOME=CACHE HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1" in said


@needs_lm_eval
def test_the_tasks_are_lm_evals_and_the_experiments(model):
    from lm_eval.tasks import TaskManager

    status, said = evaluate(model, DRY_RUN="1", DEVICE="cuda:0")
    assert status == 0
    command = shlex.split(said)
    tasks = command[command.index("--tasks") + 1].split(",")
    assert len(tasks) == 20
    assert {*tasks} == {*zero_shot_table.METRICS, "wikitext"}
    assert {*tasks} <= {*TaskManager().all_subtasks}
    metrics = {"multirc": "acc"} | zero_shot_table.PERPLEXITY
    for task in tasks:
        assert metrics.get(task, zero_shot_table.METRICS.get(task)) in listed_metrics(task)


def listed_metrics(task):
    """Return the names of the metrics in lm_eval's own file of a task."""
    import lm_eval.tasks
    import yaml

    folder = Path(lm_eval.tasks.__file__).parent
    text = next(
        text
        for path in folder.rglob("*.yaml")
        if f"\ntask: {task}\n" in f"\n{(text := path.read_text())}"
    )
    if "metric_list" not in text:  # arc_challenge and anli's are their neighbours', renamed
        name = next(line for line in text.splitlines() if line.startswith("include:")).split()[1]
        text = next(path for path in folder.rglob(name) if task[:3] in str(path)).read_text()
    start = text.index("metric_list:")
    entries = yaml.safe_load(text[start:].partition("metadata:")[0])["metric_list"]
    return {entry["metric"] for entry in entries}


@needs_lm_eval
def test_the_command_follows_the_variables(model, tmp_path):
    def command(*arguments, **variables):
        status, said = evaluate(model, *arguments, DRY_RUN="1", **variables)
        assert status == 0, said
        return said

    assert not (model / "eval-0shot").exists()
    plain = command(DEVICE="cpu")
    assert f"pretrained={model}\\,dtype=float32" in plain
    # A bare 300 would be a number to lm_eval.
    (tmp_path / "300").symlink_to(model)
    status, said = evaluate(os.path.relpath(tmp_path / "300", ROOT), DEVICE="cpu", DRY_RUN="1")
    assert status == 0, said
    assert f"pretrained={tmp_path}/300\\,dtype=float32" in said
    assert "--num_fewshot 0 " in plain
    assert "--device cpu --batch_size 8 " in plain
    assert f"--output_path {model}/eval-0shot --log_samples" in plain
    ten = command(tmp_path / "o", FEWSHOT="10", DEVICE="cuda:1", DTYPE="bfloat16", LIMIT="3")
    assert "--num_fewshot 10 --device cuda:1 --batch_size auto" in ten
    assert "wikitext" not in ten
    assert "dtype=bfloat16" in ten
    assert ten.rstrip().endswith(f"--output_path {tmp_path}/o --log_samples --limit 3")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("files", "variables", "said"),
    [
        (None, {}, "there is no folder"),
        ([], {}, "holds no config.json; tools/checkpoint/export_hf.py"),
        (["config.json"], {}, "holds no tokenizer; export it again with --tokenizer"),
        (["config.json", "tokenizer.json"], {"FEWSHOT": "ten"}, "FEWSHOT=ten is not a number"),
        (["config.json", "tokenizer.json"], {"LIMIT": "0"}, "LIMIT=0 is not a number"),
        (["config.json", "tokenizer.json"], {"INCLUDE_PATH": "/no"}, "INCLUDE_PATH: no folder /no"),
    ],
)
def test_errors_come_first(tmp_path, files, variables, said):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    # A Python that must not be reached.
    status, printed = evaluate(folder, **variables, **{"PYTHON": "/bin/false"})
    assert status == 2
    (line,) = printed.splitlines()
    assert line.startswith("eval_zero_shot: ")
    assert said in line


def test_a_comma_in_the_path(tmp_path):
    folder = tmp_path / "a,b" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).touch()
    status, printed = evaluate(folder, PYTHON="/bin/false")
    assert status == 2
    assert printed.splitlines() == [
        f"eval_zero_shot: {folder} has a comma, and lm_eval splits there; rename it"
    ]


def test_shellcheck():
    if not any(os.access(Path(p) / "shellcheck", os.X_OK) for p in os.get_exec_path()):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", SCRIPT[1]], cwd=ROOT, check=True)
