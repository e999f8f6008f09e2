"""Multi-latent attention in dropped layers: the kept tokens rotate by their true positions."""

import pytest
import torch

from megatron_rltd.patching import versions
from tests import gpt, hybrid
from tests.megatron.test_random_ltd import assert_equal_results, attached, expected_kept, results
from tests.megatron.test_random_ltd import step as begin_step

LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "rope_type": "rope",
    "q_lora_rank": None,
    # The angles decide more with a small base.
    "rotary_base": 20,
}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 8, "rotary_scaling_factor": 4.0}
RECOMPUTE = {"recompute_granularity": "full", "recompute_num_layers": 1}
CASES = {
    "rope": {},
    "yarn": YARN,
    "query compression": {"q_lora_rank": 10, "qk_layernorm": True},
    "yarn, query compression": {**YARN, "q_lora_rank": 10},
    "recompute": {**YARN, **RECOMPUTE, "recompute_method": "uniform"},
    "recompute in groups": {
        **RECOMPUTE,
        "recompute_method": "uniform",
        "recompute_num_layers": 4,
    },
    "recompute the projections": {
        "recompute_granularity": "selective",
        "recompute_modules": ["mla_up_proj", "core_attn"],
        "q_lora_rank": 10,
    },
}


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def plain_loss(model, kept):
    """Return the loss if each dropped layer sees all tokens, but attends only to the kept ones.

    Its output for the kept tokens is then that of the layer on these alone, at their positions.
    """
    tokens, labels, positions = gpt.batch()
    hidden = model.embedding(input_ids=tokens, position_ids=positions)
    causal = torch.ones(gpt.SEQ, gpt.SEQ).triu(1).bool()
    for layer in model.decoder.layers:
        is_kept = torch.ones(gpt.BATCH, gpt.SEQ, dtype=torch.bool)
        if layer.layer_number in kept:
            is_kept = torch.zeros_like(is_kept).scatter(1, kept[layer.layer_number].long(), True)
        mask = causal | ~is_kept[:, None, None, :]
        mask[:, :, torch.arange(gpt.SEQ), torch.arange(gpt.SEQ)] = False
        out, _ = type(layer).forward(layer, hidden_states=hidden, attention_mask=mask)
        hidden = torch.where(is_kept.t()[:, :, None], out, hidden)
    if hasattr(model.decoder, "final_layernorm"):
        hidden = model.decoder.final_layernorm(hidden)
    logits, _ = model.output_layer(hidden)
    return gpt.cross_entropy(logits.transpose(0, 1), labels)


def assert_drops_right(model, kept, **options):
    plain = results(model, plain_loss(model, kept))
    random_ltd = attached(model, **options)
    begin_step(random_ltd)
    assert_equal_results(results(model, gpt.loss_of(model)), plain)
    # At positions 0, 1, 2, ... the loss would be another one.
    renumbered = {n: torch.arange(8).expand(gpt.BATCH, -1) for n in kept}
    assert abs(plain["loss"] - plain_loss(model, renumbered).detach()) > 1e-6
    # Afterwards, and outside of dropped layers, positions are Megatron's.
    random_ltd.end_step()
    full = gpt.loss_of(model).detach()
    torch.testing.assert_close(full, plain_loss(model, {}).detach(), rtol=1e-12, atol=0)
    assert all(
        "forward" not in vars(module)
        for layer in model.decoder.layers
        for module in layer.modules()
        if "Rotary" in type(module).__name__
    )


@pytest.mark.parametrize("name", CASES)
def test_a_gpt_model_keeps_the_true_positions(name):
    model = gpt.build(rotary="rope", **LATENT | CASES[name])
    assert_drops_right(model, expected_kept([2, 3, 4, 5]))


@pytest.mark.skipif(versions.release() < (0, 19), reason="no latent attention in HybridModel")
@pytest.mark.parametrize("name", ["rope", "yarn, query compression", "recompute"])
def test_a_hybrid_model_keeps_the_true_positions(name):
    model = hybrid.build("+-+-+-+-", **LATENT | CASES[name])
    drawn = expected_kept([2, 3])
    assert_drops_right(model, {3: drawn[2], 4: drawn[2], 5: drawn[3], 6: drawn[3]})


def test_samples_may_share_their_positions():
    model = gpt.build(rotary="rope", **LATENT)
    first = expected_kept([2, 3, 4, 5])
    shared = {n: rows[:1].expand(gpt.BATCH, -1) for n, rows in first.items()}
    assert_drops_right(model, shared, shared_indices=True)


def test_an_error_in_a_layer_leaves_no_positions_behind():
    model = gpt.build(rotary="rope", **LATENT)
    begin_step(attached(model))
    attention = model.decoder.layers[2].self_attention
    attention.core_attention.register_forward_pre_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.loss_of(model)
    assert "forward" not in vars(attention.rotary_pos_emb)
