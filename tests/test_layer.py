import pytest
import torch

from megatron_rltd.layer import (
    KeptTokens,
    fused_rotary,
    kept_angles,
    kept_mask,
    kept_padding,
    subsample,
)

S, B = 8, 3
INDICES = torch.tensor([[0, 3, 5], [1, 2, 7], [4, 5, 6]], dtype=torch.int32)
KEPT = KeptTokens(rows=INDICES, local=INDICES, positions=INDICES, length=S)


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
    got = kept_mask(mask, KEPT)
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
    got = kept_mask(mask, kept)
    assert torch.equal(got[0, 0], mask[0, 0][[0, 3]][:, [0, 2, 5, 7]])


def test_padding_mask():
    mask = torch.rand(B, S) < 0.5
    got = kept_padding(mask, KEPT)
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
    got = subsample(arguments, KEPT)
    assert torch.equal(got["rotary_pos_emb"][0], kept_angles(angles, INDICES))
    assert got["rotary_pos_emb"][1] is None
    assert torch.equal(got["attention_mask"], kept_mask(mask, KEPT))
    assert got["sequence_len_offset"] == 3
    assert arguments["attention_mask"] is mask


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
