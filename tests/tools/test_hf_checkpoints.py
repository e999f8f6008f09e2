"""export_hf.py and import_hf.py: the logits of Megatron's own model, and bit-equal back."""

import argparse
import dataclasses
import functools
import json
import shlex
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rltd.patching import versions
from tests.parallel import run, train
from tests.tools.hf_models import SEQ, TOKENS, VOCABULARY, gpt2, hugging_face_logits, llama
from tests.tools.hf_models import megatron_logits as megatron_logits_on_this_rank

import export_hf  # isort: skip  from tools, which tests.parallel puts on the path
import hf_checkpoint
import hf_config
import hf_tokenizer
import hf_weights
import import_hf

VOCAB_SIZE = VOCABULARY - hf_tokenizer.tokens_beyond_vocab_size()  # the flag for so many tokens

MODEL = (
    f"--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ} "
    f"--max-position-embeddings {SEQ} --attention-dropout 0 --hidden-dropout 0 --mock-data "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --split 90,5,5 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader"
)
RUN = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 3e-2 --clip-grad 1.0 "
    "--log-interval 1 --eval-interval 100 --eval-iters 0 --save-interval 2 "
    "--ckpt-format torch_dist"
)
LTD = (
    "--random-ltd --random-ltd-min-tokens 16 --random-ltd-ramp-iters 9 --random-ltd-increment 8 "
    "--random-ltd-strata 4"
)
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--group-query-attention --num-query-groups 2 --ffn-hidden-size 80 --kv-channels 16 "
    "--rotary-base 5000"
)
UNTIED = "--untie-embeddings-and-output-weights"
TP2, PP2 = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
# How far Megatron's and Hugging Face's float64 may be apart: both take the angles of RoPE from
# float32, and Megatron rounds sqrt(2 / pi) to 8 digits.
EXACT, TANH, ROPE = 1e-12, 1e-7, 1e-6


def export(load, output, *options):
    arguments = ["--load", load, "--output", output, *options]
    assert export_hf.main([str(a) for a in arguments]) == 0
    return output


def import_(folder, output, *options):
    arguments = ["--input", folder, "--output", output, *options]
    assert import_hf.main([str(a) for a in arguments]) == 0
    return output


def megatron_logits(load, tmp_path, flags="", world_size=1):
    output = tmp_path / "logits.npy"
    run(world_size, megatron_logits_on_this_rank, str(load), flags.split(), str(output))
    return np.load(output)


def assert_near(ours, theirs, tolerance):
    assert ours.shape == theirs.shape == (*TOKENS.shape, VOCABULARY)
    assert np.abs(theirs).max() > 0.2
    assert np.abs(ours - theirs).max() <= tolerance


