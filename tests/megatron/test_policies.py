"""Policies on models: against plain loops in float64, and through Megatron's loop on layouts."""

import pytest
import torch

from megatron_rltd import ConfigError
from megatron_rltd.tokens import reference
from megatron_rltd.tokens.policies import Balanced, Draw, TokenBypass
from tests import gpt
from tests.megatron.test_random_ltd import (
    CONSUMED,
    KEPT,
    SEED,
    assert_equal_results,
    attached,
    results,
    step,
)
from tests.megatron.test_training import BASE, assert_same
from tests.parallel import RankError, train

BYPASS = {"policy": "token-bypass"}


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def test_balanced_equals_plain_loops():
    samples = CONSUMED + torch.arange(gpt.BATCH)
    layers = torch.arange(2, 6)
    draw = Draw(SEED, layers, tuple(range(4)), samples, gpt.SEQ, KEPT)
    kept = dict(zip(layers.tolist(), Balanced().choose(reference, draw), strict=True))
    model = gpt.build(rotary="rope")
    plain = results(model, gpt.plain_loss(model, kept))
    step(attached(model, policy="balanced"))
    assert_equal_results(results(model, gpt.loss_of(model)), plain)


def most_important(importance, tokens):
    """Return the kept positions [b, k] by plain Python."""
    ranked = [sorted(range(gpt.SEQ), key=lambda i: (-importance[own[i]], i)) for own in tokens]
    return torch.tensor([sorted(of_sample[:KEPT]) for of_sample in ranked])


def plain_bypass(layers, hidden, kept, crossed, mask=None, rotary=None):
    """Return the hidden states after all layers, by plain loops over samples.

    All layers run on all tokens until `crossed`, which changes only kept ones. All after it but the
    last run on kept tokens.
    """
    before = gpt.plain_layers(layers[: crossed - 1], hidden, {}, mask, rotary)
    after = gpt.plain_layers(layers[crossed - 1 : crossed], before, {}, mask, rotary)
    rows = torch.zeros(gpt.SEQ, gpt.BATCH, dtype=torch.bool)
    for sample, positions in enumerate(kept):
        rows[positions, sample] = True
    hidden = torch.where(rows[..., None], after, before)
    dropped = dict.fromkeys(range(crossed + 1, len(layers)), kept)
    return gpt.plain_layers(layers[crossed:], hidden, dropped, mask, rotary)


def loss_of_hidden(hidden):
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8)).double()
    return (hidden * weights).sum()


def run_and_catch(model, block, *args, **kwargs):
    """Return what a model returns, and the hidden states after its layers."""
    seen = []
    hook = block.final_layernorm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output = model(*args, **kwargs)
    hook.remove()
    return output, seen[0]


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.mark.parametrize(
    ("options", "crossed", "layers"),
    [
        ({}, 3, None),
        ({"rotary": "rope"}, 1, "2-5"),
        ({**RECOMPUTE, "recompute_num_layers": 1}, 3, None),
        ({**RECOMPUTE, "recompute_num_layers": 3}, 2, "3-5"),
    ],
)
def test_token_bypass_equals_plain_loops(options, crossed, layers):
    model = gpt.build(**options)
    tokens, labels, positions = gpt.batch()
    importance = [TokenBypass.INITIAL] * gpt.VOCAB
    importance[4] = TokenBypass.ALWAYS
    bypass = attached(model, **BYPASS, layers=layers, always_kept=[4])
    counted = torch.rand(labels.shape, generator=torch.Generator().manual_seed(9)) > 0.4
    rotary = model.rotary_pos_emb(gpt.SEQ) if options.get("rotary") else None
    for iteration in range(3):
        kept = most_important(importance, tokens.tolist())
        hidden = model.embedding(input_ids=tokens, position_ids=positions)
        plain = plain_bypass(model.decoder.layers, hidden, kept, crossed, rotary=rotary)
        expected = results(model, loss_of_hidden(plain))
        step(bypass, iteration=iteration)
        losses, ours = run_and_catch(
            model, model.decoder, tokens, positions, None, labels=labels, loss_mask=counted.float()
        )
        assert_equal_results(results(model, loss_of_hidden(ours)), expected, exact=False)
        bypass.end_step()
        # Evaluation teaches nothing and drops nothing.
        model.eval()
        model(tokens, positions, None, labels=labels)
        model.train()
        for token in range(gpt.VOCAB):
            own = losses[(labels == token) & counted]
            if own.numel() and token != 4:
                old = importance[token]
                importance[token] = 0.995 * old + 0.005 * own.mean().item()
        labels = labels.roll(1, dims=1)
    assert not torch.equal(kept, most_important([1.0] * gpt.VOCAB, tokens.tolist()))


