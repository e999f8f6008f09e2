"""export_hf.py and import_hf.py on BERT: the logits of both heads, and bit-equal back."""

import argparse
import json
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parallel import run
from tests.tools.bert_models import MASK, bert, hugging_face_outputs, megatron_outputs
from tests.tools.hf_models import SEQ, VOCABULARY

import export_hf  # isort: skip  from tools, which tests.parallel puts on the path
import hf_bert
import hf_names
import hf_tokenizer
import import_hf
from hf_weights import ConversionError

MODEL = (
    f"--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ} "
    f"--max-position-embeddings {SEQ} --tokenizer-type NullTokenizer --padded-vocab-size 192 "
    f"--vocab-size {VOCABULARY - hf_tokenizer.tokens_beyond_vocab_size()}"
)
EXACT_GELU = "--no-bias-gelu-fusion"
# How far Megatron's and Hugging Face's float64 may be apart: Megatron rounds sqrt(2 / pi).
EXACT, TANH = 1e-12, 1e-7
VALID = MASK.astype(bool)  # what a padding token's logits are is nobody's business


def export(load, output, *options):
    arguments = ["--load", load, "--output", output, *options]
    assert export_hf.main([str(a) for a in arguments]) == 0
    return output


def import_(folder, output, *options):
    arguments = ["--input", folder, "--output", output, *options]
    assert import_hf.main([str(a) for a in arguments]) == 0
    return output


def of_megatron(flags, tmp_path, load="", save="", world_size=1):
    output = tmp_path / "outputs.npz"
    run(world_size, megatron_outputs, flags.split(), str(output), str(load), str(save))
    return dict(np.load(output)) if output.exists() else None


def assert_near(ours, theirs, tolerance, names=("mlm", "sop", "hidden")):
    assert ours.keys() == theirs.keys() >= set(names) - {"sop"}
    for name in names:
        one, other = ours[name], theirs[name]
        if name == "mlm":
            one, other = one[..., :VOCABULARY], other[..., :VOCABULARY]
        if name != "sop":
            one, other = one[VALID], other[VALID]
        assert one.shape == other.shape
        assert np.abs(other).max() > 0.1
        assert np.abs(one - other).max() <= tolerance, name


def test_a_checkpoint_of_tensor_parallelism_has_the_same_logits(tmp_path, capsys):
    flags = f"{MODEL} {EXACT_GELU} --tensor-model-parallel-size 2 --sequence-parallel"
    theirs = of_megatron(flags, tmp_path, save=tmp_path / "run", world_size=2)
    folder = export(tmp_path / "run", tmp_path / "hf")
    assert theirs["mlm"].shape[-1] == 192  # padded, which the export is not
    ours = hugging_face_outputs(folder)
    assert ours["mlm"].shape[-1] == VOCABULARY
    assert_near(ours, theirs, EXACT)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MegatronBertForPreTraining"]
    assert config["hidden_act"] == "gelu"
    printed = capsys.readouterr().out
    assert "MegatronBert, " in printed
    assert "activation: gelu, as the run's layers computed it\n" in printed
    assert (config["hidden_dropout_prob"], config["layer_norm_eps"]) == (0.1, 1e-5)


def test_pipeline_stages_untied(tmp_path):
    flags = f"{MODEL} {EXACT_GELU} --untie-embeddings-and-output-weights"
    load = tmp_path / "run"
    stages = f"{flags} --pipeline-model-parallel-size 2"
    assert of_megatron(stages, tmp_path, save=load, world_size=2) is None
    folder = export(load, tmp_path / "hf")
    theirs = of_megatron(EXACT_GELU, tmp_path, load)
    assert_near(hugging_face_outputs(folder), theirs, EXACT)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["cls.predictions.bias"], weights["cls.predictions.decoder.bias"])
    assert not torch.equal(
        weights["cls.predictions.decoder.weight"],
        weights["bert.embeddings.word_embeddings.weight"],
    )


