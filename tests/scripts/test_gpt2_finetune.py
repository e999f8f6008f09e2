"""examples/gpt2_finetune: the recipe, what is refused, and the whole of it once in small."""

import importlib.util
import json
import math
import re
import shlex
import struct
import subprocess
import sys

import pytest

from tests.commands.test_plan_command import command as plan
from tests.parallel import ROOT
from tests.scripts.gpt3_scripts import LIB, bash, environment, flags_of, settings_of

FOLDER = ROOT / "examples" / "gpt2_finetune"
SCRIPTS = ("dense", "ltd")

# GPT-2 350M on Penn Treebank (arXiv 2212.03597), 1,048 samples of 1,024 tokens, five epochs.
RECIPE = flags_of(
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
    "--global-batch-size 4 --micro-batch-size 2 --lr 1e-4 --min-lr 0 --lr-decay-style linear "
    "--adam-beta1 0.9 --adam-beta2 0.999 --weight-decay 0 --clip-grad 1.0 "
    "--attention-dropout 0.1 --hidden-dropout 0.1 --seed 1234 "
    "--full-validation --multiple-validation-sets --eval-interval 262".split()
)
GOLDEN = {
    "dense": ("--train-samples 5240", 1310),
    "ltd": (
        "--random-ltd --random-ltd-min-tokens 128 --random-ltd-increment 8 "
        "--random-ltd-ramp-iters 393 --random-ltd-strata 1 --random-ltd-grow-micro-batch 8 "
        "--random-ltd-preflight --train-layer-tokens 5365760 --layer-token-lr",
        1470,
    ),
}
# These decide what is compared with what: a script has them as given above or not at all.
DECISIVE = ("--random-ltd", "--layer-token-lr", "--train-samples", "--train-layer", "--lr")


def module(name):
    """Import a Python file of the example."""
    spec = importlib.util.spec_from_file_location(f"gpt2_finetune_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def run(name, *arguments, **settings):
    return bash(name, *arguments, folder=FOLDER, **settings)


def flags_printed(name, **settings):
    status, output, said = run(name, DRY_RUN="1", **settings)
    assert status == 0, said
    words = shlex.split(output)
    assert words[1:4] == ["-m", "megatron_rltd", "pretrain_gpt"]
    return flags_of(words[4:])


def prepared(folder, tokens, valid_tokens=5000, sequences=1):
    """Make what prepare_data.sh makes, with token files of this many tokens."""
    folder.mkdir(exist_ok=True)
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    flags = "--num-layers 24 --num-attention-heads 16 --seq-length 1024 --tokenizer-model".split()
    (folder / "model_flags").write_text("\n".join([*flags, str(model)]) + "\n")
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("release")
    for name, count in (("train", tokens), ("valid", valid_tokens)):
        head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sequences, sequences + 1)
        (folder / f"{name}_text_document.idx").write_bytes(head)
        (folder / f"{name}_text_document.bin").write_bytes(bytes(2 * count))
    (folder / "settings").write_text("made\n")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_prints_the_recipe(name):
    flags = flags_printed(name)
    golden = {**RECIPE, **flags_of(GOLDEN[name][0].split())}
    assert {flag: flags.get(flag) for flag in golden} == golden
    assert {flag for flag in flags if flag.startswith(DECISIVE)} <= set(golden)
    assert flags["--load"] == flags["--save"]
    assert flags["--pretrained-checkpoint"] == ["DATA/checkpoint"]
    assert "--finetune" not in flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_megatron_takes_the_flags_for_the_experiment(name):
    status, output = plan(f"--gpus 1 --json --from {FOLDER / name}.sh -- --vocab-size 50257")
    assert status == 0, output
    numbers = json.loads(output)
    assert numbers["runs"]["run"]["iterations"] == GOLDEN[name][1]
    rate = numbers["learning_rate"]
    assert (rate["maximum"], rate["minimum"]) == (1e-4, 0)
    last = list(rate["points"].values())[-1]
    assert last["learning_rate"] == pytest.approx(0, abs=2e-7)