RUNS = {  # name: (ranks, flags of the layout and the model, tolerance)
    "gpt2 of TP": (2, f"{TP2} --make-vocab-size-divisible-by 96", EXACT),
    "gpt2 of PP": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {UNTIED}", EXACT),
    "gpt2 in bf16": (1, "--bf16", EXACT),
    # A ticket: filled up with heads of zeros.
    "gpt2 with fewer heads": (1, "--num-attention-heads 3 --kv-channels 8", EXACT),
    "llama of TP": (2, f"{TP2} {LLAMA} {UNTIED}", ROPE),
    "llama of PP": (2, f"{PP2} {LLAMA}", ROPE),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The function from a name of `RUNS` to the checkpoints of that random-LTD run."""

    @functools.cache
    def checkpoints(name):
        folder = tmp_path_factory.mktemp("run") / "checkpoints"
        train(f"{MODEL} {RUN} {LTD} {RUNS[name][1]} --save {folder}", RUNS[name][0])
        return folder

    # Called with and without a name, a cache would train twice.
    return lambda name="gpt2 of TP": checkpoints(name)


@pytest.mark.parametrize("name", RUNS)
def test_a_trained_model_has_the_same_logits(trained, name, tmp_path, capsys):
    load, tolerance = trained(name), RUNS[name][2]
    folder = export(load, tmp_path / "out" / "model")
    printed = capsys.readouterr().out
    assert f"{load}/iter_0000002" in printed
    dtype = "bfloat16" if "--bf16" in RUNS[name][1] else "float32"
    assert f"parameters in {dtype}, " in printed
    assert {str(t.dtype) for t in load_file(folder / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }
    theirs = megatron_logits(load, tmp_path, "--no-bias-gelu-fusion")
    assert theirs.shape[-1] > VOCABULARY  # padded, which the export is not
    assert_near(hugging_face_logits(folder), theirs[..., :VOCABULARY], tolerance)
    # All that is written may be read by others, and nothing else is left behind.
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert all(path.stat().st_mode & 0o44 == 0o44 for path in folder.iterdir())


@pytest.mark.skipif(versions.release() < (0, 19), reason="no HybridModelConfig")
def test_a_hybrid_model_is_exported_as_the_gpt_model_that_it_continues(trained, tmp_path):
    load, flags = trained("llama of PP"), RUNS["llama of PP"][1]
    model = f"{MODEL} {LLAMA}".replace("--num-layers 4", "--hybrid-layer-pattern *-*|-*-*-")
    # Megatron turns the GPTModel into a HybridModel; at this learning rate it stays what it is.
    still = "--finetune --no-load-optim --lr 0 --min-lr 0 --train-iters 1 --save-interval 1"
    train(
        f"{model} {RUN} {still} {LTD} {PP2} --load {load} --save {tmp_path / 'hybrid'}",
        2,
        script="pretrain_hybrid",
    )
    assert PP2 in flags
    ours, theirs = (
        load_file(export(path, tmp_path / f"out-{i}") / "model.safetensors")
        for i, path in enumerate((tmp_path / "hybrid", load))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((tmp_path / f"out-{i}/config.json").read_text()) for i in (0, 1)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("pattern", ["*-*E", "*-M-", "*-**-", "*-*-/*-"])
def test_other_hybrid_models_are_refused(pattern):
    args = argparse.Namespace(hybrid_layer_pattern=pattern, spec=["a", "b"])
    assert hf_config.as_gpt(args) is args


# name: (model, flags beyond those printed, tolerance)
MODELS = {
    "gpt2, tanh": (gpt2, {}, TANH),
    "gpt2, exact, wide MLP": (gpt2, {"activation_function": "gelu", "n_inner": 48}, EXACT),
    "gpt2, epsilon, untied": (
        gpt2,
        {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
        TANH,
    ),
    "llama": (llama, {}, ROPE),
    "llama, tied, no groups": (
        llama,
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        ROPE,
    ),
    "llama, one group": (llama, {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}, ROPE),
}


# What of a configuration is to come back as it went.
OF_CONFIG = (
    "model_type vocab_size tie_word_embeddings activation_function layer_norm_epsilon n_positions "
    "n_embd n_layer n_head attn_pdrop resid_pdrop hidden_act rms_norm_eps hidden_size "
    "intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_parameters attention_dropout dtype"
).split()


@pytest.fixture(params=MODELS)
def published(request, tmp_path):
    """A random Hugging Face model on disk, and how near Megatron is to come."""
    make, options, tolerance = MODELS[request.param]
    make(**options).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", tolerance


def test_there_and_back(published, tmp_path, capsys):
    folder, tolerance = published
    load = import_(folder, tmp_path / "megatron", "--make-vocab-size-divisible-by", "96")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  --load"))
    flags = " ".join(shlex.split(line)[3:])
    ours = megatron_logits(load, tmp_path, flags)
    assert ours.shape[-1] == 192
    theirs = hugging_face_logits(folder)
    assert_near(ours[..., :VOCABULARY], theirs, tolerance)
    # Padding changes the loss by no more than its share.
    more = np.logaddexp.reduce(ours, -1) - np.logaddexp.reduce(theirs, -1)
    assert 0 < more.max() <= np.log(192 / VOCABULARY)
    back = export(load, tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (back, folder))
    assert {name: ours.get(name) for name in OF_CONFIG} == {
        name: theirs.get(name) for name in OF_CONFIG
    }


def test_use_checkpoint_args_and_tensor_parallelism(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron")
    left = capsys.readouterr().out.split("all of these except ")[1].strip()
    assert left == f"--norm-epsilon 1e-06 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
    flags = f"{left} --tensor-model-parallel-size 2"
    ours = megatron_logits(load, tmp_path, flags, world_size=2)
    assert_near(ours[..., :VOCABULARY], hugging_face_logits(tmp_path / "hf"), ROPE)


def test_training_starts_from_an_import_on_any_layout(tmp_path, capsys):
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    gpt2(activation_function="gelu", **still).save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  --load"))
    data = "--mock-data --split 90,5,5 --num-workers 0 --no-create-attention-mask-in-dataloader"
    run_flags = f"{line} {data} {RUN} {LTD}"
    alone = train(run_flags)
    assert len(alone.losses) == 2
    for layout in (TP2, PP2.replace("2", "3")):
        losses = train(f"{run_flags} {layout}", int(layout.split("size ")[1][0])).losses
        assert losses == pytest.approx(alone.losses, rel=1e-5)
    fresh = train(f"{run_flags} --train-iters 1".replace(f"--load {load} --finetune", ""))
    assert abs(alone.losses[0] - fresh.losses[0]) > 0.01  # so that not loading would be seen


def test_dtype_and_bare_names_and_pieces(tmp_path):
    # A published GPT-2: without its head, in several files, with buffers of older releases.
    model = gpt2()
    model.save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, SEQ, SEQ)
    names = sorted(bare)
    for i, part in enumerate((names[:9], names[9:])):
        file = tmp_path / "hf" / f"model-{i}.safetensors"
        save_file({name: bare[name].contiguous() for name in part}, file)
    load = import_(tmp_path / "hf", tmp_path / "megatron", "--dtype", "bfloat16")
    back = export(load, tmp_path / "back", "--dtype", "float32")
    after = load_file(back / "model.safetensors")
    assert after.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(after[name], tensor.bfloat16().float())
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


def test_norms_stored_less_one_in_bf16():
    shape = hf_weights.Shape(0, 4, 4, 8, True, centred_norms=True)
    gamma = torch.full((8,), 0.01233).bfloat16()

    def read(name):
        return gamma[:0] if name.startswith("decoder.layers") else gamma

    wide = dict(hf_weights.to_hugging_face("gpt2", shape, read, torch.float32))
    assert torch.equal(wide["transformer.ln_f.weight"], gamma.float() + 1)
    assert torch.equal(wide["transformer.ln_f.bias"], gamma.float())
    as_stored = dict(hf_weights.to_hugging_face("gpt2", shape, read))
    assert torch.equal(as_stored["transformer.ln_f.weight"], (gamma.float() + 1).bfloat16())
    # So that it is seen what is rounded first.
    assert not torch.equal(as_stored["transformer.ln_f.weight"].float(), gamma.float() + 1)


def test_norms_stored_less_one():
    # --apply-layernorm-1p, which needs Transformer Engine to be trained.
    model = gpt2()
    weights = model.state_dict()
    shape = hf_config.shape_of_config(model.config)
    centred: dict = {}
    for name, _, tensor in hf_weights.to_megatron("gpt2", shape, 128, weights.__getitem__):
        is_norm = "norm" in name and name.endswith("weight")
        centred.setdefault(name, []).append(tensor.double() - float(is_norm))
    stored = {k: torch.stack(v) if len(v) > 1 else v[0] for k, v in centred.items()}
    shape = dataclasses.replace(shape, centred_norms=True)
    for name, tensor in hf_weights.to_hugging_face("gpt2", shape, stored.__getitem__):
        assert torch.allclose(tensor, weights[name].double(), rtol=0, atol=1e-15)


def test_padding_hardly_changes_the_loss():
    # Where logits are far below zero, as a published GPT-2's are, rows of zeros would be all.
    generator = torch.Generator().manual_seed(1)
    rows, hidden = (torch.randn(n, 8, generator=generator) for n in (50, 20))
    rows[:, 0] -= 30
    hidden[:, 0] = 1
    padded = hf_weights.pad(rows, 64)
    assert torch.equal(padded[:50], rows)
    more = (hidden @ padded.T).logsumexp(1) - (hidden @ rows.T).logsumexp(1)
    assert 0 < more.max() <= np.log(64 / 50)


def stored(**changes):
    """Return arguments as a checkpoint holds them, of GPT-2's kind if nothing is changed."""
    plain = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "group_query_attention": False,
        "untie_embeddings_and_output_weights": False,
        "rotary_percent": 1.0,
    }
    return argparse.Namespace(**plain | changes)


