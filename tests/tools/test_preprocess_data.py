"""tools/preprocess_data.py: what it writes, what Megatron reads, and how it fails.

Runs that succeed happen in this process, which imports Megatron once, or in one child at the end;
errors are looked at from outside, as a user sees them.
"""

import argparse
import errno
import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import preprocess_data
import pytest
from text_data import corpus, token_files, tokenization, workers

TOOLS = Path(preprocess_data.__file__).parent
EOD_TEXT = "<|endoftext|>"
TIMEOUT_S = 300  # ends what hangs; nothing takes so long
# Bytes that a text layer might change: all line ends, a lone accent, astral characters, a tab.
TEXTS = [
    "def f(x):\n\treturn x\n",
    "caf\u00e9 \u65e5\u672c \U0001f600\r\nb\rc",
    " e\u0301 \n\n",
    "x",
]


def run(*flags, workers=2):
    """Run in this process and return the exit status."""
    return preprocess_data.main([*map(str, flags), "--workers", str(workers)])


def command(*flags):
    return [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, flags)]


def read(path):
    """Return the documents of a file as Megatron reads it: lists of lists of tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(path))
    ends = data.document_indices
    return [[data[i].tolist() for i in range(*pair)] for pair in zip(ends, ends[1:], strict=False)]


def tokens(path):
    """Return the documents, sentences joined."""
    return [sum(sentences, []) for sentences in read(path)]


def megatron_tokenizer(flags):
    """Return the tokenizer that Megatron's training builds from these flags."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_known_args(flags)[0]
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 0, 128, 1
    return build_tokenizer(args)


def printed_flags(stdout):
    """Return the flags of the last line."""
    head, flags = stdout.splitlines()[-1].split(": ", 1)
    assert head == "train with"
    return shlex.split(flags)


def as_jsonl(*documents):
    return "".join(json.dumps(document) + "\n" for document in documents)


