"""BERT in Megatron's own training loop: the bundled script, and what is refused with any script."""

import layout_data
import numpy as np
import pytest

from tests.megatron.test_training import BASE, GLOBAL_BATCH, KEPT, LTD, STEPS, TOKENS
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
    layout_data.prepare(folder, with_sentences=True)
    line = BASE.replace("--mock-data", f"--data-path {folder}/sentences --short-seq-prob 0.3")
    line = line.replace("--position-embedding-type rope", "")
    line = line.replace("--tokenizer-type NullTokenizer", "--tokenizer-type HuggingFaceTokenizer")
    line = line.replace("--vocab-size 127", f"--tokenizer-model {folder}/tokenizer")
    return folder, f"{line} --data-cache-path {folder}/cache"


FORMAT = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
LENGTH = "--layer-token-lr"


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The folder of a checkpoint of the first steps, and what the whole run did."""
    folder = tmp_path_factory.mktemp("checkpoint")
    line = f"{data[1]} {LTD} {LENGTH} {FORMAT}"
    save = f"--save {folder} --save-interval {SAVED} --exit-interval {SAVED}"
    train(f"{line} {save}", 1, "pretrain_bert")
    return folder, train(line, 1, "pretrain_bert")


def test_it_trains_and_saves(saved):
    folder, whole = saved
    assert whole.kept == KEPT and len(whole.losses) == STEPS
    assert whole.layer_tokens == sum(GLOBAL_BATCH * TOKENS.per_sample(k) for k in KEPT)
    assert "| lm loss: " in whole.output and "| sop loss: " in whole.output
    assert (folder / f"iter_{SAVED:07}" / "metadata.json").is_file()


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
    line = f"{data[1]} {LTD} {LENGTH} {FORMAT} --load {folder} {flags}"
    ours = train(line, world_size, "pretrain_bert")
    for what in ("losses", "grad_norms", "learning_rates"):
        values, wanted = getattr(ours, what), getattr(whole, what)[SAVED:]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, err_msg=what)
    assert ours.kept == whole.kept[SAVED:]
    assert ours.layer_tokens == whole.layer_tokens


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
def test_data_of_another_kind_are_refused(which, data, other_script, tmp_path):
    # Each run has one of both mistakes, because Megatron would search the first kind forever.
    script, flags = ("pretrain_bert", "") if which == "bundled, dense" else (other_script, LTD)
    documents, said = (FRAMED, "begin with [CLS] or end with [SEP]")
    if which == "any script":
        documents, said = (WHOLE, "none with two sentences or more, of at most 512 tokens each")
    path = write(tmp_path / "other", documents)
    with pytest.raises(RankError) as error:
        train(f"{data[1].replace(f'{data[0]}/sentences', str(path))} {flags}", 1, script)
    assert error.value.reason.startswith("megatron_rltd.config.RankConfigError: cannot run")
    assert f"{path}, train set: " in error.value.reason and said in error.value.reason


def test_bad_command_lines(data):
    flags = "--context-parallel-size 2 --attention-backend unfused --vocab-file v.txt"
    flags += " --tokenizer-type BertWordPieceLowerCase"
    with pytest.raises(RankError) as error:
        train(f"{data[1]} {flags}", 1, "pretrain_bert")
    for said in (
        "--context-parallel-size with BERT: ",
        "--attention-backend unfused is for Transformer Engine",
        "--vocab-file v.txt would be ignored: ",
    ):
        assert said in error.value.reason
    for given, said in (
        ("--mock-data", "--mock-data: Megatron has no made-up data for BERT"),
        ("--data-path nowhere", "--data-path: nowhere.bin is missing"),
        ("", "there is no data: give --data-path PREFIX"),
    ):
        line = data[1].replace(f"--data-path {data[0]}/sentences", given)
        with pytest.raises(RankError) as error:
            train(line, 1, "pretrain_bert")
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