def bert():
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.models.bert.bert_model import BertModel

    model = BertModel(
        gpt.config(num_layers=4),
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_specs.bert_layer_local_spec,
        vocab_size=gpt.VOCAB,
        max_sequence_length=gpt.SEQ,
        add_binary_head=False,
    ).double()
    return gpt.with_random_weights(model)


def test_token_bypass_on_bert_learns_from_masked_tokens_only():
    model = bert()
    tokens, labels, _ = gpt.batch()
    padding = torch.ones(gpt.BATCH, gpt.SEQ)
    padding[0, 12:] = padding[1, 9:] = 0
    tokens = torch.where(padding.bool(), tokens, 0)
    masked = torch.where((torch.arange(gpt.SEQ) % 3 == 1) & padding.bool(), labels, -1)
    bypass = attached(model, **BYPASS, always_kept=[4], padding=[0])
    importance = [10.0] * gpt.VOCAB
    importance[4], importance[0] = 1e4, -1e4
    for iteration in range(2):
        kept = most_important(importance, tokens.tolist())
        hidden = model.embedding(input_ids=tokens, position_ids=model.bert_position_ids(tokens))
        mask = model.bert_extended_attention_mask(padding)
        plain = plain_bypass(model.encoder.layers, hidden, kept, 2, mask)
        step(bypass, iteration=iteration)
        (losses, _), ours = run_and_catch(model, model.encoder, tokens, padding, lm_labels=masked)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        bypass.end_step()
        for token in set(masked.flatten().tolist()) - {-1, 0, 4}:
            own = losses[masked == token].mean().item()
            importance[token] = 0.995 * importance[token] + 0.005 * own
    assert len(set(importance)) > 5


def test_a_step_that_does_not_end_teaches_nothing():
    model = gpt.build()
    tokens, labels, positions = gpt.batch()
    bypass = attached(model, **BYPASS)
    start = bypass.policy_state()
    step(bypass)
    model(tokens, positions, None, labels=labels)
    bypass.abandon_step()
    step(bypass)
    bypass.end_step()
    assert bypass.policy_state() == start


def test_state_outlives_the_attachment():
    model = gpt.build()
    tokens, labels, positions = gpt.batch()
    bypass = attached(model, **BYPASS)
    fresh = bypass.policy_state()
    step(bypass)
    model(tokens, positions, None, labels=labels)
    bypass.end_step()
    state = bypass.policy_state()
    assert state != fresh
    bypass.detach()
    assert "forward" not in vars(model)
    assert bypass.attach(model).policy_state() == state


def test_what_token_bypass_cannot_see_is_an_error():
    model = gpt.build()
    tokens, _, positions = gpt.batch()
    step(attached(model, **BYPASS))
    with pytest.raises(RuntimeError, match="needs input_ids and labels"):
        model(tokens, positions, None)
    stage = gpt.build()
    stage.post_process = False
    with pytest.raises(ConfigError, match="token-bypass needs a GPTModel or BertModel"):
        attached(stage, **BYPASS)


LTD = (
    "--random-ltd --random-ltd-policy token-bypass --random-ltd-constant --random-ltd-min-tokens 24"
)


@pytest.fixture(scope="module")
def alone():
    return train(f"{BASE} {LTD}")


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        (1, "--random-ltd-grow-micro-batch 4 --random-ltd-preflight"),
    ],
)
def test_layouts_train_on_the_same_tokens(alone, ranks, flags):
    ours = train(f"{BASE} {LTD} {flags}", ranks)
    assert_same(ours, alone, 1e-6)
    assert ours.layer_tokens == alone.layer_tokens == 6 * 8 * (3 * 64 + 24)


def test_resume(tmp_path, alone):
    saved = f"{BASE} {LTD} --save {tmp_path} --load {tmp_path} --save-interval 3"
    first = train(f"{saved} --exit-interval 3")
    second = train(saved)
    assert first.losses + second.losses == alone.losses
    assert second.validation == alone.validation
    forgetful = train(f"{saved} --random-ltd-policy random --override-opt-param-scheduler")
    assert "the command line overrides --random-ltd-policy random" in forgetful.output


def test_a_refusal_comes_before_any_training():
    with pytest.raises(RankError, match="token-bypass with --pipeline-model-parallel-size needs"):
        train(f"{BASE} {LTD} --pipeline-model-parallel-size 2", 2)