def test_a_fused_gelu_is_that_of_the_layers(tmp_path, capsys):
    theirs = of_megatron(MODEL, tmp_path, save=tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "hf")
    ours = hugging_face_outputs(folder)
    assert_near(ours, theirs, TANH, ("hidden", "sop"))
    # The head's is exact in Megatron and that of the layers in MegatronBert.
    apart = np.abs(ours["mlm"] - theirs["mlm"][..., :VOCABULARY])[VALID].max()
    assert TANH < apart < 1e-2
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"
    assert "its language-model head computed the exact GELU" in capsys.readouterr().out


def test_without_a_binary_head(tmp_path, capsys):
    flags = f"{MODEL} {EXACT_GELU} --bert-no-binary-head"
    theirs = of_megatron(flags, tmp_path, save=tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "hf")
    assert "--bert-no-binary-head" in capsys.readouterr().out
    assert "sop" not in theirs
    ours = hugging_face_outputs(folder)  # although it is given token types
    assert_near(ours, theirs, EXACT, ("mlm", "hidden"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MegatronBertForMaskedLM"]
    load = import_(folder, tmp_path / "back")
    printed = capsys.readouterr().out
    assert "--bert-no-binary-head" in printed.split("all of these except ")[1]
    again = of_megatron(f"{EXACT_GELU} --bert-no-binary-head", tmp_path, load)
    assert_near(again, theirs, 0, ("mlm", "hidden"))
    # What was trained with token types cannot be held without.
    weights = load_file(folder / "model.safetensors")
    weights[hf_names.TOKEN_TYPES][1, 0] = 1
    save_file(weights, folder / "model.safetensors")
    line = said_by_import(folder, tmp_path, capsys)
    assert f"{hf_names.TOKEN_TYPES} is not zero" in line
    assert "give a MegatronBertForPreTraining" in line


MODELS = {  # name: (options, tolerance)
    "exact": ({"hidden_act": "gelu", "layer_norm_eps": 1e-3}, EXACT),
    "untied": ({"hidden_act": "gelu", "tie_word_embeddings": False}, EXACT),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path, capsys):
    options, tolerance = MODELS[name]
    bert(**options).save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron", "--make-vocab-size-divisible-by", "96")
    printed = capsys.readouterr().out
    assert "train it with pretrain_bert and" in printed
    assert "the folder has no tokenizer, and BERT's data need one with [CLS]" in printed
    line = next(x for x in printed.splitlines() if x.startswith("  --load"))
    flags = " ".join(shlex.split(line)[3:])
    ours = of_megatron(f"{flags} --tensor-model-parallel-size 2", tmp_path, load, world_size=2)
    theirs = hugging_face_outputs(tmp_path / "hf")
    assert_near(ours, theirs, tolerance)
    # Padding changes the loss by no more than its share.
    more = np.logaddexp.reduce(ours["mlm"], -1) - np.logaddexp.reduce(theirs["mlm"], -1)
    assert 0 < more[VALID].max() <= np.log(192 / VOCABULARY)
    back = export(load, tmp_path / "back")
    before, after = (load_file(p / "model.safetensors") for p in (tmp_path / "hf", back))
    if not options.get("tie_word_embeddings", True):
        before["cls.predictions.bias"] = before["cls.predictions.decoder.bias"]  # is not used
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((p / "config.json").read_text()) for p in (tmp_path / "hf", back)]
    assert configs[1].pop("torch_dtype") == configs[1]["dtype"]
    for config in configs:
        for name in ("pad_token_id", "initializer_range"):
            config.pop(name)  # the tokenizer's, and the training's
    assert configs[0] == configs[1]


def test_the_flags_of_a_tanh_gelu_name_what_differs(tmp_path, capsys):
    bert(hidden_act="gelu_new").save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron", "--dtype", "bfloat16")
    printed = capsys.readouterr().out
    assert EXACT_GELU not in printed.split("gelu_new")[0]
    assert "in the language-model head it always is" in printed
    back = load_file(export(load, tmp_path / "back") / "model.safetensors")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}


