import pytest
import torch

from megatron_rltd import ConfigError, RandomLTD, RandomLTDConfig, kept_indices
from tests import gpt

KEPT, SEED, CONSUMED = 8, 7, 1000


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def attached(model, **options):
    config = RandomLTDConfig(
        **{"min_tokens": KEPT, "constant": True, "increment": 1, "seed": SEED, **options}
    )
    return RandomLTD(config).attach(model)


def expected_kept(layers, strata=1, kept=KEPT, micro_batch=0):
    samples = CONSUMED + micro_batch * gpt.BATCH + torch.arange(gpt.BATCH)
    drawn = kept_indices(SEED, torch.tensor(layers), samples, gpt.SEQ, kept, strata)
    return dict(zip(layers, drawn, strict=True))


def step(random_ltd, micro_batch=0, iteration=0):
    random_ltd.begin_step(iteration, CONSUMED)
    random_ltd.begin_micro_batch(micro_batch)


def results(model, loss):
    """Return the loss and all gradients."""
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in named if p.grad is not None}}


def assert_equal_results(ours, plain, exact=False):
    assert ours.keys() == plain.keys()
    assert len(ours) > 20
    for name, value in plain.items():
        # An expert that no token chose has no gradient.
        assert value.abs().max() > 0 or exact or "experts" in name, name
        tolerance = 0 if exact else 1e-12
        scale = value.abs().max().clamp(min=1e-30)
        assert (ours[name] - value).abs().max() <= tolerance * scale, name


MODELS = {
    "learned": {},
    "rope": {"rotary": "rope"},
    "rope half": {"rotary": "rope", "rotary_percent": 0.5},
    "rope interleaved": {"rotary": "rope", "rotary_interleaved": True},
    "llama": {
        "rotary": "rope",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "num_query_groups": 2,
        "add_bias_linear": False,
    },
    "moe": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "add_bias_linear": False,
    },
    "full recompute": {
        "rotary": "rope",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute in groups": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 4,
    },
    "recompute some layers": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 3,
    },
    "recompute modules": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_plain_loops(name, masked):
    model = gpt.build(**MODELS[name])
    mask = gpt.document_mask() if masked else None
    plain = results(model, gpt.plain_loss(model, expected_kept([2, 3, 4, 5]), mask))
    random_ltd = attached(model)
    step(random_ltd)
    assert_equal_results(results(model, gpt.loss_of(model, mask)), plain)
    full = results(model, gpt.plain_loss(model, {}, mask))
    assert abs(full["loss"] - plain["loss"]) > 1e-4, "dropping changed nothing"


@pytest.mark.parametrize(
    ("layers", "dropped"),
    [("1-6", [1, 2, 3, 4, 5, 6]), ("2,4-5", [2, 4, 5]), ("3", [3]), ("1,6", [1, 6])],
)
def test_any_choice_of_layers(layers, dropped):
    model = gpt.build(rotary="rope")
    plain = results(model, gpt.plain_loss(model, expected_kept(dropped)))
    step(attached(model, layers=layers))
    assert_equal_results(results(model, gpt.loss_of(model)), plain)


