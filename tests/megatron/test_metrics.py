"""Megatron's count of floating-point operations, with dropping, against what torch counts."""

import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_rltd.config import RandomLTDConfig
from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.patching import versions
from megatron_rltd.resolved_config import ModelFacts, resolve
from megatron_rltd.training import metrics
from megatron_rltd.training.metrics import (
    add_to_log_line,
    floating_point_operations,
    write_scalars,
)
from megatron_rltd.training.state import Training
from tests.gpt import BATCH, SEQ, VOCAB, batch, build, one_process

LAYERS = 6
EXPERTS = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    moe_layer_freq=[0, 1, 0, 1, 1, 0],
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="allgather",
    add_bias_linear=False,
)
MODELS = {
    "GPT-3": {},
    "GQA, SwiGLU, wide heads": dict(
        num_query_groups=2,
        kv_channels=8,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        ffn_hidden_size=40,
        normalization="RMSNorm",
        add_bias_linear=False,
    ),
    "MoE": EXPERTS,
    "MoE, shared expert": {**EXPERTS, "moe_shared_expert_intermediate_size": 20},
}


def arguments(config) -> types.SimpleNamespace:
    """Return what Megatron's count asks its arguments for."""
    return types.SimpleNamespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        seq_length=SEQ,
        padded_vocab_size=VOCAB,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        swiglu=config.gated_linear_unit,
        num_experts=config.num_moe_experts,
        moe_layer_freq=config.moe_layer_freq,
        moe_router_topk=config.moe_router_topk,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_latent_size=None,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        mtp_num_layers=None,
        multi_latent_attention=False,
        attention_output_gate=False,
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
        hybrid_override_pattern=None,
        is_hybrid_model=False,
        dsa_indexer_n_heads=None,
    )


def measured(model, ltd) -> dict[str, int]:
    """Return the operations of a forward and backward pass by kind of product."""
    tokens, labels, positions = batch()
    ltd.begin_step(0, 0)
    ltd.begin_micro_batch(0)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, positions, None, labels=labels).mean().backward()
    ltd.end_step()
    counts = counter.get_flop_counts()["Global"]
    return {str(operation).removeprefix("aten."): n for operation, n in counts.items()}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kept", [4, 12, SEQ])
@pytest.mark.parametrize("layers", [None, "2,5"])
def test_operations_are_those_that_are_done(options, kept, layers):
    from megatron.training.training import num_floating_point_operations as megatrons

    with one_process():
        model = build("rope", num_layers=LAYERS, **options)
        config = RandomLTDConfig(min_tokens=kept, constant=True, layers=layers, strata=1)
        ltd = RandomLTD(config).attach(model)
        done = measured(model, ltd)
        args = arguments(model.config)
    counted = floating_point_operations(megatrons, ltd.resolved, kept, args, BATCH)
    # Attention by hand: two products of [k, k] and head size, of which Megatron counts the lower
    # half and torch all; three passes.
    dropped = len(ltd.resolved.dropped_layers)
    width = model.config.kv_channels * model.config.num_attention_heads
    squares = (LAYERS - dropped) * SEQ**2 + dropped * kept**2
    attention = 3 * 2 * 2 * BATCH * squares * width
    assert done.pop("bmm") + done.pop("baddbmm") == attention
    # The router, which Megatron leaves out.
    moe = [number + 1 for number in range(LAYERS) if options and is_moe(options, number)]
    rows = sum(kept if number in ltd.resolved.dropped_layers else SEQ for number in moe)
    router = 3 * 2 * BATCH * rows * model.config.hidden_size * (options.get("num_moe_experts") or 0)
    assert set(done) <= {"mm", "addmm"}
    assert counted == sum(done.values()) - router + attention / 2


def is_moe(options: dict, number: int) -> bool:
    return bool(options.get("num_moe_experts")) and bool(options["moe_layer_freq"][number])