def test_without_data_it_is_the_published_model():
    sys.path.insert(0, str(ROOT / "tools" / "checkpoint"))
    try:
        import hf_config
        from transformers import GPT2Config

        imported = flags_of(hf_config.flags_of(GPT2Config(n_layer=24, n_embd=1024, n_head=16)))
    finally:
        sys.path.pop(0)
    flags = flags_printed("dense")
    assert {flag: flags[flag] for flag in imported} == imported
    assert flags["--padded-vocab-size"] == [str(math.ceil(50257 / 128) * 128)]


@pytest.mark.parametrize("over", [1, 1024])
def test_epochs_are_counted_in_samples_of_the_text(tmp_path, over):
    data = prepared(tmp_path / "data", 1048 * 1024 + over)
    for name in SCRIPTS:
        flags = flags_printed(name, DATA=data)
        golden = flags_of(GOLDEN[name][0].split())
        assert {flag: flags.get(flag) for flag in golden} == golden
        assert flags["--eval-interval"] == flags["--save-interval"] == ["262"]
    assert flags_printed("dense", DATA=data, EPOCHS="3")["--train-samples"] == ["3144"]
    data = prepared(tmp_path / "data", 1048 * 1024)  # the last sample lacks its last label
    assert flags_printed("dense", DATA=data)["--train-samples"] == [str(5 * 1047)]


def test_epochs_are_said_to_be_at_most_so_many(tmp_path):
    data = prepared(tmp_path / "data", 1048 * 1024 + 1)
    for name in SCRIPTS:
        said = run(name, DRY_RUN="1", DATA=data, EPOCHS="3")[2]
        assert "at most 3 epochs of 1048 samples of 1024 tokens" in said


def test_seeds_are_runs_of_their_own():
    assert flags_printed("ltd", SEED="7")["--save"][0].endswith(
        "/gpt2_finetune/ltd-seed7/checkpoints"
    )
    flags = flags_printed("ltd", SLURM_ARRAY_TASK_ID="3")
    assert flags["--seed"] == ["3"]
    assert flags["--save"][0].endswith("/ltd-seed3/checkpoints")


