"""BERT in Megatron's own training loop: the bundled script, and what is refused with any script."""

import json
import shutil

import layout_data
import numpy as np
import pytest

from tests.megatron.test_training import BASE, KEPT, LTD, STEPS, assert_same
from tests.parallel import RankError, train

SAVED = 3
# As a script of Megatron-LM, without the bundled script's own look at the data.
OTHER_SCRIPT = """
from megatron_rltd.pretrain import pretrain_bert

pretrain_bert.check_args = pretrain_bert.check_sets = lambda *args: None
pretrain_bert.main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of sentences, a tokenizer, and their Megatron flags: (folder, flags)."""
    folder = tmp_path_factory.mktemp("bert")
    layout_data.write_tokenizer(folder / "tokenizer")
    layout_data.write_sentences(str(folder / "sentences"), np.random.default_rng(2))
    line = BASE.replace("--mock-data", f"--data-path {folder}/sentences --short-seq-prob 0.3")
    line = line.replace("--position-embedding-type rope", "")
    line = line.replace("--tokenizer-type NullTokenizer", "--tokenizer-type HuggingFaceTokenizer")
    line = line.replace("--vocab-size 127", f"--tokenizer-model {folder}/tokenizer")
    return folder, f"{line} --data-cache-path {folder}/cache"


FORMAT = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
LAYER_TOKEN_LR = "--layer-token-lr --lr-warmup-iters 0 --lr-warmup-samples 8"


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The folder of a checkpoint of the first steps, and what the whole run did."""
    folder = tmp_path_factory.mktemp("checkpoint")
    whole = train(
        f"{data[1]} {LTD} {FORMAT} --save {folder} --save-interval {SAVED}", 1, "pretrain_bert"
    )
    for path in folder.glob("iter_*"):
        if path.name != f"iter_{SAVED:07}":
            shutil.rmtree(path)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    return folder, whole


def test_it_trains_and_saves(saved):
    folder, whole = saved
    assert whole.kept == KEPT
    assert len(whole.losses) == STEPS and whole.losses[-1] < whole.losses[0]
    assert "sop loss" in whole.output
    assert json.loads((folder / f"iter_{SAVED:07}" / "metadata.json").read_text())


LAYOUTS = {
    "TP + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP, recompute": (
        2,
        "--pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
    "DP, overlaps": (2, "--overlap-grad-reduce --overlap-param-gather"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_continue_the_run(name, data, saved):
    folder, whole = saved
    world_size, flags = LAYOUTS[name]
    line = f"{data[1]} {LTD} {FORMAT} --load {folder} {flags}"
    ours = train(line, world_size, "pretrain_bert")
    for what in ("losses", "grad_norms"):
        values, wanted = getattr(ours, what), getattr(whole, what)[SAVED:]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, err_msg=what)
    assert ours.kept == whole.kept[SAVED:]
    assert ours.layer_tokens == whole.layer_tokens


def test_full_length_is_bit_identical(data):
    full = f"{data[1]} --random-ltd --random-ltd-constant --random-ltd-min-tokens 64"
    ours = train(full, 1, "pretrain_bert")
    assert_same(ours, train(data[1], 1, "pretrain_bert"))


@pytest.fixture
def other_script(tmp_path):
    path = tmp_path / "pretrain_bert.py"
    path.write_text(OTHER_SCRIPT)
    return str(path)


def write(path, documents):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(sum(document, [])), [len(s) for s in document])
    builder.finalize(f"{path}.idx")
    return path


WHOLE = [[[*range(5, 60)]]] * 40
FRAMED = [[[2, 7, 8, 3], [2, 9, 3]]] * 40


@pytest.mark.parametrize("which", ["bundled, dense", "any script"])
@pytest.mark.parametrize(
    ("documents", "said"),
    [(WHOLE, "Megatron would search for samples forever"), (FRAMED, "begin with [CLS] or end")],
    ids=["whole documents", "special tokens"],
)
def test_data_of_another_kind_are_refused(which, documents, said, data, other_script, tmp_path):
    path = write(tmp_path / "other", documents)
    line = data[1].replace(f"{data[0]}/sentences", str(path))
    with pytest.raises(RankError, match="none with two|begin with") as error:
        if which == "any script":
            train(f"{line} {LTD}", 1, other_script)
        else:
            train(line, 1, "pretrain_bert")
    assert "RankConfigError: cannot run" in error.value.reason and said in error.value.reason
    assert "train set: " in error.value.reason


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tokenizer-type BertWordPieceLowerCase --vocab-file v.txt", "--vocab-file v.txt would"),
        ("--context-parallel-size 2", "--context-parallel-size with BERT"),
        ("--mock-data", "--mock-data: Megatron has no made-up data for BERT"),
        ("--attention-backend unfused", "--attention-backend unfused is for Transformer Engine"),
        ("--data-path nowhere", "--data-path: nowhere.bin is missing"),
    ],
)
def test_bad_command_lines(flags, said, data):
    world_size = 2 if "parallel" in flags else 1
    with pytest.raises(RankError) as error:
        train(f"{data[1]} {flags}", world_size, "pretrain_bert")
    assert said in error.value.reason


def test_an_ignored_vocabulary_is_refused_before_any_script_loads_it(data, other_script):
    flags = "--tokenizer-type BertWordPieceLowerCase --vocab-file v.txt"
    with pytest.raises(RankError) as error:
        train(f"{data[1]} {LTD} {flags}", 1, other_script)
    assert "ConfigError: " in error.value.reason
    assert "--vocab-file v.txt would be ignored" in error.value.reason


def test_the_layers_are_transformer_engines_where_it_is_installed(monkeypatch):
    from types import SimpleNamespace

    from megatron.core.models.bert import bert_layer_specs

    from megatron_rltd.pretrain import pretrain_bert

    name = "get_bert_layer_with_transformer_engine_spec"
    monkeypatch.setattr(bert_layer_specs, name, lambda: "its layers")
    local = bert_layer_specs.bert_layer_local_spec
    for installed, implementation, spec, layers in (
        (True, "transformer_engine", None, "its layers"),
        (True, "local", None, local),
        (False, "transformer_engine", None, local),
        (True, "transformer_engine", ["local"], local),
        (True, "local", ["tests.megatron.test_bert_training", "SAVED"], SAVED),
    ):
        monkeypatch.setattr(pretrain_bert, "HAVE_TE", installed)
        args = SimpleNamespace(spec=spec, transformer_impl=implementation)
        assert pretrain_bert.layer_spec(args) == layers
