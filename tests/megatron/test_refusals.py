import argparse

import pytest

from megatron_rltd.config import ConfigError, RandomLTDConfig
from megatron_rltd.patching import versions
from megatron_rltd.refusals import (
    REFUSALS,
    find_refused,
    find_refused_in_model,
    refuse_command_line,
)
from megatron_rltd.training.arguments import add_arguments, resolve_args

GROW = "--random-ltd-grow-micro-batch"
BYPASS = "--random-ltd-policy token-bypass"
# How a user asks for each refused feature.
COMMAND_LINES = {
    "--yaml-cfg": "--yaml-cfg x.yaml",
    "--use-legacy-models": "--use-legacy-models",
    "--overlap-moe-expert-parallel-comm": "--overlap-moe-expert-parallel-comm",
    "--cuda-graph-impl": "--cuda-graph-impl local",
    "--perform-rl-step": "--perform-rl-step",
    "--tp-comm-overlap": "--tp-comm-overlap",
    "--multi-latent-attention with fused rotary embeddings": "--multi-latent-attention "
    "--position-embedding-type rope",
    "--experimental-attention-variant": "--experimental-attention-variant dsa",
    "--hybrid-context-parallel": "--hybrid-context-parallel",
    "--random-ltd-recurrent-layers with packed sequences": "--random-ltd-recurrent-layers --sft "
    "--hybrid-layer-pattern *-M-*-",
    "--moe-flex-dispatcher-backend hybridep": "--moe-token-dispatcher-type flex "
    "--moe-flex-dispatcher-backend hybridep",
    "--moe-paged-stash": "--moe-paged-stash",
    "--moe-expert-rank-capacity-factor": "--moe-expert-rank-capacity-factor 1.5",
    "--calculate-per-token-loss with --num-experts": "--calculate-per-token-loss --num-experts 4",
    "--window-size": "--window-size 64,0",
    "--fine-grained-activation-offloading": "--fine-grained-activation-offloading",
    "--cpu-offloading-num-layers": "--cpu-offloading-num-layers 2",
    "--use-megatron-fsdp": "--use-megatron-fsdp",
    "--use-torch-fsdp2": "--use-torch-fsdp2",
    "--tensor-parallel-num-weight-shards": None,  # derived by Megatron's validation
    "--sft and --dataloader-inter-document-masking with --context-parallel-size": "--sft "
    "--context-parallel-size 2",
    "--sft and --dataloader-inter-document-masking with fused RoPE": "--position-embedding-type "
    "rope --dataloader-inter-document-masking",
    "--random-ltd-preflight with FP8": "--random-ltd-preflight --fp8-format hybrid",
    f"{GROW} with --mtp-num-layers": f"{GROW} 2 --mtp-num-layers 1",
    f"{GROW} with --moe-router-load-balancing-type sinkhorn": f"{GROW} 2 "
    "--moe-router-load-balancing-type sinkhorn",
    f"{GROW} with --moe-expert-capacity-factor": f"{GROW} 2 --moe-expert-capacity-factor 1.0",
    f"{GROW} with packed sequences and --moe-aux-loss-coeff": f"{GROW} 2 --sft "
    "--moe-aux-loss-coeff 0.1",
    f"{GROW} with --log-straggler": f"{GROW} 2 --log-straggler",
    f"{GROW} with distillation": None,  # of ModelOpt's flags
    "fused_single_qkv_rope of the TransformerConfig": None,  # has no flag
    f"{BYPASS} with --pipeline-model-parallel-size": f"{BYPASS} --pipeline-model-parallel-size 2",
    f"{BYPASS} with --context-parallel-size": f"{BYPASS} --context-parallel-size 2",
    f"{BYPASS} with --sequence-parallel": f"{BYPASS} --sequence-parallel",
    f"{BYPASS} with --random-ltd-strata": f"{BYPASS} --random-ltd-strata 2",
    f"{BYPASS} with --random-ltd-shared-indices": f"{BYPASS} --random-ltd-shared-indices",
    f"{BYPASS} with --mtp-num-layers": f"{BYPASS} --mtp-num-layers 1",
    f"{BYPASS} with packed sequences": f"{BYPASS} --sft",
    f"{BYPASS} with --hybrid-layer-pattern": f"{BYPASS} --hybrid-layer-pattern *-*-*-*-",
}
# The releases that have a flag, where not all do: from the first, up to but without the second.
ONLY_IN = {
    "--use-legacy-models": ((0, 17), (0, 18)),
    "--moe-paged-stash": ((0, 18), (9, 0)),
    "--moe-expert-rank-capacity-factor": ((0, 18), (9, 0)),
    "--sft and --dataloader-inter-document-masking with fused RoPE": ((0, 19), (9, 0)),
}
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 "
    "--micro-batch-size 2 --random-ltd --random-ltd-min-tokens 16 --random-ltd-ramp-iters 5"
)


