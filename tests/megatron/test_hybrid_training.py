"""HybridModel in Megatron's own training loop, with Megatron's own layer spec."""

import shutil

import pytest

from megatron_rltd.patching import versions
from tests.megatron.test_training import BASE, GLOBAL_BATCH, LAYERS, LTD, SEQ, assert_same
from tests.parallel import RankError, train

pytestmark = pytest.mark.skipif(versions.release() < (0, 19), reason="no HybridModelConfig")

HYBRID = BASE.replace(f"--num-layers {LAYERS}", "--hybrid-layer-pattern")
FORMAT = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type none --disable-bias-linear"
)


def train_hybrid(pattern, options="", world_size=1):
    before, after = HYBRID.split("--hybrid-layer-pattern")
    arguments = f"{before} --hybrid-layer-pattern {pattern} {after} {LTD} {options}"
    return train(arguments, world_size, script="pretrain_hybrid")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A GPTModel of as many layers as the patterns below have groups, saved after two steps."""
    folder = tmp_path_factory.mktemp("gpt")
    train(f"{BASE} {LTD} {FORMAT} --save {folder} --save-interval 2 --exit-interval 2")
    return folder


@pytest.fixture(scope="module")
def gpt(saved):
    """The same run continued as a GPTModel."""
    return train(f"{BASE} {LTD} {FORMAT} --load {saved}")


LAYOUTS = {
    "one process": (1, "*-*-*-*-", ""),
    "CP + TP + SP": (
        4,
        "*-*-*-*-",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "interleaved stages that split groups, recompute": (
        4,
        "*-*|-*|-*|-",
        "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "two micro-batches in one pass": (
        2,
        "*-*-|*-*-",
        "--pipeline-model-parallel-size 2 --random-ltd-grow-micro-batch 2",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpt_model_continues_as_a_hybrid_model(name, saved, gpt):
    world_size, pattern, options = LAYOUTS[name]
    ours = train_hybrid(pattern, f"{FORMAT} --load {saved} {options}", world_size)
    assert_same(ours, gpt, 1e-6)
    assert ours.kept == gpt.kept
    assert ours.layer_tokens == gpt.layer_tokens
    assert ours.flops == pytest.approx(gpt.flops, rel=1e-12)
    assert ours.learning_rates == gpt.learning_rates
    assert "groups of layers that drop: 2-3 of 4" in ours.output


def test_experts_resume_and_spread_over_ranks(tmp_path):
    options = f"{EXPERTS} --save-interval 2"
    whole = train_hybrid("*E*E*E", f"{options} --save {tmp_path}")
    # An attention and the experts after it are one group; one of three drops.
    assert whole.layer_tokens == sum(GLOBAL_BATCH * (2 * SEQ + k) for k in whole.kept)
    for folder in tmp_path.glob("iter_*"):
        if folder.name != "iter_0000002":
            shutil.rmtree(folder)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train_hybrid("*E*E*E", f"{options} --load {tmp_path}")
    for name in ("losses", "grad_norms", "kept"):
        assert getattr(resumed, name) == getattr(whole, name)[2:]
    assert resumed.layer_tokens == whole.layer_tokens
    # Megatron cannot load the optimizer of experts onto another number of ranks.
    options = f"{EXPERTS} --load {tmp_path} --no-load-optim"
    spread = train_hybrid(
        "*E*E*E",
        f"{options} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--tensor-model-parallel-size 2 --sequence-parallel",
        2,
    )
    assert_same(spread, train_hybrid("*E*E*E", options), 1e-5)


@pytest.mark.parametrize(
    ("arguments", "script", "said"),
    [
        (f"{BASE} --hybrid-layer-pattern *-*-*-*-", "pretrain_gpt", "builds a GPTModel"),
        (BASE, "pretrain_hybrid", "there are no layers: give --hybrid-layer-pattern"),
        (
            f"{HYBRID.replace('--hybrid-layer-pattern', '--hybrid-override-pattern *-*-')}",
            "pretrain_hybrid",
            "no group of the --hybrid-layer-pattern drops",
        ),
    ],
)
def test_bad_command_lines(arguments, script, said):
    with pytest.raises(RankError, match=said):
        train(f"{arguments} {LTD}", script=script)


LATENT = (
    "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 8 --qk-layernorm --rope-type yarn --no-rope-fusion "
    "--normalization RMSNorm --disable-bias-linear"
)
SHARDED = "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"


def test_latent_attention_is_the_same_on_many_ranks():
    alone = train(f"{BASE} {LTD} {LATENT}")
    assert_same(train(f"{BASE} {LTD} {LATENT} {SHARDED}", 4), alone, 1e-5)
    in_stack = train_hybrid("+-+-+-+-", LATENT)
    assert_same(train_hybrid("+-+-+-+-", f"{LATENT} {SHARDED}", 4), in_stack, 1e-5)
    assert in_stack.kept == alone.kept


RECURRENT = (
    "--swiglu --disable-bias-linear --normalization RMSNorm --linear-key-head-dim 8 "
    "--linear-value-head-dim 8 --linear-num-key-heads 4 --linear-num-value-heads 4 "
    "--linear-conv-kernel-dim 4"
)


def test_gated_delta_nets_see_all_tokens_or_the_kept_ones(tmp_path):
    save = f"--save {tmp_path} --save-interval 1 --exit-interval 1"
    train_hybrid("*-G-*-G-*-", f"{RECURRENT} {save}")
    options = f"{RECURRENT} --load {tmp_path} --no-load-optim --override-opt-param-scheduler"
    full = train_hybrid("*-G-*-G-*-", options)
    assert "groups of layers that drop: 3 of 5" in full.output
    options += " --random-ltd-recurrent-layers"
    alone = train_hybrid("*-G-*-G-*-", options)
    assert "groups of layers that drop: 2-4 of 5" in alone.output
    assert abs(alone.losses[0] - full.losses[0]) > 1e-4
    assert alone.layer_tokens < full.layer_tokens
    assert_same(train_hybrid("*-G-*-G-*-", f"{options} {SHARDED}", 4), alone, 1e-5)
    stages = "--pipeline-model-parallel-size 2"
    assert_same(train_hybrid("*-G-*|-G-*-", f"{options} {stages}", 2), alone, 1e-5)
