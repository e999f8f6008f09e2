"""examples/gpt3_1.3b/prepare_data.sh and the tools it calls: from raw text to one data set."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/gpt3_1.3b/prepare_data.sh"
# Of several kB each, so that files differ in length.
SOURCES = sorted(f for f in (ROOT / "megatron_rltd").rglob("*.py") if f.stat().st_size > 2000)
END_OF_TEXT = "<|endoftext|>"


def lines(files):
    return "".join(json.dumps({"text": file.read_text()}) + "\n" for file in files).encode()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Raw text in three files, one line of it bad, and the two files of a GPT-2-like tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from zstandard import ZstdCompressor

    folder = tmp_path_factory.mktemp("raw")
    (folder / "in/sub").mkdir(parents=True)
    (folder / "in/00.jsonl.zst").write_bytes(ZstdCompressor().compress(lines(SOURCES[:4])))
    (folder / "in/01.jsonl").write_bytes(lines(SOURCES[4:6]) + b"{bad\n" + lines(SOURCES[6:8]))
    (folder / "in/sub/02.jsonl.gz").write_bytes(gzip.compress(lines(SOURCES[8:10])))
    (folder / "in/notes.txt").write_text("not this")
    (folder / "in/empty.jsonl").touch()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(list(map(str, SOURCES)), vocab_size=500, special_tokens=[END_OF_TEXT])
    tokenizer.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(raw):
    """The folder that gpt2_tokenizer.py makes of them."""
    done = run_tool("gpt2_tokenizer.py", *gpt2_flags(raw), "--output", raw / "tokenizer")
    assert done.returncode == 0, done.stderr
    return raw / "tokenizer"


def gpt2_flags(raw):
    return ["--vocab-file", raw / "vocab.json", "--merge-file", raw / "merges.txt"]


def run_tool(name, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, flags)],
        capture_output=True,
        text=True,
    )


def settings(raw, output, **variables):
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PYTHON": sys.executable,
        "INPUT": str(raw / "in"),
        "OUTPUT": str(output),
        "VOCAB_FILE": str(raw / "vocab.json"),
        "MERGE_FILE": str(raw / "merges.txt"),
        "WORKERS": "2",
        **variables,
    }


def prepare(raw, output, **variables):
    return subprocess.run(
        ["bash", str(SCRIPT)],
        env=settings(raw, output, **variables),
        capture_output=True,
        text=True,
    )


def array_task(number, count, **variables):
    highest = count - 1
    names = {"ID": number, "COUNT": count, "MIN": 0, "MAX": highest, "STEP": 1, **variables}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def files_of(output):
    """Return {name: content} of the joined data set."""
    return {
        ending: (output / f"text_document.{ending}").read_bytes()
        for ending in ("bin", "idx", "sha256")
    }


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "data"
    done = prepare(raw, output)
    assert done.returncode == 0, done.stderr
    return output, done


def test_one_data_set_of_all_files_in_order(raw, prepared, tmp_path):
    output, done = prepared
    assert "1 bad lines skipped" in done.stdout
    assert "01.jsonl: 1 bad documents skipped" in done.stderr
    assert f"DATA_PATH={output}/text_document TOKENIZER={output}/tokenizer" in done.stderr
    log = (output / "shards/01.jsonl.log").read_text()
    assert f"skipped: {raw}/in/01.jsonl, line 3 is not JSON" in log
    whole = run_tool(
        "preprocess_data.py",
        *("--input", raw / "in/00.jsonl.zst", raw / "in/01.jsonl", raw / "in/sub/02.jsonl.gz"),
        *("--append-eod", "--skip-bad-lines", "--output-prefix", tmp_path / "whole"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", output / "tokenizer"),
    )
    assert whole.returncode == 0, whole.stderr
    ours = files_of(output)
    for ending in ("bin", "idx"):
        assert ours[ending] == (tmp_path / f"whole_text_document.{ending}").read_bytes()
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "text_document.sha256"], cwd=output
    )
    assert checked.returncode == 0


def test_the_same_command_again_makes_what_changed(raw, prepared, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(prepared[0], output)
    source = tmp_path / "raw"
    shutil.copytree(raw, source, copy_function=shutil.copy2)
    before = (output / "text_document.bin").stat().st_mtime_ns
    done = prepare(source, output)
    assert done.returncode == 0, done.stderr
    assert "01.jsonl" not in done.stderr
    assert (output / "text_document.bin").stat().st_mtime_ns == before
    (source / "in/01.jsonl").write_bytes(lines(SOURCES[4:6]))
    done = prepare(source, output)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stderr.splitlines() if line.endswith(("zst", "jsonl", "gz"))]
    assert made == ["megatron_rltd: 2/3 01.jsonl"]
    assert len(files_of(output)["bin"]) < len(files_of(prepared[0])["bin"])
    assert "bad" not in done.stdout


def test_array_tasks_share_the_files(raw, prepared, tmp_path):
    output = tmp_path / "data"
    tasks = [
        subprocess.Popen(
            ["bash", str(SCRIPT)],
            env=settings(raw, output, **array_task(number, 2)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 shards made" in said[0] and "1 shards made" in said[1]
    assert not (output / "text_document.idx").exists()
    done = prepare(raw, output)
    assert done.returncode == 0, done.stderr
    assert "/3 0" not in done.stderr.replace("shards/0", "")  # nothing is tokenized again
    assert files_of(output) == files_of(prepared[0])


def test_array_with_gaps_is_refused(raw, tmp_path):
    done = prepare(raw, tmp_path / "data", **array_task(7, 3, MIN=3, MAX=9))
    assert done.returncode == 1
    assert "without gaps: --array=0-2" in done.stderr
    # Every second number is as good as every number.
    done = prepare(raw, tmp_path / "data", **array_task(2, 2, MAX=2, STEP=2))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "data/shards").glob("*.idx")) == [
        "01.jsonl_text_document.idx"
    ]


def test_a_killed_run_goes_on(raw, prepared, tmp_path):
    output = tmp_path / "data"
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=settings(raw, output, TOKENIZER=str(prepared[0] / "tokenizer")),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list((output / "shards").glob("*.sha256")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # as a node that goes down
    process.wait()
    assert not (output / "text_document.idx").exists()
    done = prepare(raw, output)
    assert done.returncode == 0, done.stderr
    assert "00.jsonl.zst" not in done.stderr.replace("shards/", "").split("1/3")[0]
    assert files_of(output) == files_of(prepared[0])


def test_a_damaged_file_costs_only_itself(raw, prepared, tmp_path):
    source, output = tmp_path / "raw", tmp_path / "data"
    shutil.copytree(prepared[0], output, copy_function=shutil.copy2)
    shutil.copytree(raw, source, copy_function=shutil.copy2)
    (output / "text_document.idx").unlink()
    for name in ("00.jsonl.zst", "sub__02.jsonl.gz"):
        (output / f"shards/{name}_text_document.sha256").unlink()
    (source / "in/00.jsonl.zst").write_bytes(b"no zst")
    done = prepare(source, output)
    assert done.returncode == 1
    assert "00.jsonl.zst: preprocess_data.py: error: " in done.stderr
    assert "1 of 3 files failed" in done.stderr
    assert (output / "shards/sub__02.jsonl.gz_text_document.sha256").exists()  # went on after it
    assert not (output / "text_document.idx").exists()
    shutil.copy2(raw / "in/00.jsonl.zst", source / "in/00.jsonl.zst")
    (output / "text_document.sha256").unlink()
    assert prepare(source, output).returncode == 0
    assert files_of(output) == files_of(prepared[0])


def test_spaces_bad_files_and_what_was_removed(raw, tokenizer, tmp_path):
    source, output = tmp_path / "my raw", tmp_path / "my data"
    (source / "in").mkdir(parents=True)
    (source / "in/a b.jsonl").write_bytes(lines(SOURCES[:3]))
    (source / "in/c.jsonl").write_bytes(b"{bad\n" * 3)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy2(raw / name, source / name)
    done = prepare(source, output)
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout and "3 bad lines skipped" in done.stdout
    whole = files_of(output)
    # A file system that is purged.
    (output / "shards/a b.jsonl_text_document.bin").unlink()
    (output / "text_document.bin").unlink()
    done = prepare(source, output)
    assert done.returncode == 0, done.stderr
    assert "1/2 a b.jsonl" in done.stderr and "c.jsonl" not in done.stderr
    assert files_of(output) == whole
    (source / "vocab.json").write_text("{}")
    done = prepare(source, output)
    assert done.returncode == 1
    assert "was not made from VOCAB_FILE and MERGE_FILE" in done.stderr
    (source / "in/a b.jsonl").unlink()
    shutil.copy2(raw / "vocab.json", source / "vocab.json")
    done = prepare(source, output)
    assert done.returncode == 1
    assert "has a line with text under 'text'" in done.stderr
    assert files_of(output) == whole


def test_a_damaged_shard_is_not_joined(raw, prepared, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(prepared[0], output)
    (output / "text_document.parts").unlink()
    shard = output / "shards/01.jsonl_text_document.bin"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    done = prepare(raw, output)
    assert done.returncode == 2
    assert f"error: {shard} does not match" in done.stderr
    assert "remove both and tokenize this part again" in done.stderr
    assert files_of(output) == files_of(prepared[0])  # what was there stays


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"INPUT": "nowhere"}, "INPUT=nowhere is not a folder"),
        ({"INPUT": str(ROOT / "docs")}, "has no file ending in .jsonl, .jsonl.gz or .jsonl.zst"),
        ({"OUTPUT": ""}, "OUTPUT is not set"),
        ({"MERGE_FILE": ""}, "set VOCAB_FILE and MERGE_FILE"),
        ({"VOCAB_FILE": "no.json"}, "--vocab-file no.json: there is no such file"),
        ({"TOKENIZER": "nowhere"}, "TOKENIZER=nowhere is not a folder"),
    ],
)
def test_wrong_settings_are_one_sentence(variables, part, raw, tmp_path):
    done = prepare(raw, tmp_path / "data", **variables)
    assert done.returncode != 0
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("data/shards/*.idx"))


def test_shards_of_another_tokenizer_are_refused(raw, prepared, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(prepared[0], output)
    done = prepare(raw, output, JSON_KEY="title")
    assert done.returncode == 1
    assert "made with another tokenizer or JSON_KEY" in done.stderr
    assert files_of(output) == files_of(prepared[0])


def test_gpt2_tokenizer_is_that_of_hugging_face(raw, tokenizer):
    from transformers import AutoTokenizer, GPT2Tokenizer

    theirs = GPT2Tokenizer.from_pretrained(str(raw / "tokenizer"))
    ours = AutoTokenizer.from_pretrained(str(tokenizer))
    merges = [
        tuple(line.split())
        for line in (raw / "merges.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    plain = GPT2Tokenizer(vocab=json.loads((raw / "vocab.json").read_text()), merges=merges)
    text = SOURCES[0].read_text() + " caf\u00e9 \U0001f600\r\n\t  x" + END_OF_TEXT + "y"
    assert ours(text).input_ids == plain(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours.eos_token == END_OF_TEXT and len(ours) == len(plain) == 500


def test_plans_know_the_tokenizer(tokenizer):
    flags = (
        *"-- --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64".split(),
        *"--max-position-embeddings 64 --micro-batch-size 2 --train-iters 9 --lr 1e-3".split(),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
    )
    plan = [sys.executable, "-m", "megatron_rltd", "plan", *flags]
    done = subprocess.run(plan, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vocabulary 512\n" in done.stdout  # 500, padded


@pytest.mark.parametrize(
    ("vocab", "merges", "part"),
    [
        ("{}", "", "lacks 256 of the 256 bytes"),
        (None, "a b c\n", "are not the two files of one byte-level BPE"),
        ("no json", None, "are not the two files of one byte-level BPE"),
    ],
)
def test_gpt2_tokenizer_refuses_other_files(vocab, merges, part, raw, tmp_path):
    for name, text in (("vocab.json", vocab), ("merges.txt", merges)):
        data = (raw / name).read_text() if text is None else text
        (tmp_path / name).write_text(data)
    done = run_tool("gpt2_tokenizer.py", *gpt2_flags(tmp_path), "--output", tmp_path / "out")
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpt2_tokenizer_replaces_nothing(raw, tokenizer):
    done = run_tool("gpt2_tokenizer.py", *gpt2_flags(raw), "--output", tokenizer)
    assert done.returncode == 2
    assert "exists; choose another or remove it" in done.stderr


def test_merge_refuses_what_does_not_fit(raw, prepared, tmp_path):
    shards = prepared[0] / "shards"
    one, other = shards / "01.jsonl_text_document.idx", shards / "00.jsonl.zst_text_document.idx"
    index = tmp_path / "wide.idx"
    shutil.copy2(one, index)
    shutil.copy2(one.with_suffix(".bin"), index.with_suffix(".bin"))
    data = bytearray(index.read_bytes())
    data[17] = 4  # the index now says int32 where the tokens have 16 bits
    index.write_bytes(data)
    cut = tmp_path / "cut.idx"
    cut.write_bytes(one.read_bytes()[:40])
    cut.with_suffix(".bin").write_bytes(one.with_suffix(".bin").read_bytes())
    for inputs, part in (
        ([one, one], "is named twice"),
        ([one, "no.idx"], "--input no.idx: there is no no.idx"),
        ([one, shards / "settings"], "does not end in .idx"),
        ([one, index], "bytes, but its index says"),
        ([cut, one], f"{tmp_path}/cut.idx is not an index of tokens"),
    ):
        done = run_tool(
            "merge_datasets.py", "--input", *inputs, "--output-prefix", tmp_path / "out"
        )
        assert done.returncode == 2
        assert part in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("out*"))
    done = run_tool(
        "merge_datasets.py", "--input", one, other, "--output-prefix", one.with_suffix("")
    )
    assert done.returncode == 2
    assert "is an input too" in done.stderr
