"""draw_ticket.py: what is kept of a checkpoint, and that the run goes on with it on any layout."""

import argparse
import contextlib
import io
import re
import shlex

import pytest
import torch

from megatron_rltd.early_bird.masks import distance
from megatron_rltd.early_bird.target import Target
from tests.megatron.test_training import BASE, LTD
from tests.parallel import RankError, train

import draw_ticket  # isort: skip  from tools, which tests.parallel puts on the path
import hf_checkpoint
import ticket_checkpoint
from hf_weights import ConversionError

FORMAT = "--ckpt-format torch_dist"
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
LLAMA = (
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --kv-channels 6 "
    "--ffn-hidden-size 64 --dist-ckpt-optim-fully-reshardable"
)
LAYER_TOKENS = f"{LTD} --layer-token-lr"
FOUR = "--save-interval 2 --exit-interval 4"
# name: (ranks, layout, model, heads and FFN neurons to keep, parameters of a layer by kind)
RUNS = {
    "llama": (2, f"{TP2} {DISTRIBUTED} --bf16", LLAMA, (2, 48)),
    "gpt2": (2, f"{PP2} {LAYER_TOKENS}", "", (3, 64)),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """{name: the --save folder of a dense run of 4 iterations out of 6}."""
    folders = {}
    for name, (ranks, layout, model, _) in RUNS.items():
        folders[name] = tmp_path_factory.mktemp("run") / name
        train(f"{BASE} {model} {layout} {FORMAT} {FOUR} --save {folders[name]}", ranks)
    return folders


@pytest.fixture(scope="module")
def tickets(dense, tmp_path_factory):
    """{name: (the folder of a run's ticket, what the tool printed)}."""
    drawn = {}
    for name, (*_, keep) in RUNS.items():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            folder = draw(dense[name], tmp_path_factory.mktemp("drawn") / name, *keeping(*keep))
        drawn[name] = folder, printed.getvalue()
    return drawn


def draw(load, save, *options):
    arguments = ["--load", load, "--save", save, *options]
    assert draw_ticket.main([str(a) for a in arguments]) == 0
    return save


def keeping(heads, neurons):
    return "--num-attention-heads", heads, "--ffn-hidden-size", neurons


def contents(folder, iteration=4):
    """Return ({name: whole tensor}, common state) of a checkpoint."""
    from megatron.core import dist_checkpointing

    path = str(folder / f"iter_{iteration:07d}")
    with hf_checkpoint.alone():
        wanted = dist_checkpointing.load_tensors_metadata(path)
        loaded = dist_checkpointing.load(dict(wanted), path, validate_access_integrity=False)
        common = dist_checkpointing.load_common_state_dict(path)
        return {name: loaded[name].clone() for name in wanted}, common


def plain_slices(tensors, kept, groups, q, d):
    """Cut tensors by plain indexing: the definition.

    Args:
        kept: [(kept groups, kept neurons) of each layer].
    """
    cut = {}
    for name, tensor in tensors.items():
        neurons = tensors[_of(name, "linear_fc2.weight")].shape[2] if "layers" in name else 0
        parts = []
        for layer, (of_groups, of_neurons) in enumerate(kept):
            part = tensor[layer] if "layers" in name else tensor
            if re.search(r"linear_qkv\.(weight|bias)", name):
                size = (q + 2) * d
                part = torch.cat([part[g * size : (g + 1) * size] for g in of_groups])
            elif "linear_proj.weight" in name:
                part = torch.cat([part[:, g * q * d : (g + 1) * q * d] for g in of_groups], 1)
            elif re.search(r"linear_fc1\.(weight|bias)", name):
                gates = range(0, len(part), neurons)
                part = torch.stack([part[start + i] for start in gates for i in of_neurons])
            elif "linear_fc2.weight" in name:
                part = torch.stack([part[:, i] for i in of_neurons], 1)
            parts.append(part)
        cut[name] = torch.stack(parts) if "layers" in name else tensor
    return cut


def _of(name, parameter):
    return f"{name.partition('decoder.layers.')[0]}decoder.layers.mlp.{parameter}"


def largest_norms(tensors, heads, neurons, groups, q, d):
    """Return [(groups, neurons) to keep of each layer], by the definition."""
    names = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    names += ["mlp.linear_fc1", "mlp.linear_fc2"]
    qkv, proj, fc1, fc2 = (tensors[f"decoder.layers.{n}.weight"].double() for n in names)
    kept = []
    for layer in range(len(qkv)):
        of_groups = []
        for g in range(groups):
            value = qkv[layer, g * (q + 2) * d + (q + 1) * d : (g + 1) * (q + 2) * d]
            of_groups.append(value.norm() * proj[layer, :, g * q * d : (g + 1) * q * d].norm())
        rows = fc1[layer].view(-1, fc2.shape[2], fc1.shape[2]).norm(dim=2).prod(0)
        of_neurons = rows * fc2[layer].norm(dim=0)
        best = torch.stack(of_groups).topk(heads // q)[1], of_neurons.topk(neurons)[1]
        kept.append(tuple(sorted(chosen.tolist()) for chosen in best))
    return kept


SIZES = {"llama": (2, 2, 6), "gpt2": (4, 1, 8)}  # groups, heads of a group, head size


@pytest.mark.parametrize("name", RUNS)
def test_all_tensors_are_cut_alike_and_the_rest_is_kept(dense, tickets, name):
    heads, neurons = RUNS[name][3]
    ticket = tickets[name][0]
    (before, common), (after, ours) = contents(dense[name]), contents(ticket)
    kept = largest_norms(before, heads, neurons, *SIZES[name])
    expected = plain_slices(before, kept, *SIZES[name])
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in before) > 5
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(after[key], tensor), key
        assert after[key].dtype == before[key].dtype
    args, theirs = vars(ours.pop("args")), vars(common.pop("args"))
    assert str(ours) == str(common)  # learning rate, optimizer's groups, FLOPs so far
    changed = {key for key in args if key not in theirs or args[key] != theirs[key]}
    assert changed - {"early_bird", "early_bird_emerged", "early_bird_ticket"} == {
        "num_attention_heads",
        "ffn_hidden_size",
        *(["num_query_groups"] if name == "llama" else []),
    }
    assert args["kv_channels"] == SIZES[name][2]


def test_keeping_everything_is_the_checkpoint_itself(dense, tmp_path):
    ticket = draw(dense["gpt2"], tmp_path / "ticket", *keeping(4, 128))
    before, after = contents(dense["gpt2"])[0], contents(ticket)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def assert_near(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs) == 2
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)) < tolerance


