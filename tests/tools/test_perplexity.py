"""perplexity.py: equal to transformers' own loss and to probabilities multiplied one by one."""

import json
import math
import shutil

import pytest
import torch
from text_data import tokenization

from tests.parallel import ROOT
from tests.tools.hf_models import SEQ, gpt2, llama

from evaluation import perplexity  # isort: skip  from tools, which tests.parallel puts on the path

TEXT = (ROOT / "LICENSE").read_text()[:3000]
MODELS = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder of a random model with a tokenizer trained on the text}."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    bpe = root / "bpe.json"
    tokenization.train_bpe([str(root / "text.txt")], ["text"], 300, False, 1, str(bpe))
    for name, build in MODELS.items():
        tokenization.store_hugging_face(str(bpe), tokenization.BPE_EOD, str(root / name))
        build(vocab_size=304).save_pretrained(root / name)
    return root


def measured(tmp_path, *arguments):
    output = tmp_path / "out.json"
    options = [*map(str, arguments), "--json", str(output), "--device", "cpu"]
    assert perplexity.main(options) == 0
    return json.loads(output.read_text())


def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("name", MODELS)
def test_blocks_equal_the_losses_of_transformers(folders, name, tmp_path, capsys):
    tokenizer, model = loaded(folders / name)
    ids = torch.tensor(tokenizer.encode(TEXT))
    blocks = ids[: len(ids) // 48 * 48].view(-1, 48)
    assert len(blocks) % 5 and len(ids) % 48  # neither batches nor blocks come out even
    with torch.no_grad():
        losses = [float(model(block[None], labels=block[None]).loss) for block in blocks]
    loss = sum(losses) / len(losses)
    options = [folders / name, folders / "text.txt", "--block-size", 48, "--batch-size", 5]
    exact = measured(tmp_path, *options, "--dtype", "float64")
    # transformers takes the loss of float64 logits in float32.
    assert exact["loss"] == pytest.approx(loss, rel=1e-6)
    assert exact["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert f"perplexity {exact['perplexity']:.4f}   word-level" in capsys.readouterr().out
    assert (exact["tokens"], exact["blocks"]) == (len(ids), len(blocks))
    assert exact["predicted_tokens"] == 47 * len(blocks)
    assert measured(tmp_path, *options)["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    coarse = measured(tmp_path, *options, "--dtype", "bfloat16")["loss"]
    assert 0 < abs(coarse - exact["loss"]) < 0.05 * exact["loss"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "stride"), [(SEQ, 24), (32, 31), (20, 1)])
def test_a_window_predicts_each_token_once(folders, name, size, stride, tmp_path):
    """One token at a time: its window is the first of those at the stride that reaches it."""
    tokenizer, model = loaded(folders / name)
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:400])
    ids = tokenizer.encode(TEXT[:400])
    total, contexts = 0.0, []
    for position in range(1, len(ids)):
        number = max(0, math.ceil((position + 1 - size) / stride))
        context = ids[number * stride : position]
        contexts.append(len(context))
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1]
        total -= float(torch.log_softmax(logits, -1)[ids[position]])
    assert len(ids) > 2 * size and max(contexts) == size - 1
    options = [folders / name, text, "--block-size", size, "--stride", stride]
    result = measured(tmp_path, *options, "--dtype", "float64")
    assert result["predicted_tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-12)
    words = len(TEXT[:400].replace("\n", " ").strip().split())
    assert result["words"] == words < len(ids)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-9)


def test_records_are_tokenized_alone(folders, tmp_path):
    records = [" one two", "three ", "fourfive"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": record}) + "\n" for record in records))
    tokenizer, model = loaded(folders / "gpt2")
    ids = torch.tensor([i for record in records for i in tokenizer.encode(record)])
    assert ids.tolist() != tokenizer.encode("".join(records))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
    # A window longer than the text is the text.
    options = [folders / "gpt2", text, "--json-key", "body", "--stride", 8, "--dtype", "float64"]
    result = measured(tmp_path, *options)
    assert result["loss"] == pytest.approx(float(expected), rel=1e-12)
    assert result["words"] == 4


ERRORS = {  # name: (model, text, options, part of the message)
    "no model": ("nowhere", TEXT, [], "is not a folder with a config.json"),
    "no tokenizer": ("bare", TEXT, [], "holds no tokenizer"),
    "no weights": ("empty", TEXT, [], "cannot be loaded (Error no file named"),
    "no text": ("gpt2", None, [], "text.txt: there is no such file"),
    "empty text": ("gpt2", " \n", [], "is empty: it holds no word"),
    "binary": ("gpt2", "a\0", [], "is not text (it holds a null byte)"),
    "short text": ("gpt2", "ab", [], "tokens, fewer than a block of 64; use a smaller"),
    "one token": ("gpt2", "a", ["--stride", "8"], "has 1 tokens: there is nothing to predict"),
    "stride": (
        "gpt2",
        TEXT,
        ["--stride", "65"],
        "--stride 65 must be smaller than the block of",
    ),
    "stride of a block": ("gpt2", TEXT, ["--stride", "64"], "--stride 64 must be smaller than"),
    "block": ("gpt2", TEXT, ["--block-size", "65"], "--block-size 65: the model has 64 positions"),
    "small block": (
        "gpt2",
        TEXT,
        ["--block-size", "1"],
        "--block-size 1 leaves nothing",
    ),
    "vocabulary": ("small", TEXT, [], "has 300 tokens, but the model only 127; use the tokenizer"),
    "device": ("gpt2", TEXT, ["--device", "gpu"], "--device gpu cannot be used here"),
    "json": ("gpt2", TEXT, ["--json", "nowhere/x.json"], "there is no folder nowhere"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(folders, name, tmp_path, capsys):
    model, text, options, part = ERRORS[name]
    folder = folders / model
    if model in ("bare", "empty", "small"):
        folder = tmp_path / model
        shutil.copytree(folders / "gpt2", folder)
        if model == "bare":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        elif model == "empty":
            (folder / "model.safetensors").unlink()
        else:
            gpt2().save_pretrained(folder)
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
    assert perplexity.main([str(folder), str(tmp_path / "text.txt"), *options]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("perplexity.py: error: ") and part in line
    assert not printed.out