def test_strata():
    model = gpt.build()
    kept = expected_kept([2, 3, 4, 5], strata=4)
    assert all(
        (rows.view(3, 4, 2) // 4 == torch.arange(4)[:, None]).all() for rows in kept.values()
    )
    plain = results(model, gpt.plain_loss(model, kept))
    step(attached(model, strata=4, increment=4))
    assert_equal_results(results(model, gpt.loss_of(model)), plain)


def test_shared_indices():
    model = gpt.build(rotary="rope")
    one = kept_indices(SEED, torch.arange(2, 6), torch.tensor([CONSUMED]), gpt.SEQ, KEPT)
    kept = {n: one[i].expand(gpt.BATCH, -1) for i, n in enumerate(range(2, 6))}
    plain = results(model, gpt.plain_loss(model, kept, gpt.document_mask()))
    step(attached(model, shared_indices=True))
    assert_equal_results(results(model, gpt.loss_of(model, gpt.document_mask())), plain)


def test_kept_length_follows_the_schedule():
    model = gpt.build()
    random_ltd = attached(model, constant=False, min_tokens=4, ramp_iters=6, increment=2)
    for iteration, kept in enumerate((4, 6, 8, 10, 12, 14, 16)):
        step(random_ltd, iteration=iteration)
        assert random_ltd.step.kept_tokens == kept
        expected = {} if kept == gpt.SEQ else expected_kept([2, 3, 4, 5], kept=kept)
        plain = gpt.plain_loss(model, expected)
        torch.testing.assert_close(gpt.loss_of(model), plain, rtol=1e-12, atol=0)


def test_full_length_is_bit_identical_to_megatron():
    model = gpt.build(rotary="rope")
    untouched = results(model, gpt.loss_of(model))
    step(attached(model, min_tokens=gpt.SEQ))
    assert_equal_results(results(model, gpt.loss_of(model)), untouched, exact=True)


def test_evaluation_and_everything_outside_a_step_is_full_length():
    model = gpt.build()
    untouched = gpt.loss_of(model)
    random_ltd = attached(model)
    assert torch.equal(gpt.loss_of(model), untouched)
    step(random_ltd)
    assert not torch.equal(gpt.loss_of(model), untouched)
    model.eval()
    assert torch.equal(gpt.loss_of(model), untouched)
    model.train()
    random_ltd.end_step()
    assert torch.equal(gpt.loss_of(model), untouched)


def test_detach_gives_the_model_back():
    model = gpt.build()
    keys, forward = list(model.state_dict()), type(model.decoder).forward
    modules = [name for name, _ in model.named_modules()]
    random_ltd = attached(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    step(random_ltd)
    random_ltd.detach()
    untouched = gpt.loss_of(model)
    assert model.decoder.forward.__func__ is forward
    assert "forward" not in vars(model.decoder.layers[0])
    assert torch.equal(untouched, gpt.plain_loss(model, {})) or torch.allclose(
        untouched, gpt.plain_loss(model, {}), rtol=1e-12
    )
    attached(model)


def test_another_model_is_resolved_anew():
    random_ltd = attached(gpt.build())
    assert random_ltd.resolved.dropped_layers == (2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="already attached"):
        random_ltd.attach(gpt.build(num_layers=4))
    random_ltd.detach()
    random_ltd.attach(gpt.build(num_layers=4), seq_length=12)
    assert random_ltd.resolved.dropped_layers == (2, 3)
    assert random_ltd.resolved.model.seq_length == 12


def test_fp8_needs_whole_rows_of_the_attached_model():
    model = gpt.build()
    model.decoder.config.fp8 = "e4m3"
    with pytest.raises(ConfigError, match="must be a multiple of 16: FP8 needs"):
        attached(model, min_tokens=8)
    config = RandomLTDConfig(min_tokens=8, constant=True, increment=1)
    ltd = RandomLTD(config).attach(model, micro_batch_size=2)
    assert ltd.resolved.model.row_multiple == 16


def test_each_micro_batch_and_sample_keeps_its_own_tokens():
    model = gpt.build()
    random_ltd = attached(model)
    random_ltd.begin_step(0, CONSUMED)
    for micro_batch in range(3):
        # As Megatron's schedules do for a GPTModel.
        for layer in model.decoder.layers:
            layer.current_microbatch = micro_batch
        kept = expected_kept([2, 3, 4, 5], micro_batch=micro_batch)
        plain = gpt.plain_loss(model, kept)
        torch.testing.assert_close(gpt.loss_of(model), plain, rtol=1e-12, atol=0)


def test_recomputation_sees_the_tokens_of_its_own_forward():
    # As in 1F1B: several micro-batches are forwarded before the first is backwarded.
    plain_model = gpt.build(rotary="rope")
    model = gpt.build(**MODELS["full recompute"])
    plain = [
        gpt.plain_loss(plain_model, expected_kept([2, 3, 4, 5], micro_batch=m)) for m in range(3)
    ]
    expected = results(plain_model, plain[0] + 2 * plain[1] + 3 * plain[2])
    random_ltd = attached(model)
    random_ltd.begin_step(0, CONSUMED)
    losses = []
    for micro_batch in range(3):
        random_ltd.begin_micro_batch(micro_batch)
        losses.append(gpt.loss_of(model))
    random_ltd.end_step()
    assert_equal_results(results(model, losses[0] + 2 * losses[1] + 3 * losses[2]), expected)


def saved_rows(model):
    """Return how many rows of the hidden size are saved for backward."""
    saved = []

    def pack(tensor):
        if tensor.dim() == 3 and tensor.size(-1) == 16 and tensor.size(1) == gpt.BATCH:
            saved.append((tensor.data_ptr(), tensor.size(0)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt.loss_of(model)
    return sum(rows for _, rows in set(saved))


def test_recomputation_stores_kept_rows_only():
    model = gpt.build(**MODELS["full recompute"])
    random_ltd = attached(model, min_tokens=4)
    dense = saved_rows(model)
    step(random_ltd)
    # Two full layers store s rows, four dropped ones k instead of s.
    assert dense - saved_rows(model) == 4 * (gpt.SEQ - 4)
    assert model.config.recompute_granularity == "full"


def saved_bytes(model, mask):
    """Return the bytes of what is saved for backward."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt.loss_of(model, mask)
    return sum(size for size, _ in saved.values())


def test_recomputation_stores_no_masks_and_angles_of_kept_tokens():
    # All but one token: what is stored beside the hidden states shows most.
    model = gpt.build(**MODELS["full recompute"])
    mask = gpt.document_mask()
    random_ltd = attached(model, min_tokens=gpt.SEQ - 1)
    dense = saved_bytes(model, mask)
    step(random_ltd)
    assert saved_bytes(model, mask) < dense


def test_recomputation_in_groups_is_kept_where_it_stores_less():
    model = gpt.build(**{**MODELS["recompute in groups"], "recompute_num_layers": 6})
    random_ltd = attached(model)
    dense = saved_rows(model)
    step(random_ltd)
    assert saved_rows(model) == dense


def test_observers_see_real_hidden_states():
    model = gpt.build()
    kept = expected_kept([2, 3, 4, 5])
    plain = results(model, gpt.plain_loss(model, kept))
    weights = model.state_dict()
    step(attached(model))
    seen = {}

    def remember(name):
        return lambda module, args, kwargs, output: seen.update(
            {name: (kwargs["hidden_states"].clone(), output[0].clone())}
        )

    for number in (3, 4):
        layer = model.decoder.layers[number - 1]
        layer.register_forward_hook(remember(number), with_kwargs=True)
    assert_equal_results(results(model, gpt.loss_of(model)), plain)
    torch.testing.assert_close(seen[3][1], seen[4][0], rtol=0, atol=0)
    # What layer 3 left: the plain model's hidden states after it.
    short = gpt.build(num_layers=3)
    short.load_state_dict(weights, strict=False)
    with torch.no_grad():
        hidden = hidden_after(short, kept)
    torch.testing.assert_close(seen[3][1], hidden, rtol=1e-12, atol=1e-12)


def hidden_after(model, kept):
    final = []
    model.decoder.final_layernorm.register_forward_pre_hook(
        lambda module, args: final.append(args[0].clone())
    )
    gpt.plain_loss(model, kept)
    return final[0]


def test_extracted_layers_are_real():
    model = gpt.build()
    random_ltd = attached(model)
    tokens, _, positions = gpt.batch()
    hidden = model.embedding(input_ids=tokens, position_ids=positions)
    step(random_ltd)
    final, extracted = model.decoder(
        hidden_states=hidden, attention_mask=None, extract_layer_indices={2, 3}
    )
    alone = model.decoder(hidden_states=hidden, attention_mask=None)
    torch.testing.assert_close(final, alone, rtol=0, atol=0)
    kept = expected_kept([2, 3, 4, 5])
    for number, rows in ((3, extracted[0]), (4, extracted[1])):
        short = gpt.build(num_layers=number)
        short.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(rows, hidden_after(short, kept), rtol=1e-12, atol=1e-12)


def test_missing_micro_batch_is_an_error():
    model = gpt.build()
    attached(model).begin_step(0, 0)
    with pytest.raises(RuntimeError, match="begin_micro_batch"):
        gpt.loss_of(model)


def test_micro_batch_of_an_earlier_step_is_not_used():
    model = gpt.build()
    random_ltd = attached(model)
    for layer in model.decoder.layers:
        layer.current_microbatch = 5  # what Megatron's schedule left after an evaluation
    random_ltd.begin_step(0, 0)
    with pytest.raises(RuntimeError, match="begin_micro_batch"):
        gpt.loss_of(model)


def test_a_forward_replaced_later_sees_real_hidden_states():
    model = gpt.build()
    plain = results(model, gpt.plain_loss(model, expected_kept([2, 3, 4, 5])))
    step(attached(model))
    layer, seen = model.decoder.layers[2], []
    inner = layer.forward

    def profiled(**kwargs):
        seen.append(kwargs["hidden_states"])
        return inner(**kwargs)

    layer.forward = profiled
    model.decoder.layers[1].register_forward_hook(lambda *call: seen.append(call[2][0]))
    assert_equal_results(results(model, gpt.loss_of(model)), plain)
    assert seen[0] is seen[1]


def test_wrong_sequence_length_is_an_error():
    model = gpt.build()
    random_ltd = attached(model)
    step(random_ltd)
    tokens = torch.zeros(2, 12).long()
    with pytest.raises(RuntimeError, match=r"12 rows .* 16 gives 16 .* attach\(seq_length"):
        model(tokens, torch.arange(12).expand(2, -1), None, labels=tokens)


def test_what_a_dropped_layer_cannot_take_is_an_error():
    model = gpt.build()
    random_ltd = attached(model)
    step(random_ltd)
    hidden = torch.randn(gpt.SEQ, gpt.BATCH, 16).double()
    for name, what in (
        ("attention_bias", "an attention bias"),
        ("context", "cross-attention"),
        ("rotary_pos_cos", "rotary tables for inference"),
    ):
        with pytest.raises(RuntimeError, match=f"cannot run with {what}.*{name}"):
            model.decoder(hidden_states=hidden, attention_mask=None, **{name: hidden})


def test_attaching_twice_or_to_nothing_is_an_error():
    model = gpt.build()
    attached(model)
    with pytest.raises(RuntimeError, match="already attached"):
        attached(model)
    with pytest.raises(RuntimeError, match="no GPTModel, HybridModel .* or BertModel"):
        attached(torch.nn.Linear(2, 2))


def test_a_config_that_does_not_fit_the_model_is_an_error():
    with pytest.raises(ConfigError, match="--random-ltd-min-tokens 32 must be between 1 and"):
        attached(gpt.build(), min_tokens=32)
    model = gpt.build()
    model.decoder.config.tp_comm_overlap = True
    with pytest.raises(ConfigError, match="--tp-comm-overlap"):
        attached(model)


def test_layers_that_are_not_transformer_layers_are_an_error():
    model = gpt.build()
    layer = torch.nn.Identity()
    layer.layer_number = 3
    model.decoder.layers[2] = layer
    with pytest.raises(RuntimeError, match="layer 3 is a Identity"):
        attached(model)


def test_multi_token_prediction_layers_never_drop():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import TransformerLayer

    config = gpt.config(num_layers=4, mtp_num_layers=2)
    spec = get_gpt_layer_local_spec()
    model = GPTModel(
        config,
        spec,
        vocab_size=gpt.VOCAB,
        max_sequence_length=gpt.SEQ,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    ).train()
    rows = []

    def remember(layer, args, kwargs, output):
        rows.append((layer.layer_number, output[0].size(0)))

    step(attached(model))
    for module in (model.decoder.layers[1].mlp, model.decoder.layers[3].mlp):
        module.register_forward_hook(lambda mlp, args, output: rows.append(args[0].size(0)))
    predictions = [m for m in model.mtp.modules() if isinstance(m, TransformerLayer)]
    for layer in predictions:
        layer.register_forward_hook(remember, with_kwargs=True)
    tokens, labels, positions = gpt.batch()
    model(tokens, positions, None, labels=labels).mean().backward()
    # Numbered 1 and 2 as layers of the decoder are, of which the second drops.
    assert rows == [KEPT, gpt.SEQ, (1, gpt.SEQ), (2, gpt.SEQ)]


def test_preflight_forgets_buffers_and_random_numbers():
    from types import SimpleNamespace

    from megatron_rltd.training.preflight import _forgotten

    chunk = torch.nn.BatchNorm1d(2)  # has running statistics, as routers do
    config = SimpleNamespace(finalize_model_grads_func=len)
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    state, statistics = torch.get_rng_state(), chunk.running_mean.clone()
    with _forgotten([chunk], optimizer, config):
        chunk(torch.randn(8, 2))
        assert not torch.equal(chunk.running_mean, statistics)
        assert config.finalize_model_grads_func is not len
    assert torch.equal(chunk.running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.finalize_model_grads_func is len