def printed_flags(text):
    """Return the flags to continue with that the tool printed."""
    lines = text.splitlines()
    return lines[next(i for i, x in enumerate(lines) if x.startswith("continue with")) + 1]


def test_the_run_goes_on_with_its_learning_rate_and_layer_tokens(dense, tickets):
    def run(flags):
        return train(f"{BASE} {LAYER_TOKENS} {FORMAT} {flags}")

    whole = run(f"--load {dense['gpt2']}")
    ticket, printed = tickets["gpt2"]
    flags = printed_flags(printed).replace(f"--save {ticket}", "")
    assert set(shlex.split(flags)[::2]) == {
        "--num-attention-heads",
        "--kv-channels",
        "--ffn-hidden-size",
        "--load",
    }
    # In one process, from a checkpoint of two pipeline stages.
    ours = run(flags)
    for name in ("learning_rates", "weight_decays", "kept", "layer_tokens", "arguments"):
        assert getattr(ours, name) == getattr(whole, name), name
    assert len(ours.losses) == 2
    assert ours.losses != whole.losses
    assert ours.flops[0] < whole.flops[0]


def test_a_ticket_continues_on_another_layout(tickets):
    ticket, printed = tickets["llama"]
    flags = printed_flags(printed).split("--load")[0]
    options = f"{BASE} {LLAMA} {DISTRIBUTED} --bf16 {FORMAT} {flags} --load {ticket}"
    overlap = "--overlap-grad-reduce --overlap-param-gather"
    one, pipeline = train(f"{options} {overlap}", 2), train(f"{options} {PP2}", 2)
    assert_near(one.losses, pipeline.losses, 2e-3)  # bf16
    assert one.learning_rates == pipeline.learning_rates


