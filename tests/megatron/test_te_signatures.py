"""What random-LTD passes on to Transformer Engine, held against the signatures of a real one.

tests/golden/transformer_engine.json was made where Transformer Engine is installed;
tests/megatron/test_transformer_engine.py runs there.
"""

import dataclasses
import functools
import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_rltd import RandomLTD, RandomLTDConfig
from megatron_rltd.model.layer import fused_rotary
from megatron_rltd.model.packed import kept_packed_seq_params
from tests import gpt
from tests.megatron.te_signatures import ATTENTION, CHECKPOINT, ROTARY, TE_ATTENTION, signature
from tests.megatron.test_packed import T, kept_positions, packed

KEPT = 8


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def attached(model):
    config = RandomLTDConfig(min_tokens=KEPT, constant=True, increment=1)
    random_ltd = RandomLTD(config).attach(model)
    random_ltd.begin_step(0, 0)
    random_ltd.begin_micro_batch(0)
    return model


def test_fused_rope(monkeypatch):
    """The kernel reads angles by row, and as if they were contiguous whether or not they are."""
    from megatron.core.models.common.embeddings import rope_utils

    def kernel(*args, **kwargs):
        call = signature(ROTARY).bind(*args, **kwargs).arguments
        t, freqs = call["t"], call["freqs"]
        assert t.dim() == freqs.dim() == 4
        assert freqs.size(1) == freqs.size(2) == 1
        assert t.size(0) <= freqs.size(0) and freqs.size(3) <= t.size(3)
        assert freqs.is_contiguous() and freqs.dtype == torch.float32
        assert call["interleaved"] is False
        called.append((t.shape, t.data_ptr()))
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs[: t.size(0)])

    fused = functools.partial(fused_rotary, kernel)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    for groups in (None, 2):
        model = attached(gpt.build("rope", num_query_groups=groups))
        expected = gpt.loss_of(model)
        model.config.apply_rope_fusion = True
        queries = []
        for layer in model.decoder.layers:
            _keep_queries(monkeypatch, layer.self_attention, queries)
        called: list[tuple[torch.Size, int]] = []
        assert torch.equal(gpt.loss_of(model), expected)
        assert len(called) == 2 * len(queries) == 2 * len(model.decoder.layers)
        for (shape, place), query in zip(called[::2], queries, strict=True):
            rows, batch, heads, width = query.shape
            dropped = rows == KEPT
            assert shape == ((rows * batch, 1, heads, width) if dropped else query.shape)
            assert place == query.data_ptr(), "queries were copied"


def _keep_queries(monkeypatch, attention, queries):
    original = attention.get_query_key_value_tensors

    def recorded(*args, **kwargs):
        made = original(*args, **kwargs)
        queries.append(made[0])
        return made

    monkeypatch.setattr(attention, "get_query_key_value_tensors", recorded)


def test_attention():
    model = attached(gpt.build())
    calls = []

    def called(module, args, kwargs):
        calls.append(signature(ATTENTION).bind(module, *args, **kwargs).arguments)

    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(called, with_kwargs=True)
    gpt.loss_of(model, gpt.document_mask())
    lengths = [gpt.SEQ, KEPT, KEPT, KEPT, KEPT, gpt.SEQ]
    assert [call["query"].size(0) for call in calls] == lengths
    for call, length in zip(calls, lengths, strict=True):
        assert call["attention_mask"].shape == (gpt.BATCH, 1, length, length)


# What Megatron's TEDotProductAttention keeps to itself.
NOT_PASSED_ON = {"cp_group", "local_cp_size", "total_tokens", "seq_idx", "tokens_per_sample"}


@pytest.mark.parametrize("padded", [False, True])
def test_attention_on_packed_sequences(padded):
    params = packed()
    if padded:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = params.cu_seqlens_q
    kept = kept_packed_seq_params(params, kept_positions(), T)
    names = {field.name for field in dataclasses.fields(PackedSeqParams)} - NOT_PASSED_ON
    given = {name: getattr(kept, name) for name in names}
    query = torch.empty(kept_positions().size(1), 4, 8)
    bound = signature(TE_ATTENTION).bind(None, query, query, query, None, **given).arguments
    # As transformer_engine/pytorch/attention/dot_product_attention demands of "thd".
    for side in ("q", "kv"):
        offsets = bound[f"cu_seqlens_{side}"]
        assert offsets.dtype == torch.int32 and offsets.dim() == 1
        assert isinstance(bound[f"max_seqlen_{side}"], int)
        assert offsets.diff().max() <= bound[f"max_seqlen_{side}"]
        # By being the same tensor they say that nothing is padded.
        assert (bound[f"cu_seqlens_{side}_padded"] is offsets) == padded
    assert bound["cu_seqlens_q"].shape == bound["cu_seqlens_kv"].shape


def test_recomputation_under_fp8_is_megatrons(monkeypatch):
    """Its groups run through Transformer Engine's checkpoint, in which layers drop as always."""
    recompute = pytest.importorskip("megatron.core.recompute")  # Megatron 0.19 on
    from megatron.core import tensor_parallel
    from megatron.core.transformer import transformer_block

    def te_checkpoint(*args, **kwargs):
        bound = signature(CHECKPOINT).bind(*args, **kwargs)
        call = SimpleNamespace(**bound.arguments)
        assert not hasattr(call, "kwargs")
        checkpoints.append(call)
        distribute = call.distribute_saved_activations
        return tensor_parallel.checkpoint(call.forward_func, distribute, *call.args)

    def losses_and_gradients(model):
        model.zero_grad()
        loss = gpt.loss_of(model, gpt.document_mask())
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = losses_and_gradients(attached(gpt.build("rope")))
    options = {"recompute_granularity": "full", "recompute_method": "uniform"}
    model = attached(gpt.build("rope", recompute_num_layers=2, **options))
    model.config.fp8 = "hybrid"  # only now: a kept length that FP8 can take would drop nothing here
    for module in (recompute, transformer_block):
        monkeypatch.setattr(module, "get_fp8_context", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(recompute, "te_checkpoint", te_checkpoint)
    checkpoints: list[SimpleNamespace] = []
    ours = losses_and_gradients(model)
    assert len(checkpoints) == 3
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def test_signatures_of_the_golden_file_are_read():
    parameters = signature(ROTARY).parameters
    assert list(parameters)[:2] == ["t", "freqs"]
    assert parameters["t"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="missing a required argument: 'freqs'"):
        signature(ROTARY).bind(1, interleaved=True)
