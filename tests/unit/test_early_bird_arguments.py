"""What the --early-bird flags ask for, and what of it is refused; the files of masks."""

import argparse
import re
from types import SimpleNamespace

import pytest
import torch

from megatron_rltd.config import ConfigError
from megatron_rltd.early_bird import history, masks, zeros
from megatron_rltd.early_bird.arguments import (
    Options,
    add_arguments,
    options_of,
    refuse_without_flag,
)
from megatron_rltd.early_bird.history import HistoryError
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.refusals import refuse_other_sizes
from megatron_rltd.early_bird.rule import Rule
from megatron_rltd.early_bird.search import check, describe
from megatron_rltd.early_bird.target import Target
from megatron_rltd.early_bird.training import _last_masks

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": 4,
    "ffn_hidden_size": 256,
    "swiglu": True,
    "tensor_model_parallel_size": 2,
    "save": "folder",
    "ckpt_format": "torch_dist",
    "no_save_optim": None,
    "train_iters": 1000,
    "use_distributed_optimizer": False,
}
WANTED = "--early-bird --early-bird-num-attention-heads 12 --early-bird-interval 10"


def parsed(flags, **model):
    parser = add_arguments(add_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return SimpleNamespace(**{**vars(parser.parse_args(flags.split())), **MODEL, **model})


def problems(flags, **model):
    with pytest.raises(ConfigError) as error:
        options_of(parsed(flags, **model))
    return error.value.problems


def test_defaults():
    assert options_of(parsed(WANTED)) == Options(
        Target(num_attention_heads=12), Rule(5, 0.1), interval=10
    )


def test_every_flag():
    flags = (
        "--early-bird --early-bird-pattern unstructured --early-bird-ratio 0.5 "
        "--early-bird-interval 20 --early-bird-start 40 --early-bird-until 80 "
        "--early-bird-preset early-transformers --early-bird-window 3 --no-early-bird-exit"
    )
    assert options_of(parsed(flags)) == Options(
        Target("unstructured", ratio=0.5), Rule(3, 0.01), 20, start=40, until=80, exit=False
    )


def test_when_a_check_is_due():
    options = Options(Target(num_attention_heads=12), Rule(5, 0.1), interval=10, start=25)
    assert [n for n in range(60) if options.is_due(n)] == [30, 40, 50]
    assert not Options(options.target, options.rule, 10).is_due(0)  # weights are random


WRONG = [
    ("", {"save": None}, "give --save"),
    ("", {"ckpt_format": "torch"}, "--ckpt-format torch: use --ckpt-format torch_dist"),
    ("", {"no_save_optim": True}, "--no-save-optim"),
    ("", {"num_experts": 8}, "--num-experts .* dense GPTModel"),
    ("", {"multi_latent_attention": True}, "--multi-latent-attention"),
    ("", {"hybrid_layer_pattern": "*-*-"}, "--hybrid-layer-pattern .* GPTModel"),
    ("", {"mtp_num_layers": 1}, "--mtp-num-layers"),
    ("", {"fp8_param_gather": True}, "--fp8-param-gather .*omit"),
    ("", {"fp4_param_gather": True}, "--fp4-param-gather .*omit"),
    ("", {"use_megatron_fsdp": True}, "--use-megatron-fsdp .*--use-distributed-optimizer"),
    ("", {"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
    ("", {"optimizer": "dist_muon"}, "--optimizer .*adam"),
    ("", {"use_layer_wise_distributed_optimizer": True}, "--optimizer .*adam"),
    ("", {"softmax_type": "learnable"}, "--softmax-type"),
    (
        "",
        {"non_persistent_ckpt_type": "local", "use_distributed_optimizer": True},
        "--non-persistent-ckpt-type local .* use --non-persistent-ckpt-type global",
    ),
    (
        "--no-early-bird-exit",
        {"save_retain_interval": 100},
        "--save-retain-interval would remove .* omit it, or omit --no-early-bird-exit",
    ),
    ("", {"attention_output_gate": True}, "--attention-output-gate"),
    (
        "--early-bird-num-attention-heads 16 --early-bird-ffn-hidden-size 128",
        {"tensor_model_parallel_size": 16},
        "more than the 8 query groups.*at most",
    ),
    ("--early-bird-num-attention-heads 10", {}, "10 must be a multiple of 4 .*use 8 or 12"),
    ("--early-bird-num-attention-heads 18", {}, "from 1 to 16"),
    ("--early-bird-ffn-hidden-size 200", {}, "200 must be a multiple of 32 .*use 192 or 224"),
    ("--early-bird-num-attention-heads 16", {}, "keep all 16 heads and 256 FFN neurons"),
    ("--early-bird-interval 0", {}, "give --early-bird-interval"),
    ("--early-bird-interval 1000", {}, "--early-bird-interval 1000 leaves no check"),
    ("--early-bird-window 1", {}, "--early-bird-window 1 compares nothing"),
    ("--early-bird-threshold 1", {}, "--early-bird-threshold 1 must be"),
    ("--early-bird-start 0", {}, "--early-bird-start 0 must be at least 1"),
    ("--early-bird-until 1000", {}, "--early-bird-until 1000 is not within"),
    ("--early-bird-start 50 --early-bird-until 40", {}, "start 50 is after .*until 40"),
    ("--early-bird-ratio 0.5", {}, "--early-bird-ratio is for .*unstructured only"),
    ("--early-bird-pattern unstructured --early-bird-ratio 0.5", {}, "heads remove whole units"),
    ("--early-bird-pattern 2:4", {}, "heads remove whole units"),
]


@pytest.mark.parametrize(("flags", "model", "message"), WRONG)
def test_one_problem_is_named_with_the_way_out(flags, model, message):
    found = problems(f"{WANTED} {flags}", **model)
    assert len(found) == 1
    assert re.search(message, found[0]), found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--early-bird --early-bird-interval 5", "give --early-bird-num-attention-heads"),
        (
            "--early-bird --early-bird-interval 5 --early-bird-pattern unstructured",
            "give --early-bird-ratio between 0 and 1",
        ),
        ("--early-bird --early-bird-num-attention-heads 12", "give --early-bird-interval"),
        (
            "--early-bird --early-bird-interval 5 --early-bird-pattern 2:4 --early-bird-ratio 0.5",
            "--early-bird-ratio is for --early-bird-pattern unstructured only",
        ),
    ],
)
def test_what_is_missing_or_too_much(flags, message):
    assert any(message in problem for problem in problems(flags))


def test_two_of_four_needs_columns_in_fours():
    flags = "--early-bird --early-bird-interval 5 --early-bird-pattern 2:4"
    assert options_of(parsed(flags)).target.pattern == "2:4"
    assert "in fours" in problems(flags, ffn_hidden_size=260)[0]


def test_flags_without_the_flag():
    refuse_without_flag(parsed(""))
    with pytest.raises(ConfigError) as error:
        refuse_without_flag(parsed("--early-bird-window 2 --no-early-bird-exit"))
    assert [p.split(" does nothing")[0] for p in error.value.problems] == [
        "--early-bird-window",
        "--no-early-bird-exit",
    ]


def test_a_checkpoint_of_other_sizes_is_refused_with_the_way_out():
    dense = SimpleNamespace(num_attention_heads=16, ffn_hidden_size=256)
    ours = SimpleNamespace(num_attention_heads=12, ffn_hidden_size=256)
    refuse_other_sizes(dense, dense)
    with pytest.raises(ConfigError, match=r"heads 12 \(checkpoint: 16\): .* draw one with"):
        refuse_other_sizes(dense, ours)
    ticket = SimpleNamespace(**vars(ours), early_bird_ticket={"signal": "norm"})
    with pytest.raises(ConfigError, match=r"heads 16 \(checkpoint: 12\): it is a ticket"):
        refuse_other_sizes(ticket, dense)
    with pytest.raises(ConfigError, match=r"heads 16 \(checkpoint: 12\): give the sizes of"):
        refuse_other_sizes(ours, dense)
    grouped = {"group_query_attention": True, "num_query_groups": 8}
    with pytest.raises(ConfigError, match=r"than --num-query-groups 4 \(checkpoint: 8\): .* draw"):
        refuse_other_sizes(
            SimpleNamespace(**vars(dense), **grouped),
            SimpleNamespace(**vars(dense), **{**grouped, "num_query_groups": 4}),
        )


TARGET, UNITS = Target(ffn_hidden_size=3), {"ffn": 5}


def mask_of(iteration, *pruned):
    bits = torch.zeros(5, dtype=torch.bool)
    bits[list(pruned)] = True
    return Mask(iteration, UNITS, {"ffn": {1: masks.pack(bits)}})


def test_files_of_masks(tmp_path):
    written = mask_of(20, 0, 4)
    path = history.write(tmp_path, written, TARGET, 20)
    assert path == tmp_path / "early_bird" / "masks_0000020.pt"
    history.write(tmp_path, mask_of(100, 1, 2), TARGET, 20)
    assert history.iterations(tmp_path) == [20, 100]
    read = history.read(tmp_path, 20, TARGET, UNITS)
    assert read.iteration == 20
    assert read.of_layer("ffn", 1).tolist() == [True, False, False, False, True]
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []
    for target, units in ((Target(ffn_hidden_size=2), UNITS), (TARGET, {"ffn": 6})):
        with pytest.raises(HistoryError, match="masks_0000020.pt was taken for another ticket"):
            history.read(tmp_path, 20, target, units)
    assert history.read(tmp_path, 20, TARGET, UNITS, 20).iteration == 20
    with pytest.raises(
        HistoryError, match="masks_0000020.pt was taken with .*-interval 20, not 10"
    ):
        history.read(tmp_path, 20, TARGET, UNITS, 10)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HistoryError, match="masks_0000020.pt cannot be read"):
        history.read(tmp_path, 20, TARGET, UNITS)