def test_sizes_that_are_not_the_checkpoints(dense, tickets):
    flags = f"{BASE} {LAYER_TOKENS} {FORMAT}"
    sizes = "--num-attention-heads 3 --kv-channels 8 --ffn-hidden-size 64"
    with pytest.raises(RankError, match="heads 3 .checkpoint: 4., .* draw one with"):
        train(f"{flags} {sizes} --load {dense['gpt2']}")
    with pytest.raises(RankError, match="heads 4 .checkpoint: 3., .*: it is a ticket: give the fl"):
        train(f"{flags} --load {tickets['gpt2'][0]}")


def test_a_random_ticket_is_that_of_its_seed(dense):
    with hf_checkpoint.alone():
        chosen = ticket_checkpoint.Dense(dense["gpt2"] / "iter_0000004")
        target = Target(num_attention_heads=3, ffn_hidden_size=64)
        first, again, other = (chosen.mask(target, seed) for seed in (3, 3, 4))
        by_norm = chosen.mask(target)
    for kind, units in (("heads", 4), ("ffn", 128)):
        assert distance(first, again, kind) == 0
        assert first.count(kind) == by_norm.count(kind) == 4 * {4: 1, 128: 64}[units]
    assert distance(first, other, "ffn") > 0.4  # 0.5 is chance
    assert distance(first, by_norm, "ffn") > 0.4


def test_fresh_moments_of_a_random_ticket(dense, tickets, tmp_path):
    options = ("--signal", "random", "--reset-optimizer")
    ticket = draw(dense["gpt2"], tmp_path / "ticket", *keeping(3, 64), *options)
    tensors, common = contents(ticket)
    moments = {key: value for key, value in tensors.items() if ".exp_avg" in key}
    assert len(moments) > 10
    assert not any(value.any() for value in moments.values())
    assert {group["step"] for group in common["optimizer"]["param_groups"]} == {0}
    assert common["args"].early_bird_ticket["signal"] == "random"
    name = "decoder.layers.mlp.linear_fc2.weight"
    by_norm = contents(tickets["gpt2"][0])[0]
    assert by_norm[name].shape == tensors[name].shape
    assert not torch.equal(by_norm[name], tensors[name])


