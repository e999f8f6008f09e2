from types import SimpleNamespace

import pytest
import torch

from megatron_rltd.model.block import LayerPlan, plan_angles
from megatron_rltd.model.kept import KeptTokens
from megatron_rltd.model.layer import (
    fused_rotary,
    gather_angles,
    kept_mask,
    kept_padding,
    run_layer,
    subsample,
)
from megatron_rltd.tokens import ops

S, B = 8, 3
INDICES = torch.tensor([[0, 3, 5], [1, 2, 7], [4, 5, 6]], dtype=torch.int32)
KEPT = KeptTokens(rows=INDICES, local=INDICES, positions=INDICES, length=S)
LIBRARY = ops.find_library("auto")


def kept_angles(angles, local):
    """Return the angles of one layer."""
    return gather_angles(angles, {5: KeptTokens(local, local, local, S)}, None, LIBRARY)[5]


def test_angles_are_those_of_the_true_positions():
    angles = torch.randn(S, 1, 1, 4)
    got = kept_angles(angles, INDICES)
    assert got.shape == (3, B, 1, 4)
    for i in range(3):
        for j in range(B):
            assert torch.equal(got[i, j, 0], angles[INDICES[j, i], 0, 0])


def test_angles_that_differ_between_samples():
    angles = torch.randn(S, B, 1, 4)
    got = kept_angles(angles, INDICES)
    for i in range(3):
        for j in range(B):
            assert torch.equal(got[i, j, 0], angles[INDICES[j, i], j, 0])


def test_angles_of_shared_indices_stay_shared():
    angles = torch.randn(S, 1, 1, 4)
    got = kept_angles(angles, INDICES[:1])
    assert torch.equal(got, angles[[0, 3, 5]])


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("queries", [1, S])
def test_masks_lose_rows_and_columns(batch, queries):
    mask = torch.rand(batch, 1, queries, S) < 0.5
    got = kept_mask(mask, KEPT, LIBRARY)
    for j in range(B):
        full = mask[j if batch > 1 else 0, 0]
        index = INDICES[j].long()
        expected = full[index][:, index] if queries > 1 else full[:, index]
        assert torch.equal(got[j, 0], expected)


def test_mask_rows_are_local_and_columns_global_under_context_parallelism():
    # Rank 0 of 2 holds chunks 0 and 3 of four: positions 0, 1, 6, 7.
    mask = torch.rand(1, 1, 4, S) < 0.5
    kept = KeptTokens(
        rows=torch.tensor([[0, 3]]),
        local=torch.tensor([[0, 3]], dtype=torch.int32),
        positions=torch.tensor([[0, 2, 5, 7]], dtype=torch.int32),
        length=S,
    )
    got = kept_mask(mask, kept, LIBRARY)
    assert torch.equal(got[0, 0], mask[0, 0][[0, 3]][:, [0, 2, 5, 7]])


def test_padding_mask():
    mask = torch.rand(B, S) < 0.5
    got = kept_padding(mask, KEPT, LIBRARY)
    for j in range(B):
        assert torch.equal(got[j], mask[j, INDICES[j].long()])


def test_subsample_touches_what_depends_on_positions_only():
    angles, mask = torch.randn(S, 1, 1, 4), torch.rand(1, 1, S, S) < 0.5
    arguments = {
        "attention_mask": mask,
        "rotary_pos_emb": (angles, None),
        "inference_context": None,
        "sequence_len_offset": 3,
        "packed_seq_params": None,
    }
    got = subsample(arguments, KEPT, LIBRARY)
    assert torch.equal(got["rotary_pos_emb"][0], kept_angles(angles, INDICES))
    assert got["rotary_pos_emb"][1] is None
    assert torch.equal(got["attention_mask"], kept_mask(mask, KEPT, LIBRARY))
    assert got["sequence_len_offset"] == 3
    assert arguments["attention_mask"] is mask


def layers_kept(positions=INDICES):
    """Return what three layers keep, of which the second keeps other tokens."""
    other = torch.flip(S - 1 - positions, dims=[1])
    sets = {3: positions, 4: other, 7: positions}
    return {n: KeptTokens(rows=i, local=i, positions=i, length=S) for n, i in sets.items()}