def test_the_window_of_a_resumed_run(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    target = Target(ffn_hidden_size=240)
    bits = {"ffn": {n: masks.pack(torch.ones(256, dtype=torch.bool)) for n in (1, 2, 3, 4)}}
    for iteration in (10, 20, 30, 40, 50):
        history.write(old, Mask(iteration, {"ffn": 256}, bits), target, 10)
    options = Options(target, Rule(3, 0.1), 10)
    args = parsed("", load=str(old), save=str(new), iteration=40)
    # That of iteration 40 is taken again from the checkpoint's weights.
    assert [mask.iteration for mask in _last_masks(options, args)] == [20, 30]
    assert history.iterations(new) == [20, 30]
    args = parsed("", load=None, save=str(new), iteration=40)
    assert [mask.iteration for mask in _last_masks(options, args)] == [20, 30]


def test_a_check_compares_with_the_window():
    rule = Rule(3, 0.4)
    taken = [mask_of(10, 0, 1), mask_of(20, 0, 2), mask_of(30, 0, 2), mask_of(40, 0, 1)]
    found = [check(mask, taken[:i], rule) for i, mask in enumerate(taken)]
    assert [f.distances["ffn"] for f in found] == [[], [0.4], [0.0, 0.4], [0.4, 0.4]]
    assert [f.emerged for f in found] == [False, False, True, True]
    assert found[3].chance["ffn"] == pytest.approx(2 * 0.4 * 0.6)
    # Those of a later iteration, of an earlier start of the run, do not count.
    assert check(taken[1], taken, rule).distances["ffn"] == [0.4]
    assert "ffn 0.4000 to the check before, 0.83 of chance, at most 0.4000 to the last 2" in (
        describe(found[3], rule)
    )


def test_counts_are_added_over_stages():
    def stages(counts):  # of two stages: the other one has another layer with 5 units, 2 pruned
        return [n + more for n, more in zip(counts, (5, 2, 1), strict=True)]

    found = check(mask_of(20, 0, 1), [mask_of(10, 0, 2)], Rule(2, 0.3), stages)
    assert found.distances["ffn"] == [0.3]
    assert found.emerged


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"load": None}, "keeps the zeros of the checkpoint that it loads: give --load"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer .*omit it"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload .*omit it"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph .*omit it"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp .*--use-distributed-optimizer"),
        ({"num_experts": 8}, "--num-experts .* dense GPTModel"),
        ({"optimizer": "muon"}, "--optimizer .*adam"),
    ],
)
def test_what_zeros_are_not_kept_with(model, message):
    zeros.check_arguments(parsed("--early-bird-keep-zeros", load="ticket"))
    with pytest.raises(ConfigError) as error:
        zeros.check_arguments(parsed("--early-bird-keep-zeros", **{"load": "ticket", **model}))
    assert len(error.value.problems) == 1
    assert re.search(f"^--early-bird-keep-zeros: .*{message}", error.value.problems[0])


def test_zeros_are_lost_only_if_the_user_says_so():
    sparse = SimpleNamespace(early_bird_ticket={"pattern": "2:4"})
    continued = SimpleNamespace(early_bird_keep_zeros=True)
    dense = SimpleNamespace(
        early_bird_ticket={"pattern": "structured"}, early_bird_keep_zeros=False
    )
    for checkpoint in (sparse, continued):
        with pytest.raises(ConfigError, match="add --early-bird-keep-zeros .*--no-early-bird-keep"):
            zeros.require_choice(checkpoint, parsed(""))
        zeros.require_choice(checkpoint, parsed("--early-bird-keep-zeros"))
        zeros.require_choice(checkpoint, parsed("--no-early-bird-keep-zeros"))
        zeros.require_choice(checkpoint, parsed("", skip_train=True))  # nothing is trained
    for checkpoint in (dense, SimpleNamespace()):
        zeros.require_choice(checkpoint, parsed(""))