def test_rewound_are_weights_and_all_else_but_the_choice(dense, tmp_path):
    load = dense["gpt2"]
    rewound = draw(load, tmp_path / "rewound", *keeping(3, 64), "--weights-iteration", 2)
    tensors, common = contents(rewound, 2)
    kept = largest_norms(contents(load)[0], 3, 64, *SIZES["gpt2"])
    earlier, of_earlier = contents(load, 2)
    assert kept != largest_norms(earlier, 3, 64, *SIZES["gpt2"])
    expected = plain_slices(earlier, kept, *SIZES["gpt2"])
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    assert common["opt_param_scheduler"] == of_earlier["opt_param_scheduler"]
    assert (rewound / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_history_of_checkpoints(dense, tmp_path, capsys):
    load = dense["gpt2"]
    arguments = ["--load", str(load), *map(str, keeping(3, 64)), "--history"]
    picture = tmp_path / "distances.png"
    rule = ["--window", "2", "--threshold", "0.9"]
    assert draw_ticket.main([*arguments, str(picture), *rule]) == 0
    printed = capsys.readouterr().out
    earlier, later = (largest_norms(contents(load, n)[0], 3, 64, *SIZES["gpt2"]) for n in (2, 4))
    expected = []
    for kind, units in ((0, 4), (1, 128)):
        pairs = zip(earlier, later, strict=True)
        differing = sum(len(set(a[kind]) ^ set(b[kind])) for a, b in pairs)
        expected.append(differing / (4 * units))
    row = next(x for x in printed.splitlines() if x.split()[:1] == ["4"]).split()
    assert [float(row[1]), float(row[4])] == pytest.approx(expected, abs=6e-5)
    assert "a ticket has emerged at iteration 4" in printed
    assert picture.stat().st_size > 1000
    assert draw_ticket.main([*arguments[:-1], "--history", "--threshold", "0"]) == 0
    assert "no ticket has emerged" in capsys.readouterr().out


REFUSED = {
    ("num_experts", 4): "--num-experts",
    ("multi_latent_attention", True): "--multi-latent-attention",
    ("hybrid_layer_pattern", "*-*-"): "--hybrid-layer-pattern",
    ("mtp_num_layers", 1): "--mtp-num-layers",
    ("fp8_param_gather", True): "--fp8-param-gather",
    ("use_megatron_fsdp", True): "--use-megatron-fsdp",
    ("use_layer_wise_distributed_optimizer", True): "--optimizer",
    ("softmax_type", "learnable"): "--softmax-type",
    ("heterogeneous_layers_config_path", "x"): "--heterogeneous-layers-config-path",
}


def test_other_models_are_refused_and_nothing_is_written(dense, tmp_path, monkeypatch, capsys):
    folder = dense["gpt2"] / "iter_0000004"
    with hf_checkpoint.alone():
        stored = vars(hf_checkpoint.stored_args(folder))
        for (name, value), flag in REFUSED.items():
            args = argparse.Namespace(**{**stored, name: value})
            monkeypatch.setattr(hf_checkpoint, "stored_args", lambda _, args=args: args)
            with pytest.raises(ConversionError, match=f"can be drawn from {folder}.*{flag}"):
                ticket_checkpoint.Dense(folder)
    options = ["--load", dense["gpt2"], "--save", tmp_path / "ticket", *keeping(3, 64)]
    assert draw_ticket.main([str(a) for a in options]) == 2
    assert "draw_ticket: no ticket can be drawn from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-attention-heads", 5), "--num-attention-heads 5 must be from 1 to 4"),
        (("--ffn-hidden-size", 63), "--ffn-hidden-size 63 must be a multiple of 16 .*use 48 or 64"),
        (("--ffn-hidden-size", 0), "--ffn-hidden-size 0 must be from 1 to 128"),
        ((), "give --num-attention-heads, --ffn-hidden-size or both"),
        (("--num-attention-heads", 3, "--iteration", 3), "there is no .*iter_0000003"),
        (("--num-attention-heads", 3, "--weights-iteration", 9), "there is no .*iter_0000009"),
    ],
)
def test_counts_and_iterations_that_do_not_fit(dense, tmp_path, capsys, options, message):
    arguments = ["--load", dense["gpt2"], "--save", tmp_path / "ticket", *options]
    assert draw_ticket.main([str(a) for a in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --save, --history or both"),
        (["--save", "{there}"], "exists; name a new folder"),
        (["--save", "new", "--seed", "1"], "--seed is for --signal random only"),
        (["--save", "new", "--window", "3"], "--window is for --history only"),
        (["--history", "--window", "1"], "--window must be at least 2"),
        (["--history", "{there}/no/a.png"], "there is no folder for the picture"),
        (["--history", "--threshold", "2"], "--threshold must be from 0 to 1"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, capsys, options, message):
    options = [option.format(there=tmp_path) for option in options]
    with pytest.raises(SystemExit) as error:
        draw_ticket.main(["--load", str(tmp_path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_state_of_the_optimizer_that_cannot_be_cut(tmp_path, capsys):
    flat, none = tmp_path / "flat", tmp_path / "none"
    # In fp32, Megatron cannot load such buffers at all.
    options = f"{BASE} {FORMAT} --use-distributed-optimizer --bf16"
    train(f"{options} {FOUR} --save {flat}")
    train(f"{BASE} {FORMAT} {FOUR} --no-save-optim --save {none}")
    arguments = ["--save", str(tmp_path / "ticket"), *map(str, keeping(3, 64))]
    for load, way_out in ((flat, "--dist-ckpt-optim-fully-reshardable"), (none, "--no-save-optim")):
        assert draw_ticket.main(["--load", str(load), *arguments]) == 2
        assert way_out in capsys.readouterr().err
    # The way out is one.
    once = "--dist-ckpt-optim-fully-reshardable --save-interval 1 --exit-interval 5"
    train(f"{options} {once} --load {flat} --save {flat}")
    assert draw_ticket.main(["--load", str(flat), *arguments]) == 0
    assert (tmp_path / "ticket" / "iter_0000005").is_dir()