def test_a_machine_lends_no_more_gpus_than_the_batch_can_use(tmp_path):
    said = run("dense", DRY_RUN="1", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")[2]
    assert "2 processes on 1 nodes" in said
    said = run("dense", DRY_RUN="1", CUDA_VISIBLE_DEVICES="0")[2]
    assert "1 processes on 1 nodes" in said


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ltd", {}, "DATA is not set: see the top of .*finetune.sh, or use SCALE=smoke"),
        (
            "ltd",
            {"DATA": "no/where"},
            "DATA=no/where is not a folder that prepare_data.sh has compl",
        ),
        ("ltd", {"SCALE": "tiny"}, "SCALE=tiny is not full or smoke"),
        ("ltd", {"EPOCHS": "0"}, "EPOCHS=0 is not a whole number above 0"),
        ("dense", {"SEED": "x"}, "SEED=x is not a whole number above 0"),
        ("dense", {"LAYER_TOKEN_LR": "2"}, "LAYER_TOKEN_LR=2 is not 0 or 1"),
        ("prepare_data", {}, "OUTPUT is not set; set it to the folder"),
        ("prepare_data", {"OUTPUT": "{tmp}/new"}, "MODEL is not set; see the top of"),
        ("prepare_data", {"SCALE": "smoke", "TRAIN": "x"}, "TRAIN=x: SCALE=smoke makes its own"),
        ("all", {}, "DATA is not set: prepare_data.sh makes it; or use SCALE=smoke"),
        ("all", {"SCALE": "smoke", "SEEDS": "1 two"}, "SEEDS=1 two: two is not a whole number"),
        ("all", {"SCALE": "smoke", "SEED": "1"}, "SEED=1 is for one run; use the scripts"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_starts(tmp_path, name, settings, message):
    settings = {key: value.replace("{tmp}", str(tmp_path)) for key, value in settings.items()}
    status, output, said = run(
        name, **{"RUN_DIR": tmp_path / "run"} if name != "all" else {}, **settings
    )
    assert (status, output, said.count("\n")) == (2, "", 1), said
    assert re.search(f"^{name}: {message}", said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": 1024},
            "has 1024 tokens, but one sample takes 1025: there is not an epoch of it",
        ),
        ({"tokens": 5000, "valid_tokens": 64}, "data/valid has 64 tokens, but one sample takes"),
        (
            {"tokens": 5000, "sequences": 3},
            "train_text_document has 3 documents, which would be sh",
        ),
        (
            {"tokens": 3000, "EPOCHS": "1"},
            "EPOCHS=1 of 2 samples are fewer than GLOBAL_BATCH_SIZE=4",
        ),
        (
            {"tokens": 5000, "TP": "3", "PROCESSES": "3"},
            "TP=3 does not divide the 16 attention hea",
        ),
        (
            {"tokens": 5000, "remove": "model/config.json"},
            "model/config.json is missing .* prepare",
        ),
        (
            {"tokens": 5000, "remove": "valid_text_document.bin"},
            "valid_text_document.bin is missing",
        ),
        (
            {"tokens": 5000, "remove": "settings"},
            "is not a folder that prepare_data.sh has complet",
        ),
        (
            {"tokens": 5000, "remove": "checkpoint/latest_checkpointed_iteration.txt"},
            "START_FROM=.*/checkpoint is not a folder of checkpoints",
        ),
    ],
)
def test_data_that_do_not_do_are_an_error(tmp_path, change, message):
    settings = {key: change.pop(key) for key in list(change) if key.isupper()}
    removed = change.pop("remove", None)
    data = prepared(tmp_path / "data", **change)
    if removed:
        (data / removed).unlink()
    settings = {"PROCESSES": "1", **settings}
    status, output, said = run("dense", DATA=data, RUN_DIR=tmp_path / "run", **settings)
    assert (status, output) == (2, ""), said
    assert re.search(f"^dense: .*{message}", said, re.MULTILINE), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "tokenizer.json",
            "MODEL=.*model holds no tokenizer; put the tokenizer.json of that model",
        ),
        ("config.json", "MODEL=.*model is not a folder with a config.json"),
        ("text.txt", "TRAIN=.*text.txt is no file"),
        ("the text", "TRAIN=.*text.txt is empty"),
    ],
)
def test_preparation_checks_its_files_first(tmp_path, missing, message):
    (tmp_path / "model").mkdir()
    for file in ("model/config.json", "model/tokenizer.json", "text.txt"):
        if not file.endswith(missing):
            text = "" if (missing, file) == ("the text", "text.txt") else "{}"
            (tmp_path / file).write_text(text)
    text = tmp_path / "text.txt"
    status, _, said = run(
        "prepare_data",
        MODEL=tmp_path / "model",
        OUTPUT=tmp_path / "out",
        **dict.fromkeys(("TRAIN", "VALID", "TEST"), text),
    )
    assert (status, said.count("\n")) == (2, 1), said
    assert re.search(f"^prepare_data: {message}", said), said
    assert not (tmp_path / "out").exists()


def test_records_are_those_of_the_published_preparation(tmp_path):
    corpus = module("prepare")
    text = tmp_path / "ptb.txt"
    text.write_bytes(b" no it was n't \n\n  black <unk> \x0b\r\nend")
    out = tmp_path / "out.jsonl"

    def written(kind, source=text):
        corpus.records(kind, source, out)
        return [json.loads(line)["text"] for line in out.read_text().splitlines()]

    assert written("lines") == ["no it was n't", "black <unk>", "end"]
    assert written("file") == [" no it was n't \n\n  black <unk> \x0b\nend"]
    source = tmp_path / "given.jsonl"
    source.write_text(json.dumps({"text": " as it is \n"}) + "\n")
    assert written("lines", source) == [" as it is \n"]
    text.write_text(" \n \n")
    with pytest.raises(ValueError, match="ptb.txt is empty: it holds no word"):
        written("lines")
    text.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="ptb.txt is not UTF-8"):
        written("file")


def test_the_table_has_means_and_each_seed():
    evaluate = module("evaluate")

    def row(value):
        return dict.fromkeys(evaluate.COLUMNS, value)

    rows = [
        ("before", [("", 0, row(30.0))]),
        ("dense", [("seed 1", 1310, row(16.0)), ("seed 2", 1310, row(17.0))]),
        ("ltd", [("seed 1", 1470, row(15.5))]),
    ]
    lines = [re.split("  +", line) for line in evaluate.table(rows).splitlines()]
    assert [line[0] for line in lines[1:]] == [
        "before",
        "dense, mean of 2",
        "dense, seed 1",
        "dense, seed 2",
        "ltd, seed 1",
    ]
    assert lines[2][1:] == ["16.50"] * 6
    assert lines[5][1:] == ["1,470", *["15.50"] * 6]