def source_files():
    """Return some thousand lines of real text: this project's own."""
    return sorted((TOOLS.parent / "megatron_rltd").glob("*.py"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A trained tokenizer and its corpus: (output prefix, corpus, what the run printed)."""
    folder = tmp_path_factory.mktemp("bpe")
    jsonl = folder / "in.jsonl"
    jsonl.write_text(as_jsonl(*({"text": f.read_text()} for f in source_files())))
    done = subprocess.run(
        command(
            *("--input", jsonl, "--tokenizer-type", "bpe", "--vocab-size", 600, "--append-eod"),
            *("--output-prefix", folder / "out", "--workers", 2),
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", jsonl, done.stdout


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A folder with a tokenizer that begins each text with <s> and has <eod> as a plain token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(
        ["<eod> " * 5000, *(f.read_text() for f in source_files())], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("llama")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    assert "\u2581<eod>" in tokenizer.get_vocab()
    return folder


def write_input(kind, folder):
    """Write TEXTS as this kind of input and return the path to give to --input."""
    if kind == "folder":
        # By name, files before subfolders; the rest is to be left out.
        for name, text in zip(("a.py", "b.py", "sub/a.py", "sub/z/a.PY"), TEXTS, strict=True):
            (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "in" / name).write_bytes(text.encode())
        for name in ("notes.txt", ".hidden.py", "test_a.py", "skip/a.py", ".git/a.py", "happy"):
            (folder / "in" / name).parent.mkdir(exist_ok=True)
            (folder / "in" / name).write_text("not this")
        return [folder / "in", "--suffixes", "py", "--exclude", "test_*", "skip"]
    if kind == "files":
        paths = [folder / name for name in ("z.txt", "a.md", "noext", "b.py")]
        for path, text in zip(paths, TEXTS, strict=True):
            path.write_bytes(text.encode())
        # A byte order mark is not part of the text.
        paths[1].write_bytes(b"\xef\xbb\xbf" + TEXTS[1].encode())
        return paths
    data = as_jsonl(*({"text": text, "n": 1} for text in TEXTS))
    # A blank line, Windows line ends and no line end at the end are all usual.
    data = data.replace("\n", "\r\n", 1).replace("\n", "\n\n", 1).rstrip("\n").encode()
    if kind == "jsonl":
        path = folder / "in.jsonl"
        path.write_bytes(data)
    elif kind == "gz":
        path = folder / "in.json.gz"
        path.write_bytes(gzip.compress(data[:30]) + gzip.compress(data[30:]))
    else:
        compress = pytest.importorskip("zstandard").ZstdCompressor().compress
        path = folder / "in.jsonl.zst"
        path.write_bytes(compress(data[:30]) + compress(data[30:]))
    return [path]


@pytest.mark.parametrize("kind", ["files", "folder", "jsonl", "gz", "zst"])
def test_bytes_round_trip(kind, tmp_path, capsys):
    prefix = tmp_path / "new" / "folder" / "out"
    status = run(
        *("--input", *write_input(kind, tmp_path), "--tokenizer-type", "byte", "--append-eod"),
        *("--output-prefix", prefix),
    )
    stdout, stderr = capsys.readouterr()
    assert status == 0, stderr
    documents = tokens(f"{prefix}_text_document")
    assert [bytes(ids[:-1]).decode() for ids in documents] == TEXTS
    size = sum(len(text.encode()) for text in TEXTS)
    assert f"4 documents, {size + 4} tokens, 0.0 MB of text in " in stdout
    assert f" {size / (size + 4):.2f} bytes per token" in stdout
    flags = printed_flags(stdout)
    assert flags[:2] == ["--data-path", f"{prefix}_text_document"]
    tokenizer = megatron_tokenizer(flags[2:])
    assert {ids[-1] for ids in documents} == {tokenizer.eod} == {256}
    assert tokenizer.vocab_size == 257
    names = sorted(path.name for path in prefix.parent.iterdir())
    assert names == ["out_text_document.bin", "out_text_document.idx"]


def test_folders_are_read_in_sorted_order(tmp_path):
    # Forty of each, so that no filesystem lists them in this order by chance.
    names = [f"{n * 37 % 97:02}" for n in range(40)]
    for name in names:
        (tmp_path / f"folder{name}").mkdir()
        (tmp_path / f"folder{name}" / "b.py").write_text("b")
        (tmp_path / f"file{name}.py").write_text("a")
    found = [os.path.relpath(f, tmp_path) for f in corpus.find_files([str(tmp_path)], [], [])]
    assert found == [f"file{name}.py" for name in sorted(names)] + [
        f"folder{name}/b.py" for name in sorted(names)
    ]


def test_truncated_zst_is_an_error(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(os.urandom(1 << 20).hex().encode())[:-9])
    with pytest.raises(corpus.InputError, match="zst: the compressed data are damaged or end earl"):
        list(corpus.read_records([str(path)]))


def test_bytes_without_eod(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    assert not run(
        *("--input", tmp_path / "a.txt", "--tokenizer-type", "byte"),
        *("--output-prefix", tmp_path / "out"),
    )
    assert read(tmp_path / "out_text_document") == [[list(b"abc")]]


def test_one_sequence(bpe, tmp_path, capsys):
    records = ["one two", " three", "", "fourfive", "six"]  # enough for a split, were they apart
    (tmp_path / "in.jsonl").write_text(as_jsonl(*({"text": text} for text in records)))
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{bpe[0]}_tokenizer"]
    options = ["--input", tmp_path / "in.jsonl", *flags, "--output-prefix"]
    assert not run(*options, tmp_path / "out", "--one-sequence")
    stdout = capsys.readouterr().out
    assert "5 documents, " in stdout and "joined into one document of one sequence" in stdout
    assert printed_flags(stdout)[-4:] == ["--split", "100,0,0", "--eval-iters", "0"]
    assert not run(*options, tmp_path / "apart")
    apart = tokens(tmp_path / "apart_text_document")
    assert len(apart) == 5
    assert read(tmp_path / "out_text_document") == [[sum(apart, [])]]


def test_one_sequence_has_a_limit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(token_files, "MAX_SEQUENCE", 5)
    for text, status in (("abcde", 0), ("abcdef", 2)):
        (tmp_path / "a.txt").write_text(text)
        options = ["--input", tmp_path / "a.txt", "--tokenizer-type", "byte", "--one-sequence"]
        assert run(*options, "--output-prefix", tmp_path / text) == status
    assert "--one-sequence: 6 tokens are too many, a seq" in capsys.readouterr().err
    assert not list(tmp_path.glob("abcdef*"))


@pytest.mark.parametrize("documents", [1, 4, 5, 9, 10, 999, 1000, 10**6])
def test_printed_split_leaves_no_set_empty(documents):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    flags = preprocess_data.split_flags(documents)
    split = flags[1] if flags else "969, 30, 1"
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for share in matrix:
        assert share is None or round(share[0] * documents) < round(share[1] * documents)


def test_bpe_trains_what_megatron_loads(bpe):
    prefix, jsonl, stdout = bpe
    flags = printed_flags(stdout)
    assert flags[4:] == ["--tokenizer-model", f"{prefix}_tokenizer", "--split", "90,10,0"]
    tokenizer = megatron_tokenizer(flags[2:])
    assert tokenizer.vocab_size == 600
    assert tokenizer.detokenize([tokenizer.eod]) == EOD_TEXT
    documents = tokens(flags[1])
    texts = [json.loads(line)["text"] for line in jsonl.open()]
    assert [tokenizer.detokenize(ids) for ids in documents] == [text + EOD_TEXT for text in texts]
    assert sum(map(len, documents)) < 0.7 * sum(map(len, texts))
    for text in TEXTS:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    # transformers 4 knows no other class.
    config = json.loads(Path(f"{prefix}_tokenizer", "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_bpe_skips_bad_lines(bpe, tmp_path, capsys):
    prefix, jsonl, _ = bpe
    (tmp_path / "in.jsonl").write_bytes(b"no\n" + jsonl.read_bytes())
    assert not run(
        *("--input", tmp_path / "in.jsonl", "--tokenizer-type", "bpe", "--vocab-size", 600),
        *("--append-eod", "--skip-bad-lines", "--output-prefix", tmp_path / "out"),
    )
    assert "1 bad documents skipped" in capsys.readouterr().out
    ours = (tmp_path / "out_text_document.bin").read_bytes()
    assert ours == Path(f"{prefix}_text_document.bin").read_bytes()


def test_bpe_does_not_depend_on_the_number_of_workers(bpe, tmp_path):
    prefix, jsonl, _ = bpe
    assert not run(
        *("--input", jsonl, "--tokenizer-type", "bpe", "--vocab-size", 600, "--append-eod"),
        *("--output-prefix", tmp_path / "out"),
        workers=1,
    )
    for name in ("_tokenizer/tokenizer.json", "_text_document.bin", "_text_document.idx"):
        assert Path(f"{tmp_path}/out{name}").read_bytes() == Path(f"{prefix}{name}").read_bytes()


def test_workers_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_RECORDS", 2)
    # The first batch takes far longer than those that follow.
    texts = ["x " * 2_000_000, *(str(n) for n in range(60))]
    (tmp_path / "in.jsonl").write_text(as_jsonl(*({"text": text} for text in texts)))
    for count in (1, 3):
        assert not run(
            *("--input", tmp_path / "in.jsonl", "--tokenizer-type", "byte"),
            *("--output-prefix", tmp_path / f"out{count}"),
            workers=count,
        )
    assert [bytes(ids).decode() for ids in tokens(tmp_path / "out3_text_document")] == texts
    for ending in ("bin", "idx"):
        one, three = (tmp_path / f"out{n}_text_document.{ending}" for n in (1, 3))
        assert one.read_bytes() == three.read_bytes()


def test_input_is_not_read_far_ahead():
    taken = []
    items = (taken.append(n) or n for n in range(100))
    with workers.WorkerPool(2) as pool:
        results = pool.in_order(pow, items, 2)
        for n in range(10):
            assert next(results) == 2**n
            assert len(taken) <= n + 5
        assert list(results) == [2**n for n in range(10, 100)]
        assert list(pool.in_order(pow, [], 2)) == []


def test_workers_leave_interrupts_to_the_main_process():
    # In a new process: there the first worker starts differently.
    code = """
import os, signal
from text_data import workers
with workers.WorkerPool(1) as pool:
    process = pool.call(eval, "__import__('os').getpid()")
    assert process != os.getpid()
    os.kill(process, signal.SIGINT)  # a terminal sends it to all processes
    assert pool.call(eval, "__import__('os').getpid()") == process
assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_truncation_in_a_tokenizer_json_is_ignored(bpe, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{bpe[0]}_tokenizer/tokenizer.json")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    record = corpus.Record("a", None, b"def f(x): return x")
    (encoded,) = tokenization.encode_records(
        str(tmp_path / "t.json"), ["text"], None, None, [record]
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert encoded.ids[0].tolist() == tokenizer.encode("def f(x): return x").ids
    assert 3 < encoded.ids[0].size < 50


def megatron_lm(jsonl, key, tokenizer, prefix):
    """Write what Megatron-LM's tool writes: see Encoder.encode and process_json_file there."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for line in jsonl.open(encoding="utf-8"):
        value = json.loads(line)[key]
        sentences = [tokenizer.tokenize(s) for s in (value if isinstance(value, list) else [value])]
        sentences = [ids for ids in sentences if len(ids) > 0]
        if sentences:
            sentences[-1] = [*sentences[-1], tokenizer.eod]
        builder.add_document(sum(sentences, []), [len(ids) for ids in sentences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("which", ["bpe", "llama_like", "large"])
def test_hugging_face_equals_megatron_lm(which, bpe, llama_like, tmp_path, capsys):
    jsonl = tmp_path / "in.jsonl"
    texts = [f.read_text() for f in source_files()[:6]] + [*TEXTS, "", EOD_TEXT + " <s> a<eod> b"]
    lists = [["one ", "", "two"], [], [""]]
    lines = [{"text": t, "title": t[:9].upper()} for t in texts]
    jsonl.write_text(as_jsonl(*lines, *({"text": t, "title": "t"} for t in lists)))
    model, flags = f"{bpe[0]}_tokenizer", []
    if which == "llama_like":
        model, flags = llama_like, ["--eod-token", "\u2581<eod>"]
    if which == "large":  # too many tokens for 16 bits
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(70_000)}, unk_token="w7"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        model = tmp_path / "large"
        fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w69999")
        fast.save_pretrained(model)
    status = run(
        *("--input", jsonl, "--json-keys", "text", "title", "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model, *flags),
        *("--output-prefix", tmp_path / "ours"),
    )
    stdout, stderr = capsys.readouterr()
    assert status == 0, stderr
    tokenizer = megatron_tokenizer(printed_flags(stdout)[2:])
    for key in ("text", "title"):
        megatron_lm(jsonl, key, tokenizer, tmp_path / f"theirs_{key}")
        ours = tmp_path / f"ours_{key}_document"
        for ending in (".bin", ".idx"):
            theirs = Path(f"{tmp_path}/theirs_{key}{ending}").read_bytes()
            assert Path(f"{ours}{ending}").read_bytes() == theirs
    documents = read(tmp_path / "ours_text_document")
    assert len(documents) == len(texts) + len(lists)
    assert documents[-2] == []  # a list of no sentences
    if which != "llama_like":  # it makes a token of any text
        assert documents[-1] == [] and len(documents[-3]) == 2
    assert documents[0][0][-1] == tokenizer.eod
    assert max(documents[1][0]) < tokenizer.vocab_size
    if which == "llama_like":
        assert documents[0][0][0] == 0
        assert tokenizer.detokenize([tokenizer.eod]).strip() == "<eod>"


def test_tokenizer_json_alone_is_stored_with_its_end_token(bpe, tmp_path, capsys):
    prefix, jsonl, _ = bpe
    alone = tmp_path / "some.json"
    alone.write_bytes(Path(f"{prefix}_tokenizer/tokenizer.json").read_bytes())
    for model, flags, stored in (
        (alone, ["--eod-token", EOD_TEXT], f"{tmp_path}/out_tokenizer"),
        # Beside its configuration the file stands for the folder.
        (f"{prefix}_tokenizer/tokenizer.json", [], f"{prefix}_tokenizer"),
    ):
        assert not run(
            *("--input", jsonl, "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"),
            *("--tokenizer-model", model, *flags, "--output-prefix", tmp_path / "out"),
        )
        printed = printed_flags(capsys.readouterr().out)
        assert printed[5] == stored
        assert megatron_tokenizer(printed[2:]).detokenize([0]) == EOD_TEXT
        ours = (tmp_path / "out_text_document.bin").read_bytes()
        assert ours == Path(f"{prefix}_text_document.bin").read_bytes()


def test_output_replaces_older_files(tmp_path):
    for text in ("a long text", "b"):
        (tmp_path / "a.txt").write_text(text)
        assert not run(
            *("--input", tmp_path / "a.txt", "--tokenizer-type", "byte"),
            *("--output-prefix", tmp_path / "out"),
        )
    assert tokens(tmp_path / "out_text_document") == [list(b"b")]


def test_progress_is_lines_without_a_terminal(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(as_jsonl(*[{"text": "abcd"}] * 7))
    assert not run(
        *("--input", tmp_path / "in.jsonl", "--tokenizer-type", "byte", "--log-interval", 3),
        *("--output-prefix", tmp_path / "out"),
    )
    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert [line.split(",")[0] for line in lines.splitlines()] == ["3 documents", "6 documents"]


BAD_LINES = {
    "not_json": (b'{"text": "a"', "is not JSON (Expecting ',' delimiter at column 13)"),
    "list": (b'["a"]', "is not a JSON object"),
    "no_key": (b'{"title": "a", "n": 1}', "lacks the key 'text' of --json-keys (it has: title, n)"),
    "number": (b'{"text": 7}', "has int, not text, under the key 'text'"),
    "null": (b'{"text": ["a", null]}', "has NoneType, not text, under the key 'text'"),
    "latin1": (b'{"text": "caf\xe9"}', "is not UTF-8 (byte 0xe9 at offset 13)"),
    "surrogate": (b'{"text": "\\ud800"}', "holds half of a surrogate pair"),
    "deep": (b"[" * 200_000, "is nested too deeply for JSON"),
}
GOOD_LINE = b'{"text": "a"}\n'


def test_skip_bad_lines_counts_and_names_them(tmp_path, capsys):
    lines = [line for line, _ in BAD_LINES.values()]
    (tmp_path / "in.jsonl").write_bytes(GOOD_LINE + b"\n".join(lines) + b"\n\n" + GOOD_LINE)
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_bytes(b"b")
    names = ("in.jsonl", "binary", "latin1.txt", "good.txt")
    assert not run(
        *("--input", *(tmp_path / name for name in names), "--tokenizer-type", "byte"),
        *("--output-prefix", tmp_path / "out", "--skip-bad-lines"),
    )
    stdout, stderr = capsys.readouterr()
    assert tokens(tmp_path / "out_text_document") == [list(b"a"), list(b"a"), list(b"b")]
    assert "3 documents, 3 tokens" in stdout and "10 bad documents skipped" in stdout
    expected = [
        f"skipped: {tmp_path}/in.jsonl, line {number} {reason}"
        for number, (_, reason) in enumerate(BAD_LINES.values(), start=2)
    ]
    expected.append(f"skipped: {tmp_path}/binary is not text (it holds a null byte)")
    expected.append(f"skipped: {tmp_path}/latin1.txt is not UTF-8 (byte 0xe9 at offset 3)")
    assert stderr.splitlines() == expected


def errors():
    """Yield (name, files to write, flags, part of the message); IN is the folder of the files."""
    byte = ["--tokenizer-type", "byte"]
    files = {"a.txt": b"a", "a.jsonl": GOOD_LINE}
    # The other bad lines differ only in the reason, which the test of --skip-bad-lines sees.
    for name, *kind in (
        ("not_json", "byte"),
        ("no_key", "byte"),
        ("no_key", "bpe", "--vocab-size", "300"),
        ("latin1", "byte"),
    ):
        line, reason = BAD_LINES[name]
        flags = ["--input", "IN/x.jsonl", "--tokenizer-type", *kind]
        part = f"IN/x.jsonl, line 2 {reason}; correct it, or skip"
        yield f"{name}-{kind[0]}", {"x.jsonl": GOOD_LINE + line + b"\n" + GOOD_LINE}, flags, part
    truncated = gzip.compress(GOOD_LINE * 1000)[:-20]
    hf = ["--input", "IN/a.txt", "--tokenizer-type", "HuggingFaceTokenizer"]
    bpe = ["--input", "IN/a.txt", "--tokenizer-type", "bpe"]
    keys = ["--input", "IN/a.jsonl", *byte, "--json-keys"]
    yield from (
        (
            "one_sequence_eod",
            files,
            ["--input", "IN/a.txt", *byte, "--one-sequence", "--append-eod"],
            "--one-sequence joins documents with nothing between them; omit --append-eod",
        ),
        ("missing", {}, ["--input", "IN/no", *byte], "--input IN/no: there is no such file"),
        ("empty", {"e": b""}, ["--input", "IN/e", *byte], "--input IN/e: all files are empty"),
        ("blank", {"e.jsonl": b"\n \n"}, ["--input", "IN/e.jsonl", *byte], "none of 0 documents"),
        (
            "no_match",
            files,
            ["--input", "IN", *byte, "--suffixes", ".c", "h"],
            "--input IN: this folder has no file ending in .c or .h",
        ),
        (
            "all_excluded",
            files,
            ["--input", "IN", *byte, "--exclude", "a.*"],
            "--input IN: this folder has no file (hidden",
        ),
        (
            "latin1_file",
            {"sub/x.py": b"caf\xe9"},
            ["--input", "IN", *byte],
            "IN/sub/x.py is not UTF-8 (byte 0xe9 at offset 3); correct it",
        ),
        (
            "binary_file",
            {"x.py": b"a\0"},
            ["--input", "IN", *byte],
            "IN/x.py is not text (it holds a null byte)",
        ),
        (
            "truncated_gz",
            {"x.gz": truncated},
            ["--input", "IN/x.gz", *byte],
            "IN/x.gz: the compressed data are damaged or end early",
        ),
        ("not_gz", {"x.gz": b"plain"}, ["--input", "IN/x.gz", *byte], "IN/x.gz: the compressed"),
        (
            "no_zstandard",
            {"x.jsonl.zst": b"a"},
            ["--input", "IN/x.jsonl.zst", *byte],
            "IN/x.jsonl.zst: .zst files need the Python package zstandard; run `pip install",
        ),
        (
            "keys_of_text",
            files,
            ["--input", "IN/a.jsonl", "IN/a.txt", *byte, "--json-keys", "a", "b"],
            "--json-keys: IN/a.txt is not a JSONL file; give only one key",
        ),
        ("key_twice", files, [*keys, "a", "a"], "--json-keys a a: name each key once"),
        ("key_path", files, [*keys, "a/b"], "--json-keys a/b: "),
        ("path_exclude", files, ["--input", "IN", *byte, "--exclude", "a/b"], "--exclude a/b: "),
        ("byte_vocab", files, ["--input", "IN", *byte, "--vocab-size", "300"], "--vocab-size is"),
        ("bpe_no_vocab", files, bpe, "--tokenizer-type bpe needs --vocab-size of at least 257"),
        ("bpe_vocab", files, [*bpe, "--vocab-size", "256"], "--vocab-size of at least 257"),
        ("hf_no_model", files, hf, "needs --tokenizer-model"),
        ("hf_missing", files, [*hf, "--tokenizer-model", "IN/t"], "--tokenizer-model IN/t: there"),
        ("no_workers", files, ["--input", "IN", *byte, "--workers", "0"], "argument --workers: 0"),
        ("no_input", files, byte, "the following arguments are required: --input"),
        ("abbreviated", files, ["--in", "IN", *byte], "the following arguments are required"),
    )


@pytest.mark.parametrize(
    ("files", "flags", "part"),
    [pytest.param(*case[1:], id=case[0]) for case in errors()],
)
def test_error_is_one_sentence(files, flags, part, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, data in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "zstandard.py").write_text("raise ImportError('not installed')\n")
    flags = [flag.replace("IN", str(source)) for flag in flags]
    if "--workers" not in flags:
        flags += ["--workers", "2"]
    done = subprocess.run(
        command(*flags, "--output-prefix", tmp_path / "out" / "x"),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "stub")},
    )
    assert done.returncode == 2
    *before, message = done.stderr.splitlines()
    assert before in ([], ["training a BPE of 300 tokens"])
    assert message.startswith("preprocess_data.py: error: ")
    assert part.replace("IN", str(source)) in message
    assert done.stdout == ""
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("files", "flags", "part"),
    [
        ({"a.jsonl": b'{"text": ""}\n'}, ["byte"], "none of 1 documents has text under 'text'"),
        (
            {"a.jsonl": b'{"text": "a", "b": ""}\n'},
            ["byte", "--json-keys", "text", "b"],
            "none of 1 documents has text under 'b'",
        ),
        (
            {"a.jsonl": b"x\n"},
            ["byte", "--skip-bad-lines"],
            "none of 0 documents has text under 'text' (1 bad ones skipped)",
        ),
        (
            {"a.jsonl": GOOD_LINE, "t/tokenizer_config.json": b"{}"},
            ["HuggingFaceTokenizer", "--tokenizer-model", "IN/t"],
            "--tokenizer-model IN/t is not a tokenizer that transformers can load (",
        ),
        (
            {"a.jsonl": GOOD_LINE, "t.json": b"{}"},
            ["HuggingFaceTokenizer", "--tokenizer-model", "IN/t.json"],
            "--tokenizer-model IN/t.json is not a tokenizer that transformers can load (",
        ),
        (
            {"a.jsonl": GOOD_LINE},
            ["HuggingFaceTokenizer", "--tokenizer-model", "LLAMA", "--append-eod"],
            "names no end-of-document token; name one with --eod-token",
        ),
        (
            {"a.jsonl": GOOD_LINE},
            ["HuggingFaceTokenizer", "--tokenizer-model", "LLAMA", "--eod-token", "<nope>"],
            "--eod-token <nope> is not a token of",
        ),
        (
            {"a.jsonl": GOOD_LINE, "out": b""},
            ["byte", "--output-prefix", "IN/out/x"],
            "/out: File exists; check path, permissions and free space",
        ),
        (
            {"a.jsonl": GOOD_LINE, "x_text_document.bin/a": b""},
            ["byte", "--output-prefix", "IN/x"],
            "--output-prefix: IN/x_text_document.bin is a folder; choose another prefix",
        ),
    ],
)
def test_error_found_late_is_one_sentence(files, flags, part, tmp_path, llama_like, capsys):
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    flags = [f.replace("IN", str(tmp_path)).replace("LLAMA", str(llama_like)) for f in flags]
    before = {path.name for path in tmp_path.iterdir()}
    defaults = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out"]
    assert run(*defaults, "--tokenizer-type", *flags) == 2
    stdout, stderr = capsys.readouterr()
    message = stderr.splitlines()[-1]
    assert message.startswith("preprocess_data.py: error: ")
    assert part.replace("IN", str(tmp_path)) in message
    assert stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before


def test_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def add_document(self, ids, lengths):
        self.data_file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", add_document)
    (tmp_path / "a.txt").write_text("a")
    flags = ["--input", tmp_path / "a.txt", "--tokenizer-type", "byte"]
    assert run(*flags, "--output-prefix", tmp_path / "out") == 2
    stderr = capsys.readouterr().err
    assert f"error: --output-prefix {tmp_path}/out: No space left on device; check" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("package", "flags"), [("tqdm", ["byte"]), ("tokenizers", ["bpe", "--vocab-size", "300"])]
)
def test_missing_package_is_one_sentence(package, flags, tmp_path):
    stub = f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
    (tmp_path / f"{package}.py").write_text(stub)
    done = subprocess.run(
        command(
            *("--input", tmp_path, "--output-prefix", tmp_path / "out", "--workers", 2),
            *("--tokenizer-type", *flags),
        ),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.endswith(
        f"error: the Python package {package} is missing; run `pip install {package}`"
    )


def session(number):
    """Return the live processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) == number and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition):
    """Return whether the condition became true in time."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def long_run(tmp_path):
    """Return a function that starts a run that would take minutes, with an older output there."""
    # Compressed to little, so that the input is large and yet quickly written.
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(GOOD_LINE * 500_000, 1) * 400)
    out = tmp_path / "out"
    out.mkdir()
    for ending in ("bin", "idx"):
        (out / f"x_text_document.{ending}").write_text("older")
    started = []

    def start(*flags):
        process = subprocess.Popen(
            command(
                *("--input", tmp_path / "in.jsonl.gz", "--output-prefix", out / "x"),
                *("--workers", 2, "--tokenizer-type", *flags),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process.pid)
        return process, out

    yield start
    for number in started:
        for process in session(number):
            os.kill(process, signal.SIGKILL)


def untouched(out):
    names = {path.name: path.read_text() for path in out.iterdir()}
    return names == {"x_text_document.bin": "older", "x_text_document.idx": "older"}


def test_interrupt_while_writing_leaves_nothing(long_run):
    process, out = long_run("byte")
    assert wait_until(lambda: any(p.stat().st_size for p in out.glob("x.*.tmp/text.bin")))
    assert len(session(process.pid)) >= 3  # this one and two workers
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "preprocess_data.py: stopped; no incomplete file is left"
    assert "Traceback" not in stderr and stdout == ""
    assert untouched(out)
    assert wait_until(lambda: not session(process.pid)), "orphans"


def started_training(process, out):
    assert wait_until(lambda: list(out.glob("x.*.tmp")) and len(session(process.pid)) >= 3)
    time.sleep(0.3)  # into the training, whose loop is not Python's


def youngest(process):
    """Return the training worker: the main process and the resource tracker are older."""
    return max(session(process.pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_training_leaves_nothing(number, long_run):
    process, out = long_run("bpe", "--vocab-size", 300)
    started_training(process, out)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "preprocess_data.py: stopped; no incomplete file is left"
    assert "Traceback" not in stderr
    assert untouched(out)
    assert wait_until(lambda: not session(process.pid)), "orphans"


def test_workers_end_with_a_killed_main_process(long_run):
    process, out = long_run("bpe", "--vocab-size", 300)
    started_training(process, out)
    process.kill()
    process.wait()
    assert wait_until(lambda: not session(process.pid)), "orphans"


def test_killed_worker_is_reported(long_run):
    process, out = long_run("bpe", "--vocab-size", 300)
    started_training(process, out)
    os.kill(youngest(process), signal.SIGKILL)
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "error: a worker was killed, most likely for lack of memory" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert untouched(out)


def imported(*args):
    """Return the top-level packages that a Python process imports, and its stdout."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit("|", 1)[1] for line in done.stderr.splitlines() if "|" in line]
    return {line.strip().split(".")[0] for line in lines}, done.stdout


def test_help_imports_nothing_heavy():
    modules, text = imported(TOOLS / "preprocess_data.py", "--help")
    assert {"argparse", "text_data"} <= modules
    assert not modules & {"numpy", "torch", "megatron", "tokenizers", "transformers", "tqdm"}
    assert "--tokenizer-type {byte,bpe,wordpiece,HuggingFaceTokenizer}" in text


def test_workers_import_neither_torch_nor_transformers(bpe):
    file = f"{bpe[0]}_tokenizer/tokenizer.json"
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n"
        "from text_data import tokenization, corpus\n"
        "record = corpus.Record('a', None, b'one two')\n"
        f"print(tokenization.encode_records({file!r}, ['text'], 0, None, [record]))"
    )
    modules, text = imported("-c", code)
    assert "Encoded(ids=[array(" in text
    assert {"tokenizers", "numpy"} <= modules
    assert not modules & {"torch", "megatron", "transformers"}


def test_tokenizer_that_works_outside_its_json_is_refused(bpe, tmp_path, monkeypatch):
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    ids = HuggingFaceTokenizer.text_to_ids
    monkeypatch.setattr(HuggingFaceTokenizer, "text_to_ids", lambda s, text: ids(s, text.lower()))
    with pytest.raises(corpus.InputError, match="needs code outside of its tokenizer.json"):
        tokenization.load_hugging_face(f"{bpe[0]}_tokenizer", None, str(tmp_path))