def test_fine_tuning_takes_encoder_and_pooler(tmp_path):
    from transformers import MegatronBertForSequenceClassification as Classifier

    bert().save_pretrained(tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "megatron")
    back = export(tmp_path / "megatron", tmp_path / "back")
    model, report = Classifier.from_pretrained(back, num_labels=3, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all(name.startswith("cls.") for name in report["unexpected_keys"])
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(model.state_dict()[pooler], weights[pooler])


def test_a_wordpiece_tokenizer_comes_along(tmp_path, capsys):
    from transformers import AutoTokenizer, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "random", "layer", "##wise", "dropping"]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "words")
    bert(vocab_size=len(words), pad_token_id=0).save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron", "--make-vocab-size-divisible-by", "8")
    folder = export(load, tmp_path / "back", "--tokenizer", tmp_path / "words")
    assert "eos" not in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    pair = AutoTokenizer.from_pretrained(folder)("Random layerwise", "dropping")
    assert pair["input_ids"] == [2, 5, 6, 7, 3, 8, 3]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1]
    import_(folder, tmp_path / "again")
    assert f"--tokenizer-model {folder}" in capsys.readouterr().out


def said_by_import(folder, tmp_path, capsys):
    """Return the one line that the import says before it gives up."""
    output = tmp_path / "refused"
    assert import_hf.main(["--input", str(folder), "--output", str(output)]) == 2
    assert not output.exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_a_bert_with_norms_behind_is_refused(tmp_path, capsys):
    from transformers import BertConfig, BertForPreTraining

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForPreTraining(BertConfig(vocab_size=9, intermediate_size=8, **sizes))
    model.save_pretrained(tmp_path / "hf")
    line = said_by_import(tmp_path / "hf", tmp_path, capsys)
    assert "model_type bert: its norms are behind attention and MLP (post-LN)" in line
    assert "only megatron-bert is imported" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act relu (can be gelu or"),
        ({"type_vocab_size": 1}, "type_vocab_size 1 (can be 2)"),
        ({"is_decoder": True}, "is_decoder True (can be False)"),
        ({"position_embedding_type": "relative_key"}, "relative_key (can be absolute)"),
    ],
)
def test_models_that_are_not_imported(tmp_path, capsys, change, said):
    bert().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert said in said_by_import(tmp_path / "hf", tmp_path, capsys)


def test_a_fine_tuned_model_is_not_imported(tmp_path, capsys):
    bert("MegatronBertForSequenceClassification").save_pretrained(tmp_path / "hf")
    line = said_by_import(tmp_path / "hf", tmp_path, capsys)
    assert "no language-model head (cls.predictions...)" in line


def stored(**changes):
    """Return arguments as a BERT's checkpoint holds them."""
    plain = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "spec": ["local"],
        # What pretrain_bert.py ignores.
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "group_query_attention": False,
    }
    return argparse.Namespace(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": 8}, "--num-experts 8 has no counterpart in Hugging Face's MegatronBert"),
        ({"spec": ["a", "b"]}, "--spec a b has no counterpart"),
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm: Hugging Face's MegatronBert has"),
        ({"swiglu": True}, "--swiglu: "),
        ({"add_bias_linear": False}, "--disable-bias-linear: "),
        ({"group_query_attention": True}, "--group-query-attention: "),
        ({"kv_channels": 16}, "--kv-channels 16: MegatronBert's heads are"),
    ],
)
def test_what_does_not_map_is_refused_by_its_flag(changes, said):
    hf_bert.check_args(stored())
    hf_bert.check_args(stored(spec=None))
    with pytest.raises(ConversionError) as error:
        hf_bert.check_args(stored(**changes))
    assert said in str(error.value)


def test_the_family_is_that_of_the_names():
    layer = "encoder.layers.mlp.linear_fc1.weight"
    assert hf_names.family_of([layer, "lm_head.dense.weight"]) == "bert_mlm"
    assert hf_names.family_of([layer, "binary_head.weight"]) == "bert"
    assert hf_names.family_of(["decoder.layers.mlp.linear_fc1.weight"]) is None


def test_the_comparison_sees_another_epsilon(tmp_path):
    # So that the comparisons above could fail.
    bert(hidden_act="gelu", layer_norm_eps=1e-3).save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron")
    ours = of_megatron(f"{EXACT_GELU} --norm-epsilon 1e-5", tmp_path, load)
    with pytest.raises(AssertionError):
        assert_near(ours, hugging_face_outputs(tmp_path / "hf"), EXACT)