def evaluated(*arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / "evaluate.py"), *map(str, arguments)],
        env=environment(PYTHONPATH=ROOT),
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_what_cannot_be_evaluated_is_said_before_anything_slow(tmp_path):
    data = prepared(tmp_path / "data", 1025)
    (tmp_path / "ltd").mkdir()
    (tmp_path / "ltd-seed1").mkdir()
    for arguments, message in [
        (["--data", tmp_path, tmp_path / "ltd"], f"--data {tmp_path} is not a folder that prep"),
        (["--data", data, tmp_path / "ltd"], "ltd is not named METHOD-seedN; rename it"),
        (["--data", data, tmp_path / "ltd-seed1"], "ltd-seed1 holds no checkpoint of a run"),
    ]:
        result = evaluated(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("evaluate.py: ")
        assert message in result.stderr


def test_from_text_to_table(tmp_path):
    """All of it: text, import, both methods, export, perplexities. Megatron agrees with them."""
    runs, data = tmp_path / "runs", tmp_path / "data"
    settings = {"SCALE": "smoke", "RUNS": runs, "DATA": data, "SEEDS": "7", "EPOCHS": "1"}
    status, output, said = run("all", **settings)
    assert status == 0, output + said
    heading, *rows = [re.split("  +", line) for line in output.splitlines()[-4:]]
    assert heading[1:] == ["iterations", *module("evaluate").COLUMNS]
    assert [row[0] for row in rows] == ["before", "dense, seed 7", "ltd, seed 7"]
    for name, row in zip(SCRIPTS, rows[1:], strict=True):
        log = (runs / f"{name}-seed7" / "log.txt").read_text()
        assert re.search(rf"^{name}: finished: iteration {row[1]} of {row[1]}$", log, re.MULTILINE)
        loss = float(re.findall(r"validation-0 loss at .* lm loss value: (\S+)", log)[-1])
        # Of samples that predict one token more, and their softmax has 24 rows of padding.
        assert float(row[2]) == pytest.approx(math.exp(loss), rel=0.02)
        assert float(row[2]) < float(rows[0][2]) * 0.8
        assert float(row[5]) < float(rows[0][5]) * 0.8
    assert "kept tokens: 16" in log  # random-LTD's, at first
    kept = [float(k) for k in re.findall(r"kept tokens: (\S+)", log)]
    assert (kept[0] < 64, kept[-1]) == (True, 64)
    # What is there is not made again, and what is wanted otherwise is not mixed with it.
    again = evaluated("--data", data, *(runs / f"{name}-seed7" for name in SCRIPTS))
    assert (again.stdout.splitlines(), again.stderr) == (output.splitlines()[-4:], "")
    status, output, said = run("prepare_data", SCALE="smoke", OUTPUT=data, RECORDS="file")
    assert status == 2
    assert "was made from other files or settings; choose another, or remove it" in said


def test_scripts_differ_in_their_settings_alone():
    texts = {
        re.sub(r"^# .*\n|:=(dense|ltd)\}", "", (FOLDER / f"{name}.sh").read_text(), flags=re.M)
        for name in SCRIPTS
    }
    assert len(texts) == 1
    for option in ("--requeue", "--signal=TERM@600", "--open-mode=append"):
        assert option in min(texts)


def test_every_documented_setting_is_read():
    def code_of(*files):
        return "".join(re.sub(r"^#.*\n", "", f.read_text(), flags=re.MULTILINE) for f in files)

    shared = [FOLDER / "finetune.sh", *LIB.glob("*.sh")]
    for files in (shared, [FOLDER / "prepare_data.sh"], [FOLDER / "all.sh"]):
        for setting in settings_of(files[0]) - {"DRY_RUN"}:
            assert re.search(rf"\b{setting}\b", code_of(*files)), setting
