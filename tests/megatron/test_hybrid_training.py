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


def test_experts_on_many_ranks_and_a_resume(tmp_path):
    """Saved by one process, continued by two; each expert is on one of them."""
    options = f"{EXPERTS} {FORMAT} --save-interval 2"
    whole = train_hybrid("*E*E*E", f"{options} --save {tmp_path}")
    for folder in tmp_path.glob("iter_*"):
        if folder.name != "iter_0000002":
            shutil.rmtree(folder)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    layout = (
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--tensor-model-parallel-size 2 --sequence-parallel"
    )
    ours = train_hybrid("*E*E*E", f"{options} --load {tmp_path} {layout}", 2)
    assert ours.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert ours.kept == whole.kept[2:]
    assert ours.layer_tokens == whole.layer_tokens
    # An attention and the experts after it are one group; with one group of three dropped:
    kept = whole.kept
    assert whole.layer_tokens == sum(GLOBAL_BATCH * (2 * SEQ + k) for k in kept)


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