@pytest.mark.parametrize("local", [INDICES, INDICES[:1]], ids=["own", "shared"])
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_of_all_layers_at_once(local, batch, dtype):
    angles, kept = torch.randn(S, batch, 1, 4).to(dtype), layers_kept(local)
    at_once = gather_angles(angles, kept, None, LIBRARY)
    assert at_once.keys() == kept.keys()
    for number, layer in kept.items():
        alone = subsample({"rotary_pos_emb": angles}, layer, LIBRARY)["rotary_pos_emb"]
        assert torch.equal(at_once[number], alone)
        assert at_once[number].is_contiguous(), "the fused kernel would copy it"
        given = subsample({"rotary_pos_emb": angles}, layer, LIBRARY, at_once[number])
        assert given["rotary_pos_emb"] is at_once[number]
    assert not torch.equal(at_once[3], at_once[4])


def test_angles_in_tuples_at_once():
    first, second, kept = torch.randn(S, 1, 1, 4), torch.randn(S, 1, 1, 2), layers_kept()
    for rotary in [(first, second), (first, None), [first, first]]:
        at_once = gather_angles(rotary, kept, None, LIBRARY)
        for number, layer in kept.items():
            alone = subsample({"rotary_pos_emb": rotary}, layer, LIBRARY)["rotary_pos_emb"]
            for ours, theirs in zip(at_once[number], alone, strict=True):
                assert ours is theirs is None or torch.equal(ours, theirs)


def test_a_layer_that_is_given_other_angles_than_its_block_uses_those():
    kept, hidden = layers_kept(), torch.randn(S, B, 2)
    of_block, others = torch.randn(S, 1, 1, 4), torch.randn(S, 1, 1, 4)
    layer = SimpleNamespace(layer_number=4)
    for rotary in (of_block, others, None):
        plan = LayerPlan(None, kept, frozenset(kept), frozenset(), LIBRARY)
        plan.rotary, plan.angles = of_block, gather_angles(of_block, kept, None, LIBRARY)
        _, got = run_layer(
            layer,
            lambda hidden_states, rotary_pos_emb, **kwargs: (hidden_states, rotary_pos_emb),
            hidden_states=hidden,
            rotary_pos_emb=rotary,
            packed_seq_params=plan,
        )
        if rotary is None:
            assert got is None
        else:
            assert torch.equal(got, kept_angles(rotary, kept[4].local))
        assert (got is plan.angles[4]) == (rotary is of_block)


@pytest.mark.parametrize(
    ("width", "recomputed", "at_once"),
    # 3 of 8 tokens of 3 samples are kept: angles of 4 float32 against 5 rows of hidden states.
    [(1, False, True), (2, True, False), (3, True, True), (5, True, True)],
)
def test_angles_kept_for_recomputation_need_no_more_memory_than_a_dense_step(
    width, recomputed, at_once
):
    hidden = torch.empty(S, B, width, dtype=torch.float32)
    angles = torch.empty(S, 1, 1, 4)
    assert plan_angles(angles, layers_kept(), hidden, recomputed) == at_once
    assert plan_angles((angles, angles), layers_kept(), hidden, recomputed) == at_once
    other = torch.empty(S, 1, 1, 4)
    twice = plan_angles((angles, other), layers_kept(), hidden, recomputed)
    assert twice == (at_once and (not recomputed or width == 5))
    assert not plan_angles(None, layers_kept(), hidden, recomputed)
    assert not plan_angles((None, None), layers_kept(), hidden, recomputed)


def strict_kernel(t, freqs, interleaved=False):
    """Transformer Engine's rotary kernel: its shape rules, with the arithmetic of plain torch.

    Source: ``transformer_engine/pytorch/csrc/extensions/apply_rope.cpp`` (2.20).
    """
    assert freqs.dim() == 4 and freqs.size(1) == 1 and freqs.size(2) == 1
    assert freqs.dtype == torch.float32
    assert t.dim() == 4 and t.size(0) <= freqs.size(0) and freqs.size(3) <= t.size(3)
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(t, freqs[: t.size(0)], rotary_interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_fused_kernel_gets_one_row_for_each_sample(interleaved, width):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    # As Megatron makes queries: a view into the product of the QKV projection.
    qkv = torch.randn(3, B, 2, 24, requires_grad=True)
    t, freqs = qkv[..., :8], torch.randn(3, B, 1, width)
    got = fused_rotary(strict_kernel, t, freqs, interleaved=interleaved)
    expected = _apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)
    assert torch.equal(got, expected)
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad(got, qkv, upstream, retain_graph=True)[0]
    assert torch.equal(ours, torch.autograd.grad(expected, qkv, upstream)[0])
    shared = torch.randn(3, 1, 1, width)
    assert torch.equal(
        fused_rotary(strict_kernel, t, shared, interleaved=interleaved),
        strict_kernel(t, shared, interleaved),
    )
    with pytest.raises(AssertionError):
        strict_kernel(t, freqs)
