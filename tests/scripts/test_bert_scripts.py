"""examples/bert_large: the recipe of each script, what is refused, and one run of it in small."""

import json
import re
import shlex
import struct

import pytest

from tests.commands.test_plan_command import command as plan
from tests.parallel import ROOT
from tests.scripts.gpt3_scripts import LIB, bash, flags_of, last_iteration, settings_of, starts

FOLDER = ROOT / "examples" / "bert_large"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*_*b.sh"))

# What the published launch scripts of the experiment have in common (arXiv 2211.11586, 2212.03597).
RECIPE = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 "
    "--max-position-embeddings 512 --init-method-std 0.02 --global-batch-size 1024 --min-lr 1e-5 "
    "--lr-decay-style linear --adam-beta1 0.9 --adam-beta2 0.999 --weight-decay 1e-2 "
    "--clip-grad 1.0 --split 949,50,1 --seed 1234 --attention-dropout 0.1 --hidden-dropout 0.1 "
    "--data-path DATA_PATH --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER "
    "--num-workers 0 --bf16"
)
DENSE = "--lr {} --train-samples {} --lr-warmup-samples 10240000"
LTD = (
    "--lr {} --lr-warmup-samples 3200000 --random-ltd --random-ltd-min-tokens 128 "
    "--random-ltd-increment 16 --random-ltd-grow-micro-batch 1 --random-ltd-strata 16 "
    "--random-ltd-preflight --random-ltd-ramp-iters {} --train-layer-tokens {} --layer-token-lr"
)
BYPASS = (
    "--lr 1e-4 --lr-warmup-samples 7893333 --random-ltd --random-ltd-min-tokens 256 "
    "--random-ltd-increment 16 --random-ltd-grow-micro-batch 1 --random-ltd-strata 1 "
    "--random-ltd-preflight --random-ltd-constant --random-ltd-policy token-bypass "
    "--train-layer-tokens 1048576000000 --layer-token-lr"
)
# {script: (flags, iterations, peak learning rate)}. Published scripts of random-LTD, which round
# LayerTokens down, take 2.719, 1.822 and 1.359 million iterations.
GOLDEN = {
    "dense_1049b": (DENSE.format("1e-4", 2_048_000_000), 2_000_000, 1e-4),
    "dense_703b": (DENSE.format("1.5e-4", 1_372_160_000), 1_340_000, 1.5e-4),
    "dense_524b": (DENSE.format("2e-4", 1_024_000_000), 1_000_000, 2e-4),
    "ltd_1049b": (LTD.format("1e-4", 2000000, 1048576000000), 2_716_147, 1e-4),
    "ltd_703b": (LTD.format("1.5e-4", 1340000, 702545920000), 1_819_818, 1.5e-4),
    "ltd_524b": (LTD.format("2e-4", 1000000, 524288000000), 1_358_074, 2e-4),
    "bypass_1049b": (BYPASS, 2_594_595, 1e-4),
}
# These decide what is compared with what: a script has them as given above or not at all.
DECISIVE = ("--random-ltd", "--layer-token-lr", "--train-", "--lr-", "--sequence-parallel")


def run(name, *arguments, **settings):
    return bash(name, *arguments, folder=FOLDER, **settings)


def test_every_script_has_its_golden_values():
    assert set(GOLDEN) == set(SCRIPTS)


@pytest.mark.parametrize("name", GOLDEN)
def test_dry_run_prints_the_recipe(name):
    status, output, said = run(name, DRY_RUN="1")
    assert (status, output.count("\n")) == (0, 1), said
    words = shlex.split(output)
    assert words[1:4] == ["-m", "megatron_rltd", "pretrain_bert"]
    flags = flags_of(words[4:])
    golden = flags_of(f"{RECIPE} {GOLDEN[name][0]}".split())
    assert {flag: flags.get(flag) for flag in golden} == golden
    assert {flag for flag in flags if flag.startswith(DECISIVE)} <= set(golden)


@pytest.mark.parametrize("name", GOLDEN)
def test_megatron_takes_the_flags_for_the_experiment(name):
    line = f"--gpus 64 --json --from {FOLDER / name}.sh -- --vocab-size 30522"
    status, output = plan(line)
    assert status == 0, output
    numbers = json.loads(output)
    _, steps, peak = GOLDEN[name]
    assert numbers["runs"]["run"]["iterations"] == steps
    rate = numbers["learning_rate"]
    assert (rate["maximum"], rate["minimum"]) == (peak, 1e-5)
    assert rate["warmup_over"]["iteration"] == pytest.approx(10_000, abs=1)
    last = list(rate["points"].values())[-1]
    assert (last["iteration"], last["learning_rate"]) == (steps, pytest.approx(1e-5, rel=1e-3))


def test_scripts_differ_in_their_settings_alone():
    texts = set()
    for name in SCRIPTS:
        text = (FOLDER / f"{name}.sh").read_text()
        head, settings, tail = re.split(
            r"^(: .*?\n)\n", re.sub(r"^# [^\n]*\n", "", text, flags=re.M), flags=re.M | re.S
        )
        assert set(re.findall(r"\{(\w+):=", settings)) <= settings_of(FOLDER / "pretrain.sh")
        texts.add(head + tail)
    assert len(texts) == 1
    for option in ("--requeue", "--signal=TERM@600", "--open-mode=append"):
        assert option in min(texts)