def test_packed_sums_are_scaled():
    if versions.release() < (0, 18):
        pytest.skip("Megatron 0.17 does not count packed documents apart")
    from megatron.training.training import num_floating_point_operations as megatrons

    with one_process():
        args = arguments(build("rope", num_layers=LAYERS).config)
    config = RandomLTDConfig(min_tokens=8, constant=True)
    resolved = resolve(config, ModelFacts(seq_length=SEQ, num_layers=LAYERS))
    # Whole documents of the sequence length are what is not packed.
    sums = dict(
        seqlen_squared_sum_in_batch=float(BATCH * SEQ**2), total_real_tokens_in_batch=BATCH * SEQ
    )
    packed = floating_point_operations(megatrons, resolved, 8, args, BATCH, **sums)
    assert packed == floating_point_operations(megatrons, resolved, 8, args, BATCH)
    shorter = {**sums, "seqlen_squared_sum_in_batch": float(BATCH * SEQ**2) / 2}
    less = floating_point_operations(megatrons, resolved, 8, args, BATCH, **shorter)
    core = 3 * 2 * BATCH * 16 * (2 * SEQ**2 + 4 * 8**2)
    assert packed - less == core / 2


def test_weights_and_biases_get_what_tensorboard_gets(monkeypatch):
    import megatron.training
    from megatron.training import global_vars

    scalars, logged = [], []
    writer = types.SimpleNamespace(add_scalar=lambda *call: scalars.append(call))
    wandb = types.SimpleNamespace(log=lambda *call: logged.append(call))
    args = types.SimpleNamespace(tensorboard_log_interval=5)
    monkeypatch.setattr(megatron.training, "get_args", lambda: args)
    monkeypatch.setattr(megatron.training, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(global_vars, "get_wandb_writer", lambda: wandb)
    write_scalars({"lm loss": 2.0}, 1e-3, 9, 640, 0.5)
    assert scalars == logged == []
    write_scalars({"lm loss": 2.0}, 1e-3, 10, 640, 0.5)
    assert logged == [
        ({"random-ltd layer tokens": 640}, 10),
        ({"random-ltd share of dense": 0.5}, 10),
    ]
    assert scalars[2:] == [
        ("learning-rate vs layer tokens", 1e-3, 640),
        ("lm loss vs layer tokens", 2.0, 640),
    ]
    write_scalars({}, None, 15, 700, 0.5)  # a rank that knows no loss and has no optimizer
    assert [name for name, *_ in scalars[4:]] == list(logged[0][0]) + list(logged[1][0])


def test_the_log_gets_the_mean_of_its_steps(monkeypatch):
    """Megatron's log line is about the steps since its last line, the skipped ones included."""
    import megatron.training

    from megatron_rltd.training import checkpoint

    args = types.SimpleNamespace()
    checkpoint.set_consumed(args, 3, 4)
    monkeypatch.setattr(megatron.training, "get_args", lambda: args)
    monkeypatch.setattr(metrics, "write_scalars", lambda *_: None)
    # A step's operations, as Megatron counts them after each step.
    monkeypatch.setattr(metrics, "floating_point_operations", lambda *call: call[-1])
    training = Training()
    facts = types.SimpleNamespace(model=types.SimpleNamespace(seq_length=SEQ))
    training.random_ltd = types.SimpleNamespace(resolved=facts)
    logged = []

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, skipped_iter):
        logged.append(training.num_floating_point_operations(None, args, 0.0))

    def step(operations, advanced, skipped, is_skipped=0):
        sums = {"advanced iterations": advanced, "skipped iterations": skipped}
        assert training.num_floating_point_operations(None, args, operations) == operations
        training.training_log(training_log, {}, sums, 1e-3, 5, is_skipped)

    step(1.0, 0, 0)
    step(2.0, 1, 0)
    step(6.0, 2, 0)
    step(3.0, 0, 0)  # the first after a line that reset the sums
    step(9.0, 1, 0, is_skipped=1)
    step(6.0, 1, 1)
    assert logged == [1.0, 1.5, 3.0, 3.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("before", "skipped", "steps"), [(0, 0, 1), (2, 0, 3), (2, 1, 2), (0, 1, 1)]
)
def test_the_log_line_has_values_and_no_means(before, skipped, steps):
    losses = {"advanced iterations": before} if before else {}
    add_to_log_line(losses, skipped, 640, 0.5)
    # Megatron adds the step and divides by the steps that were not skipped.
    assert losses["random-ltd layer tokens"].item() / steps == 640
    assert losses["random-ltd share of dense"].item() / steps == 0.5
