"""random-LTD in Megatron-Bridge's own training loop, by the callback of the example."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatron_rltd.schedule import Schedule
from tests.parallel import ROOT, RankError, environment, free_port, run, train

INSTALL = "docs/frameworks.md says how to install it for this test"


def _why_not() -> str | None:
    try:
        if not importlib.util.find_spec("megatron.bridge"):
            return f"megatron.bridge is not installed: {INSTALL}"
    except ModuleNotFoundError:
        return "megatron-core is not installed"
    if importlib.util.find_spec("transformer_engine"):
        return "Transformer Engine is installed, so Megatron needs a GPU"
    return None


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=str(_why_not()))

STEPS, SEQ = 10, 128
KEPT = [Schedule(SEQ, 32, 7, 16).kept_tokens(step) for step in range(STEPS)]
# The example's recipe as flags of Megatron-LM's script.
SAME = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --min-lr 1e-5 --lr-decay-style cosine "
    "--weight-decay 0.01 --clip-grad 1.0 --log-interval 1 --eval-interval 5 --eval-iters 1"
)
LTD = " --random-ltd --random-ltd-min-tokens 32 --random-ltd-ramp-iters 7"


def _train_here(runs: list[dict]) -> list[dict]:
    """Be one rank of some trainings, one after the other; return what each did, in exact floats.

    Args:
        runs: ``min_tokens`` (without it there is no random-LTD), ``folder``, ``stop`` (the step
            after which the run ends), ``layer_token_lr``, ``grow``, ``rerun_mode``.
    """
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # before Megatron-Bridge, which then leaves it
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = ["megatron_bridge.py", "--cpu"]
    import megatron_bridge as example
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.initialize import destroy_global_state

    class Record(Callback):
        def __init__(self):
            names = "losses lengths evaluated_lengths evaluated rates numbers"
            self.record = {name: [] for name in names.split()}
            self.lengths = []

        def on_train_start(self, context):
            layer = context.model[0].module.decoder.layers[1]
            layer.mlp.register_forward_hook(
                lambda module, args, output: self.lengths.append(args[0].size(0))
            )

        def on_train_step_end(self, context):
            self.record["losses"].append(float(context.loss_dict["lm loss"]))
            self.record["lengths"].append(sorted(set(self.lengths)))
            self.record["numbers"].append(len(self.lengths))
            self.record["rates"].append(context.optimizer.param_groups[0]["lr"])
            self.lengths.clear()

        def on_eval_end(self, context):
            self.record["evaluated"].append(float(context.total_loss_dict["lm loss"]))
            self.record["evaluated_lengths"] += sorted(set(self.lengths))
            self.lengths.clear()

        on_test_end = on_eval_end

    records = []
    for settings in runs:
        recipe = example.recipe(STEPS, settings.get("folder"), on_cpu=True)
        recipe.train.exit_interval = settings.get("stop")
        recipe.rerun_state_machine.rerun_mode = settings.get("rerun_mode", "disabled")
        callbacks = [Record()]
        if "min_tokens" in settings:
            config = example.RandomLTDConfig(
                min_tokens=settings["min_tokens"],
                ramp_iters=7,
                grow_micro_batch=settings.get("grow", 1),
            )
            rate = settings.get("layer_token_lr", False)
            callbacks.insert(0, example.RandomLTDCallback(config, layer_token_lr=rate))
        try:
            example.pretrain(recipe, example.forward_step, callbacks=callbacks)
        except SystemExit as exit_:  # Megatron's way to end at an exit interval
            assert not exit_.code
        records.append(callbacks[-1].record)
        destroy_global_state()
    return records


@functools.cache
def _trained(world_size: int, runs: str) -> list[list[dict]]:
    return run(world_size, _train_here, json.loads(runs))


def trained(*runs: dict, world_size: int = 1) -> list[dict]:
    """Return the records of trainings, of the first rank."""
    return _trained(world_size, json.dumps(runs))[0]


DENSE, DROPPED = {}, {"min_tokens": 32}


def test_losses_are_those_of_megatrons_own_loop():
    dense, dropped = trained(DENSE, DROPPED)
    assert dense["losses"] == pytest.approx(train(SAME).losses, rel=1e-6)
    theirs = train(SAME + LTD)
    assert theirs.kept == KEPT
    assert dropped["losses"] == pytest.approx(theirs.losses, rel=1e-6)
    assert abs(dropped["losses"][0] / dense["losses"][0] - 1) > 1e-5


def test_training_drops_and_evaluation_does_not():
    dense, dropped = trained(DENSE, DROPPED)
    assert dropped["lengths"] == [[kept] for kept in KEPT]
    assert dense["lengths"] == [[SEQ]] * STEPS
    assert dropped["numbers"] == [4] * STEPS  # micro-batches
    assert set(dropped["evaluated_lengths"]) == {SEQ}
    assert len(dropped["evaluated"]) == 4  # twice in training, and at the end, with the test set


def test_full_length_changes_nothing():
    (dense, _), (full,) = trained(DENSE, DROPPED), trained({"min_tokens": SEQ})
    assert full == dense


def test_data_parallel_ranks_keep_the_tokens_of_their_samples():
    alone = trained(DENSE, DROPPED)[1]
    (two,) = trained(DROPPED, world_size=2)
    assert two["numbers"] == [2] * STEPS
    assert two["lengths"] == alone["lengths"]
    assert two["losses"] == pytest.approx(alone["losses"], rel=1e-6)


@pytest.mark.parametrize("rate", [False, True], ids=["samples", "LayerTokens"])
def test_a_resumed_run_equals_one_in_one_go(rate, tmp_path):
    ltd = {**DROPPED, "layer_token_lr": rate}
    saved = {**ltd, "folder": str(tmp_path)}
    whole, first, rest = trained(ltd, {**saved, "stop": 5}, saved)
    for name in ("losses", "lengths", "rates"):
        assert first[name] + rest[name] == whole[name], name
        assert len(first[name]) == 5


def test_the_learning_rate_follows_layer_tokens():
    ours = trained({**DROPPED, "layer_token_lr": True})[0]
    theirs = train(f"{SAME}{LTD} --layer-token-lr --lr-decay-iters {STEPS}")
    plain = trained(DENSE, DROPPED)[1]
    assert ours["rates"][1] > plain["rates"][1]
    assert ours["losses"] == pytest.approx(theirs.losses, rel=1e-6)


@pytest.mark.parametrize(
    "name, setting",
    [("grow_micro_batch", {"grow": 2}), ("rerun_mode", {"rerun_mode": "validate_results"})],
)
def test_what_cannot_work_is_refused(name, setting):
    with pytest.raises(RankError) as error:
        trained({**DROPPED, **setting})
    assert error.value.reason.startswith("ValueError") and name in error.value.reason


def test_the_example_runs_as_its_docstring_says(tmp_path):
    command = [sys.executable, "-W", "ignore", "examples/megatron_bridge.py", "--cpu"]
    done = subprocess.run(
        [*command, "--steps", "5", "--folder", str(tmp_path)],
        cwd=ROOT,
        env={**environment(), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for step, kept in enumerate([32, 64, 96, 128, 128], 1):
        assert f"step {step}: kept tokens {kept}\n" in done.stdout
    assert "latest_train_state.pt" in os.listdir(tmp_path)