OF_LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
}


def test_families():
    assert hf_config.family_of(stored()) == "gpt2"
    assert hf_config.family_of(stored(**OF_LLAMA)) == "llama"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": 8}, "--num-experts 8"),
        ({"multi_latent_attention": True}, "--multi-latent-attention has no counterpart"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"squared_relu": True}, "--squared-relu has no counterpart"),
        ({"qk_layernorm": True}, "--qk-layernorm has no counterpart"),
        ({"window_size": (128, 0)}, "--window-size (128, 0)"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
        ({"position_embedding_type": "none"}, "--position-embedding-type none is neither"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn is neither"),
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm with --position-embedding-type"),
        ({"swiglu": True}, "--swiglu with --position-embedding-type learned_absolute"),
        ({"add_bias_linear": False}, "--disable-bias-linear with --position-embedding-type"),
        ({"group_query_attention": True}, "--group-query-attention with"),
        (
            {"kv_channels": 16},
            "--kv-channels 16 with --num-attention-heads 4: GPT-2's heads are together as wide",
        ),
        (OF_LLAMA | {"rotary_percent": 0.5}, "--rotary-percent 0.5 with"),
        (OF_LLAMA | {"rotary_interleaved": True}, "--rotary-interleaved with"),
        (OF_LLAMA | {"use_rope_scaling": True}, "--use-rope-scaling with"),
        (OF_LLAMA | {"rotary_seq_len_interpolation_factor": 2}, "interpolation-factor 2 with"),
        (OF_LLAMA | {"add_bias_linear": True}, "no --disable-bias-linear with"),
        (OF_LLAMA | {"add_qkv_bias": True}, "--add-qkv-bias with"),
        (OF_LLAMA | {"swiglu": False}, "no --swiglu with"),
    ],
)
def test_what_does_not_map_is_refused_by_its_flag(changes, said):
    with pytest.raises(hf_weights.ConversionError) as error:
        hf_config.family_of(stored(**changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_everything_that_is_refused_is_said_at_once():
    with pytest.raises(hf_weights.ConversionError) as error:
        hf_config.family_of(stored(num_experts=8, swiglu=True, qk_layernorm=True))
    assert all(f in str(error.value) for f in ("--num-experts 8", "--swiglu", "--qk-layernorm"))


@pytest.mark.parametrize(
    ("fused", "name"),
    [({"bias_gelu_fusion": True}, "gelu_new"), ({"bias_gelu_fusion": False}, "gelu")]
    + [({"use_te_activation_func": True}, "gelu_new")],
)
def test_the_gelu_that_was_computed(fused, name):
    assert hf_config.activation_of(stored(**fused)) == name


def test_names_are_those_of_megatrons_own_checkpoints(trained):
    # And so those of Transformer Engine's layers: Megatron stores the norms of its local layers
    # under them (`sharded_state_dict_keys_map`).
    folder = hf_checkpoint.find(trained(), None)
    with hf_checkpoint.alone():
        args = hf_checkpoint.stored_args(folder)
        names = hf_checkpoint.tensor_shapes(folder)
    family = hf_config.family_of(args)
    hf_weights.check_names(family, hf_config.shape_of(args, VOCABULARY), names)
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names
    other = {**names, "decoder.layers.self_attention.q_layernorm.weight": (4, 8)}
    del other["decoder.final_layernorm.weight"]
    with pytest.raises(
        hf_weights.ConversionError, match="lacks decoder.final.*, has .*q_layernorm"
    ):
        hf_weights.check_names(family, hf_config.shape_of(args, VOCABULARY), other)


def said_by(module, arguments, capsys):
    """Return the one line that a tool says before it gives up."""
    try:
        status = module.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()[-1]


def test_wrong_command_lines_of_the_export(trained, tmp_path, capsys):
    load = trained()

    def said(*options, load=load):
        line = said_by(export_hf, ["--load", load, "--output", tmp_path / "o", *options], capsys)
        assert not any(tmp_path.glob("*o*"))
        return line

    assert "there is iter_0000002" in said("--iteration", 7)
    assert "no iter_ folder" in said(load=tmp_path / "nothing")
    assert "is not a checkpoint of --ckpt-format torch_dist" in said(load=load.parent)
    assert "--tokenizer: there is no" in said("--tokenizer", tmp_path / "nothing")
    assert "go together" in said("--vocab-file", load)
    assert "1000 tokens, but the model only" in said("--vocab-size", 1000)
    assert "no tokenizer can be loaded" in said("--tokenizer", load)
    assert "exists; name a new folder" in said_by(
        export_hf, ["--load", load, "--output", tmp_path], capsys
    )


@pytest.mark.parametrize("found", ["4.57.1", None])
def test_another_transformers_is_refused_at_once(tmp_path, capsys, monkeypatch, found):
    def version(name):
        assert name == "transformers"
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    gpt2().save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(metadata, "version", version)
    said = f"transformers {found} is old" if found else "no transformers is installed"
    said += ": pip install 'transformers>=5'"
    arguments = ["--output", tmp_path / "o"]
    # Before anything is read: there is no such run.
    export = ["--load", tmp_path / "nothing", *arguments]
    assert said_by(export_hf, export, capsys) == f"export_hf: {said}"
    import_ = ["--input", tmp_path / "hf", *arguments]
    assert said_by(import_hf, import_, capsys) == f"import_hf: {said}"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_checkpoint_leaves_nothing(trained, tmp_path, capsys):
    shutil.copytree(trained(), tmp_path / "run")
    for file in (tmp_path / "run" / "iter_0000002").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    line = said_by(export_hf, ["--load", tmp_path / "run", "--output", tmp_path / "o"], capsys)
    assert "cannot be read" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "model_type mistral: only gpt2, llama"),
        ({"activation_function": "relu"}, "activation_function relu (can be gelu_new or"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_models_that_are_not_imported(tmp_path, capsys, change, said):
    gpt2().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    arguments = ["--input", tmp_path / "hf", "--output", tmp_path / "o"]
    assert said in said_by(import_hf, arguments, capsys)
    assert not (tmp_path / "o").exists()


def test_rope_scaling_and_biases_are_not_imported(tmp_path, capsys):
    llama(
        attention_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    ).save_pretrained(tmp_path / "hf")
    arguments = ["--input", tmp_path / "hf", "--output", tmp_path / "o"]
    line = said_by(import_hf, arguments, capsys)
    assert "attention_bias True (can be False)" in line
    assert "rope_type linear (can be default)" in line


def test_wrong_command_lines_of_the_import(tmp_path, capsys):
    def said(*options, folder=tmp_path / "hf"):
        arguments = ["--input", folder, "--output", tmp_path / "o", *options]
        return said_by(import_hf, arguments, capsys)

    assert "there is no config.json" in said()
    gpt2().save_pretrained(tmp_path / "hf")
    assert "must be at least 1" in said("--make-vocab-size-divisible-by", 0)
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.h.1.ln_2.bias"]
    weights["transformer.h.1.adapter.weight"] = torch.ones(2)
    save_file(weights, file)
    line = said()
    assert "there is no tensor transformer.h.1.ln_2.bias; Megatron has no place for " in line
    assert line.endswith("transformer.h.1.adapter.weight")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "nothing"}')
    assert f"--input {tmp_path / 'hf'}: The checkpoint you are trying to load" in said()
    file.unlink()
    assert "there is no *.safetensors" in said()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_is_what_the_logits_depend_on(tmp_path):
    # So that the comparisons above could fail: another epsilon moves the logits.
    llama().save_pretrained(tmp_path / "hf")
    load = import_(tmp_path / "hf", tmp_path / "megatron")
    ours = megatron_logits(load, tmp_path, "--norm-epsilon 1e-5")
    with pytest.raises(AssertionError):
        assert_near(ours[..., :VOCABULARY], hugging_face_logits(tmp_path / "hf"), ROPE)
