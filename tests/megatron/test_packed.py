"""Packed sequences: documents laid end to end, on kept tokens."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_rltd import RandomLTD, RandomLTDConfig
from megatron_rltd.model.kept import KeptTokens
from megatron_rltd.model.layer import check_arguments, gather_angles
from megatron_rltd.model.packed import kept_packed_angles, kept_packed_seq_params
from megatron_rltd.patching import versions
from megatron_rltd.tokens import ops
from megatron_rltd.tokens.shards import positions_end_to_end
from tests import gpt, hybrid
from tests.megatron.test_latent_attention import LATENT, YARN
from tests.parallel import run

# Of three samples of 16 tokens; document_mask() has the same. One document has no token.
OFFSETS = [0, 5, 16, 16, 25, 32, 44, 48]
T = gpt.BATCH * gpt.SEQ


def packed(offsets=OFFSETS, **more):
    offsets = torch.tensor(offsets, dtype=torch.int32)
    longest = int(offsets.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **more,
    )


def kept_positions(kept=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(gpt.SEQ, generator=generator)[:kept].sort().values for _ in range(3)]
    return positions_end_to_end(torch.stack(rows).to(torch.int32)[None], gpt.BATCH, gpt.SEQ)[0]


def test_samples_are_laid_end_to_end():
    positions = torch.tensor([[[1, 4], [0, 3]]], dtype=torch.int32)
    assert positions_end_to_end(positions, 2, 5).tolist() == [[[1, 4, 5, 8]]]
    assert positions_end_to_end(positions[:, :1], 3, 5).tolist() == [[[1, 4, 6, 9, 11, 14]]]


@pytest.mark.parametrize("seed", range(5))
def test_documents_begin_where_their_kept_tokens_do(seed):
    positions = kept_positions(seed=seed)
    # Megatron 0.19 on; for the losses of routers, which are of samples.
    names = {field.name for field in dataclasses.fields(PackedSeqParams)}
    per_sample = {"tokens_per_sample": gpt.SEQ} if "tokens_per_sample" in names else {}
    got = kept_packed_seq_params(packed(**per_sample), positions, T)
    counts = [
        sum(start <= p < end for p in positions[0].tolist())
        for start, end in zip(OFFSETS, OFFSETS[1:], strict=False)
    ]
    assert 0 in counts
    assert got.cu_seqlens_q.diff().tolist() == counts
    assert got.cu_seqlens_q[0] == 0 and got.cu_seqlens_q[-1] == positions.size(1)
    assert got.cu_seqlens_kv.tolist() == got.cu_seqlens_q.tolist()
    assert got.cu_seqlens_q.dtype == torch.int32
    assert got.max_seqlen_q == 12
    assert not per_sample or got.tokens_per_sample == 6


def test_padding_between_documents_stays_padding():
    # Two documents of 5 and 3 tokens, each padded to 8.
    own, padded = (torch.tensor(o, dtype=torch.int32) for o in ([0, 5, 8], [0, 8, 16]))
    params = packed([0, 5, 8])
    params.cu_seqlens_q = params.cu_seqlens_kv = own
    params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = padded
    positions = torch.tensor([[0, 4, 6, 8, 9, 15]], dtype=torch.int32)
    got = kept_packed_seq_params(params, positions, 16)
    assert got.cu_seqlens_q_padded.tolist() == [0, 3, 6]
    assert got.cu_seqlens_q.tolist() == [0, 2, 4]  # of 0 4 | 6, and 8 9 | 15


def test_offsets_that_are_one_tensor_stay_one():
    """Transformer Engine sees by that, without waiting for the GPU, that nothing is padded."""
    params = packed()
    params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = params.cu_seqlens_q
    got = kept_packed_seq_params(params, kept_positions(), T)
    assert got.cu_seqlens_q_padded is got.cu_seqlens_q
    assert got.cu_seqlens_kv_padded is got.cu_seqlens_kv
    alone = kept_packed_seq_params(packed(), kept_positions(), T)
    assert torch.equal(got.cu_seqlens_q, alone.cu_seqlens_q)


def test_what_only_mamba_reads_is_left_out():
    names = {field.name for field in dataclasses.fields(PackedSeqParams)}
    if "seq_idx" not in names:
        pytest.skip("this Megatron's packed sequences know nothing of Mamba")
    params = packed(total_tokens=T)
    assert params.seq_idx is not None
    got = kept_packed_seq_params(params, kept_positions(), T)
    assert got.seq_idx is None and got.total_tokens is None


@pytest.mark.parametrize("rows", [12, T])
def test_angles_are_those_of_the_position_in_the_document(rows):
    angles, positions = torch.randn(rows, 1, 1, 4), kept_positions()
    got = kept_packed_angles(angles, packed(), positions, T)
    for row, position in zip(got, positions[0].tolist(), strict=True):
        start = 0 if rows == T else max(o for o in OFFSETS if o <= position)
        assert torch.equal(row, angles[position - start])


@pytest.mark.parametrize("rows", [12, T])
def test_angles_of_all_layers_at_once(rows):
    angles, sets = torch.randn(rows, 1, 1, 4), [kept_positions(seed=seed) for seed in (1, 2, 3)]
    kept = {n: KeptTokens(rows=i, local=i, positions=i, length=T) for n, i in enumerate(sets)}
    at_once = gather_angles(angles, kept, packed(), ops.find_library("auto"))
    for number, positions in enumerate(sets):
        alone = kept_packed_angles(angles, packed(), positions, T)
        assert torch.equal(at_once[number], alone)


@pytest.fixture(scope="module")
def megatron():
    with gpt.one_process():
        yield


def results(model, logits, labels):
    loss = gpt.cross_entropy(logits.reshape(labels.shape + (-1,)), labels)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["learned", "rope", "latent", "latent yarn"])
def test_packed_equals_masked(megatron, kind, recompute):
    """Documents behind a mask and documents packed are the same, and keep the same tokens."""
    options = {"recompute_granularity": "full", "recompute_method": "uniform"}
    options = {**options, "recompute_num_layers": 1} if recompute else {}
    options |= LATENT if "latent" in kind else {}
    options |= YARN if "yarn" in kind else {}
    model = gpt.build(None if kind == "learned" else "rope", **options)
    for module in model.modules():  # else angles of different positions differ by rounding
        for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name).double())
                type(module).forward.cache_clear()
    tokens, labels, positions = gpt.batch()
    random_ltd = RandomLTD(RandomLTDConfig(min_tokens=8, constant=True, increment=1, strata=2))
    random_ltd.attach(model)
    random_ltd.begin_step(0, 1000)
    random_ltd.begin_micro_batch(0)
    masked = results(model, model(tokens, positions, gpt.document_mask()), labels)
    flat = [x.reshape(1, -1) for x in (tokens, positions)]
    ours = results(model, model(*flat, None, packed_seq_params=packed()), labels)
    random_ltd.end_step()
    full = results(model, model(*flat, None, packed_seq_params=packed()), labels)
    assert abs(full[0] - masked[0]) > 1e-4, "dropping changed nothing"
    for a, b in zip(ours, masked, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max().clamp(min=1e-3)


@pytest.mark.skipif(versions.release() < (0, 18), reason="no HybridModel")
def test_recurrent_layers_do_not_drop_in_packed_sequences(megatron):
    model = hybrid.build("*-M-M-*-")
    config = RandomLTDConfig(min_tokens=8, constant=True, increment=1, recurrent_layers=True)
    random_ltd = RandomLTD(config).attach(model)
    random_ltd.begin_step(0, 0)
    random_ltd.begin_micro_batch(0)
    flat = [x.reshape(1, -1) for x in (gpt.batch()[0], gpt.batch()[2])]
    with pytest.raises(RuntimeError, match="packed sequences: omit --random-ltd-recurrent-layers"):
        model(*flat, None, packed_seq_params=packed())


def _packed_losses(tensor_parallel: int) -> list[float]:
    """Return the losses of two micro-batches on packed samples, under TP and SP."""
    from megatron_rltd.cpu import adapter

    adapter.enable()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = gpt.config(
        num_layers=4,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), 32, gpt.SEQ, position_embedding_type="rope"
    )
    random_ltd = RandomLTD(RandomLTDConfig(min_tokens=8, constant=True, increment=4, strata=4))
    random_ltd.attach(model.train())
    tokens, labels, positions = (x.reshape(1, -1) for x in gpt.batch())
    losses = []
    for micro_batch in range(2):
        random_ltd.begin_step(0, 0)
        random_ltd.begin_micro_batch(micro_batch)
        loss = model(tokens, positions, None, labels=labels, packed_seq_params=packed()).mean()
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def test_sequence_parallel_ranks_share_packed_samples():
    (alone,) = run(1, _packed_losses, 1)
    shared = run(2, _packed_losses, 2)
    assert shared[0] == pytest.approx(alone, rel=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-5, "the second micro-batch kept the same tokens"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"qkv_format": "sbhd"}, {}, "in the format sbhd, only in thd"),
        ({}, {"context_parallel_size": 2}, "and context parallelism"),
        ({}, {"apply_rope_fusion": True}, "--no-rope-fusion"),
    ],
)
def test_what_cannot_be_packed(change, options, message):
    params = packed()
    for name, value in change.items():
        setattr(params, name, value)
    config = SimpleNamespace(**{"context_parallel_size": 1, "apply_rope_fusion": False, **options})
    with pytest.raises(RuntimeError, match=message):
        check_arguments({"packed_seq_params": params, "rotary_pos_emb": torch.ones(1)}, config)
    check_arguments({"packed_seq_params": None}, config)