@pytest.fixture(scope="module")
def parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def test_every_refusal_has_a_command_line():
    assert set(COMMAND_LINES) == {refusal.flag for refusal in REFUSALS}


def test_an_ordinary_run_is_not_refused(parser):
    args = parser.parse_args(MODEL.split())
    assert find_refused(args) == []
    assert resolve_args(args).dropped_layers == (2, 3)


@pytest.mark.parametrize("flag", sorted(f for f, line in COMMAND_LINES.items() if line))
def test_refused_features(parser, flag):
    command_line = [*MODEL.split(), *COMMAND_LINES[flag].split()]
    since, before = ONLY_IN.get(flag, ((0, 0), (9, 0)))
    if not since <= versions.release() < before:
        with pytest.raises(SystemExit):  # unknown to this Megatron's parser
            parser.parse_args(command_line)
        return
    args = parser.parse_args(command_line)
    problems = find_refused(args)
    assert len(problems) == 1
    assert problems[0].startswith(flag)
    with pytest.raises(ConfigError, match=flag.split()[0]):
        resolve_args(args)


@pytest.mark.parametrize(
    ("name", "value"),
    [("gtp_weight_remat_size", 2), ("fused_single_qkv_rope", True), ("modelopt_enabled", True)],
)
def test_features_without_a_flag_of_their_own(parser, name, value):
    args = parser.parse_args([*MODEL.split(), GROW, "2"])
    setattr(args, name, value)
    assert len(find_refused(args)) == 1


def test_sparse_attention_of_a_hybrid_model_is_not_refused(parser):
    line = "--experimental-attention-variant dsa --hybrid-layer-pattern +-+-D-+-"
    args = parser.parse_args([*MODEL.split(), *line.split()])
    assert find_refused(args) == []
    assert resolve_args(args).dropped_layers == (2,)


def test_all_problems_are_reported_at_once(parser):
    line = f"{MODEL} --perform-rl-step --tp-comm-overlap --random-ltd-layers 9"
    with pytest.raises(ConfigError) as error:
        resolve_args(parser.parse_args(line.split()))
    assert len(error.value.problems) == 3


def test_what_skips_validation_is_refused_before_it():
    for argument in ("--yaml-cfg=x.yaml", "--yaml-cfg"):
        with pytest.raises(ConfigError, match="--yaml-cfg replaces the parsed flags"):
            refuse_command_line(["--random-ltd", argument])
    refuse_command_line(["--random-ltd"])


def test_a_transformer_config_is_refused_alike():
    from megatron.core.transformer import TransformerConfig

    plain = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    assert find_refused(plain) == []
    plain.tp_comm_overlap = True
    assert find_refused(plain)[0].startswith("--tp-comm-overlap")
    plain.tp_comm_overlap, plain.calculate_per_token_loss = False, True
    assert find_refused(plain) == []
    plain.num_moe_experts = 4
    assert find_refused(plain)[0].startswith("--calculate-per-token-loss")
    plain.num_moe_experts, plain.mtp_num_layers = None, 1
    assert find_refused_in_model(plain, RandomLTDConfig()) == []
    (problem,) = find_refused_in_model(plain, RandomLTDConfig(grow_micro_batch=2))
    assert problem.startswith(f"{GROW} with --mtp-num-layers")