def test_every_documented_setting_is_read():
    def code_of(*files):
        return "".join(re.sub(r"^#.*\n", "", f.read_text(), flags=re.MULTILINE) for f in files)

    shared = [FOLDER / "pretrain.sh", *LIB.glob("*.sh")]
    for files in (shared, [FOLDER / "prepare_data.sh", LIB / "shards.sh"]):
        for setting in settings_of(files[0]) - {"DRY_RUN"}:
            assert re.search(rf"\b{setting}\b", code_of(*files)), setting


def data_set(folder, documents, sequences, tokens=100):
    """Write token files of as many documents and sequences; return their settings."""
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sequences, documents + 1)
    (folder / "text_sentence.idx").write_bytes(head)
    (folder / "text_sentence.bin").write_bytes(bytes(2 * tokens))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    return {"DATA_PATH": folder / "text_sentence", "TOKENIZER": folder / "tokenizer"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DATA_PATH": ""}, "DATA_PATH is not set: see the top of .*bert_large/pretrain.sh"),
        ({"TOKENIZER": ""}, "TOKENIZER is not set: see the top of"),
        ({"TOKENIZER": "no"}, "no/tokenizer_config.json is missing or empty: check DATA_PATH and"),
        ({"DATA_PATH": "1 no"}, "no.bin is missing or empty: check DATA_PATH and TOKENIZER"),
        ({"documents": "400"}, "has 400 documents, of which SPLIT=949,50,1 leaves none for test"),
        ({"SPLIT": "9999,1,0"}, "of which SPLIT=9999,1,0 leaves none for validation"),
        ({"SPLIT": "9:1"}, "SPLIT=9:1 is not three whole numbers, as in 949,50,1"),
        ({"sequences": "2000"}, "text_sentence is not split into sentences: make it with prepare_"),
        ({"CP": "2", "PROCESSES": "2"}, "CP=2: Megatron does not split BERT's samples between"),
        ({"TP": "3", "PROCESSES": "3"}, "TP=3 does not divide the 16 attention heads: change TP"),
        ({"PRECISION": "16"}, "PRECISION=16 is not bf16, fp16 or fp32"),
        ({"WARMUP_ITERS": "no"}, "WARMUP_ITERS=no is not a whole number above 0"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_starts(tmp_path, settings, message):
    counts = {name: int(settings.pop(name)) for name in list(settings) if name.islower()}
    given = data_set(tmp_path, **{"documents": 2000, "sequences": 9000, **counts})
    settings = {"PROCESSES": "1", "RUN_DIR": tmp_path / "run", **given, **settings}
    status, output, said = run("ltd_1049b", **settings)
    assert (status, output) == (2, ""), said
    assert re.search(f"^ltd_1049b: .*{message}", said, re.MULTILINE), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set one of VOCAB_FILE, VOCAB_SIZE and TOKENIZER, not 0 of them"),
        ({"VOCAB_SIZE": "9", "VOCAB_FILE": "a"}, "set one of VOCAB_FILE, VOCAB_SIZE and TOKENIZER"),
        ({"VOCAB_SIZE": "many"}, "VOCAB_SIZE=many is not a whole number above 0"),
        ({"VOCAB_FILE": "no.txt"}, "VOCAB_FILE=no.txt is no file or empty"),
        ({"VOCAB_SIZE": "9", "CASED": "yes"}, "CASED=yes is not 0 or 1"),
        ({"VOCAB_SIZE": "900"}, "INPUT= is not a folder; set it to the folder of .jsonl files"),
        ({"SCALE": "smoke", "INPUT": "x"}, "INPUT=x: SCALE=smoke makes its own"),
        ({"SCALE": "big"}, "SCALE=big is not full or smoke"),
        ({"vocabulary": "[UNK]\n[CLS]\n"}, "vocab.txt lacks [PAD], [SEP], [MASK]; BERT's data"),
    ],
)
def test_preparation_says_what_is_wrong(tmp_path, settings, message):
    settings = dict(settings)
    if "vocabulary" in settings:
        (tmp_path / "vocab.txt").write_text(settings.pop("vocabulary"))
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jsonl").write_text('{"text": ["One.", "Two."]}\n')
        settings |= {"VOCAB_FILE": tmp_path / "vocab.txt", "INPUT": tmp_path / "in"}
    status, _, said = run("prepare_data", OUTPUT=tmp_path / "out", **settings)
    assert (status, said.count("\n")) == (1, 1), said
    assert message in said


def test_from_text_to_a_run_that_drops(tmp_path):
    """With Megatron: sentences and vocabulary of real text, then random-LTD, stopped by nothing."""
    status, output, said = run("prepare_data", SCALE="smoke", OUTPUT=tmp_path / "data")
    assert status == 0, output + said
    data = {"DATA_PATH": tmp_path / "data/text_sentence", "TOKENIZER": tmp_path / "data/tokenizer"}
    settings = {"SCALE": "smoke", "TOKENS": "250000000000", "RAMP_ITERS": "600000", **data}
    settings["EXTRA_ARGS"] = "--tensorboard-queue-size 1"
    status, output, said = run("ltd_1049b", RUN_DIR=tmp_path / "run", **settings)
    assert status == 0, output + said
    last = last_iteration(tmp_path / "run")
    assert output.splitlines()[-1] == f"ltd_1049b: finished: iteration {last} of {last}"
    (steps,) = starts(tmp_path / "run")
    kept = [step["random-ltd kept tokens"] for step in steps.values()]
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (32, 128)
    assert steps[last]["lm loss"] < steps[1]["lm loss"]
